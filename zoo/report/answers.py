"""What each run's model answers to the same example of its task."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from zoo.core.errors import UsageError
from zoo.core.options import tuples
from zoo.core.run_files import CHECKPOINTS
from zoo.report import solving, units
from zoo.report.charts import Row
from zoo.report.runs import Run
from zoo.report.style import house_style, to_svg
from zoo.tasks.protocol import Split

SPLIT: Split = "validation"
EXAMPLE = 0
MOST, SECONDS = 40, 90
"""Largest number of models that are run, and the time for all of them."""


class Answer(NamedTuple):
    """A model's answer: as text, as a picture or step by step where there are such; or why there is none."""

    row: Row
    verdict: str
    text: str = ""
    svg: str = ""
    animation: str = ""
    steps: str = ""


def answers(runs: Sequence[Run], rows: Sequence[Row]) -> list[Answer]:
    """The answer of each run that still has its weights, or why its model was not run; in the order of the runs."""
    found: list[Answer] = []
    end = time.monotonic() + SECONDS
    for run, row in zip(runs, rows, strict=True):
        if not (run.path / CHECKPOINTS).is_dir():
            continue
        if len(found) >= MOST or time.monotonic() > end:
            found.append(Answer(row, "not asked: enough others were"))
            continue
        try:
            found.append(_answer(run, row))
        except (UsageError, RuntimeError) as error:
            found.append(Answer(row, f"not asked: {str(error).splitlines()[0]}"))
    return found


def _answer(run: Run, row: Row) -> Answer:
    import torch

    from zoo import tasks
    from zoo.training.generating import answer_example

    text, data = answer_example(run.path, EXAMPLE, split=SPLIT, device="cpu")
    task = tasks.create_task(tuples(run.section("task")))
    svg = ""
    if type(task).draw is not tasks.Task.draw:  # the default picture is the same text
        batch = task.sample(1, split=SPLIT, seed=0, start=EXAMPLE)
        with house_style():
            figure = task.draw(batch, 0, torch.tensor([data["predictions"]]))
        svg = to_svg(figure, f"answer-{row.id}", f"The answer of {row.label}, drawn.")
    moving = solving.animation_html(run.path, f"solving-{row.id}")
    return Answer(row, _verdict(data), text, svg, moving, solving.filmstrip_svg(run.path))


def _verdict(data: dict[str, Any]) -> str:
    error, trivial = (units.number(data.get(key)) for key in ("mse", "trivial_mse"))
    if error is not None and trivial is not None:
        return f"mean squared error {units.plain(error)}; trivial {units.plain(trivial)}"
    accuracy = units.number(data.get("accuracy"))
    return "all right" if data.get("exact") == 1 else f"{units.percent(accuracy or 0)} right"
