"""A zoo of sequence models: one interface, many ways to mix a sequence."""

import os
from typing import TYPE_CHECKING, Any

# Read when torch is first imported. Threads that spin at their barriers stand still whenever another program takes one
# of their cores (25 times slower on two cores, one of them busy); sleeping ones cost a tenth on an idle machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from tasks.registry import UsageError
from zoo.models.token import ModelConfig, create_model, list_models, swap
from zoo.protocol import Context, Mixer, Place, State, canonical, fork, join, select
from zoo.registry import create_mixer, list_mixers, register

if TYPE_CHECKING:
    from zoo.objectives import list_objectives
    from zoo.training.loop import train
    from zoo.training.run import load

_LATER = {"train": "zoo.training.loop", "load": "zoo.training.run", "list_objectives": "zoo.objectives"}


def __getattr__(name: str) -> Any:
    """Names whose modules take long to import, imported when first used."""
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LATER[name]), name)


__all__ = [
    "Context",
    "Mixer",
    "ModelConfig",
    "Place",
    "State",
    "UsageError",
    "canonical",
    "create_mixer",
    "create_model",
    "fork",
    "join",
    "list_mixers",
    "list_models",
    "list_objectives",
    "load",
    "register",
    "select",
    "swap",
    "train",
]
