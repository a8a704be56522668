"""Opening a run: which checkpoint, its model, and the task and objective that go with it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from zoo.core.errors import UsageError, quoted, unknown
from zoo.core.readers import check_path
from zoo.core.run_files import CONFIG, changes, differing, is_run, read_whole_config, run_of
from zoo.interop.hf import CONFIG as PUBLISHED
from zoo.models.create import create_model
from zoo.models.ends import Ends
from zoo.tasks.protocol import Task
from zoo.training import checkpoint, checkpoints, imports
from zoo.training.fit import Parts
from zoo.training.machine import choose_device, choose_precision
from zoo.training.options import Experiment
from zoo.training.randomness import kept_random_state
from zoo.training.recipes import override
from zoo.training.saving import is_saved, load_saved
from zoo.training.train_options import TrainConfig


def load(path: str | Path, which: str = "best") -> Any:
    """Load the model of a run or of a folder that `zoo.save` wrote, on the CPU in evaluation mode.

    Args:
        path: a run folder, one of its checkpoints, or a folder of `zoo.save`; `zoo.from_hf` reads published ones.
        which: of a run: "best" by validation, "last", or the name of a checkpoint, such as "step_300"; the running
            average is taken where the run kept one.

    Raises:
        UsageError: no such folder, or a checkpoint that is missing, damaged or another model's. No other one is read in
            its place; the error names one that could be read.
    """
    folder = check_path(path)
    if is_saved(folder):
        if which != "best":
            raise UsageError(f"which={quoted(which)} chooses from a run: {folder} holds one saved model.")
        with kept_random_state():
            return load_saved(folder)
    if (folder / PUBLISHED).is_file() and not is_run(folder):
        raise UsageError(f"{folder} is the folder of a published checkpoint: zoo.from_hf reads it.")
    return load_from(folder, which)[0]


@kept_random_state()
def load_from(path: str | Path, which: str = "best") -> tuple[Ends, Path]:
    """As `load`, with the checkpoint that was read."""
    found = checkpoints.find(Path(path), which)
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
    *(f"train.{k}" for k in ("eval_rows", "test_rows", "eval_batch_size", "device", "precision", "threads", "compile")),
)


class OpenRun(NamedTuple):
    """A run whose model is ready to answer."""

    model: Ends
    parts: Parts
    config: TrainConfig
    precision: str
    checkpoint: Path


def open_run(
    path: str | Path, overrides: Mapping[str, Any] | None = None, which: str = "best", *, task: Task | None = None
) -> OpenRun:
    """A run's model on its device, with its own task and objective or changed ones.

    Args:
        path: a run folder, or one of its checkpoints.
        overrides: dotted keys and values.
        which: which checkpoint.
        task: the task as an object, in place of the run's.

    Raises:
        UsageError: no such run, a damaged checkpoint, or a key that would change the model.
    """
    path = Path(path)
    if is_saved(path):
        told = "to score it on a task, train it: zoo train RECIPE init=FOLDER"
        raise UsageError(f"{path} holds a saved model, which has no task: {told}.")
    for key in overrides or {}:
        if not any(key == k or key.startswith(k + ".") for k in EVALUATION_KEYS):
            raise unknown("key of an evaluation", key, EVALUATION_KEYS)
    model, found = load_from(path, which)
    run = run_of(found)
    imports.check(run, {"task", "objective"} - set(overrides or ()))
    experiment = Experiment(**override(read_whole_config(run), overrides or {}))
    parts, config = experiment.build(task), experiment.train
    device = choose_device(config.device)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    return OpenRun(model.to(device), parts, config, choose_precision(config.computes_in, device), found)
