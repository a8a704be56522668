"""A run folder while a process trains into it: its lock, its config, its records, its result."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, NonNegativeFloat, NonNegativeInt, ValidationError

from zoo.core import yaml_text
from zoo.core.errors import RunError, UsageError
from zoo.core.files import open_own, set_aside, sync_folder, write_atomic, writing
from zoo.core.readers import read_bytes
from zoo.core.run_files import (
    CHECKPOINTS,
    CONFIG,
    EVENTS,
    IMPORTED,
    INIT,
    LOCK,
    METRICS,
    RESULT,
    SOLVING,
    TRACKING,
    at_key,
    changes,
    differing,
    parse_record,
    read_metrics,
    read_result,
    read_whole_config,
)
from zoo.objectives.base import objectives
from zoo.training import checkpoints, extending
from zoo.training.events import Events
from zoo.training.options import completed
from zoo.training.result import ENDED
from zoo.training.train_options import BOOKKEEPING

_TRASH = ".deleted.{}.tmp"
_OWN = (CONFIG, METRICS, RESULT, SOLVING, INIT, IMPORTED, TRACKING)
_LEFTOVER = re.compile(rf"\.({'|'.join(map(re.escape, (*_OWN, 'deleted')))})\.[0-9a-f]{{8}}\.tmp")


class RunFolder:
    """One process's hold on a run folder; use as a context manager."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.checkpoints = self.path / CHECKPOINTS
        self._lock = FileLock(self.path / LOCK)
        self._metrics: Any = None
        self._events: Any = None
        self._identity: tuple[int, int] | None = None

    def __enter__(self) -> RunFolder:
        if self.path.exists() and not self.path.is_dir():
            raise UsageError(f"out={self.path} is a file; a run needs a folder.")
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            if (self.path / LOCK).is_symlink():  # the lock is this folder's, not what a link leads to
                (self.path / LOCK).unlink()
            try:
                self._lock.acquire(timeout=0)
            except Timeout:
                told = "wait for it to end, or choose another folder with out=..."
                raise UsageError(f"The run folder {self.path} is in use by another process: {told}") from None
            self._identity = self._here()
            for path in self.path.iterdir():
                if _LEFTOVER.fullmatch(path.name):  # of a process that was killed
                    _remove(path)
        return self

    def __exit__(self, *error: object) -> None:
        for file in (self._metrics, self._events):
            if file is not None:
                with contextlib.suppress(OSError):  # a full disk has been told of already
                    file.close()
        self._lock.release()

    def _here(self) -> tuple[int, int]:
        found = os.stat(self.path)
        return found.st_dev, found.st_ino

    def check(self) -> None:
        """Raises RunError if the folder is no longer where it was: a second one would hold the rest of the run."""
        with contextlib.suppress(OSError):
            if self._here() == self._identity:
                return
        told = "it was renamed or deleted while the run wrote to it. Where it was renamed, go on with: zoo train FOLDER"
        raise RunError(f"The run folder {self.path} is gone: {told}.")

    # ---- config

    def open(self, config: Mapping[str, Any], *, fresh: bool = False) -> dict[str, list[Any]]:
        """Enter the config, or check it against the one that is there.

        Returns:
            The keys by which a run that goes on is extended, each with its old and its new value.

        Raises:
            UsageError: the folder holds another experiment, or something that is no run.
        """
        if fresh:
            self._clear()
        path = self.path / CONFIG
        begun = bool(checkpoints.steps(self.checkpoints))
        trained = checkpoints.config_of(self.checkpoints) if begun else None
        if not path.exists() and self._foreign():
            raise UsageError(f"{self.path} is not empty and holds no {CONFIG}: choose another folder with out=...")
        if trained is None and begun and path.exists():  # of a version that did not keep the config with the weights
            trained = read_whole_config(self.path)
        changed = {} if trained is None else self._compare(trained, config)
        if not begun:  # of an attempt that came to nothing
            (self.path / RESULT).unlink(missing_ok=True)
        write_atomic(path, yaml_text.dump(dict(config)).encode())
        return changed

    def _compare(self, old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, list[Any]]:
        """Refuse to continue with a config other than the run's; return what extends it."""
        old = completed(old)
        differ = [k for k in differing(old, new) if k not in BOOKKEEPING]
        keys = [k for k in differ if not extending.extends(k)]
        if not keys:
            if differ:
                done = max(checkpoints.steps(self.checkpoints))
                result = self.result(lambda line: None) or {}
                metric = objectives[new["objective"]["name"]].metric
                extending.check(self.path, old["train"], new["train"], done, result, metric)
            return {k: [at_key(old, k), at_key(new, k)] for k in differ}
        edited = False
        with contextlib.suppress(UsageError):
            edited = not differing(read_whole_config(self.path), new)
        if edited:
            told = changes(old, new, keys, "when it was trained")
            fix = "change it back, choose another folder with out=..., or start over with --fresh"
            raise UsageError(f"{self.path / CONFIG} was edited after its run had begun: {told}: {fix}.")
        told = changes(old, new, keys, "there")
        fix = f"give them as before, train in another folder with out=... init={self.path}, or start over with --fresh"
        raise UsageError(f"{self.path} holds a run with a different {told}: {fix}.")

    def _foreign(self) -> bool:
        names = [p.name for p in self.path.iterdir()]
        return any(name not in (METRICS, CHECKPOINTS) and not name.startswith((EVENTS, ".")) for name in names)

    def _clear(self) -> None:
        """Delete the run, whole: what cannot be deleted is found out before anything is."""
        if not (self.path / CONFIG).exists() and self._foreign():
            raise UsageError(f"{self.path} holds no {CONFIG}, so it is not a run that --fresh could start over.")
        with writing(self.path):
            own = [self.path / name for name in _OWN]
            own += [path for path in self.path.iterdir() if path.name.startswith(EVENTS)]
            kept = checkpoints.belongings(self.checkpoints)  # through a link, should it be one, which stays
        trash = self.path / _TRASH.format(secrets.token_hex(4))
        below: Path | None = None
        if kept:
            below = self.checkpoints / f".step_0.{secrets.token_hex(4)}.tmp"
            set_aside(kept, below)
        try:
            set_aside([path for path in own if os.path.lexists(path)], trash)
        except RunError:
            if below is not None:
                for path in below.iterdir():
                    path.rename(self.checkpoints / path.name)
                below.rmdir()
            raise
        for place in (below, trash):
            if place is not None:
                _remove(place)

    # ---- records

    def start_records(self, size: int, say: Callable[[str], None]) -> None:
        """Cut metrics.jsonl to its first `size` bytes, those of the checkpoint that is resumed, and continue there.

        Lines that are no longer there, or are damaged, are missed aloud and left out: no weight depends on them.
        """
        path = self.path / METRICS
        with writing(path):
            try:
                there = read_bytes(path) if path.exists() else b""
            except UsageError as error:
                raise RunError(f"{error} Move it away, and the run goes on without its records.") from None
            found = there[:size]
            lines = [line for line in found.split(b"\n") if line]
            whole = [line for line in lines if _record(line) is not None]
            if len(found) < size or len(whole) < len(lines):
                lost = f"{len(found):,} of {size:,} bytes are there, {len(lines) - len(whole)} damaged lines"
                say(f"{path} is not as the checkpoint left it ({lost}): the run goes on without the lost records.")
            kept = b"".join(line + b"\n" for line in whole)
            if path.is_symlink() or there != kept or (there and path.stat().st_nlink > 1):
                write_atomic(path, kept)  # a file of its own, whatever a link led to
            self._metrics = open_own(path, keep=True)
        self._events = Events(self.path, [json.loads(line) for line in whole], say)

    def record(self, line: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl and to the TensorBoard events."""
        self.check()
        with writing(self.path / METRICS):
            self._metrics.write(json.dumps(line).encode() + b"\n")
            self._metrics.flush()
            self._events.add(line)

    def records_size(self) -> int:
        """Bytes of metrics.jsonl, which are now on the disk."""
        with writing(self.path / METRICS):
            os.fsync(self._metrics.fileno())
            self._events.flush()
            return os.fstat(self._metrics.fileno()).st_size

    def training_rate(self) -> float | None:
        """Median tokens per second of the training lines."""
        lines = [line.get("tokens_per_second") for line in read_metrics(self.path) if line.get("split") == "train"]
        rates = [rate for rate in lines if isinstance(rate, int | float)]
        return statistics.median(rates) if rates else None

    def write_init(self, data: Mapping[str, Any]) -> None:
        """Write what became of the weights that the run starts from."""
        write_atomic(self.path / INIT, json.dumps(data, indent=1).encode() + b"\n")

    # ---- result

    def result(self, say: Callable[[str], None]) -> dict[str, Any] | None:
        """What result.json holds, if it is one."""
        if not (self.path / RESULT).exists():
            return None
        try:
            data = read_result(self.path)
            _Result.model_validate(data)
            if data["status"] in ENDED:
                _Ended.model_validate(data)
        except (UsageError, ValidationError):
            say(f"{self.path / RESULT} is damaged: it is written anew.")
            return None
        return data

    def write_result(self, result: Mapping[str, Any]) -> None:
        self.check()
        write_atomic(self.path / RESULT, json.dumps(result, indent=1).encode() + b"\n")


class _Right(BaseModel):
    accuracy: float
    exact: float


class _Near(BaseModel):
    mse: float
    mse_ratio: float


class _Result(BaseModel):
    """What any result.json says."""

    model_config = ConfigDict(strict=True)

    status: str | None
    steps: NonNegativeInt
    seconds: NonNegativeFloat


class _Ended(BaseModel):
    """What that of a run that has ended says besides."""

    validation: _Right | _Near
    test: _Right | _Near


def _record(line: bytes) -> dict[str, Any] | None:
    """A line of metrics.jsonl, if it is one that a run wrote."""
    record = parse_record(line)
    if isinstance(record, str) or not isinstance(record.get("split"), str):
        return None
    numbers = [value for value in record.values() if isinstance(value, int)]
    if not isinstance(record.get("step"), int) or not isinstance(record.get("seconds"), int | float):
        return None
    return record if all(abs(number) < 2**63 for number in numbers) else None


def _remove(path: Path) -> None:
    """Delete a file, or a folder with all that is in it.

    Raises:
        RunError: the file system refuses.
    """
    with writing(path):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        sync_folder(path.parent)


__all__ = ["RunFolder"]
