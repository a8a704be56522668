"""What trackers have in common: the package that each needs, and the id under which a run folder is known to it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

from zoo.core.errors import UsageError, UsageWarning
from zoo.core.files import write_atomic
from zoo.core.readers import read_json
from zoo.core.run_files import TRACKING
from zoo.training.callbacks import Callback

_MOST_BYTES = 2**16


class Tracker(Callback):
    """A callback for one tracker.

    Raises:
        UsageError: its package is not installed.
    """

    package: ClassVar[str]
    """The package that it needs, and the extra that brings it."""
    entry: ClassVar[str]
    """A name that only the package has, and no folder of the same name."""

    def __init__(self) -> None:
        try:
            self.library: Any = import_module(self.package)
        except ImportError:
            self.library = None
        if not hasattr(self.library, self.entry):  # a folder `wandb/` of earlier runs is imported as an empty package
            told = f"pip install 'sequence-zoo[{self.package}]'"
            raise UsageError(f"{type(self).__name__} needs the package {self.package}: {told}.")

    def known_as(self, folder: str) -> str | None:
        """The id under which the tracker knows a run folder, if it does."""
        path = Path(folder, TRACKING)
        if not path.exists():
            return None
        try:
            known = read_json(path, most=_MOST_BYTES)
            found = known[self.package] if isinstance(known, dict) and self.package in known else None
        except UsageError as error:
            warnings.warn(f"{error} {type(self).__name__} starts a new run.", UsageWarning, stacklevel=2)
            return None
        return found if isinstance(found, str) else None

    def remember(self, folder: str, run_id: str) -> None:
        """Note in a run folder the id under which the tracker knows it."""
        path, known = Path(folder, TRACKING), {}
        if path.exists():
            try:
                found = read_json(path, most=_MOST_BYTES)
                known = found if isinstance(found, dict) else {}
            except UsageError:
                pass  # warned of as it was read
        write_atomic(path, json.dumps({**known, self.package: run_id}, indent=1).encode() + b"\n")


def figures(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a record under `split/name`, as TensorBoard has them."""
    left_out = ("step", "split")
    numbers = {k: v for k, v in record.items() if k not in left_out and isinstance(v, int | float)}
    return {f"{record['split']}/{k}": v for k, v in numbers.items()}


def outcome(result: Mapping[str, Any]) -> dict[str, Any]:
    """What stands of a result beside its records: how the run ended, its costs, and the scores of the best weights."""
    names = ("status", "steps", "best_step", "tokens", "seconds", "n_parameters", "state_bytes", "flops_per_token")
    scores = {
        f"{split}/best_{key}" if split == "validation" else f"{split}/{key}": value
        for split in ("validation", "test")
        for key, value in (result.get(split) or {}).items()
        if isinstance(value, int | float)
    }
    return {name: result[name] for name in names if result.get(name) is not None} | scores


__all__ = ["Tracker", "figures", "outcome"]
