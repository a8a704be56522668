"""Scores of rows: of answers that are right or wrong, and of real numbers that are more or less near."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zoo.tasks.batch import IGNORE, Batch

_LEAST = 1e-12
"""Of what the ratio of errors divides by, so that a task whose trivial answers are right gives a number."""


def exactly(batch: Batch, predictions: Tensor) -> Tensor:
    """(n,) bool, the rows with every scored position right."""
    return ((predictions == batch.targets) | (batch.targets == IGNORE)).all(1)


def squared_errors(batch: Batch, predictions: Tensor) -> Tensor:
    """(n,) the mean over each row's scored steps of the squared error, itself the mean over the numbers of a step."""
    scored = batch.scored
    errors = (predictions.double() - batch.targets.double()).square().mean(-1).masked_fill(~scored, 0.0)
    return errors.sum(1) / scored.sum(1).clamp(min=1)


def summary(figures: dict[str, Tensor], slices: dict[str, Tensor]) -> dict[str, Any]:
    def mean(rows: Tensor | slice) -> dict[str, Any]:
        picked = {k: v[rows] for k, v in figures.items()}
        return {k: v.double().mean().item() for k, v in picked.items()} | {"n": len(picked["exact"])}

    result: dict[str, Any] = mean(slice(None))
    result["slices"] = {
        name: {str(value): mean(values == value) for value in values.unique().tolist()}
        for name, values in slices.items()
    }
    return result


