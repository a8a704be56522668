"""RMS norm without weights, along any axis."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from zoo.ops._gated_norm import FEW_NUMBERS
from zoo.ops.bridge import Operator
from zoo.ops.common import state_dtype
from zoo.ops.kernel import Call, Kernel, suffix

KERNEL = Kernel("plain_norm", dtypes=(torch.float32, torch.bfloat16))


def plain_norm(x: Tensor, *, dim: int = -1, eps: float = 1e-5) -> Tensor:
    """x / sqrt(mean of x^2 along `dim` + eps), in x's dtype; the arithmetic is in float32 at least."""
    if x.numel() > FEW_NUMBERS and KERNEL.why_not(x) is None:
        return compiled(x, dim % x.ndim, eps)[0]
    wide = x.to(state_dtype(x))
    return (wide * torch.rsqrt(wide.square().mean(dim, keepdim=True) + eps)).to(x.dtype)


def _norm_forward(call: Call, x: Tensor, dim: int, eps: float) -> tuple[Tensor, Tensor]:
    """y, and the inverse root mean squares (outer, inner) in float32."""
    outer, n, inner = _shape(x, dim)
    y, inverse = torch.empty_like(x), x.new_empty(outer, inner, dtype=torch.float32)
    call(f"plain_norm_forward_{suffix(x)}", (x,), (y, inverse), outer, n, inner, eps)
    return y, inverse


def _shape(x: Tensor, dim: int) -> tuple[int, int, int]:
    return math.prod(x.shape[:dim]), x.shape[dim], math.prod(x.shape[dim + 1 :])


def _norm_backward(call: Call, y: Tensor, inverse: Tensor, d_y: Tensor, dim: int) -> Tensor:
    d_x = torch.empty_like(y)
    call(f"plain_norm_backward_{suffix(y)}", (y, d_y, inverse), (d_x,), *_shape(y, dim))
    return d_x


def _norm_again(y: Tensor, inverse: Tensor, d_y: Tensor, d_inverse: Tensor, dim: int) -> Tensor:
    """In plain operators on both outputs, as x is not kept, with n numbers in a norm:
    d_x = inverse (d_y - y mean(y d_y)) - inverse^2 y d_inverse / n."""
    shape = _shape(y, dim)
    wide, inverse, d_y = y.reshape(shape).to(inverse.dtype), inverse.unsqueeze(1), d_y.reshape(shape).to(inverse.dtype)
    d_x = inverse * (d_y - wide * (wide * d_y).mean(1, keepdim=True))
    d_x = d_x - inverse.square() * wide * d_inverse.unsqueeze(1) / shape[1]
    return d_x.reshape(y.shape).to(y.dtype)


compiled = Operator(
    KERNEL,
    "plain_norm(Tensor x, int dim, float eps) -> (Tensor y, Tensor inverse)",
    _norm_forward,
    _norm_backward,
    gradients="x",
    again=_norm_again,
)
