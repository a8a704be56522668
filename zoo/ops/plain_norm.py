"""RMS norm without weights, along any axis."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from zoo.ops import native
from zoo.ops.common import state_dtype
from zoo.ops.derivatives import once
from zoo.ops.gated_norm import FEW_NUMBERS


def plain_norm(x: Tensor, *, dim: int = -1, eps: float = 1e-5) -> Tensor:
    """x / sqrt(mean of x^2 along `dim` + eps), in x's dtype; the arithmetic is in float32 at least."""
    if x.numel() > FEW_NUMBERS and native.serves(x, kernel="plain_norm", bfloat16=True) is None:
        return compiled(x, dim % x.ndim, eps)[0]
    wide = x.to(state_dtype(x))
    return (wide * torch.rsqrt(wide.square().mean(dim, keepdim=True) + eps)).to(x.dtype)


@torch.library.custom_op("zoo::plain_norm", mutates_args=(), device_types="cpu")
def compiled(x: Tensor, dim: int, eps: float) -> tuple[Tensor, Tensor]:
    """`kernels/plain_norm.cpp`: y, and the inverse root mean squares (outer, inner) in float32."""
    x = x.contiguous()
    outer, n, inner = _shape(x, dim)
    y, inverse = torch.empty_like(x), x.new_empty(outer, inner, dtype=torch.float32)
    native.form_of("plain_norm", "forward", x)(x, y, inverse, outer, n, inner, eps)
    return y, inverse


def _shape(x: Tensor, dim: int) -> tuple[int, int, int]:
    return math.prod(x.shape[:dim]), x.shape[dim], math.prod(x.shape[dim + 1 :])


@compiled.register_fake
def _(x, dim, eps):
    outer, _, inner = _shape(x, dim)
    return x.new_empty(x.shape), x.new_empty(outer, inner, dtype=torch.float32)


@torch.library.custom_op("zoo::plain_norm_backward", mutates_args=(), device_types="cpu")
def compiled_backward(y: Tensor, d_y: Tensor, inverse: Tensor, dim: int) -> Tensor:
    d_x = torch.empty_like(y)
    native.form_of("plain_norm", "backward", y)(y, d_y.contiguous(), inverse, d_x, *_shape(y, dim))
    return d_x


@compiled_backward.register_fake
def _(y, d_y, inverse, dim):
    return y.new_empty(y.shape)


def _setup(ctx, inputs, output):
    ctx.dim = inputs[1]
    ctx.save_for_backward(*output)
    ctx.set_materialize_grads(False)


def _backward_again(ctx, d_y, d_inverse):
    """In plain operators on both outputs, as x is not kept, with n numbers in a norm:
    d_x = inverse (d_y - y mean(y d_y)) - inverse^2 y d_inverse / n."""
    y, inverse = ctx.saved_tensors
    shape = _shape(y, ctx.dim)
    wide, inverse = y.reshape(shape).to(inverse.dtype), inverse.unsqueeze(1)
    d_x = torch.zeros_like(wide)
    if d_y is not None:
        d_y = d_y.reshape(shape).to(wide.dtype)
        d_x = inverse * (d_y - wide * (wide * d_y).mean(1, keepdim=True))
    if d_inverse is not None:
        d_x = d_x - inverse.square() * wide * d_inverse.unsqueeze(1) / shape[1]
    return d_x.reshape(y.shape).to(y.dtype), None, None


@once(_backward_again)
def _backward(ctx, d_y, d_inverse):
    if d_y is None and d_inverse is None:
        return None, None, None
    if d_inverse is not None:  # of a backward pass that was differentiated
        return _backward_again(ctx, d_y, d_inverse)
    y, inverse = ctx.saved_tensors
    return compiled_backward(y, d_y, inverse, ctx.dim), None, None


compiled.register_autograd(_backward, setup_context=_setup)
