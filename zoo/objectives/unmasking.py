"""The order in which masked cells are unmasked, and how many of them in every pass."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from zoo.core.options import Options
from zoo.objectives.draws import RowDraws

ORDER, NOISE = 3, 4  # purposes of a row's random numbers, beside those of the objectives


class Unmasking(Options):
    """Options of how answers are unmasked.

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

    steps: int | None = Field(default=None, ge=1)
    order: Literal["random", "confidence", "margin", "low_confidence"] = "margin"
    block_length: int | None = Field(default=None, ge=1)
    temperature: float = Field(default=0.0, ge=0)
    guidance: float = Field(default=0.0, ge=0)


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


def plan(cells: Tensor, how: Unmasking) -> Plan:
    """The steps of rows with these numbers (n,) of cells."""
    size = cells.clamp(min=1, max=how.block_length)
    blocks = -(-cells // size)
    steps = cells if how.steps is None else torch.full_like(cells, how.steps)
    return Plan(cells, size, blocks, (-(-steps // blocks.clamp(min=1))).clamp(min=1))


def unmasked(count: Tensor, step: Tensor | int, steps: Tensor | int) -> Tensor:
    """How many of `count` cells are unmasked after step `step` of `steps`, unless the order is random: what the steps
    do not divide is unmasked by the first of them (LLaDA's code)."""
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
    how: Unmasking,
    own: RowDraws | None,
    mask: int,
) -> Tensor:
    """Tokens (n, T) after step `step` of `steps` within the cells `inside` (n, T), `count` (n,) of them a row.

    Args:
        logits: (n, T, vocab of the task).
        own: the rows' random numbers of this step, where an order or a temperature asks for some.
        mask: the mask token.
    """
    masked = inside & (tokens == mask)
    guess = torch.where(masked, logits.argmax(-1), tokens)
    if how.temperature and own is not None:
        row, cell = masked.nonzero(as_tuple=True)
        gumbel = -(-own.at(row, cell).uniform(NOISE, logits.shape[-1]).log()).log()
        guess[row, cell] = (logits[row, cell] + how.temperature * gumbel.to(logits)).argmax(-1)
    if how.order == "random":
        assert own is not None
        return torch.where(drawn(masked, step, steps, own), guess, tokens)
    p = logits.softmax(-1)
    if how.order == "margin":
        two = p.topk(min(2, p.shape[-1]), -1).values
        score = two[..., 0] - two[..., -1] if two.shape[-1] > 1 else two[..., 0]
    else:
        score = p.gather(-1, guess.clamp(max=p.shape[-1] - 1)[..., None]).squeeze(-1)
    kept = unmasked(count, step, steps)
    competing = inside if how.order == "low_confidence" else masked
    most = kept - (inside & ~competing).sum(1)
    score = score.masked_fill(~competing, -math.inf)
    rank = score.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    chosen = competing & (rank < most[:, None])
    return torch.where(chosen, guess, tokens.masked_fill(competing, mask))


__all__ = ["Plan", "Unmasking", "drawn", "plan", "step_of", "unmasked"]
