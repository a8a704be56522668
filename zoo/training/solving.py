"""One example of a run's task while its model solves it, step by step; a run that ends keeps one as `solving.json`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import BaseModel, Field, NonNegativeInt, PositiveInt
from torch import nn

from zoo.core.errors import UsageError
from zoo.core.files import write_atomic
from zoo.core.run_files import SOLVING
from zoo.objectives.base import Frame, Objective
from zoo.tasks.protocol import Batch, Task
from zoo.tasks.sketch import Cell, Sketch
from zoo.training.evaluation import HELD_OUT_SEED, held_out
from zoo.training.loading import open_run
from zoo.training.machine import autocast

RECORDED = 10
"""Steps that are kept, the question among them."""
RECORDED_PATHS = 4
"""Paths that are kept, the one that is taken among them."""


class Step(NamedTuple):
    """The answer as it stands after a step.

    Attributes:
        title: which step, such as "pass 3".
        note: how far the answer is.
        sketch: its cells.
    """

    title: str
    note: str
    sketch: Sketch


class Solving(NamedTuple):
    """An example while it is solved: its question, then the answer after each step.

    Attributes:
        example: which one, in words.
        steps: at least two.
        question: the example as text, where the cells of its answer alone do not tell it; not recorded.
        path: the name of the path to its answer, where there are several.
        others: the other paths.
    """

    example: str
    steps: list[Step]
    question: str = ""
    path: str = ""
    others: tuple[Solving, ...] = ()

    def shortened(self, most: int) -> Solving:
        """At most `most` steps, the first and the last among them: of too many those that change a cell, evenly."""
        if len(self.steps) <= most:
            return self
        changing = [b for a, b in pairwise(self.steps) if a.sketch != b.sketch and b is not self.steps[-1]]
        kept = [self.steps[0], *changing, self.steps[-1]]
        last = len(kept) - 1
        chosen = dict.fromkeys(round(i * last / (most - 1)) for i in range(most))  # each once, where they are few
        return self._replace(steps=[kept[i] for i in chosen])


@torch.no_grad()
def solve(objective: Objective, model: nn.Module, batch: Batch, *, precision: str = "float32") -> list[Step]:
    """The question of a batch's only row, and its answer after every step."""
    return solve_by_paths(objective, model, batch, precision=precision)[0][1]


@torch.no_grad()
def solve_by_paths(
    objective: Objective, model: nn.Module, batch: Batch, *, precision: str = "float32"
) -> list[tuple[str, list[Step]]]:
    """As `solve`, for every path to the answer, each with its name; the first is the one that is taken."""
    with autocast(precision, next(model.parameters()).device):
        found = objective.solutions(model, batch)
    return [(name, _steps(objective, batch, frames)) for name, frames in found]


def _steps(objective: Objective, batch: Batch, frames: Iterable[Frame]) -> list[Step]:
    asked = objective.task.asked(batch)
    steps = [Step("question", f"{int(asked.sum())} to find", objective.task.question(batch))]
    for i, frame in enumerate(frames, 1):
        sketch = objective.task.sketch(batch, 0, frame.tokens, frame.hidden)
        kinds = objective.task.kinds(batch, 0, frame.tokens, frame.hidden)
        if batch.mask is not None:
            steps.append(Step(f"{objective.step_name} {i}", _error(objective.task, batch, frame), sketch))
            continue
        lost = [kind == "wrong" and not own for kind, own in zip(kinds, asked[0].tolist(), strict=True)]
        steps.append(Step(f"{objective.step_name} {i}", _note(frame, sketch, sum(lost)), sketch))
    return steps


def _error(task: Task, batch: Batch, frame: Frame) -> str:
    """How far real vectors are off, beside the trivial predictor."""
    score = task.score(batch, frame.tokens)
    return f"mse {score['mse']:.4g}; {task.trivial_predictor}: {score['trivial_mse']:.4g}"


def _note(frame: Frame, sketch: Sketch, lost: int) -> str:
    """How far the answer is, `lost` of its wrong cells being given ones, which a model may overwrite."""
    hidden, wrong = sketch.count("hidden"), sketch.count("wrong") - lost
    told = [f"{hidden} to find"] if hidden else []
    told += [f"{wrong} wrong"] if wrong else []
    told += [f"{lost} given{'s' * (lost > 1)} {'too' if wrong else 'wrong'}"] if lost else []
    told = told or ["solved"]
    if frame.halting is not None:
        told.append(f"{100 * float(frame.halting[0]):.0f} % sure")
    return ", ".join(told)


def solve_run(
    path: str | Path,
    overrides: Mapping[str, Any] | None = None,
    *,
    split: str = "validation",
    seed: int = HELD_OUT_SEED,
    row: int = 0,
    which: str = "best",
) -> Solving:
    """An example solved by a run's model, every step of it.

    Args:
        path: a run folder, or one of its checkpoints.
        overrides: as in `evaluate_run`: of the task, or of how the objective answers.
        split: of the example.
        seed: of the stream of examples.
        row: which of them.
        which: "best" or "last" checkpoint.

    Raises:
        UsageError: as in `evaluate_run`.
    """
    run = open_run(path, overrides, which)
    batch = held_out(run.parts.task, split, 1, start=row, seed=seed)
    paths = solve_by_paths(run.parts.objective, run.model, batch, precision=run.precision)
    task, has_own = run.parts.task, type(run.parts.task).sketch is not Task.sketch
    if task.layout == "series":  # its answers are drawn over the question: cells alone would not show where they stand
        with autocast(run.precision, next(run.model.parameters()).device):
            question = task.render(batch, 0, run.parts.objective.predict(run.model, batch))
    else:
        question = "" if has_own else task.render(batch)
    return _solving(f"{split} example {row}", paths)._replace(question=question)


def _solving(example: str, paths: Sequence[tuple[str, list[Step]]]) -> Solving:
    first, *others = [Solving(example, steps, path=name) for name, steps in paths]
    return first._replace(others=tuple(others))


# ---- the file


class _Step(BaseModel):
    title: str
    note: str
    width: PositiveInt
    box: tuple[PositiveInt, PositiveInt] | None
    cells: list[NonNegativeInt]  # as numbers of the file's


class _Path(BaseModel):
    path: str
    steps: list[_Step] = Field(min_length=2)


class _File(BaseModel):
    example: str
    cells: list[Cell]
    steps: list[_Step] = Field(min_length=2)
    path: str = ""
    others: list[_Path] = []


def record(folder: Path, objective: Objective, model: nn.Module, *, precision: str) -> None:
    """Keep the first validation example in a run folder, if it takes more than one step; a text's are no answers."""
    if objective.task.is_language:
        return
    paths = solve_by_paths(objective, model, held_out(objective.task, "validation", 1), precision=precision)
    if len(paths) == 1 and len(paths[0][1]) == 2:
        return
    numbers: dict[Cell, int] = {}

    def data(steps: list[Step]) -> list[_Step]:
        return [
            _Step(
                title=title,
                note=note,
                width=sketch.width,
                box=sketch.box,
                cells=[numbers.setdefault(cell, len(numbers)) for cell in sketch.cells],
            )
            for title, note, sketch in Solving("", steps).shortened(RECORDED).steps
        ]

    kept = [_Path(path=name, steps=data(steps)) for name, steps in paths[:RECORDED_PATHS]]
    first, *others = kept
    example = "validation example 0"
    file = _File(example=example, cells=list(numbers), steps=first.steps, path=first.path, others=others)
    write_atomic(folder / SOLVING, file.model_dump_json().encode() + b"\n")


def read(folder: Path) -> Solving | None:
    """What `record` has kept, if anything.

    Raises:
        UsageError: the file is damaged.
    """
    try:
        file = _File.model_validate_json((folder / SOLVING).read_bytes())
        kept = [(file.path, file.steps), *((other.path, other.steps) for other in file.others)]
        paths = [(name, [_step(step, file.cells) for step in steps]) for name, steps in kept]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, IndexError):
        raise UsageError(f"{folder / SOLVING} is damaged: without it a report leaves its pictures out.") from None
    return _solving(file.example, paths)


def _step(step: _Step, cells: list[Cell]) -> Step:
    return Step(step.title, step.note, Sketch(step.width, tuple(cells[i] for i in step.cells), step.box))


__all__ = ["Solving", "Step", "read", "record", "solve", "solve_by_paths", "solve_run"]
