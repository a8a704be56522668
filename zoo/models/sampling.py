"""Tokens chosen from logits: the most probable, or samples from a random stream for every row."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zoo.core.errors import UsageError
from zoo.ops.common import widest

DRAWS = 64  # of a row's generator at a time

Generators = torch.Generator | Sequence[torch.Generator]


class NotFinite(UsageError):
    """A row of logits that is not finite."""

    def __init__(self, row: int, which: str = ""):
        super().__init__(f"The model's logits{which} are not finite: there is nothing to choose from.")
        self.row = row


def _require_finite(values: Tensor) -> None:
    if values.numel() == 1 and math.isfinite(values.item()):  # a single row: without the operators of many
        return
    finite = values.isfinite()
    if not finite.all():
        raise NotFinite(int((~finite).nonzero()[0]))


class Choice(NamedTuple):
    """How tokens are chosen; see `generate`."""

    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def take(self, logits: Tensor, uniform: Tensor | None) -> Tensor:
        """logits (B, vocab_size) and, to sample, numbers (B,) uniform in [0, 1) to tokens (B,).

        Raises:
            NotFinite: a row's logits, of which there is none to choose.
        """
        if uniform is None:
            best, tokens = logits.max(-1)  # not a number where any logit is not
            _require_finite(best)
            return tokens
        p, ids = self.distribution(logits)
        total = p.cumsum(-1)
        _require_finite(total[:, -1])
        below = (uniform * total[:, -1]).clamp(max=torch.nextafter(total[:, -1], total.new_zeros(())))
        index = torch.searchsorted(total, below[:, None], right=True)
        return (index if ids is None else ids.gather(1, index)).squeeze(1)

    def distribution(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """What is sampled from: weights (B, n), wide, and the tokens (B, n) they belong to, None for all in order."""
        ids = None
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            logits, ids = logits.topk(self.top_k)
        elif self.top_p is not None:
            logits, ids = logits.sort(descending=True, stable=True)
        logits = logits.to(widest(logits.device))
        p = torch.softmax((logits - logits.amax(-1, keepdim=True)) / self.temperature, -1)
        if self.top_p is not None and self.top_p < 1:
            kept = p.cumsum(-1) - p < self.top_p
            p = p * kept
        if self.min_p is not None:
            p = p * (p >= self.min_p * p.amax(-1, keepdim=True))
        return p, ids


def read_choice(temperature: float, top_k: int | None, top_p: float | None, min_p: float | None) -> Choice:
    given = {"top_k": top_k, "top_p": top_p, "min_p": min_p}
    for name, value in {**given, "temperature": temperature}.items():
        if value is None and name != "temperature":
            continue
        if isinstance(value, bool) or not (isinstance(value, Real) or integer(value) is not None):
            raise UsageError(f"{name}={value!r:.60} is not allowed: it should be a number.")
    if not 0 <= temperature < math.inf:
        raise UsageError(f"temperature={temperature} is not allowed: it should be 0 (greedy) or above.")
    top_k = None if top_k is None else whole("top_k", top_k, 1)
    if top_p is not None and not 0 < top_p <= 1:
        raise UsageError(f"top_p={top_p} is not allowed: it should be above 0 and at most 1.")
    if min_p is not None and not 0 <= min_p <= 1:
        raise UsageError(f"min_p={min_p} is not allowed: it should be from 0 to 1.")
    if temperature == 0 and (named := [f"{k}={v}" for k, v in given.items() if v is not None]):
        raise UsageError(f"{', '.join(named)} chooses among samples: give a temperature above 0 with it.")
    return Choice(temperature, top_k, top_p, min_p)


class Streams:
    """A stream of uniform numbers for every row, drawn in blocks from generators of their own."""

    def __init__(self, generator: Generators | None, n_rows: int, device: torch.device):
        if generator is None or isinstance(generator, torch.Generator):
            seeds = _seeds(generator, n_rows)
        else:
            if len(generator) != n_rows:
                raise UsageError(f"{len(generator)} generators for {n_rows} prompts: give one, or one for each.")
            seeds = [seed for g in generator for seed in _seeds(g, 1)]
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.device = device
        self.block = torch.empty(n_rows, 0, dtype=widest(device), device=device)
        self.used = 0

    def draw(self) -> Tensor:
        """The next number of every row, (B,) in [0, 1)."""
        if self.used == self.block.shape[1]:
            drawn = [torch.rand(DRAWS, generator=g, dtype=torch.float64) for g in self.generators]
            self.block, self.used = torch.stack(drawn).to(self.block.dtype).to(self.device), 0
        self.used += 1
        return self.block[:, self.used - 1]

    def keep(self, rows: Tensor) -> None:
        """Only the streams of `rows` from here on."""
        self.block = self.block[rows]
        self.generators = [self.generators[i] for i in rows.tolist()]


def _seeds(generator: torch.Generator | None, n: int) -> list[int]:
    device = "cpu" if generator is None else generator.device
    return torch.randint(2**63 - 1, (n,), generator=generator, device=device).tolist()


def integer(value: Any) -> int | None:
    """A single whole number of any type, numpy's and torch's included, as Python's; None for all else, bools too."""
    of_bools = isinstance(value, bool) or getattr(value, "dtype", None) in (bool, torch.bool)
    if of_bools or getattr(value, "ndim", None):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def whole(name: str, value: Any, least: int) -> int:
    number = integer(value)
    if number is None or number < least:
        raise UsageError(f"{name}={value!r:.60} is not allowed: it should be a whole number from {least}.")
    return number
