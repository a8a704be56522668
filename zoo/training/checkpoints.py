"""The checkpoints of a run, `checkpoints/step_N`: which there are, which one is read, and which are kept."""

from __future__ import annotations

import contextlib
import itertools
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from zoo.core.errors import UsageError, quoted
from zoo.core.readers import check_path
from zoo.core.run_files import CHECKPOINTS, is_run, no_run
from zoo.training.checkpoint import Damaged, is_checkpoint, name_of, read_manifest, step_of, verify

_OWN = re.compile(r"step_[0-9]+(\.damaged[0-9]*)?|\.step_[0-9]+\.[0-9a-f]+\.tmp")


def steps(folder: Path) -> list[int]:
    """Steps of the checkpoints in a folder, rising; whether they can be read is another matter."""
    if not folder.is_dir():
        return []
    found = (step_of(path) for path in folder.iterdir() if path.is_dir())
    return sorted(step for step in found if step is not None)


def find(path: Path, which: str = "best") -> Path:
    """The checkpoint folder that `which` of a run stands for; a checkpoint folder stands for itself.

    Args:
        path: a run folder, or one of its checkpoints.
        which: "best", "last", or the name of one, such as "step_300".

    Raises:
        UsageError: there is none, or it is damaged; the error names another one that could be read.
    """
    check_path(path)
    if is_checkpoint(path):
        verify(path)
        return path
    if not path.is_dir():
        raise UsageError(f"There is no run folder {str(path)!r}.")
    folder = path / CHECKPOINTS
    names = [name_of(step) for step in steps(folder)]
    if which not in ("best", "last", *names):
        told = f", or one of its checkpoints: {', '.join(names)}" if names else ""
        raise UsageError(f"which={quoted(which)} is not allowed: it should be 'best' or 'last'{told}.")
    if not names:
        if is_run(path):
            raise UsageError(f"{path} holds no checkpoint: its run was stopped before the first one.")
        raise UsageError(f"{no_run(path).rstrip('.')}, and holds no checkpoint.")
    newest = folder / names[-1]
    if which in names:
        return _whole(folder / which, [])
    _whole(newest, reversed(names[:-1]))
    best = read_manifest(newest).best
    if which == "last" or best is None or name_of(best) == newest.name:
        return newest
    return _whole(folder / name_of(best), [name for name in reversed(names) if name != name_of(best)])


def _whole(path: Path, others: Iterable[str]) -> Path:
    """A checkpoint that is as it was written.

    Raises:
        UsageError: it is not; which of the others, the first of them foremost, is.
    """
    try:
        verify(path)
    except Damaged as error:
        for other in others:
            with contextlib.suppress(Damaged):
                verify(path.parent / other)
                told = f"{other} is whole, and read where it is asked for: which={other!r}, or --which {other}"
                raise UsageError(f"{str(error).rstrip('.')}; {told}.") from None
        raise
    return path


def config_of(folder: Path) -> dict[str, Any] | None:
    """The config that the newest readable checkpoint of a folder was trained with, where one says so."""
    for step in reversed(steps(folder)):
        with contextlib.suppress(Damaged):
            return read_manifest(folder / name_of(step)).config
    return None


def prune(folder: Path, keep: int) -> None:
    """Delete all but the latest `keep` checkpoints and those they name as the best."""
    found = steps(folder)
    kept = set(found[-keep:])
    for step in found[-keep:]:
        with contextlib.suppress(Damaged):  # which names none
            kept.add(read_manifest(folder / name_of(step)).best or 0)
    for step in found:
        if step not in kept:
            shutil.rmtree(folder / name_of(step), ignore_errors=True)


def aside(path: Path) -> Path:
    """A free name under which a damaged checkpoint is kept and never looked at again."""
    names = (path.with_name(f"{path.name}.damaged{n or ''}") for n in itertools.count())
    return next(name for name in names if not name.exists())


def clear_leftovers(folder: Path) -> None:
    """Delete what a killed process was still writing."""
    for path in folder.glob(".step_*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


def belongings(folder: Path) -> list[Path]:
    """All in a folder of checkpoints that is theirs, damaged ones and leftovers included."""
    return sorted(p for p in folder.iterdir() if _OWN.fullmatch(p.name)) if folder.is_dir() else []
