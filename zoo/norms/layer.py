"""Layer norm (Ba et al. 2016, arXiv 1607.06450)."""

from __future__ import annotations

from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.core.options import Options
from zoo.norms.make import register
from zoo.protocol import Norm


@final
@register("layernorm")
class LayerNorm(Norm):
    """Layer norm: w (x - mean(x)) / std(x) + b; w starts at one and b at zero."""

    def __init__(self, d_model: int, config: Options, *, eps: float, axis: str = "channels"):
        super().__init__(d_model, config, eps=eps, axis=axis)
        self.weight = nn.Parameter(torch.ones(d_model))
        self.bias = nn.Parameter(torch.zeros(d_model))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
