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
import shutil
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from tasks.registry import UsageError
from zoo.models.token import TokenModel, create_model
from zoo.training import checkpoint, imports
from zoo.training.experiment import BOOKKEEPING, CONFIG, differing
from zoo.training.files import RunError, write_atomic, writing
from zoo.training.randomness import kept_random_state

METRICS, RESULT, SOLVING = "metrics.jsonl", "result.json", "solving.json"
LOCK, EVENTS = ".lock", "events.out.tfevents.zoo"
NOT_SCALARS = ("step", "split", "seconds")


class RunFolder:
    """One process's hold on a run folder; use as a context manager."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self._lock = FileLock(self.path / LOCK)
        self._metrics: Any = None
        self._events: Any = None

    def __enter__(self) -> RunFolder:
        if self.path.exists() and not self.path.is_dir():
            raise UsageError(f"out={self.path} is a file; a run needs a folder.")
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            try:
                self._lock.acquire(timeout=0)
            except Timeout:
                told = "wait for it to end, or choose another folder with out=..."
                raise UsageError(f"The run folder {self.path} is in use by another process: {told}") from None
        return self

    def __exit__(self, *error: object) -> None:
        for file in (self._metrics, self._events):
            if file is not None:
                with contextlib.suppress(OSError):  # a full disk has been told of already
                    file.close()
        self._lock.release()

    # ---- config

    def open(self, config: Mapping[str, Any], *, fresh: bool = False) -> None:
        """Enter the config, or check it against the one that is there.

        Raises:
            UsageError: the folder holds another experiment, or something that is no run.
        """
        if fresh:
            self._clear()
        path = self.path / CONFIG
        if path.exists() and checkpoint.steps(self.checkpoints):
            old = read_config(self.path)
            keys = [k for k in differing(old, config) if k not in BOOKKEEPING]
            if keys:
                told = ", ".join(f"{k} ({_at(old, k)!r} there, {_at(config, k)!r} now)" for k in keys)
                fix = "give them as before, choose another folder with out=..., or start over with --fresh"
                raise UsageError(f"{self.path} holds a run with a different {told}: {fix}.")
        elif not path.exists() and self._foreign():
            raise UsageError(f"{self.path} is not empty and holds no {CONFIG}: choose another folder with out=...")
        if not checkpoint.steps(self.checkpoints):  # of an attempt that came to nothing
            (self.path / RESULT).unlink(missing_ok=True)
        text = yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)
        write_atomic(path, text.encode())

    def _foreign(self) -> bool:
        return any(p.name not in (METRICS, EVENTS, "checkpoints") and p.name[0] != "." for p in self.path.iterdir())

    def _clear(self) -> None:
        if not (self.path / CONFIG).exists() and self._foreign():
            raise UsageError(f"{self.path} holds no {CONFIG}, so it is not a run that --fresh could start over.")
        with writing(self.path):
            shutil.rmtree(self.checkpoints, ignore_errors=True)
            for name in (CONFIG, METRICS, RESULT, SOLVING, EVENTS, imports.IMPORTED):
                (self.path / name).unlink(missing_ok=True)

    # ---- records

    def start_records(self, size: int) -> None:
        """Cut metrics.jsonl to its first `size` bytes, those of the checkpoint that is resumed, and continue there."""
        path = self.path / METRICS
        with writing(path):
            self._metrics = open(path, "ab")  # noqa: SIM115 - closed by __exit__
            self._metrics.truncate(size)
        self._events = EventFile(self.path / EVENTS)
        for line in read_metrics(self.path):
            self._events.add(line)

    def record(self, line: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl and to the TensorBoard events."""
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
        rates = [m["tokens_per_second"] for m in read_metrics(self.path) if m["split"] == "train"]
        return statistics.median(rates) if rates else None

    # ---- result

    def result(self) -> dict[str, Any] | None:
        try:
            return json.loads((self.path / RESULT).read_bytes())
        except (FileNotFoundError, ValueError):
            return None

    def write_result(self, result: Mapping[str, Any]) -> None:
        write_atomic(self.path / RESULT, json.dumps(result, indent=1).encode() + b"\n")


class EventFile:
    """TensorBoard's event file, written in this thread: torch's SummaryWriter loses errors in a thread of its own."""

    def __init__(self, path: Path):
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = Event, Summary
        self._path = path
        with writing(path):
            self._file = open(path, "wb")  # noqa: SIM115 - closed by close
        self._writer = RecordWriter(self._file)
        self._write(Event(wall_time=0.0, file_version="brain.Event:2"))

    def add(self, line: Mapping[str, Any]) -> None:
        values = [
            self._summary.Value(tag=f"{line['split']}/{k}", simple_value=v)
            for k, v in line.items()
            if k not in NOT_SCALARS and v is not None
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
    try:
        config = yaml.safe_load((path / CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{path} is no run folder: it has no {CONFIG}.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        raise UsageError(f"{path / CONFIG} is damaged: it cannot be read as YAML.") from None
    if not isinstance(config, dict) or not {"task", "model", "objective", "train"} <= set(config):
        raise UsageError(f"{path / CONFIG} is damaged, or not a run's: it lacks task, model, objective or train.")
    return config


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; a line cut off at the end by a kill is left out."""
    try:
        lines = (path / METRICS).read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines if line.strip()]


def find_checkpoint(path: Path, which: str = "best") -> Path:
    """The checkpoint folder that `which` ("best" or "last") of a run stands for; a checkpoint folder stands for itself.

    Raises:
        UsageError: there is none, or it is damaged.
    """
    if which not in ("best", "last"):
        raise UsageError(f"which={which!r} is not allowed: it should be 'best' or 'last'.")
    if checkpoint.is_checkpoint(path):
        checkpoint.verify(path)
        return path
    if not path.is_dir():
        raise UsageError(f"There is no run folder {str(path)!r}.")
    folder = path / "checkpoints"
    problems = []
    for last, manifest in checkpoint.newest(folder):
        if isinstance(manifest, checkpoint.Damaged):
            problems.append(str(manifest))
            continue
        if which == "last" or manifest.best is None:
            return last
        best = folder / f"step_{manifest.best}"
        try:
            checkpoint.verify(best)
        except checkpoint.Damaged as error:
            raise UsageError(f"{str(error).rstrip('.')}; the last one, {last}, is whole.") from None
        return best
    if problems:
        raise UsageError(" ".join(problems))
    raise UsageError(f"{path} holds no checkpoint: it is no run folder, or its run was stopped before the first one.")


@kept_random_state()
def load(path: str | Path, which: str = "best") -> TokenModel:
    """The model of a run, on the CPU in evaluation mode: its best weights by validation, or the last.

    Args:
        path: a run folder, or one of its checkpoints.
        which: "best" or "last"; the running average is taken where the run kept one.

    Raises:
        UsageError: no such run, or a checkpoint that is missing, damaged or another model's.
    """
    path = Path(path)
    found = find_checkpoint(path, which)
    imports.check(found.parents[1], ("mixer",))
    model = create_model(read_config(found.parents[1])["model"])
    checkpoint.load_weights(model, checkpoint.read_weights(found), found)
    return model.eval()


def _at(data: Any, key: str) -> Any:
    for part in key.split("."):
        data = data.get(part) if isinstance(data, Mapping) else None
    return data


__all__ = ["RunError", "RunFolder", "find_checkpoint", "load", "read_config", "read_metrics"]
