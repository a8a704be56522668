"""The order in which masked cells are unmasked, and how many of them in every pass."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor

from zoo.core.errors import UsageError
from zoo.core.options import Options
from zoo.models.policy import sureness
from zoo.objectives.draws import RowDraws

ORDER, NOISE = 3, 4  # purposes of a row's random numbers, beside those of the objectives


class Order(Options):
    """Options of which masked cells a pass unmasks.

    Attributes:
        steps: unmasking passes for each block; by default one for every cell of a row's answer. Steps may outnumber
            cells: a pass with the input of the last one is not repeated (MDLM's cache, arXiv 2406.07524, section 3.6).
        remainder: which steps unmask one cell more if steps do not divide the cells. "first": each of the first ones
            (LLaDA's code); "spread": after step i of n, as many cells are unmasked as i / n of them, rounded down.
        order: which cells are unmasked first. "random": each masked cell with the probability (t - s) / t in the step
            from time t to s (Sahoo et al. 2024, equation 11). "confidence": the cells with the most probable
            prediction, which LLaDA's code calls remasking="low_confidence". "margin": the cells with the largest
            difference between the two best predictions (Kim et al. 2025, arXiv 2502.06768, section 4.1). "entropy": the
            cells whose prediction has the least entropy.
            "low_confidence": MaskGIT's remasking (arXiv 2202.04200), not LLaDA's: as "confidence", but earlier
            predictions compete again, and the least probable are masked again.
            "learned": the cells that the policy of the model scores highest (Hong et al. 2025, arXiv 2510.05725), which
            the option `unmasking_order` of masked_diffusion trains.
        entropy_bound: in place of `steps`, as many cells in each pass, in the order above, as keep the sum of their
            entropies without the largest one within this bound in nats (EB-Sampler, arXiv 2505.24857).
        temperature: temperature of Gumbel noise on the logits; 0 takes the most probable token.
    """

    steps: int | None = Field(default=None, ge=1)
    remainder: Literal["first", "spread"] = "first"
    order: Literal["random", "confidence", "margin", "entropy", "low_confidence", "learned"] = "margin"
    entropy_bound: float | None = Field(default=None, ge=0)
    temperature: float = Field(default=0.0, ge=0)

    @model_validator(mode="after")
    def _bounded(self) -> Order:
        if self.entropy_bound is not None and self.order in ("random", "low_confidence"):
            raise UsageError(
                f'entropy_bound takes the surest cells first, and order="{self.order}" does not: set order="entropy".'
            )
        if self.entropy_bound is not None and self.steps is not None:
            raise UsageError("entropy_bound decides how many cells a pass unmasks: leave steps out.")
        return self


class Unmasking(Order):
    """Options of how whole answers are unmasked.

    Attributes:
        remasking: which cells that have a token are masked again, in a random order of `steps` passes (ReMDM, arXiv
            2503.00307, with the names of its code). Each is masked with the probability r in the step from time t to
            s, and each masked cell is unmasked with (t - s + r (1 - t)) / t. With m = min(1, s / (1 - t)), "cap": r is
            the lesser of `remasking_rate` and m; "rescale": r = `remasking_rate` * m; "confidence": r = m times the
            softmax, over the row's cells that have a token, of minus the probability with which each got it.
            "loop": the signal a(t), the share of the cells that have a token, rises to `loop_signal` at the time
            `loop_on`, stays there until `loop_off`, and then rises to 1. In the steps from `loop_on` to `loop_off`, r
            is the lesser of `remasking_rate` and (1 - a(s)) / a(t), else 0; each masked cell is unmasked with
            (a(s) - (1 - r) a(t)) / (1 - a(t)), as in all of them, which have a(t) = 1 - t.
        remasking_rate: see `remasking`; ReMDM's eta.
        loop_on: the time, from 1 down to 0, at which the loop of remasking="loop" begins; ReMDM's t_on.
        loop_off: the time at which it ends; ReMDM's t_off.
        loop_signal: share of the cells that have a token in it; ReMDM's alpha_on.
        block_length: unmask blocks of this number of cells, from left to right (LLaDA, arXiv 2502.09992).
        guidance: w in l_0 + (w + 1) (l - l_0), where l_0 are the logits with the prompt masked (Nie et al. 2024, arXiv
            2410.18514).
    """

    remasking: Literal["cap", "rescale", "confidence", "loop"] | None = None
    remasking_rate: float = Field(default=0.02, ge=0, le=1)
    loop_on: float = Field(default=0.55, gt=0, lt=1)
    loop_off: float = Field(default=0.05, gt=0, lt=1)
    loop_signal: float = Field(default=0.9, gt=0, lt=1)
    block_length: int | None = Field(default=None, ge=1)
    guidance: float = Field(default=0.0, ge=0)

    @model_validator(mode="after")
    def _fits(self) -> Unmasking:
        if self.remasking is not None and (self.order != "random" or self.block_length is not None):
            raise UsageError('remasking is of a random order without blocks: set order="random" and no block_length.')
        if self.loop_off >= self.loop_on:
            told = "times run from 1 down to 0, so the loop ends at the lesser of them"
            raise UsageError(f"loop_on={self.loop_on} with loop_off={self.loop_off} is not allowed: {told}.")
        return self


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

    def passes(self, how: Unmasking) -> int:
        """Passes that the rows take at most, together."""
        if how.remasking is not None:
            return int((self.steps * (self.cells > 0)).max())
        if how.entropy_bound is not None:
            return int(self.cells.max())
        if how.order == "random":  # a step in which no row unmasks anything needs no pass
            return min(int((self.blocks * self.steps).max()), int(self.cells.sum()))
        rest = self.cells - (self.blocks - 1).clamp(min=0) * self.size
        whole = (self.blocks - 1).clamp(min=0) * torch.minimum(self.size, self.steps)
        return int((whole + torch.minimum(rest, self.steps)).max())


def plan(cells: Tensor, how: Unmasking) -> Plan:
    """The steps of rows with these numbers (n,) of cells."""
    size = cells.clamp(min=1, max=how.block_length)
    blocks = -(-cells // size)
    steps = cells if how.steps is None else torch.full_like(cells, how.steps)
    return Plan(cells, size, blocks, (-(-steps // blocks.clamp(min=1))).clamp(min=1))


def unmasked(count: Tensor, step: Tensor | int, steps: Tensor | int, remainder: str = "first") -> Tensor:
    """How many of `count` cells are unmasked after step `step` of `steps`, unless the order is random."""
    if remainder == "spread":
        return count * (step + 1) // steps
    extra = count % steps
    return count // steps * (step + 1) + torch.where(extra <= step, extra, step + 1)


def drawn(masked: Tensor, step: Tensor | int, steps: Tensor | int, own: RowDraws) -> Tensor:
    """Which masked cells (n, T) are unmasked in step `step` of `steps` (n,), where the order is random."""
    left = torch.as_tensor(steps - step).cpu().view(-1, 1)
    return masked & (own.uniform(ORDER, masked.shape[1]) < 1 / left).to(masked.device)


def step_of(
    tokens: Tensor,
    inside: Tensor,
    count: Tensor,
    logits: Tensor,
    step: Tensor | int,
    steps: Tensor | int,
    how: Order,
    own: RowDraws | None,
    mask: int,
    learned: Tensor | None = None,
) -> Tensor:
    """Tokens (n, T) after step `step` of `steps` within the cells `inside` (n, T), `count` (n,) of them a row.

    Args:
        logits: (n, T, vocab of the task).
        own: the rows' random numbers of this step, where an order or a temperature asks for some.
        mask: the mask token.
        learned: (n, T) scores of the model's policy, where the order is learned.
    """
    masked = inside & (tokens == mask)
    guess = guesses(tokens, masked, logits, how, own)
    if how.order == "random":
        assert own is not None
        return torch.where(drawn(masked, step, steps, own), guess, tokens)
    p = logits.softmax(-1)
    if how.order == "learned":
        assert learned is not None
        score = learned
    elif how.order in ("margin", "entropy"):
        score = sureness(p, how.order)
    else:
        score = p.gather(-1, guess.clamp(max=p.shape[-1] - 1)[..., None]).squeeze(-1)
    competing = inside if how.order == "low_confidence" else masked
    score = score.masked_fill(~competing, -math.inf)
    order = score.argsort(dim=1, descending=True, stable=True)
    rank = order.argsort(dim=1)
    if how.entropy_bound is not None:
        most = within(-sureness(p, "entropy").gather(1, order), how.entropy_bound)
    else:
        most = unmasked(count, step, steps, how.remainder) - (inside & ~competing).sum(1)
    chosen = competing & (rank < most[:, None])
    return torch.where(chosen, guess, tokens.masked_fill(competing, mask))


def guesses(tokens: Tensor, masked: Tensor, logits: Tensor, how: Order, own: RowDraws | None) -> Tensor:
    """Tokens (n, T) with a prediction in every masked cell: the most probable one, or one drawn at the temperature."""
    guess = torch.where(masked, logits.argmax(-1), tokens)
    if how.temperature and own is not None:
        row, cell = masked.nonzero(as_tuple=True)
        gumbel = -(-own.at(row, cell).uniform(NOISE, logits.shape[-1]).log()).log()
        guess[row, cell] = (logits[row, cell] + how.temperature * gumbel.to(logits)).argmax(-1)
    return guess


def within(entropies: Tensor, bound: float) -> Tensor:
    """(n,) the largest number of cells, in the order of `entropies` (n, T), whose sum without the largest is within a
    bound; at least 1."""
    spread = entropies.cumsum(1) - entropies.cummax(1).values
    return (spread <= bound + 1e-12).sum(1)


def looped_signal(t: Tensor, how: Unmasking) -> Tensor:
    """The signal at times t in [0, 1] of remasking="loop"."""
    before = (1 - t) * (how.loop_signal / (1 - how.loop_on))
    after = 1 - t * ((1 - how.loop_signal) / how.loop_off)
    return torch.where(t >= how.loop_on, before, torch.where(t > how.loop_off, how.loop_signal, after))


def remasked_step(
    tokens: Tensor,
    inside: Tensor,
    logits: Tensor,
    sure: Tensor,
    step: int,
    steps: Tensor,
    how: Unmasking,
    own: RowDraws,
    mask: int,
) -> tuple[Tensor, Tensor]:
    """Tokens (n, T) after step `step` of `steps` (n,) that masks cells again (ReMDM), and `sure` after it.

    Args:
        sure: (n, T) the probability with which each cell got its token, infinite where it has none.
        own: the rows' random numbers of this step.
    """
    masked = inside & (tokens == mask)
    guess = guesses(tokens, masked, logits, how, own)
    # Of whole numbers, so that a time on the grid of the steps is that of the options, and not a rounding beside it.
    t, s = (((steps - i).clamp(min=0).to(logits.dtype) / steps)[:, None] for i in (step, step + 1))
    looping = (t <= how.loop_on) & (t > how.loop_off)
    if how.remasking == "loop":
        t, s = (1 - looped_signal(time, how) for time in (t, s))
    most = torch.where(t < 1, s / (1 - t), 1.0).clamp(max=1)
    if how.remasking == "loop":
        rate = most.clamp(max=how.remasking_rate) * looping
    elif how.remasking == "confidence":
        rate = most * (-sure).softmax(-1).nan_to_num(0.0)
    elif how.remasking == "rescale":
        rate = most * how.remasking_rate
    else:
        rate = most.clamp(max=how.remasking_rate)
    rate = rate.expand(tokens.shape)
    chance = torch.where(masked, (t - s + rate * (1 - t)) / t.clamp(min=1e-12), rate)
    change = inside & (t > 0) & (own.uniform(ORDER, tokens.shape[1]).to(chance) < chance)
    p = logits.softmax(-1).gather(-1, guess.clamp(max=logits.shape[-1] - 1)[..., None]).squeeze(-1)
    sure = torch.where(change, torch.where(masked, p.to(sure), math.inf), sure)
    return torch.where(change, torch.where(masked, guess, mask), tokens), sure


__all__ = ["Order", "Plan", "Unmasking", "drawn", "looped_signal", "plan", "remasked_step", "step_of", "unmasked"]
