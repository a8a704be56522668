"""Scores of rows: of answers that are right or wrong, and of real numbers that are more or less near."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from zoo.tasks.batch import IGNORE, Batch

LOWER_IS_BETTER = frozenset({"loss", "bits_per_byte", "mse", "mse_ratio"})
"""Figures of which less is better; of all others, a task's own too unless it says so, more is."""
_LEAST = 1e-12  # of what the ratio of errors divides by: a trivial predictor may be right everywhere


def exactly(batch: Batch, predictions: Tensor) -> Tensor:
    """(n,) bool, the rows with every scored position right."""
    return ((predictions == batch.targets) | (batch.targets == IGNORE)).all(1)


def squared_errors(batch: Batch, predictions: Tensor) -> Tensor:
    """(n,) the mean over each row's scored steps of the squared error, itself the mean over the numbers of a step."""
    scored = batch.scored
    errors = (predictions.double() - batch.targets.double()).square().mean(-1).masked_fill(~scored, 0.0)
    return errors.sum(1) / scored.sum(1).clamp(min=1)


def summary(figures: dict[str, Tensor], slices: dict[str, Tensor]) -> dict[str, Any]:
    """The means of the figures of rows, of all rows and of those of each value of each slice; of errors their ratio to
    the trivial predictor's too."""

    def mean(rows: Tensor | slice) -> dict[str, Any]:
        picked = {k: v[rows].double() for k, v in figures.items()}
        means = {k: v.mean().item() for k, v in picked.items()}
        if "trivial_mse" in means:
            means["mse_ratio"] = means["mse"] / max(means["trivial_mse"], _LEAST)
        return means | {"n": len(next(iter(picked.values())))}

    result: dict[str, Any] = mean(slice(None))
    result["slices"] = {
        name: {str(value): mean(values == value) for value in values.unique().tolist()}
        for name, values in slices.items()
    }
    return result
