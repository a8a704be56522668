"""Opening a run: which checkpoint, its model, and the task and objective that go with it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from zoo.core.errors import UsageError, quoted, unknown
from zoo.core.readers import check_path
from zoo.core.run_files import CHECKPOINTS, CONFIG, changes, differing, is_run, no_run, read_whole_config, run_of
from zoo.models.create import create_model
from zoo.models.ends import Ends
from zoo.training import checkpoint, imports
from zoo.training.fit import Parts
from zoo.training.machine import choose_device, choose_precision
from zoo.training.options import Experiment, TrainConfig
from zoo.training.randomness import kept_random_state
from zoo.training.recipes import override


def find_checkpoint(path: Path, which: str = "best") -> Path:
    """The checkpoint folder that `which` of a run stands for; a checkpoint folder stands for itself.

    Args:
        path: a run folder, or one of its checkpoints.
        which: "best", "last", or the name of one, such as "step_300".

    Raises:
        UsageError: there is none, or it is damaged; the error names another one that could be read.
    """
    check_path(path)
    if checkpoint.is_checkpoint(path):
        checkpoint.verify(path)
        return path
    if not path.is_dir():
        raise UsageError(f"There is no run folder {str(path)!r}.")
    folder = path / CHECKPOINTS
    names = [f"step_{step}" for step in checkpoint.steps(folder)]
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


def load(path: str | Path, which: str = "best") -> Ends:
    """Load the model of a run, on the CPU in evaluation mode: its best weights by validation, or the last.

    Args:
        path: a run folder, or one of its checkpoints.
        which: "best", "last", or the name of a checkpoint, such as "step_300"; the running average is taken where the
            run kept one.

    Raises:
        UsageError: no such run, or a checkpoint that is missing, damaged or another model's. No other one is read in
            its place; the error names one that could be read.
    """
    return load_from(path, which)[0]


@kept_random_state()
def load_from(path: str | Path, which: str = "best") -> tuple[Ends, Path]:
    """As `load`, with the checkpoint that was read."""
    found = find_checkpoint(Path(path), which)
    imports.check(run_of(found), imports.MODEL_KINDS)
    config = read_whole_config(run_of(found))
    model = create_model(config["model"])
    checkpoint.load_weights(model, checkpoint.read_weights(found), found)
    trained = checkpoint.read_manifest(found).config or {}
    old, new = trained.get("model"), config["model"]
    if isinstance(old, Mapping) and isinstance(new, Mapping) and (keys := differing(old, new, "model.")):
        told = changes(trained, config, keys, "when it was trained")
        raise UsageError(f"{run_of(found) / CONFIG} was edited after its run had begun: {told}: change it back.")
    return model.eval(), found


EVALUATION_KEYS = (
    "task",
    "objective",
    *(f"train.{k}" for k in ("eval_rows", "test_rows", "eval_batch_size", "device", "precision", "threads")),
)


class OpenRun(NamedTuple):
    """A run whose model is ready to answer."""

    model: Ends
    parts: Parts
    config: TrainConfig
    precision: str
    checkpoint: Path


def open_run(path: str | Path, overrides: Mapping[str, Any] | None = None, which: str = "best") -> OpenRun:
    """A run's model on its device, with its own task and objective or changed ones.

    Raises:
        UsageError: no such run, a damaged checkpoint, or a key that would change the model.
    """
    path = Path(path)
    for key in overrides or {}:
        if not any(key == k or key.startswith(k + ".") for k in EVALUATION_KEYS):
            raise unknown("key of an evaluation", key, EVALUATION_KEYS)
    model, found = load_from(path, which)
    run = run_of(found)
    imports.check(run, {"task", "objective"} - set(overrides or ()))
    experiment = Experiment(**override(read_whole_config(run), overrides or {}))
    parts, config = experiment.build(), experiment.train
    device = choose_device(config.device)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    return OpenRun(model.to(device), parts, config, choose_precision(config.precision, device), found)
