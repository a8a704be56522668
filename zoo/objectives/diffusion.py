"""What objectives of diffusion share: the cells of an answer, noise of a row's own, and noisy rows in parts."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from zoo.core.errors import UsageError
from zoo.core.options import Options
from zoo.objectives.base import (
    Encoded,
    Frame,
    Objective,
    Update,
    answered,
    answered_length,
    at_least_float32,
    row_parts,
    with_losses,
)
from zoo.objectives.draws import RowDraws
from zoo.ops.common import widest
from zoo.pieces import Pieces
from zoo.protocol import Context
from zoo.tasks.protocol import IGNORE, Batch, Task

TIME, CELL, HALF = range(3)  # purposes of a row's random numbers, see `zoo.objectives.unmasking` for further ones


class Estimate(Options):
    """Options of how the bound is estimated.

    Attributes:
        loss_draws: draws of times and noise for each row in evaluation. The loss is their mean; with two or more the
            figures have a 95 % interval over the draws, with the endings `_low` and `_high`.
    """

    loss_draws: int = Field(default=1, ge=1)


class Conditioning(Options):
    """Options of what a model reads beside the noisy row.

    Attributes:
        self_conditioning: the model reads its own predictions of the pass before too: at noisy cells, the embeddings of
            all tokens by their probabilities are added to that of the noisy token (Chen et al. 2022, arXiv 2208.04202;
            Strudel et al. 2022, arXiv 2211.04236, who append them). In training half of the rows, drawn at random, have
            predictions of a first pass, through which no gradient goes; the loss of an evaluation is that of the second
            of two passes.
    """

    self_conditioning: bool = False


def one_hot_with(
    tokens: Tensor, predictions: Tensor | None, vocab_size: int, soft: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """Weights (n, T, vocab_size) of tokens for a model: 1 for those (n, T) of the row, and the predictions (n, T, K) of
    the first K tokens, if there are any.

    Args:
        soft: positions (m,) of the flattened (n * T), and the weights (m, vocab_size) that stand there in place of a 1.
    """
    dtype = torch.get_default_dtype() if predictions is None else predictions.dtype
    weights = F.one_hot(tokens, vocab_size).to(dtype)
    if soft is not None:
        weights = weights.flatten(0, 1).index_copy(0, soft[0], soft[1].to(dtype)).unflatten(0, tokens.shape)
    return weights if predictions is None else weights + F.pad(predictions, (0, vocab_size - predictions.shape[-1]))


def predictions_at(logits: Tensor, positions: Tensor, shape: torch.Size) -> Tensor:
    """Probabilities (n, T, K) of logits (m, K) at positions of the flattened (n * T); 0 elsewhere. Without gradient."""
    found = logits.new_zeros(shape.numel(), logits.shape[-1])
    found[positions] = logits.detach().softmax(-1)
    return found.unflatten(0, shape)


def drawn_losses(data: Encoded, n: int, loss: Callable[[RowDraws], Tensor]) -> Tensor:
    """The mean loss, or (n,) the losses of n draws if there are several; the first is that of a single draw.

    Args:
        loss: from the random numbers of rows to their loss.
    """
    draws = RowDraws.of(data)
    losses = [loss(draws if i == 0 else draws.at(None, i)) for i in range(n)]
    return losses[0] if n == 1 else torch.stack(losses)


class Diffusion(Objective):
    """An objective that restores noisy cells of an answer from both sides; a subclass says what the noise is.

    The cells of the answer are: in a `fill_in` task with a token for blanks, the blank cells in place; in a text, all
    of it; if the answers are a text within the row (`Task.continues`), that text; otherwise the scored cells of a copy
    of the row, which is appended to the row.
    """

    config: Conditioning
    step_name = "pass"
    loss_is_bound: ClassVar[bool] = True

    def __init__(self, config: Conditioning, task: Task, *, causal: bool):
        super().__init__(config, task, causal=causal)
        if causal:
            told = "set model.causal=false, and write recurrent words as bidirectional(...)"
            raise UsageError(f"{self.name} guesses from both sides: {told}.")
        if task.layout not in ("next_token", "fill_in"):
            raise UsageError(f"The objective {self.name} cannot teach {task.name}, whose layout is {task.layout}.")
        self.in_place = task.is_language or task.blank is not None
        self.length = task.seq_len if self.in_place else answered_length(task, self.name)

    def encode(self, batch: Batch) -> Encoded:
        """The row with its answer; `positions` are the cells of the answer."""
        if self.in_place:
            asked = batch.targets != IGNORE
            cells = asked if self.task.is_language else asked & (batch.inputs == self.task.blank)
            tokens, timespans = torch.where(asked, batch.targets, batch.inputs), batch.timespans
        else:
            tokens, cells, timespans = answered(self.task, batch)
        positions = cells.flatten().nonzero().squeeze(1)
        return Encoded(tokens, positions, tokens.flatten()[positions], timespans, streams=batch.streams)

    def rows_of(self, data: Encoded) -> Batch:
        """The task's rows that `encode` arranged, for whole answers to be judged."""
        cells = cells_of(data)
        targets = data.tokens.masked_fill(~cells, IGNORE)
        if self.in_place:
            blank = self.task.blank
            return Batch(data.tokens if blank is None else data.tokens.masked_fill(cells, blank), targets)
        length = self.task.seq_len
        return Batch(data.tokens[:, :length], targets[:, -length:])

    def predictions(self, batch: Batch, tokens: Tensor) -> Tensor:
        """(n, L) in the task's coordinates, on the CPU, of tokens (n, T) as `encode` arranges them."""
        return tokens[:, -batch.inputs.shape[1] :].cpu()

    def takes_pieces(self) -> bool:
        return super().takes_pieces() and not self.config.self_conditioning

    def training_flops(self, model: Any, *, recompute: bool = False) -> int:
        first = model.flops_per_token(self.length) if self.config.self_conditioning else 0
        return super().training_flops(model, recompute=recompute) + first

    def _learned(
        self,
        model: nn.Module,
        data: Encoded,
        noisy: Noisy,
        generator: torch.Generator,
        parts: int,
        rows: slice | None,
        pieces: Pieces | None,
        before: int = 0,
    ) -> Iterator[Update]:
        """The updates of a batch with this noise; the arguments are those of `updates`.

        Args:
            before: steps that the model reads before a row.
        """
        informed = self._informed(data, generator)
        if pieces is not None:
            pieces = pieces.of_length(data.tokens.shape[1] + before)
            noisy = noisy.cells_in(pieces.steps, before)
        for here in (cut := row_parts(len(data.tokens), parts, rows)):
            part, share = noisy.of(here), (here.stop - here.start) / len(data.tokens)
            share *= 1.0 if pieces is None else pieces.share
            timespans = None if data.timespans is None else data.timespans[here]
            rows_informed = None if informed is None else informed[here]
            logits, context = self._noisy_logits(model, part, timespans, pieces, rows_informed)
            loss = with_losses(self._loss(logits, part), context, share)
            yield Update(loss, logits, part.targets, part.rows, context.metrics, share, here is cut[-1])

    @abstractmethod
    def _loss(self, logits: Tensor, noisy: Noisy) -> Tensor:
        """What noisy cells, of the logits (m, vocab of the task), add to the loss of the whole batch."""

    @abstractmethod
    def _logits(
        self,
        model: Any,
        noisy: Noisy,
        timespans: Tensor | None,
        pieces: Pieces | None = None,
        before: Tensor | None = None,
    ) -> tuple[Tensor, Context]:
        """Logits (m, vocab of the task) at the cells of noisy rows.

        Args:
            before: (n, T, vocab of the task) what was predicted before, with `self_conditioning`; by default nothing.
        """

    def _noisy_logits(
        self,
        model: Any,
        noisy: Noisy,
        timespans: Tensor | None,
        pieces: Pieces | None = None,
        informed: Tensor | None = None,
    ) -> tuple[Tensor, Context]:
        """As `_logits`, with `self_conditioning` those of a second pass.

        Args:
            informed: (n,) bool, which rows then have the predictions of the first; by default all.
        """
        before = None
        if self.config.self_conditioning:
            with torch.no_grad():
                first, _ = self._logits(model, noisy, timespans, pieces)
                before = predictions_at(first, noisy.positions, noisy.tokens.shape)
            before = before if informed is None else before * informed[:, None, None]
        return self._logits(model, noisy, timespans, pieces, before)

    def _informed(self, data: Encoded, generator: torch.Generator) -> Tensor | None:
        """(n,) bool, which rows of a batch learn with predictions, where any do: half of them, drawn at random."""
        if not self.config.self_conditioning:
            return None
        return (torch.rand(len(data.tokens), generator=generator) < 0.5).to(data.tokens.device)


def cells_of(data: Encoded) -> Tensor:
    """(n, T) bool, the cells of the answers."""
    cells = torch.zeros_like(data.tokens, dtype=torch.bool)
    cells.view(-1)[data.positions] = True
    return cells


def times_of(source: torch.Generator | RowDraws, n: int, antithetic: bool) -> Tensor:
    """(n,) numbers in [0, 1), one a row: from its own stream, or from a generator.

    Args:
        antithetic: the i-th of a generator's is in the i-th of n equal parts.
    """
    if isinstance(source, RowDraws):
        return source.uniform(TIME)
    t = torch.rand(n, generator=source)
    return (t + torch.arange(n)) / n if antithetic else t


def hit(data: Encoded, source: torch.Generator | RowDraws, p: Tensor) -> Tensor:
    """(m,) bool, which cells of the answers are noisy, each with the probability p (n,) of its row."""
    device = data.tokens.device
    if isinstance(source, RowDraws):
        return (source.uniform(CELL, data.tokens.shape[1]) < p[:, None]).to(device).flatten()[data.positions]
    return torch.rand(len(data.positions), generator=source).to(device) < p.to(device)[data.rows]


def worth_of(batch: Batch) -> Tensor:
    """(n,) of each row in the loss of an evaluation, by its scored cells."""
    n_scored = (batch.targets != IGNORE).sum(1).double()
    return n_scored / n_scored.sum().clamp(min=1)


def shares(data: Encoded, weight: Tensor, worth: Tensor | None) -> Tensor:
    """(n,) of a cell of each row in the loss: the weight of its row's time over the number of cells.

    Args:
        weight: (n,) of the row's time, on the CPU.
        worth: (n,) of each row in the loss, on the CPU; by default the same for all that have an answer.
    """
    device = data.tokens.device
    cells = torch.bincount(data.rows, minlength=len(data.tokens))
    if worth is None:
        worth = (cells > 0) / (cells > 0).sum()
    if widest(device) is torch.float32:
        weight, worth = weight.float(), worth.float()
    return weight.to(device) * worth.to(device) / cells.clamp(min=1)


def halves_of(cells: Tensor, draws: RowDraws) -> tuple[Tensor, Tensor]:
    """The cells (n, T) in two, drawn at random: each is to be guessed from the other."""
    first = (draws.uniform(HALF, cells.shape[1]) < 0.5).to(cells.device) & cells
    return first, cells & ~first


def guessed_halves(
    predict: Callable[[Tensor, Tensor], Tensor], data: Encoded, cells: Tensor, draws: RowDraws, mask: int
) -> Iterator[Tensor]:
    """Tokens (n, T) after each half of the cells was guessed from the other; those still to be guessed are masks.

    Args:
        predict: from rows (n, T) in which one half is masked, and the positions (m,) of its cells, to their logits.
    """
    answer = data.tokens.masked_fill(cells, mask)
    for half in halves_of(cells, draws):
        positions = half.flatten().nonzero().squeeze(1)
        logits = predict(data.tokens.masked_fill(half, mask), positions)
        answer = answer.clone()
        answer.view(-1)[positions] = logits.argmax(-1)
        yield answer


def unmasked_frames(answers: Iterable[Tensor], batch: Batch, mask: int) -> Iterator[Frame]:
    """What is known after every pass, in the task's coordinates, of tokens (n, T) that end with those of the task."""
    for answer in answers:
        tokens = answer[:, -batch.inputs.shape[1] :].cpu()
        asked, hidden = batch.targets != IGNORE, tokens == mask
        yield Frame(torch.where(asked & ~hidden, tokens, batch.inputs), hidden)


class Noisy(NamedTuple):
    """Rows with noisy cells.

    Attributes:
        tokens: (n, T).
        positions: (m,) cells that the loss is of, in the flattened (n * T).
        targets: (m,) what they hold.
        rows: (m,) the row of each.
        weight: (m,) of each in the loss.
        signal: (n,) share of the signal that is left at each row's time, where the loss needs it.
        rate: (n,) how fast it falls there, where not as fast for all rows.
        soft: (m, K) weights of tokens that the model reads at the cells in place of tokens, where it does.
    """

    tokens: Tensor
    positions: Tensor
    targets: Tensor
    rows: Tensor
    weight: Tensor
    signal: Tensor | None = None
    rate: Tensor | None = None
    soft: Tensor | None = None

    def of(self, rows: slice) -> Noisy:
        """Some of the rows; the weights are still those of the whole batch."""
        if rows.stop - rows.start == len(self.tokens):
            return self
        here = (self.rows >= rows.start) & (self.rows < rows.stop)
        positions = self.positions[here] - rows.start * self.tokens.shape[1]
        own, soft = self.rows[here] - rows.start, None if self.soft is None else self.soft[here]
        signal, rate = (None if each is None else each[rows] for each in (self.signal, self.rate))
        return Noisy(self.tokens[rows], positions, self.targets[here], own, self.weight[here], signal, rate, soft)

    def cells_in(self, steps: slice, before: int = 0) -> Noisy:
        """The same rows, and those of their cells that a piece of the steps has.

        Args:
            steps: of the piece.
            before: tokens that the model reads before a row.
        """
        step = self.positions % self.tokens.shape[1] + before
        here = (step >= steps.start) & (step < steps.stop)
        of_cells = ("positions", "targets", "rows", "weight", *(() if self.soft is None else ("soft",)))
        return self._replace(**{k: getattr(self, k)[here] for k in of_cells})


def weighted_nats(logits: Tensor, noisy: Noisy) -> Tensor:
    """The sum over noisy cells of -log p times their weight; logits (m, tokens)."""
    nats = F.cross_entropy(at_least_float32(logits), noisy.targets, reduction="none")
    return (nats * noisy.weight).sum()


def read_piece(
    pieces: Pieces, tokens: Tensor, positions: Tensor, timespans: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What the model reads of a piece of rows (n, T), whose `positions` are then counted within it."""
    T, steps = tokens.shape[1], pieces.steps
    positions = positions // T * pieces.sizes[pieces.rank] + positions % T - steps.start
    return tokens[:, steps], positions, None if timespans is None else timespans[:, steps]


__all__ = [
    "Conditioning",
    "Diffusion",
    "Estimate",
    "Noisy",
    "cells_of",
    "drawn_losses",
    "guessed_halves",
    "halves_of",
    "hit",
    "one_hot_with",
    "predictions_at",
    "read_piece",
    "shares",
    "times_of",
    "unmasked_frames",
    "weighted_nats",
    "worth_of",
]
