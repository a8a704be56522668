"""Whole sequences over heads without gradients, a few steps at a time: `kernels/heads_pass.cpp`."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.ops import sizes
from zoo.ops.kernel import Call, Kernel, Strided

KERNEL = Kernel("heads_pass")
CACHE = 1 << 18  # bytes that the states of one task may take


def takes(op: str, q: Tensor, v: Tensor, g: Tensor | None) -> bool:
    """Whether a pass without gradients goes by these sizes, and there is such a kernel."""
    per_channel = g is not None and g.ndim == 4
    return sizes.in_one_pass(op, v.shape[1], q.shape[3], v.shape[3], per_channel) and KERNEL.why_not() is None


def heads_pass(
    call: Call,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    g: Tensor | None,
    state: Tensor,
    resets: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """o and the last state: of the delta rule with `beta`, of DPLR with a and b, else of linear attention with one
    decay a channel. Shapes are those of the ops; q, k and v may lie in memory with any strides of rows and steps."""
    (B, T, H, V), (G, K) = v.shape, q.shape[2:]
    o, last = v.new_empty(v.shape), torch.empty_like(state)
    spans = spans_of(B, H, 4 * K * V, CACHE)
    strides = (x.stride(axis) for x in (q, k, v) for axis in (0, 1))
    reads = (Strided(q), Strided(k), Strided(v), beta, a, b, g, state, resets)
    call("heads_pass", reads, (o, last), B, T, G, H, K, V, spans, *strides, g is not None and g.ndim == 4, scale)
    return o, last


def spans_of(rows: int, heads: int, state: int, cache: int) -> int:
    """Tasks that the heads of a row are cut into: few, so that what lies side by side is read at a time, but enough for
    all threads, and their states, of `state` bytes, small enough for the cache."""
    return min(heads, max(-(-torch.get_num_threads() // rows), -(-heads * state // cache)))
