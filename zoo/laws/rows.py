"""Law 14: a row's loss and answer are its own, whatever its batch; a law of a model together with an objective."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from zoo.laws.compare import require
from zoo.models.modes import evaluation_mode
from zoo.objectives.base import Objective
from zoo.objectives.draws import row_names
from zoo.tasks.protocol import Batch, split_rows, take


class _Answers(NamedTuple):
    predictions: Tensor
    loss: float


def _answers(model: nn.Module, objective: Objective, rows: Batch, batch_size: int) -> _Answers:
    predictions, losses, weights = [], [], []
    for part in split_rows(rows, batch_size):
        predicted, loss = objective.evaluate(model, part)
        predictions.append(predicted)
        losses.append(loss.double().mean().cpu())
        weights.append(part.scored.sum())
    weight = torch.stack(weights).double()
    return _Answers(torch.cat(predictions), ((torch.stack(losses) * weight).sum() / weight.sum()).item())


def batch_mates(model: nn.Module, objective: Objective, rows: Batch, others: Batch, tolerance: float = 1e-9) -> None:
    """Answers and losses of rows depend on no batch size, order or other row.

    Args:
        model: of any objective, in float64 for the default tolerance.
        objective: what the model answers by.
        rows: of the objective's task, ten or so; with names of their random streams (`Batch.streams`) or without.
        others: further rows of that task, of the same length.

    Raises:
        LawBroken: what does not hold.
    """
    n, named = len(rows.inputs), rows.streams is not None
    if not named:  # copies of a row in one batch draw apart, so that names of the whole go with the parts
        rows = rows._replace(streams=row_names(objective.encode(rows)))
    with torch.no_grad(), evaluation_mode(model):
        whole = _answers(model, objective, rows, n)

        def same(found: _Answers, expected: Tensor, what: str) -> None:
            require(_agree(found.predictions, expected, tolerance), f"answers change {what}")
            off = abs(found.loss - whole.loss)
            require(off <= tolerance * abs(whole.loss), f"the loss changes {what}: {found.loss} against {whole.loss}")

        for size in (1, 3):
            same(_answers(model, objective, rows, size), whole.predictions, f"in batches of {size} rows")
        order = torch.randperm(n, generator=torch.Generator("cpu").manual_seed(1), device="cpu")
        mixed = _answers(model, objective, take(rows, order), 4)
        same(mixed, whole.predictions[order], "in another order")
        for i in (0, n - 3):
            alone = take(rows, slice(i, i + 1))
            alone = alone if named else alone._replace(streams=None)
            said, loss = objective.evaluate(model, alone)
            require(bool(loss.isfinite().all()), f"the loss of row {i} is not finite")
            require(_agree(said[0], whole.predictions[i], tolerance), f"the answer of row {i} alone is another")
            require(torch.equal(objective.predict(model, alone), said), f"row {i}: predict and evaluate differ")
            together = _beside(objective, alone, others)
            found = objective.predict(model, together)[0]
            require(_agree(found, said[0], tolerance), f"the answer of row {i} beside other rows is another")


def _agree(answers: Tensor, others: Tensor, tolerance: float) -> bool:
    """Whether answers are the same; real vectors up to rounding."""
    if not answers.is_floating_point():
        return torch.equal(answers, others)
    return torch.allclose(answers, others, rtol=tolerance, atol=tolerance)


def _beside(objective: Objective, alone: Batch, others: Batch) -> Batch:
    """A row, and others behind it."""
    fields: dict[str, Any] = {"slices": {}, "streams": None}
    for name in ("inputs", "targets", "timespans", "puzzles", "lengths", "mask"):
        parts = getattr(alone, name), getattr(others, name)
        fields[name] = None if parts[0] is None else torch.cat(parts)
    if alone.streams is not None:
        fields["streams"] = torch.cat([alone.streams, row_names(objective.encode(others))])
    return alone._replace(**fields)
