"""Block diffusion: blocks follow each other from left to right, and a block is unmasked from both sides."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from zoo.core.errors import UsageError
from zoo.models.modes import evaluation_mode
from zoo.objectives.base import (
    Carry,
    Encoded,
    Frame,
    Objective,
    Update,
    answered,
    answered_length,
    appended,
    at_least_float32,
    last_of,
    register,
    row_parts,
    with_losses,
)
from zoo.objectives.diffusion import (
    CELL,
    TIME,
    Estimate,
    Noisy,
    cells_of,
    drawn_losses,
    guessed_halves,
    shares,
    unmasked_frames,
    weighted_nats,
    worth_of,
)
from zoo.objectives.draws import RowDraws
from zoo.objectives.unmasking import Order, drawn, step_of
from zoo.protocol import Context, State
from zoo.states import fork, join
from zoo.tasks.protocol import IGNORE, Batch, Task


@register("block_diffusion")
class BlockDiffusion(Objective):
    """Predict masked cells of a block from the block and from all blocks before it, with a bound on the likelihood.

    A row is cut into blocks of `block_length` steps. Each block draws a time t, every cell of the answer in it is
    masked with the probability t, and the masked cells are predicted (Arriola et al. 2025, arXiv 2503.09573, BD3-LM):

        loss = mean over rows of  sum over masked cells of 1 / t * -log p_model(cell) / (number of cells of the answer)

    The model reads from left to right (`causal=True`), and any mixer with a state will do: the state after the finished
    blocks is the cache. From a copy of it the noisy block is read `readings` times in a row, and its cells are
    predicted in the last reading. At the second reading every step has seen the whole block, so that two readings
    predict from both sides; one reading sees only what is to the left within the block. A finished block is read once
    more, clean, for the state of the next. In training, the states at the starts of all blocks are joined into one
    batch, so that all noisy blocks of a row are read at once.

    The answer of a puzzle follows the puzzle and a separator, as under `next_token`. A text is the answer itself. If
    the answers are a text within the row (`Task.continues`), they are answered there; otherwise in a copy of the row.
    """

    class Config(Order, Estimate):
        """The options; those of `Order` belong to the sampler, and their steps are those of a block.

        Attributes:
            block_length: steps of a row in a block. With 1 the loss is that of the next token.
            readings: how often a noisy block is read before its cells are predicted.
            eps: the least time.
            mask_range: the least and the largest probability of a mask in training (the clipped schedules of BD3-LM).
            antithetic: in training, the i-th of n blocks draws its time from the i-th of n equal parts.
        """

        block_length: int = Field(default=4, ge=1)
        readings: int = Field(default=2, ge=1)
        eps: float = Field(default=1e-3, gt=0, lt=1)
        mask_range: tuple[float, float] = (0.0, 1.0)
        antithetic: bool = True

        @model_validator(mode="after")
        def _ordered(self) -> BlockDiffusion.Config:
            if self.order == "learned":
                raise UsageError('order="learned" is of the objective masked_diffusion, and block_diffusion has none.')
            low, high = self.mask_range
            if not 0 <= low <= high <= 1 or high < self.eps:
                raise UsageError(
                    f"mask_range={self.mask_range} is not allowed: it should be two shares, as in (0.3, 0.8)."
                )
            return self

    step_name = "pass"
    loss_is_bound = True
    config: Config

    def __init__(self, config: Config, task: Task, *, causal: bool):
        super().__init__(config, task, causal=causal)
        if not causal:
            raise UsageError(
                "block_diffusion keeps the state after finished blocks, which a model with causal=False has not: "
                "set model.causal=true, or objective=masked_diffusion."
            )
        if task.layout not in ("next_token", "fill_in"):
            raise UsageError(f"The objective block_diffusion cannot teach {task.name}, whose layout is {task.layout}.")
        self.mask_token = task.vocab_size
        self.separator = task.vocab_size + 1
        self.in_place = task.is_language or bool(task.continues)
        self.vocab_size = task.vocab_size + 1 + (not self.in_place)
        self.first = 0 if self.in_place else task.seq_len + 1
        if task.is_language:
            self.n_steps = task.seq_len
        elif self.in_place:
            self.n_steps = answered_length(task, self.name)
        else:
            self.n_steps = 2 * task.seq_len + 1
        self.length = self.n_steps + (config.readings - 1) * config.block_length

    def encode(self, batch: Batch) -> Encoded:
        """The row with its answer; `positions` are the cells of the answer."""
        asked = batch.targets != IGNORE
        if self.task.is_language:
            tokens, cells, timespans = torch.where(asked, batch.targets, batch.inputs), asked, batch.timespans
        elif self.in_place:
            tokens, cells, timespans = answered(self.task, batch)
        else:
            tokens, cells, timespans = appended(batch, self.separator)
            if self.task.blank is not None:
                blank = F.pad(batch.inputs == self.task.blank, (tokens.shape[1] - asked.shape[1], 0))
                cells = cells & blank
        positions = cells.flatten().nonzero().squeeze(1)
        return Encoded(tokens, positions, tokens.flatten()[positions], timespans, streams=batch.streams)

    def updates(
        self,
        model: nn.Module,
        data: Encoded,
        carry: Carry,
        generator: torch.Generator,
        parts: int = 1,
        rows: slice | None = None,
    ) -> Iterator[Update]:
        noisy, cells = self._noise(data, generator), cells_of(data)
        for here in (cut := row_parts(len(data.tokens), parts, rows)):
            part, share = noisy.of(here), (here.stop - here.start) / len(data.tokens)
            timespans = None if data.timespans is None else data.timespans[here]
            clean, noise, own = data.tokens[here], part.tokens, cells[here]
            logits, losses, metrics = self._logits(model, clean, own, noise, part.positions, timespans)
            loss = with_losses(weighted_nats(logits, part), Context(losses=losses), share)
            yield Update(loss, logits, part.targets, part.rows, metrics, share, here is cut[-1])

    def passes(self, model: nn.Module, batch: Batch) -> int:
        """Passes of the model, over the prompt, noisy blocks and finished blocks alike."""
        data = self.encode(batch)
        cells = cells_of(data)
        needed = self._needed(cells)
        clean = len(self._clean(needed))
        if self.task.is_language:
            return 2 * (clean + self._groups(needed))
        return clean + sum(self._most(cells[:, block].sum(1)) for block in needed)

    @torch.no_grad()
    def solve(self, model: nn.Module, batch: Batch) -> Iterator[Frame]:
        """The answers after every pass that unmasked something."""
        with evaluation_mode(model):
            data = self.encode(batch).to(next(model.parameters()).device)
            yield from unmasked_frames(self._answers(model, data), batch, self.mask_token)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Predictions, and the bound on the answer's negative log likelihood in nats for each of its cells.

        Every block's time and masks are from its row's own stream. A text is not written anew: each half of its cells,
        drawn at random, is guessed from the rest of its block and the text before it.
        """
        with evaluation_mode(model):
            data = self.encode(batch).to(next(model.parameters()).device)
            answer, cells = last_of(self._answers(model, data)), cells_of(data)

            def loss(draws: RowDraws) -> Tensor:
                noisy = self._noise(data, draws, worth_of(batch))
                logits, _, _ = self._logits(model, data.tokens, cells, noisy.tokens, noisy.positions, data.timespans)
                return weighted_nats(logits, noisy)

            said = answer[:, -batch.inputs.shape[1] :].cpu()
            return said, drawn_losses(data, self.config.loss_draws, loss)

    # ---- noise and loss

    def _noise(self, data: Encoded, source: torch.Generator | RowDraws, worth: Tensor | None = None) -> Noisy:
        """Rows with cells of their answers masked, each block at a time of its own; see `shares` for `worth`."""
        c, (n, length), device = self.config, data.tokens.shape, data.tokens.device
        block = (torch.arange(length) - self.first).clamp(min=0) // c.block_length
        n_blocks = int(block[-1]) + 1
        low, high = c.eps, 1.0
        if isinstance(source, RowDraws):
            t, u = source.uniform(TIME, n_blocks), source.uniform(CELL, length)
        else:
            low, high = max(c.eps, c.mask_range[0]), c.mask_range[1]
            t = torch.rand(n, n_blocks, generator=source)
            t = (t + torch.arange(n * n_blocks).view(n, n_blocks)) / (n * n_blocks) if c.antithetic else t
            u = torch.rand(n, length, generator=source)
        p = (low + (high - low) * t)[:, block]
        masked = (u < p).to(device).flatten()[data.positions]
        positions, rows = data.positions[masked], data.rows[masked]
        tokens = data.tokens.clone()
        tokens.view(-1)[positions] = self.mask_token
        share = shares(data, torch.ones(n, dtype=p.dtype), worth)
        weight = share[rows] / p.to(device, share.dtype).flatten()[positions]
        return Noisy(tokens, positions, data.targets[masked], rows, weight)

    def _needed(self, cells: Tensor) -> list[slice]:
        """The blocks in which any row has a cell (n, T) of its answer."""
        size, length = self.config.block_length, cells.shape[1]
        blocks = [slice(a, min(a + size, length)) for a in range(self.first, length, size)]
        return [block for block in blocks if cells[:, block].any()]

    def _clean(self, needed: list[slice]) -> list[slice]:
        """The pieces that are read clean, one after another, so that there is a state at the start of each block."""
        starts = [0, *(block.start for block in needed)]
        return [slice(a, b) for a, b in itertools.pairwise(starts) if b > a]

    def _groups(self, needed: list[slice]) -> int:
        """Passes over all noisy blocks at once: one for those of each length."""
        return len({block.stop - block.start for block in needed})

    def _logits(
        self, model: Any, tokens: Tensor, cells: Tensor, noisy: Tensor, positions: Tensor, timespans: Tensor | None
    ) -> tuple[Tensor, list[Tensor], dict[str, Tensor]]:
        """Logits (m, vocab of the task) at `positions` of the flattened rows, and the losses and metrics of the layers.

        Args:
            tokens: (n, T) clean.
            cells: (n, T) bool, those of the answers.
            noisy: (n, T) with masks.
        """
        n, needed, seen = len(tokens), self._needed(cells), _Seen()
        states = list(self._states(model, tokens, needed, timespans, seen))
        hidden = torch.zeros(0)
        for size in sorted({block.stop - block.start for block in needed}, reverse=True):
            own = [i for i, block in enumerate(needed) if block.stop - block.start == size]
            read = torch.cat([noisy[:, needed[i]] for i in own])
            spans = None if timespans is None else torch.cat([timespans[:, needed[i]] for i in own])
            found = self._read(model, read, join([states[i] for i in own]), spans, seen)
            if not len(hidden):
                hidden = found.new_zeros(*tokens.shape, found.shape[-1])
            for i, part in zip(own, found.split(n), strict=True):
                hidden[:, needed[i]] = part
        logits = self._head(model, hidden.flatten(0, 1).index_select(0, positions))
        return logits, seen.losses(), seen.contexts[-1].metrics

    def _states(
        self, model: Any, tokens: Tensor, needed: list[slice], timespans: Tensor | None, seen: _Seen
    ) -> Iterator[State]:
        """The state at the start of each block, a copy: clean tokens are read as far as there are blocks."""
        room = None if torch.is_grad_enabled() else tokens.shape[1] + self.config.readings * self.config.block_length
        state, at = model.init_state(len(tokens), capacity=room), 0
        for block in needed:
            if block.start > at:
                state = self._finish(model, tokens, state, timespans, slice(at, block.start), seen)
            at = block.start
            yield fork(state)

    def _finish(
        self, model: Any, tokens: Tensor, state: State, timespans: Tensor | None, at: slice, seen: _Seen
    ) -> State:
        """The state after the clean tokens of a piece (n, T)[:, at]."""
        context = seen.context(tokens[:, at], None if timespans is None else timespans[:, at])
        return model.features(tokens[:, at], state, context)[1]

    def _read(self, model: Any, noisy: Tensor, state: State, timespans: Tensor | None, seen: _Seen) -> Tensor:
        """Hidden states (n, size, D) of a noisy block at its last reading; consumes the state."""
        times, size = self.config.readings, noisy.shape[1]
        read = noisy.repeat(1, times)
        context = seen.context(read, None if timespans is None else timespans.repeat(1, times))
        return model.features(read, state, context)[0][:, -size:]

    def _head(self, model: Any, hidden: Tensor) -> Tensor:
        return model.logits(hidden)[..., : self.mask_token]

    # ---- answers

    def _most(self, count: Tensor) -> int:
        """Passes that a block takes at most, by the numbers (n,) of its cells."""
        steps = count if self.config.steps is None else count.clamp(max=self.config.steps)
        if self.config.order == "random" and self.config.steps is not None:
            steps = torch.full_like(count, min(self.config.steps, int(count.sum())))
        return int(steps.max())

    def _answers(self, model: Any, data: Encoded) -> Iterator[Tensor]:
        """Tokens (n, T) after every pass, masked where they are still to be found."""
        draws, cells = RowDraws.of(data), cells_of(data)
        tokens = data.tokens.masked_fill(cells, self.mask_token)
        if not cells.any():
            yield tokens
        elif self.task.is_language:

            def predict(noisy: Tensor, positions: Tensor) -> Tensor:
                return self._logits(model, data.tokens, cells, noisy, positions, data.timespans)[0]

            yield from guessed_halves(predict, data, cells, draws, self.mask_token)
        else:
            yield from self.unmask(model, tokens, cells, data.timespans, draws)

    @torch.no_grad()
    def unmask(
        self,
        model: Any,
        tokens: Tensor,
        cells: Tensor,
        timespans: Tensor | None = None,
        generator: torch.Generator | RowDraws | None = None,
        first: int | None = None,
    ) -> Iterator[Tensor]:
        """Answers block by block, from the state that the finished blocks left; each row as if it were alone.

        Args:
            model: in evaluation mode.
            tokens: (n, T), the mask token at the cells to be filled in.
            cells: (n, T) bool, those cells.
            timespans: (n, T), where the task has irregular times.
            generator: the source of random orders and samples, a stream a row: given, or named by the i-th number of a
                generator on the CPU.
            first: the step at which the first block starts, after a prompt; by default where the task's answers do.

        Yields:
            (n, T) tokens after every pass that changed any; the last holds no mask.
        """
        c, start = self.config, self.first if first is None else first
        draws = generator if isinstance(generator, RowDraws) else RowDraws.drawn(len(tokens), generator)
        length, seen = tokens.shape[1], _Seen()
        blocks = [slice(a, min(a + c.block_length, length)) for a in range(start, length, c.block_length)]
        state, at = model.init_state(len(tokens), capacity=length + c.readings * c.block_length), 0
        for block in blocks:
            if not cells[:, block].any():
                continue
            if block.start > at:  # what is finished, and was not read yet
                state = self._finish(model, tokens, state, timespans, slice(at, block.start), seen)
                at = block.start
            inside, spans = cells[:, block], None if timespans is None else timespans[:, block]
            count = (inside & (tokens[:, block] == self.mask_token)).sum(1)
            steps = (count if c.steps is None else torch.full_like(count, c.steps)).clamp(min=1)
            cached: Tensor | None = None  # logits of these very tokens
            step = 0
            while (masked := inside & (tokens[:, block] == self.mask_token)).any():
                own = draws.at(None, block.start * length + step)
                if c.order != "random" or drawn(masked, step, steps, own).any():
                    if cached is None:
                        hidden = self._read(model, tokens[:, block], fork(state), spans, seen)
                        cached = at_least_float32(self._head(model, hidden))
                    new = step_of(tokens[:, block], inside, count, cached, step, steps, c, own, self.mask_token)
                    if not torch.equal(new, tokens[:, block]):
                        tokens, cached = tokens.clone(), None
                        tokens[:, block] = new
                        yield tokens
                step += 1


class _Seen:
    """The contexts of the passes over pieces of a batch, and the number of tokens of each."""

    def __init__(self) -> None:
        self.contexts: list[Context] = []
        self.sizes: list[int] = []

    def context(self, tokens: Tensor, timespans: Tensor | None) -> Context:
        """A new one."""
        self.contexts.append(Context(timespans=timespans))
        self.sizes.append(tokens.numel())
        return self.contexts[-1]

    def losses(self) -> list[Tensor]:
        """What mixers add to the loss: the mean over passes, by their tokens."""
        total = sum(self.sizes)
        each = zip(self.contexts, self.sizes, strict=True)
        return [loss * (size / total) for context, size in each for loss in context.losses]
