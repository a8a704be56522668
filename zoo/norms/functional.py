"""Norms as functions, for mixers that normalise keys, queries and heads."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.ops.single_step import norm_step
from zoo.protocol import recurrent_dtype


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x normed along its last axis, in float32 at least, times `weight` where there is one."""
    done = norm_step(x, weight, x.shape[-1], eps)
    if done is not None:
        return done
    dtype = recurrent_dtype(x.dtype)
    normed = F.rms_norm(x.to(dtype), x.shape[-1:], eps=eps)
    return (normed if weight is None else normed * weight.to(dtype)).to(x.dtype)


def l2_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(|x|^2 + eps) along the last axis, in float32 at least."""
    done = norm_step(x, None, 1.0, eps)
    if done is not None:
        return done
    x = x.to(recurrent_dtype(x.dtype))
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + eps)
