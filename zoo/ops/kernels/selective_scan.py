"""Mamba's selective scan for GPUs: see `selective_scan.cpp`, whose functions, names and shapes these are.

A program runs a block of channels of one row through all steps with its states in registers, from any state and over
documents. The backward pass computes the states of a chunk again from those that are kept.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from zoo.ops.kernels.elementary import log_sigmoid, sigmoid
from zoo.ops.kernels.tiles import tile

CHUNK = 32  # steps between kept states
CHANNELS = 64


@triton.jit
def _dt(delta, delta_bias, at, d, inside, SOFTPLUS: tl.constexpr):
    """The step, and its slope by delta."""
    raw = tl.load(delta + at, mask=inside, other=0.0)
    if delta_bias is not None:
        raw += tl.load(delta_bias + d, mask=inside, other=0.0)
    slope = tl.full(raw.shape, 1.0, raw.dtype)
    if SOFTPLUS:
        slope = sigmoid(raw)
        raw = -log_sigmoid(-raw)
    return raw, slope


@triton.jit
def _forward(
    u,
    delta,
    A,
    B,
    C,
    D,
    z,
    delta_bias,
    state,
    resets,
    y,
    last,
    kept,
    T,
    W,
    N,
    SOFTPLUS: tl.constexpr,
    CHUNK: tl.constexpr,
    CHANNELS: tl.constexpr,
    STATES: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64)
    d, n = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS), tl.arange(0, STATES)
    inside = d < W
    cells, there = d[:, None] * N + n[None, :], inside[:, None] & (n < N)[None, :]
    rates = tl.load(A + cells, mask=there, other=0.0)
    h = tl.load(state + row * W * N + cells, mask=there, other=0.0)
    for t in range(T):
        if kept is not None and t % CHUNK == 0:
            to = (row * tl.cdiv(T, CHUNK) + t // CHUNK) * W * N + n[None, :] * W + d[:, None]
            tl.store(kept + to, h, mask=there)
        if resets is not None:
            h = tl.where(tl.load(resets + row * T + t) != 0, 0.0, h)
        at = (row * T + t) * W + d
        x = tl.load(u + at, mask=inside, other=0.0)
        dt, _ = _dt(delta, delta_bias, at, d, inside, SOFTPLUS)
        b = tl.load(B + (row * T + t) * N + n, mask=n < N, other=0.0)
        c = tl.load(C + (row * T + t) * N + n, mask=n < N, other=0.0)
        h = tl.exp(dt[:, None] * rates) * h + (dt * x)[:, None] * b[None, :]
        out = tl.sum(h * c[None, :], 1)
        if D is not None:
            out += tl.load(D + d, mask=inside, other=0.0) * x
        if z is not None:
            gate = tl.load(z + at, mask=inside, other=0.0)
            out *= gate * sigmoid(gate)
        tl.store(y + at, out, mask=inside)
    tl.store(last + row * W * N + cells, h, mask=there)


@triton.jit
def _backward(
    u,
    delta,
    A,
    B,
    C,
    D,
    z,
    delta_bias,
    resets,
    kept,
    d_y,
    d_last,
    d_u,
    d_delta,
    d_z,
    d_state,
    d_B,
    d_C,
    d_A,
    d_D,
    d_bias,
    states,
    T,
    W,
    N,
    SOFTPLUS: tl.constexpr,
    CHUNK: tl.constexpr,
    CHANNELS: tl.constexpr,
    STATES: tl.constexpr,
):
    """d_B, d_C (blocks, B, T, N) are sums over a block's channels. `states` (programs, CHUNK, CHANNELS, STATES) are
    those before the steps of a chunk, as they enter it: nothing where a document starts."""
    row, block = tl.program_id(1).to(tl.int64), tl.program_id(0)
    d, n = block * CHANNELS + tl.arange(0, CHANNELS), tl.arange(0, STATES)
    inside = d < W
    cells, there = d[:, None] * N + n[None, :], inside[:, None] & (n < N)[None, :]
    scratch = (row * tl.num_programs(0) + block) * CHUNK * CHANNELS * STATES
    local = tl.arange(0, CHANNELS)[:, None] * STATES + n[None, :]
    parts = (block.to(tl.int64) * tl.num_programs(1) + row) * T
    rates = tl.load(A + cells, mask=there, other=0.0)
    dh = tl.load(d_last + row * W * N + cells, mask=there, other=0.0)
    sum_A = tl.zeros((CHANNELS, STATES), tl.float64)
    sum_D, sum_bias = tl.zeros((CHANNELS,), tl.float64), tl.zeros((CHANNELS,), tl.float64)
    weight = tl.zeros((CHANNELS,), tl.float32)
    if D is not None:
        weight += tl.load(D + d, mask=inside, other=0.0)
    for back in range(tl.cdiv(T, CHUNK)):
        number = tl.cdiv(T, CHUNK) - 1 - back
        start = number * CHUNK
        count = tl.minimum(T - start, CHUNK)
        of = (row * tl.cdiv(T, CHUNK) + number) * W * N + n[None, :] * W + d[:, None]
        h = tl.load(kept + of, mask=there, other=0.0)
        for s in range(count):
            t = start + s
            if resets is not None:
                h = tl.where(tl.load(resets + row * T + t) != 0, 0.0, h)
            tl.store(states + scratch + s * CHANNELS * STATES + local, h)
            at = (row * T + t) * W + d
            x = tl.load(u + at, mask=inside, other=0.0)
            dt, _ = _dt(delta, delta_bias, at, d, inside, SOFTPLUS)
            b = tl.load(B + (row * T + t) * N + n, mask=n < N, other=0.0)
            h = tl.exp(dt[:, None] * rates) * h + (dt * x)[:, None] * b[None, :]
        tl.debug_barrier()
        for s in range(count):
            t = start + count - 1 - s
            before = tl.load(states + scratch + (count - 1 - s) * CHANNELS * STATES + local)
            at = (row * T + t) * W + d
            x = tl.load(u + at, mask=inside, other=0.0)
            dt, slope = _dt(delta, delta_bias, at, d, inside, SOFTPLUS)
            b = tl.load(B + (row * T + t) * N + n, mask=n < N, other=0.0)
            c = tl.load(C + (row * T + t) * N + n, mask=n < N, other=0.0)
            a = tl.exp(dt[:, None] * rates)
            h = a * before + (dt * x)[:, None] * b[None, :]
            dy = tl.load(d_y + at, mask=inside, other=0.0)
            if z is not None:
                gate = tl.load(z + at, mask=inside, other=0.0)
                s_gate = sigmoid(gate)
                out = tl.sum(h * c[None, :], 1) + weight * x
                tl.store(d_z + at, dy * out * s_gate * (1.0 + gate * (1.0 - s_gate)), mask=inside)
                dy = dy * gate * s_gate
            dh += dy[:, None] * c[None, :]
            tl.store(d_C + (parts + t) * N + n, tl.sum(dy[:, None] * h, 0), mask=n < N)
            tl.store(d_B + (parts + t) * N + n, tl.sum(dh * (dt * x)[:, None], 0), mask=n < N)
            d_x = tl.sum(dh * b[None, :], 1)
            dh = a * dh
            q = dh * before
            d_raw = (tl.sum(q * rates, 1) + d_x * x) * slope
            tl.store(d_u + at, d_x * dt + weight * dy, mask=inside)
            tl.store(d_delta + at, d_raw, mask=inside)
            sum_A += (q * dt[:, None]).to(tl.float64)
            sum_D += (dy * x).to(tl.float64)
            sum_bias += d_raw.to(tl.float64)
            if resets is not None:
                dh = tl.where(tl.load(resets + row * T + t) != 0, 0.0, dh)
        tl.debug_barrier()
    tl.store(d_state + row * W * N + cells, dh, mask=there)
    tl.store(d_A + row * W * N + cells, sum_A, mask=there)
    tl.store(d_D + row * W + d, sum_D, mask=inside)
    tl.store(d_bias + row * W + d, sum_bias, mask=inside)


def _how(W: int, N: int, softplus: bool) -> dict[str, int]:
    channels, states = tile(W, CHANNELS), triton.next_power_of_2(N)
    how = {"SOFTPLUS": bool(softplus), "CHUNK": CHUNK, "CHANNELS": channels, "STATES": states}
    return {**how, "num_warps": 4 if states <= 32 else 8}


def _launch_forward(*arguments) -> None:
    *tensors, batch, T, W, N, softplus = arguments
    how = _how(W, N, softplus)
    _forward[triton.cdiv(W, how["CHANNELS"]), batch](*tensors, T, W, N, **how)


def _launch_backward(
    u,
    delta,
    A,
    B,
    C,
    D,
    z,
    delta_bias,
    state,
    resets,
    kept,
    d_y,
    d_last,
    d_u,
    d_delta,
    d_z,
    d_state,
    d_B,
    d_C,
    d_A,
    d_D,
    d_bias,
    batch,
    T,
    W,
    N,
    softplus,
) -> None:
    how = _how(W, N, softplus)
    blocks = triton.cdiv(W, how["CHANNELS"])
    of_B, of_C = u.new_empty(2, blocks, batch, T, N)
    states = u.new_empty(blocks * batch, CHUNK, how["CHANNELS"], how["STATES"])
    reads = u, delta, A, B, C, D, z, delta_bias, resets, kept, d_y, d_last
    writes = d_u, d_delta, d_z, d_state, of_B, of_C, d_A, d_D, d_bias
    _backward[blocks, batch](*reads, *writes, states, T, W, N, **how)
    for gradient, parts in ((d_B, of_B), (d_C, of_C)):  # which the caller sums over its own, fewer blocks
        gradient[1:] = 0
        torch.sum(parts, 0, out=gradient[0])


selective_scan_forward_float = _launch_forward
selective_scan_backward_float = _launch_backward
