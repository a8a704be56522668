"""Norms by the root mean square (Zhang and Sennrich 2019, arXiv 1910.07467)."""

from __future__ import annotations

from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.core.options import Options
from zoo.norms.make import register
from zoo.ops import plain_norm
from zoo.ops.single_step import norm_step
from zoo.protocol import Norm, recurrent_dtype


@final
@register("rmsnorm")
class RMSNorm(Norm):
    """RMS norm: w x / rms(x); w starts at one. Along time, steps have no weights: x / rms(x)."""

    axes = ("channels", "time")

    def __init__(self, d_model: int, config: Options, *, eps: float, axis: str = "channels"):
        super().__init__(d_model, config, eps=eps, axis=axis)
        self.weight = nn.Parameter(torch.ones(d_model)) if axis == "channels" else None

    def forward(self, x: Tensor) -> Tensor:
        if self.weight is None:
            return plain_norm(x, dim=1, eps=self.eps)
        done = norm_step(x, self.weight, self.d_model, self.eps)
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps) if done is None else done


@final
@register("rmsnorm_plain")
class PlainRMSNorm(Norm):
    """RMS norm without weights: x / rms(x)."""

    axes = ("channels", "time")

    def __init__(self, d_model: int, config: Options, *, eps: float, axis: str = "channels"):
        super().__init__(d_model, config, eps=eps, axis=axis)
        self.dim = -1 if axis == "channels" else 1

    def forward(self, x: Tensor) -> Tensor:
        return plain_norm(x, dim=self.dim, eps=self.eps)


@final
@register("rmsnorm_zero_centred")
class ZeroCentredRMSNorm(Norm):
    """RMS norm with the factor 1 + w; w starts at zero (Gemma: weight decay then pulls the factor to one)."""

    def __init__(self, d_model: int, config: Options, *, eps: float, axis: str = "channels"):
        super().__init__(d_model, config, eps=eps, axis=axis)
        self.weight = nn.Parameter(torch.zeros(d_model))

    def forward(self, x: Tensor) -> Tensor:
        dtype = recurrent_dtype(x.dtype)
        return (F.rms_norm(x.to(dtype), x.shape[-1:], eps=self.eps) * (1 + self.weight.to(dtype))).to(x.dtype)
