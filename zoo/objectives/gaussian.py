"""Duo's curriculum: noisy tokens as the softmax of a Gaussian diffusion, whose largest entries diffuse uniformly."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from zoo.core.errors import UsageError
from zoo.core.options import Options, tuples

PUBLISHED = 30_522, -3.5, -1.75  # tokens and noise levels of the authors' training on LM1B
_REACH, _WIDTH = 10.0, 0.05  # of the quadrature: 10 deviations to both sides, where a normal density is 8e-23

_CERTAIN = 1e-6  # a signal this close to 0 or 1 has a loss of no number


class Curriculum(Options, label="objective.curriculum"):
    """How the first batches of a uniform diffusion are learned: from soft inputs.

    A clean token x, as a vector of K numbers (1 at x, 0 elsewhere), diffuses to w = sqrt(1 - s) x + sqrt(s) e with
    normal e and s = sigmoid(g) at the noise level g. The position of the largest number of w is then x with the
    probability a + (1 - a) / K, and any other token with (1 - a) / K: the uniform diffusion of a signal a(g). In place
    of that token the model reads the sum of the embeddings of all tokens by softmax(w / temperature). The loss is the
    integrand of the bound at the signal a(g), the level g running from `levels[0]` to `levels[1]` evenly in time.

    Attributes:
        batches: how many of the first batches. Those after them, and evaluation, have tokens and all times.
        constant: of these, the first ones that have the temperature `start`.
        start: temperature at first; 0.001 throughout in the authors' scripts, 0.1 to 0.01 in their config.
        end: temperature after the last of the batches. Its logarithm moves evenly from that of `start`.
        levels: least and greatest noise level g. By default those at which the signal is what it is at the published
            -3.5 and -1.75 among 30,522 tokens: 0.94 and 0.05.
    """

    batches: int = Field(ge=1)
    constant: int = Field(default=0, ge=0)
    start: float = Field(default=1e-3, gt=0)
    end: float = Field(default=1e-3, gt=0)
    levels: tuple[float, float] | None = None

    @field_validator("levels", mode="before")
    @classmethod
    def _from_list(cls, value: Any) -> Any:
        return tuples(value)

    @model_validator(mode="after")
    def _fits(self) -> Curriculum:
        if self.constant > self.batches:
            raise UsageError(f"curriculum: constant={self.constant} is more than batches={self.batches}.")
        if self.levels is not None and self.levels[0] >= self.levels[1]:
            raise UsageError(
                f"curriculum: levels={list(self.levels)} is not allowed: the least noise level comes first."
            )
        return self

    def temperature(self, batch: int) -> float | None:
        """That of a batch, numbered from 0; None after the last of the curriculum."""
        if batch >= self.batches:
            return None
        share = max(batch - self.constant, 0) / max(self.batches - self.constant, 1)
        return self.start * (self.end / self.start) ** share

    def levels_among(self, n_values: int) -> tuple[float, float]:
        """The least and greatest noise level among this number of tokens.

        Raises:
            UsageError: a level at which nothing is noisy, or everything, within a millionth.
        """
        if self.levels is not None:
            for level in self.levels:
                if not _CERTAIN < (signal := _signal_at(level, n_values)) < 1 - _CERTAIN:
                    told = f"at {level} the signal among {n_values:,} tokens is {round(signal)}, within {_CERTAIN:g}"
                    raise UsageError(f"curriculum: levels={list(self.levels)} is not allowed: {told}.")
            return self.levels
        tokens, *levels = PUBLISHED
        least, greatest = (level_of(_signal_at(level, tokens), n_values) for level in levels)
        return least, greatest


class SoftTokens(NamedTuple):
    """Noisy tokens of a Gaussian diffusion.

    Attributes:
        weights: (m, K) of all tokens, the softmax.
        found: (m,) the token of the largest weight.
    """

    weights: Tensor
    found: Tensor


def softened(tokens: Tensor, level: Tensor, noise: Tensor, temperature: float) -> SoftTokens:
    """Tokens (m,) at noise levels (m,), by normal noise (m, K)."""
    w = noise * level.sigmoid().sqrt().to(noise)[:, None]
    w.scatter_add_(1, tokens[:, None], (-level).sigmoid().sqrt().to(noise)[:, None])
    return SoftTokens((w / temperature).softmax(-1), w.argmax(-1))


def signal_of(level: Tensor, n_values: int) -> tuple[Tensor, Tensor]:
    """The signal a (n,) of the uniform diffusion at noise levels g (n,) among K tokens, and da/dg; float64.

    With m = exp(-g / 2) and the normal density and distribution p and P, the largest of the K numbers is the clean
    token's with the probability c = integral of p(z - m) P(z)^(K-1) dz, and a = (K c - 1) / (K - 1). The trapezoidal
    rule is exact to rounding here: all is smooth, and vanishes at both ends.
    """
    m = (-level.double() / 2).exp()[:, None]
    off = torch.arange(-_REACH, _REACH + _WIDTH / 2, _WIDTH, dtype=torch.float64, device=level.device)
    largest = (n_values - 1) * torch.special.log_ndtr(off + m)
    each = (largest - off.square() / 2).exp() * (_WIDTH / math.sqrt(2 * math.pi))
    chance, by_m = each.sum(1), (each * off).sum(1)
    scale = n_values / (n_values - 1)
    return scale * (chance - 1 / n_values), -scale * by_m * m[:, 0] / 2


def level_of(signal: float, n_values: int) -> float:
    """The noise level of a signal in (0, 1) among K tokens."""
    low, high = -40.0, 40.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _signal_at(middle, n_values) > signal else (low, middle)
    return (low + high) / 2


def _signal_at(level: float, n_values: int) -> float:
    return float(signal_of(torch.tensor([level], dtype=torch.float64), n_values)[0])


__all__ = ["Curriculum", "SoftTokens", "level_of", "signal_of", "softened"]
