"""Single steps of whole layers, without gradients: all between two projections in one call of `kernels/cell.cpp`.

As in `single_step`, `None` means that the step does not run so. States are written in place: the layer that owns them
does not read them again. A layer asks only while nothing is attached to the modules whose weights go in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from zoo.ops.bridge import steps_alone
from zoo.ops.common import log_form
from zoo.ops.kernel import Kernel
from zoo.ops.kv_cache import KVCache, room_for_step
from zoo.ops.rotary import RopeScaling
from zoo.ops.single_step import address, counts, turning

KERNEL = Kernel("cell")


class HeadsCell(NamedTuple):
    """A layer over heads with a memory (H, K, V), as `kernels/cell.cpp` has it; -1 where a row has no such part.

    Attributes:
        width: numbers of a row, which is what the projection gives of a token.
        conv_at, channels, conv_size, silu: the part of a row that is convolved, by how many taps (0 for none), and
            whether it then has its activation.
        q_at, k_at, v_at: places of q, k and v in that part.
        beta_at, dt_at, gate_at: places in a row of beta, of the step sizes and of the gate.
        n_key_heads, n_heads, d_key, d_value: G, H, K, V.
        v_times_dt: the memory is given dt v, as in Mamba-2.
        n_parts: parts of the norm over all heads, with weights for each channel; 0 for one norm a head with weights
            that heads share.
        gate_first: the gate comes before the norm.
        q_norm: epsilon of the norms of q and k; below 0 for none.
        beta_range: factor on beta.
        scale: factor on what is read.
        norm_eps: epsilon of the norm.
    """

    width: int
    conv_at: int
    channels: int
    conv_size: int
    silu: bool
    q_at: int
    k_at: int
    v_at: int
    beta_at: int
    dt_at: int
    gate_at: int
    n_key_heads: int
    n_heads: int
    d_key: int
    d_value: int
    v_times_dt: bool
    n_parts: int
    gate_first: bool
    q_norm: float
    beta_range: float
    scale: float
    norm_eps: float


def heads_cell_step(
    cell: HeadsCell,
    rows: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    skip: Tensor | None,
    norm: Tensor | None,
    state: tuple[Tensor, Tensor],
    ops: Sequence[str],
) -> Tensor | None:
    """What rows (B, 1, width) give, (B, 1, H V); the state moves on.

    Args:
        cell: the layer.
        weight, bias: of the convolution.
        A_log, dt_bias: of the decays, where a row has step sizes.
        skip: (H,), what is added of v.
        norm: weights of the norm.
        state: window (B, W - 1, channels) and memory (B, H, K, V).
        ops: names of the ops whose work this is, for the log of forms.
    """
    (window, memory), B, H = state, len(rows), cell.n_heads
    if not _movable(window, memory) or not steps_alone(
        KERNEL, rows, weight, bias, A_log, dt_bias, skip, norm, window, memory
    ):
        return None
    if rows.shape != (B, 1, cell.width) or memory.shape != (B, H, cell.d_key, cell.d_value):
        return None
    o = rows.new_empty(B, 1, H * cell.d_value)
    increment_version((window, memory))
    KERNEL.bare("heads_cell_step")(
        rows.data_ptr(),
        address(weight),
        address(bias),
        address(A_log),
        address(dt_bias),
        address(skip),
        address(norm),
        window.data_ptr(),
        memory.data_ptr(),
        o.data_ptr(),
        B,
        torch.get_num_threads(),
        *cell,
    )
    for op in ops:
        log_form(op, "compiled")
    return o


class AttentionCell(NamedTuple):
    """Softmax attention between its projections, as `kernels/cell.cpp` has it.

    Attributes:
        n_heads, n_kv_heads, head_dim: H, G, K.
        window: see `attention`.
        rotated: channels of a head that are turned, 0 for none.
        rope_base, rope_scaling, rope_interleaved: how, see `rotary_table` and `rotate`.
        gates: gates of a head: 0 for none, 1, or K.
        norm_eps: epsilon of the norms of q and k.
        scale: factor on q . k.
        softcap: see `attention`.
    """

    n_heads: int
    n_kv_heads: int
    head_dim: int
    window: int | None
    rotated: int
    rope_base: float
    rope_scaling: RopeScaling | None
    rope_interleaved: bool
    gates: int
    norm_eps: float
    scale: float
    softcap: float | None


def attention_cell_step(
    cell: AttentionCell,
    rows: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    sinks: Tensor | None,
    cache: KVCache,
) -> tuple[Tensor, KVCache] | None:
    """What rows (B, 1, width) of q, k, v and gate give, (B, 1, H K), and the cache with their keys and values.

    Args:
        cell: the layer.
        q_norm, k_norm: (K,), weights of the norms of each head.
        sinks: (H,), see `attention`.
        cache: without gradients; written in place where it has room.
    """
    H, G, K = cell[:3]
    if not _movable(cache.k, cache.v) or not steps_alone(KERNEL, rows, q_norm, k_norm, sinks, cache.k, cache.v):
        return None
    k, v, length = cache = room_for_step(cache, cell.window)
    B, N = len(rows), k.shape[1]
    if rows.shape != (B, 1, (H + 2 * G) * K + H * cell.gates) or k.shape != (B, N, G, K) or v.shape != k.shape:
        return None
    if not counts(length, B):
        return None
    frequencies, amplitude = turning(cell.rotated, cell.rope_base, cell.rope_scaling)
    o = rows.new_empty(B, 1, H * K)
    increment_version(cache)
    KERNEL.bare("attention_cell_step")(
        rows.data_ptr(),
        address(q_norm),
        address(k_norm),
        frequencies.data_ptr(),
        address(sinks),
        k.data_ptr(),
        v.data_ptr(),
        length.data_ptr(),
        o.data_ptr(),
        *(B, torch.get_num_threads(), N, H, G, K, cell.rotated // 2, cell.rope_interleaved, cell.gates),
        *(amplitude, cell.norm_eps, cell.scale, cell.softcap or 0.0),
    )
    log_form("attention", "compiled")
    return o, cache


def shift_step(x: Tensor, before: Tensor, *shares: Tensor) -> Tensor | None:
    """x + share (before - x) for each of up to six shares (D,), as (n, B, 1, D); x and `before` (B, 1, D)."""
    if not steps_alone(KERNEL, x, before, *shares) or x.shape[1] != 1:
        return None
    B, _, D = x.shape
    out = x.new_empty(len(shares), B, 1, D)
    addresses = [share.data_ptr() for share in shares] + [None] * (6 - len(shares))
    KERNEL.bare("shift_step")(x.data_ptr(), before.data_ptr(), *addresses, out.data_ptr(), B, D)
    return out


def rwkv7_step(
    mixed: Tensor,
    r: Tensor,
    k: Tensor,
    v: Tensor,
    first: Tensor | None,
    weights: Sequence[Any],
    memory: Tensor,
    kappa_eps: float,
    norm_eps: float,
) -> Tensor | None:
    """RWKV-7 between its projections, (B, 1, D), from the shifted inputs (6, B, 1, D) and r, k, v (B, 1, D).

    v, whose memory is written over, then has the first layer's values mixed in, where there is a v0.

    Args:
        first: the values of the first layer, None for zeros.
        weights: w0, w1, w2, a0, a1, a2, v0, v1, v2, g1, g2, k_k, k_a, r_k, and weight and bias of the group norm.
            The caller has checked them by `steps_alone`.
        memory: (B, H, K, K), which moves on.
    """
    if not _movable(memory) or not steps_alone(KERNEL, mixed, r, k, v, first, memory):
        return None
    (B, H, K, _), (_, w1, _, _, a1, _, _, v1, _, g1, *_) = memory.shape, weights
    y = torch.empty_like(v)
    increment_version((v, memory))
    KERNEL.bare("rwkv7_step")(
        mixed.data_ptr(),
        r.data_ptr(),
        k.data_ptr(),
        address(first),
        *map(address, weights),
        v.data_ptr(),
        memory.data_ptr(),
        y.data_ptr(),
        *(B, H, K, w1.shape[1], a1.shape[1], 0 if v1 is None else v1.shape[1], g1.shape[1], kappa_eps, norm_eps),
    )
    log_form("dplr", "compiled")
    return y


def _movable(*states: Tensor) -> bool:
    return not any(state.requires_grad for state in states)
