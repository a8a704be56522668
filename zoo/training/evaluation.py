"""Scores of a model on a task's held-out rows."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from zoo.models.compiled_step import compiled_decoding, why_not_compiled
from zoo.models.modes import evaluation_mode
from zoo.objectives.base import Objective
from zoo.objectives.draws import row_names
from zoo.statistics import clustered_interval, t_interval
from zoo.tasks import random
from zoo.tasks.protocol import Batch, Task, check_split, names_of, split_rows
from zoo.tasks.scores import squared_errors
from zoo.training.group import Group, interleaved
from zoo.training.loading import open_run
from zoo.training.machine import autocast, synchronize

HELD_OUT_SEED = 0
"""Runs of all seeds are scored on the same rows."""


class Stopped(Exception):
    """An evaluation that was ended early."""


def held_out(task: Task, split: Any, n: int, *, start: int = 0, seed: int = HELD_OUT_SEED) -> Batch:
    """Rows start ... start + n - 1 of a split, each with a random stream of its own for what is drawn to answer it."""
    rows = task.sample(n, split=split, seed=seed, start=start)
    return rows._replace(streams=names_of(random.row_keys(split, seed, start, n)))


@torch.no_grad()
def evaluate(
    model: nn.Module,
    objective: Objective,
    batch: Batch,
    *,
    batch_size: int,
    precision: str = "float32",
    stop: Callable[[], bool] = lambda: False,
    compile: bool = False,
) -> dict[str, Any]:
    """`Task.score` of the model's predictions, with the mean `loss` of a scored position.

    Of a text, `bits_per_byte` is the loss in bits: exact under next_token, under diffusion an estimate, by one draw
    of times and noise a row, of an upper bound. With several draws (`loss_draws`) the loss and what follows from it
    have a 95 % interval over the draws (Student's t): how far the estimate is from the bound on these rows.
    `n_rows` were scored, of `n_problems` (`Task.problems`); `exact_low` and `exact_high` are the 95 % interval of
    `exact` over those problems, None where there is one only; where targets are real vectors, `mse_low` and `mse_high`
    are that of `mse`. No figure depends on `batch_size`. With `compile`, answers that are generated token by token run
    as one graph in batches of `batch_size` rows, where the model and the machine can compile.

    Raises:
        Stopped: `stop` said so between two batches.
    """
    how: dict[str, Any] = {"batch_size": batch_size, "precision": precision, "stop": stop, "compile": compile}
    return scored(objective, batch, answered(model, objective, batch, **how))


def scored(objective: Objective, batch: Batch, answers: Answers) -> dict[str, Any]:
    """What `evaluate` returns, of answers that are there."""
    figures = {"loss": answers.loss, **objective.task.loss_figures(batch, answers.loss)}
    if (interval := t_interval(answers.estimates)) is not None:
        low, high = ({"loss": loss, **objective.task.loss_figures(batch, loss)} for loss in interval)
        for name in list(figures):  # a figure may fall where the loss rises
            figures[f"{name}_low"], figures[f"{name}_high"] = sorted((low[name], high[name]))
    said = answers.predictions
    return {**figures, **objective.task.score(batch, said), **certainty(objective.task, batch, said)}


class Answers(NamedTuple):
    """A model's answers to n rows.

    Attributes:
        predictions: (n, L), or (n, L, D_out) real vectors, on the CPU.
        loss: mean of a scored position.
        estimates: of this mean, independent of each other, where the objective gives several.
    """

    predictions: Tensor
    loss: float
    estimates: tuple[float, ...] = ()


@torch.no_grad()
def answered(
    model: nn.Module,
    objective: Objective,
    batch: Batch,
    *,
    batch_size: int,
    precision: str = "float32",
    stop: Callable[[], bool] = lambda: False,
    compile: bool = False,
    group: Group = Group(),
) -> Answers:
    """What `evaluate` scores. The processes of a group answer a batch each in turn; all have all answers then.

    Raises:
        Stopped: as `evaluate`.
    """
    device = next(model.parameters()).device
    if batch.streams is None:
        batch = batch._replace(streams=row_names(objective.encode(batch)))
    own, stopped = [], False
    compiled = compile and objective.reads_back and why_not_compiled(model) is None
    decoding = compiled_decoding(model, batch_size) if compiled else contextlib.nullcontext()
    with evaluation_mode(model), group.together(model), decoding:
        for part in itertools.islice(split_rows(batch, batch_size), group.rank, None, group.size):
            if stopped := stop():
                break
            with autocast(precision, device):
                predicted, loss = objective.evaluate(model, part)
            own.append((predicted, loss.cpu().double(), part.scored.sum()))
    if any(group.largest(stopped)):
        raise Stopped
    predictions, losses, weights = zip(*interleaved(group.gathered(own)), strict=True)
    weight = torch.stack(weights).double()
    of_batches = torch.stack(losses).view(len(losses), -1)
    estimates = [((each * weight).sum() / weight.sum()).item() for each in of_batches.T.contiguous()]
    return Answers(torch.cat(predictions), sum(estimates) / len(estimates), tuple(estimates))


def row_figures(task: Task, batch: Batch, predictions: Tensor) -> dict[str, list[Any]]:
    """Of every row, its problem (`Task.problems`) and its figures, those whose means `Task.score` gives."""
    return {"problem": task.problems(batch).tolist()} | {
        name: values.tolist() for name, values in task.figures(batch, predictions).items()
    }


def certainty(task: Task, batch: Batch, predictions: Tensor) -> dict[str, Any]:
    """What the share of right answers, or the mean squared error, rests on: rows, problems that differ, and the 95 %
    interval over these."""
    problems = task.problems(batch).numpy()
    if batch.mask is None:
        name, values = "exact", task.is_right(batch, predictions)
    else:
        name, values = "mse", squared_errors(batch, predictions)
    interval = clustered_interval(values.numpy(), problems)
    low, high = interval or (None, None)
    return {
        "n_rows": len(problems),
        "n_problems": len(np.unique(problems)),
        f"{name}_low": low,
        f"{name}_high": high,
    }


def scalars(score: dict[str, Any]) -> dict[str, float]:
    """The figures of a score without its slices."""
    return {k: v for k, v in score.items() if k != "slices"}


@torch.no_grad()
def decode_rate(model: Any, context_length: int, *, steps: int = 64, seconds: float = 0.5) -> float | None:
    """Tokens per second of step-by-step decoding of one row after `context_length` tokens, or as many as leave room.

    None if the model is not causal, or has too few positions.
    """
    learned = model.config.max_len
    if learned is not None:  # decoding needs positions to go on to
        steps = min(steps, learned - 1)
    if not model.causal or steps < 3:
        return None
    device = next(model.parameters()).device
    inputs = model.zeros(1, context_length)
    if learned is not None:
        inputs = inputs[:, : learned - steps]
    with evaluation_mode(model):
        _, state = model.features(inputs, model.init_state(1, capacity=inputs.shape[1] + steps))
        step, done, start = inputs[:, 0], 0, 0.0
        for i in range(steps):
            if i == 2:  # the first steps warm up
                start = _now(device)
            logits, state = model.step(step, state)
            step = logits.argmax(-1) if model.config.inputs is None else step  # a real vector is given, not predicted
            done = i - 1
            if done > 0 and time.perf_counter() - start > seconds:
                break
        return done / (_now(device) - start)


def _now(device: torch.device) -> float:
    synchronize(device)
    return time.perf_counter()


def evaluate_run(
    path: str | Path,
    overrides: Mapping[str, Any] | None = None,
    *,
    split: str = "validation",
    which: str = "best",
    task: Task | None = None,
) -> dict[str, Any]:
    """The score of a run's model, on its own task, a changed one (`{"task.n_pairs": 8}`), or a task object.

    Raises:
        UsageError: no such run or split, a damaged checkpoint, or a key that would change the model.
    """
    check_split(split)
    model, parts, config, precision, found = open_run(path, overrides, which, task=task)
    rows = held_out(parts.task, split, config.test_rows if split == "test" else config.eval_rows)
    size = config.eval_batch_size or config.batch_size
    score = evaluate(model, parts.objective, rows, batch_size=size, precision=precision, compile=config.compile)
    return {"run": str(path), "checkpoint": str(found), "split": split, **score}


def score_lines(score: dict[str, Any]) -> list[str]:
    """A score for a person: its figures, then each slice."""
    lines = [f"{k}: {_text(v)}" for k, v in score.items() if k != "slices" and v is not None]
    for name, values in score["slices"].items():
        lines += [
            f"{name} {value}: " + ", ".join(f"{k} {_text(v)}" for k, v in s.items()) for value, s in values.items()
        ]
    return lines


def _text(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)
