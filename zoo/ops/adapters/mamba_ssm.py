"""mamba-ssm: the selective scan in CUDA, and Mamba-2's state-space duality (SSD) in Triton.

The selective scan is laid out (B, D, T). SSD is linear attention with one decay a head, g = dt A, and v = dt x: at
A = -1 it is ours with dt = -g and x = v / dt.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zoo.core.errors import UsageError
from zoo.ops.adapters import missing, off_device
from zoo.ops.common import Heads

CHUNK = 256
SMALLEST_STEP = 1e-20  # for dt where nothing decays: x = v / dt stays in range, and exp(-dt) is 1


def why_not_scan(u: Tensor, state: Tensor | None, resets: Tensor | None) -> str | None:
    """Why the selective scan cannot take these inputs."""
    if u.device.type != "cuda":  # compiled CUDA: no interpreter
        return f"it needs a GPU, the inputs are on {u.device}"
    if (
        why := off_device(u) or missing("mamba_ssm", "mamba_ssm.ops.selective_scan_interface", "mamba-ssm")
    ) is not None:
        return why
    if u.dtype == torch.float64:
        return "it computes in float32 at most, the inputs are torch.float64"
    if state is not None or resets is not None:
        return "its selective scan starts from rest and knows no documents"
    return None


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    kernel: Callable[..., Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """The op of that name from rest, arguments as there; `kernel` is the library's own by default.

    The library has no gradient of the last state: asking for it is refused.
    """
    if kernel is None:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

        kernel = selective_scan_fn
    u, delta, B, C = (x.transpose(1, 2) for x in (u, delta, B, C))
    z = None if z is None else z.transpose(1, 2)
    y, state = kernel(u, delta, A, B, C, D, z, delta_bias, delta_softplus, True)
    return y.transpose(1, 2), _Closed.apply(state.float(), y)


class _Closed(torch.autograd.Function):
    """A last state through which no gradient can pass: a backward pass through it is an error."""

    @staticmethod
    def forward(ctx, state: Tensor, y: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        return state.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor | None):
        if gradient is None:
            return None, None
        raise UsageError(
            "selective_scan: backend='mamba_ssm' has no gradient of its last state; use backend='chunked'."
        )


def why_not_ssd(x: Tensor, heads: Heads, *, chosen: bool) -> str | None:
    """Why SSD cannot take these heads; x is an input as the caller gave it, `chosen` as in flash_linear_attention."""
    if (why := off_device(x) or missing("mamba_ssm", "mamba_ssm.ops.triton.ssd_combined", "mamba-ssm")) is not None:
        return why
    if heads.g is not None and heads.g.shape[-1] > 1:
        return "it has one decay a head, these are per channel"
    if x.dtype == torch.float64:
        return "it computes in float32 at most, the inputs are torch.float64"
    if x.dtype == torch.float32 and not chosen:
        return "it multiplies float32 in TF32; ask for it by name"
    return None


def linear_attention(
    heads: Heads, scale: float, dtype: torch.dtype, kernel: Callable[..., Any] | None = None
) -> tuple[Tensor, Tensor]:
    """The op of that name on prepared heads, operands in `dtype`: o (B, T, G, R, V), state (B, G, R, K, V)."""
    if kernel is None:
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

        kernel = mamba_chunk_scan_combined
    v = heads.v.flatten(2, 3)
    g = v.new_zeros(v.shape[:3]) if heads.g is None else heads.g.flatten(2, 4)
    dt = (-g).clamp(min=SMALLEST_STEP)
    document = None if heads.resets is None else heads.resets.int().cumsum(1, dtype=torch.int32)
    o, state = kernel(
        (v / dt[..., None]).to(dtype),
        dt,
        -torch.ones(v.shape[2], dtype=torch.float32, device=v.device),
        heads.k.to(dtype),
        (scale * heads.q).to(dtype),
        CHUNK,
        initial_states=heads.state.flatten(1, 2).mT.contiguous(),
        seq_idx=document,
        return_final_states=True,
    )
    return o.reshape(heads.v.shape).float(), state.float().mT.unflatten(1, heads.v.shape[2:4])
