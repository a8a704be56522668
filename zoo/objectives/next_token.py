"""Next-token prediction, and its two readings of a fill-in task."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from tasks.protocol import IGNORE, Batch, Task
from tasks.registry import Options, UsageError
from zoo.objectives.base import Carry, Encoded, Objective, Update, register, scored
from zoo.protocol import Context


@register("next_token")
class NextToken(Objective):
    """Cross entropy at the scored positions.

    A `next_token` task is read as it stands. A `fill_in` task of L cells becomes, for a causal model, the sequence

        inputs[0] ... inputs[L-1]  separator  answer[0] ... answer[L-2]

    whose last L positions predict answer[0] ... answer[L-1]: the target where a cell is scored, its input elsewhere.
    The answer is generated greedily, each token read back. A model that is not causal predicts all cells in place.
    """

    class Config(Options):
        """label_smoothing: weight of the uniform distribution in the targets."""

        label_smoothing: float = Field(default=0.0, ge=0, lt=1)

    config: Config

    def __init__(self, config: Config, task: Task, *, causal: bool):
        super().__init__(config, task, causal=causal)
        if task.layout not in ("next_token", "fill_in"):
            raise UsageError(f"The objective next_token cannot teach {task.name}, whose layout is {task.layout}.")
        if task.layout == "next_token" and not causal:
            told = "which a model with causal=False can look up: set model.causal=true"
            raise UsageError(f"{task.name} asks for the next token, {told}.")
        self.generates = task.layout == "fill_in" and causal
        self.separator = task.vocab_size
        self.vocab_size = task.vocab_size + self.generates
        self.length = 2 * task.seq_len if self.generates else task.seq_len

    def encode(self, batch: Batch) -> Encoded:
        if not self.generates:
            positions = scored(batch.targets)
            return Encoded(batch.inputs, positions, batch.targets.reshape(-1)[positions], batch.timespans)
        answer = torch.where(batch.targets == IGNORE, batch.inputs, batch.targets)
        tokens = torch.cat([self._prompt(batch.inputs), answer[:, :-1]], 1)
        positions = scored(torch.cat([torch.full_like(batch.inputs, IGNORE), batch.targets], 1))
        timespans = None
        if batch.timespans is not None:  # the separator and the answer come at steps of 1
            timespans = F.pad(batch.timespans, (0, batch.inputs.shape[1]), value=1.0)
        return Encoded(tokens, positions, batch.targets[batch.targets != IGNORE], timespans)

    def updates(self, model: nn.Module, data: Encoded, carry: Carry, generator: torch.Generator) -> Iterator[Update]:
        logits, context = _logits(model, data)
        loss = F.cross_entropy(logits, data.targets, label_smoothing=self.config.label_smoothing)
        for extra in context.losses:
            loss = loss + extra
        rows = data.positions // data.tokens.shape[1]
        yield Update(loss, logits, data.targets, rows, context.metrics)

    def predict(self, model: nn.Module, batch: Batch) -> Tensor:
        return self._generate(model, batch) if self.generates else self.evaluate(model, batch)[0]

    @torch.no_grad()
    def evaluate(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        model.eval()
        data = self.encode(batch).to(_device(model))
        logits, _ = _logits(model, data)
        loss = F.cross_entropy(logits.float(), data.targets)
        if self.generates:
            return self._generate(model, batch), loss
        predictions = batch.inputs.clone()
        predictions.view(-1)[data.positions.cpu()] = logits.argmax(-1).cpu()
        return predictions, loss

    @torch.no_grad()
    def _generate(self, model: Any, batch: Batch) -> Tensor:
        """Greedy answers (n, L); cells that are not scored are given, so they are read, not predicted."""
        model.eval()
        device = _device(model)
        n, length = batch.inputs.shape
        known = (batch.targets == IGNORE).to(device)
        answer = batch.inputs.clone().to(device)
        state = model.init_state(n, capacity=2 * length)
        context = Context()
        if batch.timespans is not None:
            context.timespans = F.pad(batch.timespans, (0, 1), value=1.0).to(device)
        hidden, state = model.features(self._prompt(batch.inputs).to(device), state, context)
        logits = model.logits(hidden[:, -1])
        for t in range(length):
            answer[:, t] = torch.where(known[:, t], answer[:, t], logits.argmax(-1))
            if t + 1 < length:
                logits, state = model.step(answer[:, t], state)
        return answer.cpu()

    def _prompt(self, inputs: Tensor) -> Tensor:
        return F.pad(inputs, (0, 1), value=self.separator)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _logits(model: Any, data: Encoded) -> tuple[Tensor, Context]:
    """Logits at the scored positions only, (m, vocab): the head is often the widest matrix of a small model."""
    context = Context(timespans=data.timespans)
    hidden, _ = model.features(data.tokens, None, context)
    hidden = hidden.flatten(0, 1)
    if len(data.positions) < len(hidden):
        hidden = hidden.index_select(0, data.positions)
    return model.logits(hidden), context
