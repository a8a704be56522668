"""RMS norm with a gate, as most linear-time mixers end: norm(x) * silu(z), or norm(x * silu(z)) as in Mamba-2."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.ops import common, native
from zoo.ops.derivatives import gradients_of, once

FEW_NUMBERS = 1 << 14  # up to here the plain form is the faster one


@common.without_autocast
def gated_norm(
    x: Tensor,
    z: Tensor | None,
    weight: Tensor,
    *,
    n_groups: int = 1,
    eps: float = 1e-5,
    norm_before_gate: bool = True,
) -> Tensor:
    """weight * x / rms(x) * silu(z), or weight * u / rms(u) with u = x * silu(z).

    Args:
        x, z: (..., D), of one floating-point dtype; z None for no gate.
        weight: (D,).
        n_groups: equal parts of D, each with a norm of its own.
        eps: added to the mean square.
        norm_before_gate: which of the two.
    """
    weight = weight.to(x.dtype)
    if x.numel() > FEW_NUMBERS and native.serves(x, z, weight, kernel="gated_norm") is None:
        return compiled_norm(x, z, weight, n_groups, eps, norm_before_gate)
    return _plain(x, z, weight, n_groups, eps, norm_before_gate)


def _plain(x: Tensor, z: Tensor | None, weight: Tensor, n_groups: int, eps: float, norm_before_gate: bool) -> Tensor:
    gate = None if z is None else F.silu(z)
    if gate is not None and not norm_before_gate:
        x, gate = x * gate, None
    if n_groups == 1:
        y = F.rms_norm(x, weight.shape, weight, eps)
    else:
        parts = x.unflatten(-1, (n_groups, -1))
        y = F.rms_norm(parts, parts.shape[-1:], None, eps).flatten(-2) * weight
    return y if gate is None else y * gate


@torch.library.custom_op("zoo::gated_norm", mutates_args=(), device_types="cpu")
def compiled_norm(
    x: Tensor, z: Tensor | None, weight: Tensor, n_groups: int, eps: float, norm_before_gate: bool
) -> Tensor:
    """One pass over memory: `kernels/gated_norm.cpp`."""
    tensors, options = _arguments(x, z, weight, n_groups, eps, norm_before_gate)
    y = x.new_empty(x.shape)
    native.load("gated_norm").gated_norm_forward(*tensors, y, *options)
    return y


def _arguments(
    x: Tensor, z: Tensor | None, weight: Tensor, n_groups: int, eps: float, norm_before_gate: bool
) -> tuple[list[Tensor | None], tuple[int | float, ...]]:
    width = x.shape[-1]
    tensors = [None if t is None else t.contiguous() for t in (x, z, weight)]
    return tensors, (x.numel() // width, width, n_groups, not norm_before_gate, eps)


@compiled_norm.register_fake
def _(x, z, weight, n_groups, eps, norm_before_gate):
    return x.new_empty(x.shape)


ROWS = 64  # of a task of the kernel


@torch.library.custom_op("zoo::gated_norm_backward", mutates_args=(), device_types="cpu")
def compiled_backward(
    x: Tensor, z: Tensor | None, weight: Tensor, d_y: Tensor, n_groups: int, eps: float, norm_before_gate: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, z (empty without one) and weight."""
    tensors, options = _arguments(x, z, weight, n_groups, eps, norm_before_gate)
    d_x, d_z = x.new_empty(x.shape), x.new_empty(0 if z is None else x.shape)
    d_weight = x.new_empty(-(-int(options[0]) // ROWS), x.shape[-1])
    native.load("gated_norm").gated_norm_backward(
        *tensors, d_y.contiguous(), d_x, None if z is None else d_z, d_weight, *options
    )
    return d_x, d_z, d_weight.sum(0)


@compiled_backward.register_fake
def _(x, z, weight, d_y, n_groups, eps, norm_before_gate):
    return x.new_empty(x.shape), x.new_empty(0 if z is None else x.shape), weight.new_empty(weight.shape)


def _setup(ctx, inputs, output):
    x, z, weight, *ctx.options = inputs
    ctx.save_for_backward(x, z, weight)


@once(lambda ctx, d_y: gradients_of(_plain, (*ctx.saved_tensors, *ctx.options), d_y))
def _backward(ctx, d_y):
    x, z, weight = ctx.saved_tensors
    d_x, d_z, d_weight = compiled_backward(x, z, weight, d_y, *ctx.options)
    return d_x, None if z is None else d_z, d_weight, None, None, None


compiled_norm.register_autograd(_backward, setup_context=_setup)
