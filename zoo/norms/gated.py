"""The norm with a gate that many recurrent mixers end in."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zoo.ops import gated_norm
from zoo.protocol import recurrent_dtype


class GatedRMSNorm(nn.Module):
    """RMS norm of each of `n_groups` parts of the last axis, with a gate: norm(x) * silu(z), or norm(x * silu(z)).

    Works in float32 at least and returns that.
    """

    def __init__(self, width: int, *, n_groups: int = 1, eps: float = 1e-5, norm_before_gate: bool = True):
        super().__init__()
        self.n_groups, self.eps, self.norm_before_gate = n_groups, eps, norm_before_gate
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        x = x.to(recurrent_dtype(x.dtype))
        z = None if z is None else z.to(x.dtype)
        return gated_norm(
            x, z, self.weight, n_groups=self.n_groups, eps=self.eps, norm_before_gate=self.norm_before_gate
        )
