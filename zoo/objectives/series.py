"""What the objectives of series have in common: one pass over real vectors, and a loss at the scored steps."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from zoo.core.needs import Need, Needs
from zoo.core.options import Options
from zoo.models.config import ModelConfig
from zoo.models.modes import evaluation_mode
from zoo.objectives.base import Carry, Encoded, Frame, Objective, Update, at_least_float32, with_losses
from zoo.protocol import Context
from zoo.tasks.protocol import Batch, Task


class SeriesObjective(Objective):
    """Read a series of real vectors once and answer at every scored step; a subclass says by which loss."""

    series = True

    def __init__(self, config: Options, task: Task, *, causal: bool):
        super().__init__(config, task, causal=causal)
        self.vocab_size, self.length = 0, task.seq_len

    def needs(self, draft: ModelConfig) -> Needs:
        return super().needs(draft)._replace(vocab_size=Need(0, f"{self.task.name} has no tokens"))

    @abstractmethod
    def losses(self, outputs: Tensor, targets: Tensor, *, learning: bool) -> Tensor:
        """(m,) losses of outputs (m, n_outputs) in float32 or more, at targets (m,) or (m, D_out); `learning` says
        whether they are to be differentiated, or measured."""

    @abstractmethod
    def answers(self, outputs: Tensor) -> Tensor:
        """Answers in the form of the targets, from outputs (n, L, n_outputs)."""

    def encode(self, batch: Batch) -> Encoded:
        positions = batch.scored.flatten().nonzero().squeeze(1)
        targets = batch.targets.flatten(0, 1)[positions]
        more = {"streams": batch.streams, "lengths": batch.lengths}
        return Encoded(batch.inputs, positions, targets, batch.timespans, **more)

    def updates(
        self,
        model: nn.Module,
        data: Encoded,
        carry: Carry,
        generator: torch.Generator,
        parts: int = 1,
        rows: slice | None = None,
    ) -> Iterator[Update]:
        split = data.split(parts, rows)
        for part in split:
            hidden, context = self._features(model, part)
            outputs = model.logits(hidden.flatten(0, 1).index_select(0, part.positions))  # type: ignore[operator]
            loss = self.losses(at_least_float32(outputs), part.targets, learning=True).sum() / len(data.targets)
            share = len(part.tokens) / len(data.tokens)
            loss = with_losses(loss, context, share)
            yield Update(loss, outputs, part.targets, part.rows, context.metrics, share, part is split[-1])

    @torch.no_grad()
    def solve(self, model: nn.Module, batch: Batch) -> Iterator[Frame]:
        """The answers, which are there after a single step."""
        yield Frame(self.evaluate(model, batch)[0], torch.zeros_like(batch.scored))

    @torch.no_grad()
    def evaluate(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Answers at every step, scored or not, and the mean loss of a scored one."""
        data = self.encode(batch).to(next(model.parameters()).device)
        with evaluation_mode(model):
            hidden, _ = self._features(model, data)
            outputs = at_least_float32(model.logits(hidden))  # type: ignore[operator]
        chosen = outputs.flatten(0, 1).index_select(0, data.positions)
        losses = self.losses(chosen, data.targets, learning=False)
        return self.answers(outputs).cpu(), losses.mean()

    def _features(self, model: Any, data: Encoded) -> tuple[Tensor, Context]:
        context = Context(lengths=data.lengths, timespans=data.timespans)
        hidden, _ = model.features(data.tokens, None, context)
        return hidden, context
