"""Next-token prediction, and its two readings of a fill-in task."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from zoo.core.errors import UsageError
from zoo.core.options import Options
from zoo.models.modes import evaluation_mode
from zoo.objectives.base import (
    Carry,
    Encoded,
    Frame,
    Objective,
    Update,
    appended,
    at_least_float32,
    last_of,
    register,
    scored,
    with_losses,
)
from zoo.pieces import Pieces
from zoo.protocol import Context
from zoo.tasks.protocol import IGNORE, Batch, Task


@register("next_token")
class NextToken(Objective):
    """Predict the next token, or all cells of a puzzle at once: cross entropy at the scored positions.

    A `next_token` task is read as it is. A `fill_in` task of L cells becomes, for a causal model, the sequence

        inputs[0] ... inputs[L-1]  separator  answer[0] ... answer[L-2]

    whose last L positions predict answer[0] ... answer[L-1]: the target where a cell is scored, its input elsewhere.
    The answer is generated greedily, each token read back. A model that is not causal predicts all cells in place.

    A `reconstruct` task is read as it is, and the model's decoder predicts every position from the features of the
    last.

    With `free_running`, an answer of a `next_token` task that is a text (`Task.continues`) is generated too. The loss
    and the training still read the given tokens.
    """

    class Config(Options):
        """label_smoothing: weight of the uniform distribution in the targets.
        free_running: predict with the model's own tokens as input instead of the given ones.
        """

        label_smoothing: float = Field(default=0.0, ge=0, lt=1)
        free_running: bool = False

    config: Config

    def __init__(self, config: Config, task: Task, *, causal: bool):
        super().__init__(config, task, causal=causal)
        if task.layout == "next_token" and not causal:
            told = "which a model with causal=False can look up: set model.causal=true"
            raise UsageError(f"{task.name} asks for the next token, {told}.")
        if config.free_running and not task.continues:
            raise UsageError(
                f"next_token: free_running=True is for answers that are a text, which {task.name}'s are not."
            )
        self.generates = task.layout == "fill_in" and causal
        self.reconstructs = task.layout == "reconstruct"
        self.reads_back = self.generates or config.free_running
        self.step_name = "token" if self.reads_back else "step"
        self.separator = task.vocab_size
        self.vocab_size = task.vocab_size + self.generates
        self.length = 2 * task.seq_len if self.generates else task.seq_len

    def encode(self, batch: Batch) -> Encoded:
        if not self.generates:
            positions = scored(batch.targets)
            return Encoded(batch.inputs, positions, batch.targets.reshape(-1)[positions], batch.timespans)
        tokens, cells, timespans = appended(batch, self.separator)
        positions = cells[:, 1:].flatten().nonzero().squeeze(1)  # each is told by the step before it
        timespans = None if timespans is None else timespans[:, :-1].contiguous()
        return Encoded(tokens[:, :-1].contiguous(), positions, batch.targets[batch.targets != IGNORE], timespans)

    def updates(
        self,
        model: nn.Module,
        data: Encoded,
        carry: Carry,
        generator: torch.Generator,
        parts: int = 1,
        rows: slice | None = None,
        pieces: Pieces | None = None,
    ) -> Iterator[Update]:
        whole = data
        if pieces is not None:
            pieces = pieces.of_length(data.tokens.shape[1])
            data = data.piece(pieces.steps)
        split = data.split(parts, rows)
        for part in split:
            logits, context = self._logits(model, part, pieces)
            share, smoothing = part.n_steps / whole.n_steps, self.config.label_smoothing
            if part is whole:
                loss = F.cross_entropy(logits, part.targets, label_smoothing=smoothing)
            else:  # of all scored positions of the batch, of which the parts have unequal numbers
                loss = F.cross_entropy(logits, part.targets, label_smoothing=smoothing, reduction="sum")
                loss = loss / len(whole.targets)
            loss = with_losses(loss, context, share)
            yield Update(loss, logits, part.targets, part.rows, context.metrics, share, part is split[-1])

    def takes_pieces(self) -> bool:
        return not self.reconstructs  # from the features of a whole row

    def passes(self, model: nn.Module, batch: Batch) -> int:
        if not self.reads_back:
            return 1
        data = self.encode(batch)
        columns = data.positions % data.tokens.shape[1]
        return int(columns.max() - columns.min()) + 1

    @torch.no_grad()
    def solve(self, model: nn.Module, batch: Batch) -> Iterator[Frame]:
        """The answers after every generated token, or after a single step if all cells are predicted at once."""
        cells = batch.targets != IGNORE
        if not self.reads_back:
            yield Frame(self.evaluate(model, batch)[0], torch.zeros_like(cells))
            return
        with evaluation_mode(model):
            for said, hidden in self._generate(model, self.encode(batch).to(_device(model))):
                unsaid = torch.zeros_like(cells)
                unsaid[cells] = hidden.cpu()
                tokens = batch.inputs.clone()
                tokens[cells] = said.cpu()
                yield Frame(torch.where(unsaid, batch.inputs, tokens), unsaid)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        data = self.encode(batch).to(_device(model))
        with evaluation_mode(model):
            logits, _ = self._logits(model, data)
            loss = F.cross_entropy(at_least_float32(logits), data.targets)
            said = last_of(self._generate(model, data))[0] if self.reads_back else self._told(logits)
        predictions = batch.inputs.clone()
        predictions[batch.targets != IGNORE] = said.cpu()
        return predictions, loss

    @torch.no_grad()
    def _generate(self, model: Any, data: Encoded) -> Iterator[tuple[Tensor, Tensor]]:
        """Greedy answers: what is scored is predicted and read back; all else is given, so it is only read.

        Yields:
            (m,) token ids at the scored positions, and (m,) which of them are still to be said, after each said token.
        """
        n, length = data.tokens.shape
        asked = torch.zeros(n * length, dtype=torch.bool, device=data.tokens.device)
        asked[data.positions] = True
        asked = asked.view(n, length)
        columns = (asked.any(0).nonzero().squeeze(1) + 1).tolist()
        start, end = columns[0], columns[-1]
        context = Context(timespans=None if data.timespans is None else data.timespans[:, :start])
        state = model.init_state(n, capacity=length)
        hidden, state = model.features(data.tokens[:, :start], state, context)
        logits = model.logits(hidden[:, -1])
        said = torch.zeros_like(data.tokens)
        for t in range(start, end + 1):
            said[:, t - 1] = self._told(logits)
            if t in columns:
                yield said.view(-1)[data.positions], data.positions % length >= t
            if t < end:
                logits, state = model.step(torch.where(asked[:, t - 1], said[:, t - 1], data.tokens[:, t]), state)

    def _logits(self, model: Any, data: Encoded, pieces: Pieces | None = None) -> tuple[Tensor, Context]:
        """Logits at the scored positions only, (m, vocab): the head is often the widest matrix of a small model."""
        context = Context(timespans=data.timespans, pieces=pieces)
        hidden, _ = model.features(data.tokens, None, context)
        if self.reconstructs:
            if model.decoder is None:
                raise UsageError(f"{self.task.name} is told from a row's last features: the model needs decoder=True.")
            hidden = model.decoder(hidden[:, -1], data.tokens.shape[1])
        hidden = hidden.flatten(0, 1)
        if len(data.positions) < len(hidden):
            hidden = hidden.index_select(0, data.positions)
        return model.logits(hidden), context

    def _told(self, logits: Tensor) -> Tensor:
        """The most probable tokens of the task: the separator is no answer."""
        return logits[..., : self.task.vocab_size].argmax(-1)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
