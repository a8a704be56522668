"""A run folder: its lock, its config, its records, its result.

config.yaml        every option, defaults spelt out
metrics.jsonl      a line per training report and evaluation
result.json        what `zoo compare` reads
imports.json       the files of the user's own that it needs: see `zoo.training.imports`
solving.json       an example while it is solved, where that takes steps: see `zoo.training.solving`
events.out.*       the same records for TensorBoard
checkpoints/       see `zoo.training.checkpoint`
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import statistics
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, NonNegativeFloat, NonNegativeInt, ValidationError

from zoo.core import yaml_text
from zoo.core.errors import RunError, UsageError, quoted
from zoo.core.files import open_own, set_aside, sync_folder, write_atomic, writing
from zoo.core.readers import at_line, check_path, read_bytes, read_json
from zoo.models.token import TokenModel, create_model
from zoo.training import checkpoint, imports
from zoo.training.experiment import BOOKKEEPING, CONFIG, differing, no_run
from zoo.training.randomness import kept_random_state

METRICS, RESULT, SOLVING = "metrics.jsonl", "result.json", "solving.json"
LOCK, EVENTS = ".lock", "events.out.tfevents.zoo"
ENDED = ("finished", "target", "time_budget")
NOT_SCALARS = ("step", "split", "seconds")
_TRASH = ".deleted.{}.tmp"
_LEFTOVER = re.compile(
    r"\.(config\.yaml|metrics\.jsonl|result\.json|solving\.json|imports\.json|deleted)\.[0-9a-f]{8}\.tmp"
)


class RunFolder:
    """One process's hold on a run folder; use as a context manager."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
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

    def open(self, config: Mapping[str, Any], *, fresh: bool = False) -> None:
        """Enter the config, or check it against the one that is there.

        Raises:
            UsageError: the folder holds another experiment, or something that is no run.
        """
        if fresh:
            self._clear()
        path = self.path / CONFIG
        begun = bool(checkpoint.steps(self.checkpoints))
        trained = checkpoint.config_of(self.checkpoints) if begun else None
        if not path.exists() and self._foreign():
            raise UsageError(f"{self.path} is not empty and holds no {CONFIG}: choose another folder with out=...")
        if trained is not None:
            self._compare(trained, config)
        elif begun and path.exists():  # of a version that did not keep the config with the weights
            self._compare(read_config(self.path), config)
        if not begun:  # of an attempt that came to nothing
            (self.path / RESULT).unlink(missing_ok=True)
        write_atomic(path, yaml_text.dump(dict(config)).encode())

    def _compare(self, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
        """Refuses to go on with a config that is not the run's own."""
        keys = [k for k in differing(old, new) if k not in BOOKKEEPING]
        if not keys:
            return
        edited = False
        with contextlib.suppress(UsageError):
            edited = not differing(read_config(self.path), new)
        if edited:
            told = _changes(old, new, keys, "when it was trained")
            fix = "change it back, choose another folder with out=..., or start over with --fresh"
            raise UsageError(f"{self.path / CONFIG} was edited after its run had begun: {told}: {fix}.")
        told = _changes(old, new, keys, "there")
        fix = "give them as before, choose another folder with out=..., or start over with --fresh"
        raise UsageError(f"{self.path} holds a run with a different {told}: {fix}.")

    def _foreign(self) -> bool:
        return any(p.name not in (METRICS, EVENTS, "checkpoints") and p.name[0] != "." for p in self.path.iterdir())

    def _clear(self) -> None:
        """Delete the run, whole: what cannot be deleted is found out before anything is."""
        if not (self.path / CONFIG).exists() and self._foreign():
            raise UsageError(f"{self.path} holds no {CONFIG}, so it is not a run that --fresh could start over.")
        with writing(self.path):
            own = [self.path / name for name in (CONFIG, METRICS, RESULT, SOLVING, EVENTS, imports.IMPORTED)]
            kept = checkpoint.belongings(self.checkpoints)  # through a link, should it be one, which stays
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
        self._events = EventFile(self.path / EVENTS)
        for line in whole:
            self._events.add(json.loads(line))

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
        lines = [line.get("tokens_per_second") for line in read_metrics(self.path) if line["split"] == "train"]
        rates = [rate for rate in lines if isinstance(rate, int | float)]
        return statistics.median(rates) if rates else None

    # ---- result

    def result(self, say: Callable[[str], None]) -> dict[str, Any] | None:
        """What result.json holds, if it is one."""
        path = self.path / RESULT
        if not path.exists():
            return None
        try:
            data = read_json(path)
            _Result.model_validate(data)
            if data["status"] in ENDED:
                _Ended.model_validate(data)
        except (UsageError, ValidationError):
            say(f"{path} is damaged: it is written anew.")
            return None
        return data

    def write_result(self, result: Mapping[str, Any]) -> None:
        self.check()
        write_atomic(self.path / RESULT, json.dumps(result, indent=1).encode() + b"\n")


class _Figures(BaseModel):
    accuracy: float
    exact: float


class _Result(BaseModel):
    """What any result.json says."""

    model_config = ConfigDict(strict=True)

    status: str | None
    steps: NonNegativeInt
    seconds: NonNegativeFloat


class _Ended(BaseModel):
    """What that of a run that has ended says besides."""

    validation: _Figures
    test: _Figures


class EventFile:
    """TensorBoard's event file, written in this thread: torch's SummaryWriter loses errors in a thread of its own."""

    def __init__(self, path: Path):
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = Event, Summary
        self._path = path
        with writing(path):
            self._file = open_own(path)
        self._writer = RecordWriter(self._file)
        self._write(Event(wall_time=0.0, file_version="brain.Event:2"))

    def add(self, line: Mapping[str, Any]) -> None:
        values = [
            self._summary.Value(tag=f"{line['split']}/{k}", simple_value=v)
            for k, v in line.items()
            if k not in NOT_SCALARS and isinstance(v, int | float)
        ]
        event = self._event(wall_time=line["seconds"], step=line["step"], summary=self._summary(value=values))
        self._write(event)

    def _write(self, event: Any) -> None:
        with writing(self._path):
            self._writer.write(event.SerializeToString())

    def flush(self) -> None:
        with writing(self._path):
            self._file.flush()

    def close(self) -> None:
        self._file.close()


# ---- reading runs


def read_config(path: Path) -> dict[str, Any]:
    """The config of a run folder.

    Raises:
        UsageError: there is none, or it cannot be read.
    """
    if not (path / CONFIG).exists():
        raise UsageError(no_run(path) if path.is_dir() else f"There is no run folder {str(path)!r}.")
    try:
        config = yaml_text.read(path / CONFIG)
    except UsageError as error:
        raise UsageError(f"{path / CONFIG} is damaged: {error}") from None
    if not isinstance(config, dict) or not {"task", "model", "objective", "train"} <= set(config):
        raise UsageError(f"{path / CONFIG} is damaged, or not a run's: it lacks task, model, objective or train.")
    return config


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; a line cut off at the end by a kill is left out.

    Raises:
        UsageError: a line is damaged.
    """
    if not (path / METRICS).exists():
        return []
    records = []
    for number, line in enumerate(read_bytes(path / METRICS).split(b"\n")[:-1], 1):
        if line.strip():
            record = _record(line)
            if record is None:
                raise at_line(path / METRICS, number, "this is no record of a run")
            records.append(record)
    return records


def _record(line: bytes) -> dict[str, Any] | None:
    """A line of metrics.jsonl, if it is one."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or not isinstance(record.get("split"), str):
        return None
    numbers = [value for value in record.values() if isinstance(value, int)]
    if not isinstance(record.get("step"), int) or not isinstance(record.get("seconds"), int | float):
        return None
    return record if all(abs(number) < 2**63 for number in numbers) else None


def find_checkpoint(path: Path, which: str = "best") -> Path:
    """The checkpoint folder that `which` of a run stands for; a checkpoint folder stands for itself.

    Args:
        path: a run folder, or one of its checkpoints.
        which: "best", "last", or the name of one, such as "step_300".

    Raises:
        UsageError: there is none, or it is damaged; which other one could be asked for.
    """
    check_path(path)
    if checkpoint.is_checkpoint(path):
        checkpoint.verify(path)
        return path
    if not path.is_dir():
        raise UsageError(f"There is no run folder {str(path)!r}.")
    folder = path / "checkpoints"
    names = [f"step_{step}" for step in checkpoint.steps(folder)]
    if which not in ("best", "last", *names):
        told = f", or one of its checkpoints: {', '.join(names)}" if names else ""
        raise UsageError(f"which={quoted(which)} is not allowed: it should be 'best' or 'last'{told}.")
    if not names:
        if (path / CONFIG).exists():
            raise UsageError(f"{path} holds no checkpoint: its run was stopped before the first one.")
        raise UsageError(f"{no_run(path).rstrip('.')}, and holds no checkpoint.")
    newest = folder / names[-1]
    if which in names:
        return _whole(folder / which, [])
    _whole(newest, reversed(names[:-1]))
    best = checkpoint.read_manifest(newest).best
    if which == "last" or best is None or folder / f"step_{best}" == newest:
        return newest
    return _whole(folder / f"step_{best}", [name for name in reversed(names) if name != f"step_{best}"])


def _whole(path: Path, others: Iterable[str]) -> Path:
    """A checkpoint that is as it was written.

    Raises:
        UsageError: it is not; which of the others, the first of them foremost, is.
    """
    try:
        checkpoint.verify(path)
    except checkpoint.Damaged as error:
        for other in others:
            with contextlib.suppress(checkpoint.Damaged):
                checkpoint.verify(path.parent / other)
                told = f"{other} is whole, and read where it is asked for: which={other!r}, or --which {other}"
                raise UsageError(f"{str(error).rstrip('.')}; {told}.") from None
        raise
    return path


def load(path: str | Path, which: str = "best") -> TokenModel:
    """The model of a run, on the CPU in evaluation mode: its best weights by validation, or the last.

    Args:
        path: a run folder, or one of its checkpoints.
        which: "best", "last", or the name of a checkpoint, such as "step_300"; the running average is taken where the
            run kept one.

    Raises:
        UsageError: no such run, or a checkpoint that is missing, damaged or another model's. No other one is read in
            its place; the error names one that could be asked for.
    """
    return load_from(path, which)[0]


@kept_random_state()
def load_from(path: str | Path, which: str = "best") -> tuple[TokenModel, Path]:
    """As `load`, with the checkpoint that was read."""
    found = find_checkpoint(Path(path), which)
    imports.check(run_of(found), ("mixer",))
    config = read_config(run_of(found))
    model = create_model(config["model"])
    checkpoint.load_weights(model, checkpoint.read_weights(found), found)
    trained = checkpoint.read_manifest(found).config or {}
    old, new = trained.get("model"), config["model"]
    if isinstance(old, Mapping) and isinstance(new, Mapping) and (keys := differing(old, new, "model.")):
        told = _changes(trained, config, keys, "when it was trained")
        raise UsageError(f"{run_of(found) / CONFIG} was edited after its run had begun: {told}: change it back.")
    return model.eval(), found


def run_of(found: Path) -> Path:
    """The run folder of a checkpoint."""
    return found.parents[1] if len(found.parents) > 1 else found.absolute().parent.parent


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


def _changes(old: Any, new: Any, keys: Iterable[str], then: str) -> str:
    return ", ".join(f"{k} ({quoted(_at(old, k))} {then}, {quoted(_at(new, k))} now)" for k in keys)


def _at(data: Any, key: str) -> Any:
    for part in key.split("."):
        data = data.get(part) if isinstance(data, Mapping) else None
    return data


__all__ = ["RunError", "RunFolder", "find_checkpoint", "load", "load_from", "read_config", "read_metrics", "run_of"]
