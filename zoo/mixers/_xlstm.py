"""What the xLSTM's two layers share: maps and norms a head at a time, and the published inits."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.mixers.parts import precise


class HeadwiseLinear(nn.Module):
    """A linear map that is block-diagonal: `n_blocks` parts of the width, each mapped apart. Weight (n, out, in)."""

    def __init__(self, width: int, n_blocks: int, *, bias: bool, std: float):
        super().__init__()
        size = width // n_blocks
        self.weight = nn.Parameter(std * torch.randn(n_blocks, size, size))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        y = torch.einsum("btni,noi->btno", x.unflatten(-1, (len(self.weight), -1)), self.weight).flatten(-2)
        return y if self.bias is None else y + self.bias


class HeadNorm(nn.Module):
    """Layer norm of each head (..., H, V), in float32 at least, to (..., H V).

    `weight` is "one", "centred" (kept as its difference from one, as the first paper's code does) or None for none.
    """

    def __init__(self, width: int, *, eps: float, weight: Literal["one", "centred"] | None, bias: bool = False):
        super().__init__()
        self.eps, self.centred = eps, weight == "centred"
        self.weight = None if weight is None else nn.Parameter((torch.zeros if self.centred else torch.ones)(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        y = F.layer_norm(precise(x), x.shape[-1:], eps=self.eps).flatten(-2)
        if self.weight is not None:
            y = torch.addcmul(y, y, self.weight.to(y.dtype)) if self.centred else y * self.weight
        return y if self.bias is None else y + self.bias


def small_std(width: int) -> float:
    """Standard deviation of weights that read the residual stream (Nguyen and Salazar 2019, section 2.2)."""
    return (2 / (5 * width)) ** 0.5


def wang_std(width: int, n_layers: int) -> float:
    """That of weights that write to it (Wang and Komatsuzaki 2021, GPT-J)."""
    return 2 / n_layers / width**0.5
