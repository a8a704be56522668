"""Masked diffusion: random tokens are masked and predicted from both sides; answers are unmasked step by step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

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
    answered,
    answered_length,
    at_least_float32,
    last_of,
    register,
    row_parts,
    with_losses,
)
from zoo.objectives.draws import RowDraws
from zoo.ops.common import widest
from zoo.protocol import Context
from zoo.tasks.protocol import IGNORE, Batch, Task

_TIME, _MASK, _HALF, _ORDER, _NOISE = range(5)  # purposes of a row's random numbers


class Unmasking(NamedTuple):
    """How answers are unmasked.

    Attributes:
        steps: unmasking passes for each block; by default one for every cell of a row's answer. If steps do not divide
            the cells, each of the first steps unmasks one cell more (LLaDA's code). Steps may outnumber cells: a pass
            with the input of the last one is not repeated (MDLM's cache, arXiv 2406.07524, section 3.6).
        order: which cells are unmasked first. "random": each masked cell with the probability (t - s) / t in the step
            from time t to s (Sahoo et al. 2024, equation 11). "confidence": the cells with the most probable
            prediction, which LLaDA's code calls remasking="low_confidence". "margin": the cells with the largest
            difference between the two best predictions (Kim et al. 2025, arXiv 2502.06768, section 4.1).
            "low_confidence": MaskGIT's remasking (arXiv 2202.04200), not LLaDA's: as "confidence", but earlier
            predictions compete again, and the least probable are masked again.
        block_length: unmask blocks of this number of cells, from left to right (LLaDA, arXiv 2502.09992).
        temperature: temperature of Gumbel noise on the logits; 0 takes the most probable token.
        guidance: w in l_0 + (w + 1) (l - l_0), where l_0 are the logits with the prompt masked (Nie et al. 2024, arXiv
            2410.18514).
    """

    steps: int | None = None
    order: Literal["random", "confidence", "margin", "low_confidence"] = "margin"
    block_length: int | None = None
    temperature: float = 0.0
    guidance: float = 0.0


@register("masked_diffusion")
class MaskedDiffusion(Objective):
    """Predict randomly masked cells from all others, with a loss that bounds the likelihood of the answer.

    Each row draws a time t in (0, 1]. Every cell of its answer is masked with the probability p, and the masked cells
    are predicted from all others (the absorbing-state diffusion of Austin et al. 2021, arXiv 2107.03006):

        loss = mean over rows of  sum over masked cells of w * -log p_model(cell) / (number of cells of the answer)

        "llada"   p = (1 - eps) t + eps,  w = 1 / p      (Nie et al. 2025, arXiv 2502.09992, algorithms 1 and 2)
        "mdlm"    p = (1 - eps) t,        w = 1 / t      (Sahoo et al. 2024, arXiv 2406.07524: log-linear noise)

    The mask token is never predicted, and an unmasked cell stays unmasked (MDLM's SUBS). Known cells are never masked.

    The cells of the answer are: in a `fill_in` task with a token for blanks, the blank cells in place; in a text, all
    of it; if the answers are a text within the row (`Task.continues`), that text; otherwise the scored cells of a copy
    of the row, which is appended to the row. The model needs `causal=False` and one token more than the task.
    """

    class Config(Options):
        """The options; from `steps` on they belong to the sampler, see `Unmasking`.

        Attributes:
            weighting: weights of the masked cells in the loss.
            eps: the least probability of a mask (llada), or the least time (mdlm).
            antithetic: in training, the i-th of n rows draws its time from the i-th of n equal parts of (0, 1] (MDLM's
                code; its paper spreads them evenly from one draw), not from the whole interval (LLaDA). In evaluation
                every row has its own time.
            random_length: share of batches of a text that are cut to a random length (LLaDA: 0.01).
            prompt_dropout: share of rows whose prompt is masked too, which `guidance` needs.
        """

        weighting: Literal["llada", "mdlm"] = "llada"
        eps: float = Field(default=1e-3, gt=0, lt=1)
        antithetic: bool = True
        random_length: float = Field(default=0.0, ge=0, le=1)
        prompt_dropout: float = Field(default=0.0, ge=0, lt=1)
        steps: int | None = Field(default=None, ge=1)
        order: Literal["random", "confidence", "margin", "low_confidence"] = "margin"
        block_length: int | None = Field(default=None, ge=1)
        temperature: float = Field(default=0.0, ge=0)
        guidance: float = Field(default=0.0, ge=0)

        def unmasking(self) -> Unmasking:
            """The options of the sampler."""
            return Unmasking(**{k: getattr(self, k) for k in Unmasking._fields})

    step_name = "pass"
    loss_is_bound = True
    config: Config

    def __init__(self, config: Config, task: Task, *, causal: bool):
        super().__init__(config, task, causal=causal)
        if causal:
            told = "set model.causal=false, and write recurrent words as bidirectional(...)"
            raise UsageError(f"masked_diffusion guesses from both sides: {told}.")
        if task.layout not in ("next_token", "fill_in"):
            raise UsageError(f"The objective masked_diffusion cannot teach {task.name}, whose layout is {task.layout}.")
        if config.guidance and not config.prompt_dropout and not task.is_language:
            raise UsageError("masked_diffusion: guidance needs a model trained with prompt_dropout above 0.")
        self.mask_token = task.vocab_size
        self.vocab_size = task.vocab_size + 1
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

    def updates(
        self,
        model: nn.Module,
        data: Encoded,
        carry: Carry,
        generator: torch.Generator,
        parts: int = 1,
        rows: slice | None = None,
    ) -> Iterator[Update]:
        c = self.config
        if self.task.is_language and c.random_length and torch.rand((), generator=generator) < c.random_length:
            data = _cut(data, int(torch.randint(1, data.tokens.shape[1] + 1, (), generator=generator)))
        noisy = self._noise(data, generator)
        if c.prompt_dropout:
            dropped = (torch.rand(len(data.tokens), generator=generator) < c.prompt_dropout).to(data.tokens.device)
            prompt = torch.ones_like(data.tokens, dtype=torch.bool)
            prompt.view(-1)[data.positions] = False
            noisy = noisy._replace(tokens=noisy.tokens.masked_fill(prompt & dropped[:, None], self.mask_token))
        for here in (cut := row_parts(len(data.tokens), parts, rows)):
            part, share = noisy.of(here), (here.stop - here.start) / len(data.tokens)
            timespans = None if data.timespans is None else data.timespans[here]
            logits, context = self._logits(model, part.tokens, part.positions, timespans)
            loss = with_losses(_weighted(logits, part), context, share)
            yield Update(loss, logits, part.targets, part.rows, context.metrics, share, here is cut[-1])

    def passes(self, model: nn.Module, batch: Batch) -> int:
        if self.task.is_language:
            return 2
        data, how = self.encode(batch), self.config.unmasking()
        plan = _plan(torch.bincount(data.rows, minlength=len(data.tokens)), how)
        return plan.passes(how.order) * (2 if how.guidance else 1)

    @torch.no_grad()
    def solve(self, model: nn.Module, batch: Batch) -> Iterator[Frame]:
        """The answers after every pass that unmasked something."""
        with evaluation_mode(model):
            data = self.encode(batch).to(next(model.parameters()).device)
            for answer in self._answers(model, data):
                tokens = answer[:, -batch.inputs.shape[1] :].cpu()
                asked, hidden = batch.targets != IGNORE, tokens == self.mask_token
                yield Frame(torch.where(asked & ~hidden, tokens, batch.inputs), hidden)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Predictions, and the bound on the answer's negative log likelihood in nats for each of its cells.

        Every row's time and masks are from its own stream. A text is not written anew: each half of its cells, drawn at
        random, is guessed from the other half.
        """
        with evaluation_mode(model):
            data = self.encode(batch).to(next(model.parameters()).device)
            n_scored = (batch.targets != IGNORE).sum(1).double()
            noisy = self._noise(data, RowDraws.of(data), n_scored / n_scored.sum().clamp(min=1))
            logits, _ = self._logits(model, noisy.tokens, noisy.positions, data.timespans)
            answer = last_of(self._answers(model, data))
            return answer[:, -batch.inputs.shape[1] :].cpu(), _weighted(logits, noisy)

    def _answers(self, model: Any, data: Encoded) -> Iterator[Tensor]:
        """Tokens (n, T) after every pass, masked where they are still to be found."""
        draws = RowDraws.of(data)
        cells = torch.zeros_like(data.tokens, dtype=torch.bool)
        cells.view(-1)[data.positions] = True
        if self.task.is_language:
            yield from self._halves(model, data, cells, draws)
            return
        tokens = data.tokens.masked_fill(cells, self.mask_token)
        if not cells.any():
            yield tokens
        yield from self.unmask(model, tokens, cells, data.timespans, draws)

    # ---- noise

    def _noise(self, data: Encoded, source: torch.Generator | RowDraws, worth: Tensor | None = None) -> Noisy:
        """Rows with cells of their answers masked, each row at a time of its own.

        Args:
            source: of the times and masks: one for the batch, or one a row.
            worth: (n,) of each row in the loss, on the CPU; by default the same for all that have an answer.
        """
        c, n, device = self.config, len(data.tokens), data.tokens.device
        rows = data.rows
        cells = torch.bincount(rows, minlength=n)
        if isinstance(source, RowDraws):
            t = source.uniform(_TIME)
        else:
            t = torch.rand(n, generator=source)
            t = (t + torch.arange(n)) / n if c.antithetic else t
        if c.weighting == "llada":
            p = (1 - c.eps) * t + c.eps
            weight = 1 / p
        else:
            t = (1 - c.eps) * t + c.eps
            p, weight = (1 - c.eps) * t, 1 / t
        if isinstance(source, RowDraws):
            hidden = source.uniform(_MASK, data.tokens.shape[1]) < p[:, None]
            masked = hidden.to(device).flatten()[data.positions]
        else:
            masked = torch.rand(len(data.positions), generator=source).to(device) < p.to(device)[rows]
        tokens = data.tokens.clone()
        tokens.view(-1)[data.positions[masked]] = self.mask_token
        rows_masked = rows[masked]
        if worth is None:
            worth = (cells > 0) / (cells > 0).sum()
        if widest(device) is torch.float32:
            weight, worth = weight.float(), worth.float()
        share = (weight.to(device) * worth.to(device) / cells.clamp(min=1))[rows_masked]
        return Noisy(tokens, data.positions[masked], data.targets[masked], rows_masked, share)

    def _logits(
        self, model: Any, tokens: Tensor, positions: Tensor, timespans: Tensor | None
    ) -> tuple[Tensor, Context]:
        """Logits (m, vocab of the task) at `positions` of the flattened tokens."""
        context = Context(timespans=timespans)
        hidden, _ = model.features(tokens, None, context)
        logits = model.logits(hidden.flatten(0, 1).index_select(0, positions))
        return logits[:, : self.mask_token], context

    def _halves(self, model: Any, data: Encoded, cells: Tensor, draws: RowDraws) -> Iterator[Tensor]:
        first = (draws.uniform(_HALF, cells.shape[1]) < 0.5).to(cells.device) & cells
        answer = data.tokens.masked_fill(cells, self.mask_token)
        for half in (first, cells & ~first):
            positions = half.flatten().nonzero().squeeze(1)
            logits, _ = self._logits(model, data.tokens.masked_fill(half, self.mask_token), positions, data.timespans)
            answer = answer.clone()
            answer.view(-1)[positions] = logits.argmax(-1)
            yield answer

    # ---- unmasking

    @torch.no_grad()
    def unmask(
        self,
        model: Any,
        tokens: Tensor,
        cells: Tensor,
        timespans: Tensor | None = None,
        generator: torch.Generator | RowDraws | None = None,
        how: Unmasking | None = None,
    ) -> Iterator[Tensor]:
        """Answers step by step; each row is computed as if it were alone.

        Rows have blocks and steps of their own, by the number of their cells; a pass of the model serves a step of all.

        Args:
            model: in evaluation mode.
            tokens: (n, T), the mask token at the cells to be filled in.
            cells: (n, T) bool, those cells.
            timespans: (n, T), where the task has irregular times.
            generator: the source of random orders and samples, a stream a row: given, or named by the i-th number of a
                generator on the CPU.
            how: by default as the objective's options say.

        Yields:
            (n, T) tokens after every pass that changed any; the last holds no mask.
        """
        how = self.config.unmasking() if how is None else how
        draws = generator if isinstance(generator, RowDraws) else RowDraws.drawn(len(tokens), generator)
        plan = _plan(cells.sum(1), how)
        block_of = (cells.cumsum(1) - 1) // plan.size[:, None]
        block, step = torch.full_like(plan.size, -1), torch.zeros_like(plan.size)
        cached: Tensor | None = None  # logits of these very tokens
        while (masked := cells & (tokens == self.mask_token)).any():
            now = block_of.masked_fill(~masked, tokens.shape[1]).amin(1)  # the first block with a masked cell
            block, step = now, torch.where(now == block, step + 1, 0)
            inside = cells & (block_of == block[:, None])
            own = draws.at(None, block * plan.steps + step)
            if how.order == "random" and not _drawn(masked & inside, step, plan.steps, own).any():
                continue
            if cached is None:
                cached = self._guided(model, tokens, cells, timespans, how)
            new = self._step(tokens, inside, inside.sum(1), cached, step, plan.steps, how, own)
            if not torch.equal(new, tokens):
                tokens, cached = new, None
                yield tokens

    def _guided(self, model: Any, tokens: Tensor, cells: Tensor, timespans: Tensor | None, how: Unmasking) -> Tensor:
        """Logits (n, T, vocab of the task), with guidance if it is set."""
        everywhere = torch.arange(tokens.numel(), device=tokens.device)
        logits, _ = self._logits(model, tokens, everywhere, timespans)
        if how.guidance:
            free, _ = self._logits(model, tokens.masked_fill(~cells, self.mask_token), everywhere, timespans)
            logits = free + (how.guidance + 1) * (logits - free)
        return at_least_float32(logits).unflatten(0, tokens.shape)

    def _step(
        self,
        tokens: Tensor,
        inside: Tensor,
        count: Tensor,
        logits: Tensor,
        step: Tensor | int,
        steps: Tensor | int,
        how: Unmasking,
        own: RowDraws | None,
    ) -> Tensor:
        """Tokens (n, T) after step `step` of `steps` within the cells `inside`, `count` (n,) of them a row.

        `own` are the rows' random numbers of this step, where an order or a temperature asks for some.
        """
        masked = inside & (tokens == self.mask_token)
        guess = torch.where(masked, logits.argmax(-1), tokens)
        if how.temperature and own is not None:
            row, cell = masked.nonzero(as_tuple=True)
            gumbel = -(-own.at(row, cell).uniform(_NOISE, logits.shape[-1]).log()).log()
            guess[row, cell] = (logits[row, cell] + how.temperature * gumbel.to(logits)).argmax(-1)
        if how.order == "random":
            assert own is not None
            return torch.where(_drawn(masked, step, steps, own), guess, tokens)
        p = logits.softmax(-1)
        if how.order == "margin":
            two = p.topk(min(2, p.shape[-1]), -1).values
            score = two[..., 0] - two[..., -1] if two.shape[-1] > 1 else two[..., 0]
        else:
            score = p.gather(-1, guess.clamp(max=p.shape[-1] - 1)[..., None]).squeeze(-1)
        kept = _unmasked(count, step, steps)
        competing = inside if how.order == "low_confidence" else masked
        most = kept - (inside & ~competing).sum(1)
        score = score.masked_fill(~competing, -math.inf)
        rank = score.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        chosen = competing & (rank < most[:, None])
        return torch.where(chosen, guess, tokens.masked_fill(competing, self.mask_token))


class Noisy(NamedTuple):
    """Rows with masked cells.

    Attributes:
        tokens: (n, T).
        positions: (m,) masked cells in the flattened (n * T).
        targets: (m,) what they hold.
        rows: (m,) the row of each.
        weight: (m,) of each in the loss.
    """

    tokens: Tensor
    positions: Tensor
    targets: Tensor
    rows: Tensor
    weight: Tensor

    def of(self, rows: slice) -> Noisy:
        """Some of the rows; the weights are still those of the whole batch."""
        if rows.stop - rows.start == len(self.tokens):
            return self
        here = (self.rows >= rows.start) & (self.rows < rows.stop)
        positions = self.positions[here] - rows.start * self.tokens.shape[1]
        return Noisy(self.tokens[rows], positions, self.targets[here], self.rows[here] - rows.start, self.weight[here])


class Plan(NamedTuple):
    """How the answers of n rows are unmasked, each (n,) by the number of their own cells.

    Attributes:
        cells: of the answer.
        size: cells of a block, all but the last.
        blocks: of them.
        steps: of each block.
    """

    cells: Tensor
    size: Tensor
    blocks: Tensor
    steps: Tensor

    def passes(self, order: str) -> int:
        """Passes that the rows take at most, together."""
        if order == "random":  # a step in which no row unmasks anything needs no pass
            return min(int((self.blocks * self.steps).max()), int(self.cells.sum()))
        rest = self.cells - (self.blocks - 1).clamp(min=0) * self.size
        whole = (self.blocks - 1).clamp(min=0) * torch.minimum(self.size, self.steps)
        return int((whole + torch.minimum(rest, self.steps)).max())


def _plan(cells: Tensor, how: Unmasking) -> Plan:
    size = cells.clamp(min=1, max=how.block_length)
    blocks = -(-cells // size)
    steps = cells if how.steps is None else torch.full_like(cells, how.steps)
    return Plan(cells, size, blocks, (-(-steps // blocks.clamp(min=1))).clamp(min=1))


def _unmasked(count: Tensor, step: Tensor | int, steps: Tensor | int) -> Tensor:
    """How many of `count` cells are unmasked after step `step` of `steps`, unless the order is random: what the steps
    do not divide is unmasked by the first of them (LLaDA's code)."""
    extra = count % steps
    return count // steps * (step + 1) + torch.where(extra <= step, extra, step + 1)


def _drawn(masked: Tensor, step: Tensor | int, steps: Tensor | int, own: RowDraws) -> Tensor:
    """Which masked cells (n, T) are unmasked in step `step` of `steps` (n,), where the order is random."""
    left = torch.as_tensor(steps - step).cpu().view(-1, 1)
    return masked & (own.uniform(_ORDER, masked.shape[1]) < 1 / left).to(masked.device)


def _weighted(logits: Tensor, noisy: Noisy) -> Tensor:
    nats = F.cross_entropy(at_least_float32(logits), noisy.targets, reduction="none")
    return (nats * noisy.weight).sum()


def _cut(data: Encoded, length: int) -> Encoded:
    """The first `length` steps of every row."""
    width = data.tokens.shape[1]
    kept = data.positions % width < length
    positions = data.positions[kept]
    timespans = None if data.timespans is None else data.timespans[:, :length]
    return Encoded(
        data.tokens[:, :length], positions // width * length + positions % width, data.targets[kept], timespans
    )
