"""A task that is given as an object from Python: what its run records, and what is said where it is missing."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from zoo.core.errors import UsageError, quoted
from zoo.tasks.protocol import SPLITS, Streamed, Task, check_sizes, registry

FROM_PYTHON = "from_python"
"""The key of a config's task that no name and options can make again."""
_ROWS = 2  # of each split, that a digest is of


def described(task: Any) -> dict[str, Any]:
    """A config's section `task` for a task object: its name and options if they make it again, else what it is.

    The digest of its first rows makes sure that a resumed run is given the same rows; batches that come in order have
    none for training.

    Raises:
        UsageError: it is no task, or one whose rows differ when they are drawn again.
    """
    if not isinstance(task, Task):
        fits = "zoo.tasks.from_dataset(...) or zoo.tasks.from_batches(...) makes one of a Dataset or a DataLoader"
        raise UsageError(
            f"task={quoted(task, 60)} is no zoo.tasks.Task: {fits}; a task's name belongs to the experiment."
        )
    check_sizes(task)
    for size in ("layout", "config"):
        if not hasattr(task, size):
            raise UsageError(f"The task {task.name} sets no {size}, which its __init__ should.")
    options = task.config.model_dump(mode="json")
    if task.name in registry and registry[task.name] is type(task):
        return {"name": task.name, **options}
    cls = type(task)
    sizes = ("n_inputs", "n_outputs", "n_classes") if task.layout == "series" else ("vocab_size",)
    facts = {name: getattr(task, name) for name in (*sizes, "seq_len", "layout")}
    about = {"class": f"{cls.__module__}.{cls.__qualname__}", **facts, "config": options, "digest": _digest(task)}
    return {"name": task.name, FROM_PYTHON: about}


def _digest(task: Task) -> str:
    splits = [s for s in SPLITS if s not in task.absent and not (s == "train" and isinstance(task, Streamed))]

    def drawn() -> str:
        digest = hashlib.blake2b(digest_size=8)
        for split in splits:
            rows = task.sample(_ROWS, split=split, seed=0)
            for tensor in (rows.inputs, rows.targets):
                digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()

    first = drawn()
    if drawn() != first:
        told = "row i has to depend on split, seed and i alone, so draw at random with a generator of that seed"
        raise UsageError(f"The task {task.name} gives other rows when they are drawn again: {told}.")
    return first


def check_named(section: Any) -> None:
    """Raises UsageError where a config's section `task` is of a task that was given as an object."""
    if isinstance(section, Mapping) and FROM_PYTHON in section:
        about = section[FROM_PYTHON]
        told = f", a {about['class']}" if isinstance(about, Mapping) and "class" in about else ""
        raise UsageError(
            f"The task {quoted(section.get('name'))} of this run was given as an object from Python{told}: pass it "
            "again as task=..., to zoo.train or zoo.training.evaluation.evaluate_run (zoo.load needs no task)."
        )


__all__ = ["FROM_PYTHON", "check_named", "described"]
