"""The folder of a sweep while one process runs it: its lock, and the plain description that is enough to go on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

import zoo
from zoo.core import yaml_text
from zoo.core.errors import UsageError, quoted
from zoo.core.files import write_atomic, writing
from zoo.core.run_files import is_run
from zoo.sweeps.config import SweepConfig
from zoo.sweeps.store import STORE, SWEEP, Store, read_sweep

LOCK, TRIALS = "sweep.lock", "trials"
FREE = ("name", "out", "budget", "retries", "workers")
"""Options that may change between the parts of a sweep: none of them changes a trial."""


class SweepFolder:
    """One process's hold on the folder of a sweep; use as a context manager."""

    def __init__(self, path: Path):
        self.path, self.store = path, Store(path)
        self._lock = FileLock(path / LOCK)

    def __enter__(self) -> SweepFolder:
        if self.path.exists() and not self.path.is_dir():
            raise UsageError(f"out={self.path} is a file; a sweep needs a folder.")
        if is_run(self.path):
            raise UsageError(f"{self.path} is a run folder: choose another folder with --out.")
        with writing(self.path):
            if self.path.is_dir() and not (self.path / SWEEP).exists():
                others = [p.name for p in self.path.iterdir() if p.name not in (LOCK, STORE, TRIALS)]
                if others:
                    told = f"{self.path} is not empty and holds no {SWEEP}"
                    raise UsageError(f"{told}: choose another folder with --out.")
            self.path.mkdir(parents=True, exist_ok=True)
            if (self.path / LOCK).is_symlink():
                (self.path / LOCK).unlink()
            try:
                self._lock.acquire(timeout=0)
            except Timeout:
                told = "wait for it to end, or choose another folder with --out"
                raise UsageError(f"The sweep {self.path} is run by another process: {told}.") from None
        return self

    def __exit__(self, *error: object) -> None:
        self._lock.release()

    def open(self, config: SweepConfig, trials: int) -> None:
        """Enter the sweep, or check it against the one that is there.

        Raises:
            UsageError: the folder holds another sweep.
        """
        data: dict[str, Any] = config.model_dump(mode="json")
        data = {k: v for k, v in data.items() if v is not None and k != "out"}
        searched = config.search.given()
        data["search"] = {"name": config.search.name} | {k: data["search"][k] for k in searched}
        path = self.path / SWEEP
        if path.exists():
            old = read_sweep(self.path)
            known = [k for k in SweepConfig.model_fields if k not in FREE]
            before, now = (_leaves({k: each.get(k) for k in known}) for each in (old, data))
            keys = [k for k in {**before, **now} if before.get(k) != now.get(k)]
            if keys:
                told = ", ".join(f"{k} ({_shown(before, k)} there, {_shown(now, k)} now)" for k in keys[:3])
                more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
                fix = "give all as before, or choose another folder with --out"
                raise UsageError(f"{self.path} holds a sweep with another {told}{more}: {fix}.")
        data |= {"trials": trials, "zoo_version": zoo.__version__}
        write_atomic(path, yaml_text.dump(data).encode())

    def trial(self, name: str) -> Path:
        return self.path / TRIALS / name


def _leaves(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of nested mappings by their dotted keys."""
    found: dict[str, Any] = {}
    for key, value in data.items():
        name = f"{prefix}{key}"
        found |= _leaves(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return found


def _shown(leaves: Mapping[str, Any], key: str) -> str:
    return quoted(leaves[key], 60) if leaves.get(key) is not None else "not given"


__all__ = ["FREE", "SweepFolder"]
