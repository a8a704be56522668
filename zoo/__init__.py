"""A zoo of sequence models: one interface, many ways to mix a sequence."""

import os
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# How long a CPU thread that waits for the others keeps its core busy; read when torch is first imported. By libgomp's
# default a training step takes 25 times as long where another program keeps one of two cores, with this twice as long.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")
# Large tensors in large pages, where the system lends them on request: the first touch of a fresh tensor costs less.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

for _link in ("tasks", "benchmarks"):
    if (Path(__file__).parent / _link).is_file():
        raise ImportError(
            f"zoo/{_link} should be a link to ../{_link}, but in this checkout it is a text file: "
            "pip install sequence-zoo, or clone again with git clone -c core.symlinks=true."
        )

if TYPE_CHECKING:
    from zoo.core.errors import RunError, UsageError
    from zoo.interop.hf import from_hf, to_hf
    from zoo.models.config import ModelConfig
    from zoo.models.create import create_backbone, create_model, list_models
    from zoo.models.swap import swap
    from zoo.objectives import list_objectives
    from zoo.pattern import create_mixer, list_mixers
    from zoo.protocol import Context, Mixer, Place, State, register
    from zoo.states import canonical, fork, join, select
    from zoo.sweeps.sweep import sweep
    from zoo.training.callbacks import Callback
    from zoo.training.estimate import estimate
    from zoo.training.loading import load
    from zoo.training.saving import save
    from zoo.training.train import train

# Names are imported when they are first used: torch alone takes two seconds, and `zoo.tasks` needs no model.
_LATER = {
    **dict.fromkeys(("RunError", "UsageError"), "zoo.core.errors"),
    **dict.fromkeys(("Context", "Mixer", "Place", "register"), "zoo.protocol"),
    **dict.fromkeys(("State", "canonical", "fork", "join", "select"), "zoo.states"),
    **dict.fromkeys(("create_mixer", "list_mixers"), "zoo.pattern"),
    "ModelConfig": "zoo.models.config",
    **dict.fromkeys(("create_backbone", "create_model", "list_models"), "zoo.models.create"),
    "swap": "zoo.models.swap",
    **dict.fromkeys(("from_hf", "to_hf"), "zoo.interop.hf"),
    "list_objectives": "zoo.objectives",
    "Callback": "zoo.training.callbacks",
    "load": "zoo.training.loading",
    "save": "zoo.training.saving",
    "sweep": "zoo.sweeps.sweep",
    "estimate": "zoo.training.estimate",
    "train": "zoo.training.train",
}
_PACKAGES = ("benchmarks", "core", "laws", "models", "objectives", "ops", "report", "sweeps", "tasks", "training")

__all__ = [
    "Callback",
    "Context",
    "Mixer",
    "ModelConfig",
    "Place",
    "RunError",
    "State",
    "UsageError",
    "canonical",
    "create_backbone",
    "create_mixer",
    "create_model",
    "estimate",
    "fork",
    "from_hf",
    "join",
    "list_mixers",
    "list_models",
    "list_objectives",
    "load",
    "register",
    "save",
    "select",
    "swap",
    "sweep",
    "to_hf",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return import_module(f"zoo.{name}")
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(_LATER[name]), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER, *_PACKAGES})
