"""What the layers of lru, s5 and linoss share: complex numbers as pairs of real ones, inits, and the activation."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.mixers.parts import precise
from zoo.ops.common import blank, valid_steps
from zoo.ops.modules import bare
from zoo.protocol import Context

ActivationName = Literal["full_glu", "half_glu1", "half_glu2", "gelu"]
"""What follows the linear recurrence; the names are those of the authors of S5."""


COMPLEX = {torch.float32: torch.complex64, torch.float64: torch.complex128}
"""The complex numbers of which a dtype holds the parts."""


class Activation(nn.Module):
    """The nonlinear part of a block, with g = gelu(y): "full_glu" (W_1 g + b_1) sigmoid(W_2 g + b_2), "half_glu1"
    g sigmoid(W_2 g + b_2), "half_glu2" y sigmoid(W_2 g + b_2), "gelu" g, None y."""

    def __init__(self, d_model: int, name: ActivationName | None):
        super().__init__()
        self.name = name
        self.out1 = nn.Linear(d_model, d_model) if name == "full_glu" else None
        self.out2 = nn.Linear(d_model, d_model) if name in ("full_glu", "half_glu1", "half_glu2") else None
        for layer in (self.out1, self.out2):
            if layer is not None:
                nn.init.normal_(layer.weight, std=d_model**-0.5)
                nn.init.zeros_(layer.bias)

    def forward(self, y: Tensor) -> Tensor:
        if self.name is None:
            return y
        g = F.gelu(y, approximate="tanh")
        if self.out2 is None:
            return g
        value = self.out1(g) if self.out1 is not None else g if self.name == "half_glu1" else y
        return value * self.out2(g).sigmoid()

    def flops(self, d_model: int) -> int:
        return 2 * d_model**2 * sum(layer is not None for layer in (self.out1, self.out2))


def drawn(*shape: int, low: float, high: float) -> Tensor:
    """Uniform numbers from `low` to `high`."""
    return torch.empty(shape).uniform_(low, high)


def ring(n: int, low: float, high: float) -> Tensor:
    """Moduli |z| of n complex numbers that are uniform on the ring low <= |z| <= high; none is exactly 0 or 1."""
    return (drawn(n, low=0, high=1) * (high**2 - low**2) + low**2).clamp(1e-8, 1 - 1e-6).sqrt()


def log_uniform(n: int, low: float, high: float) -> Tensor:
    """Logarithms of numbers whose logarithms are uniform."""
    return drawn(n, low=math.log(low), high=math.log(high))


def as_complex(x: Tensor) -> Tensor:
    """(..., 2 P) of pairs (re, im) -> (..., P) complex."""
    return torch.view_as_complex(precise(x).contiguous().unflatten(-1, (-1, 2)))


def as_pairs(x: Tensor) -> Tensor:
    """(..., P) complex -> (..., 2 P) of pairs (re, im): undoes `as_complex`."""
    return torch.view_as_real(x).flatten(-2)


def on_weight(x: Tensor, layer: nn.Linear, factor: Tensor) -> bool:
    """Whether the same factor (P) for all x (B, T, D) is to be applied to the rows of the layer's weight: to its
    outputs it is less work where there are fewer vectors than inputs, and needed where something is attached."""
    return factor.ndim == 1 and x.shape[0] * x.shape[1] >= x.shape[2] and bare(layer)


def driven(x: Tensor, layer: nn.Linear, factor: Tensor) -> Tensor:
    """factor * (B x), complex (B, T, P), where the layer's weight has a row each for re and im of B; factor (P) or
    (B, T, P) is real or complex."""
    if not on_weight(x, layer, factor):
        return as_complex(layer(x)) * factor
    re, im = precise(layer.weight).unflatten(0, (-1, 2)).unbind(1)
    return as_complex(F.linear(x, interleaved(torch.complex(re, im) * factor[:, None]).to(x.dtype)))


def interleaved(matrix: Tensor) -> Tensor:
    """(P, D) complex -> (2 P, D): its real and imaginary rows in turn."""
    return torch.stack([matrix.real, matrix.imag], 1).flatten(0, 1)


def known_spans(context: Context | None, n_steps: int, dtype: torch.dtype) -> Tensor | None:
    """`timespans` (B, T, 1) in `dtype`, zero in the padding, or None where no times are given."""
    if context is None or context.timespans is None:
        return None
    spans = context.timespans
    if context.lengths is not None:
        spans = blank(spans, ~valid_steps(context.lengths, n_steps))
    return spans.to(dtype)[..., None]
