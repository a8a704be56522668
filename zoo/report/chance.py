"""What chance gives on a task: the score of the best constant answer."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import Any

import torch

from zoo.tasks.protocol import create_task

ROWS = 2048


def chance_of(task: Mapping[str, Any], rows: int = ROWS, figure: str = "accuracy") -> float:
    """The score on test rows of always giving the answer that is most frequent in validation rows.

    Args:
        task: its name and options.
        rows: how many of each split are drawn.
        figure: of the score.

    Raises:
        UsageError: an unknown task, or options that it does not have.
    """
    return _chance(json.dumps(task, sort_keys=True), rows)[figure]


@functools.cache
def _chance(asked: str, rows: int) -> dict[str, float]:
    task = create_task(json.loads(asked, object_hook=_tuples))
    known, test = (task.sample(rows, split=split, seed=0) for split in ("validation", "test"))
    answer = known.targets[known.targets >= 0].mode().values
    score = task.score(test, torch.full_like(test.targets, int(answer)))
    return {figure: float(score[figure]) for figure in ("accuracy", "exact")}


def _tuples(options: dict[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
