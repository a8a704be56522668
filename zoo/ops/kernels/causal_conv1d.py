"""The depthwise causal convolution for GPUs: see `causal_conv1d.cpp`, whose functions, names and shapes these are.

A program takes a tile of steps and channels of one row. A tap is felt only by a step of the same document, so that no
reset lies between the two.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from zoo.ops.kernels.elementary import sigmoid
from zoo.ops.kernels.tiles import tile

STEPS, CHANNELS = 32, 64


@triton.jit
def _inputs(x, state, row, u, d, valid, x_row, x_step, D, WIDTH: tl.constexpr):
    """The inputs at steps u, those before the first from the state; zero outside of both."""
    inside = (d < D)[None, :]
    now = (u >= 0) & (u < valid)
    known = tl.load(x + row * x_row + u[:, None] * x_step + d[None, :], mask=now[:, None] & inside, other=0.0)
    old = (u < 0) & (u > -WIDTH)
    at = (row * (WIDTH - 1) + WIDTH - 1 + u)[:, None] * D + d[None, :]
    return tl.where(old[:, None], tl.load(state + at, mask=old[:, None] & inside, other=0.0), known)


@triton.jit
def _alive(alive, resets, row, t, valid, T):
    """`alive` where no document starts at step t."""
    if resets is not None:
        alive = alive & (tl.load(resets + row * T + t, mask=(t >= 0) & (t < valid), other=0) == 0)
    return alive


@triton.jit
def _sums(x, weight, bias, state, resets, row, t, d, valid, x_row, x_step, T, D, WIDTH: tl.constexpr):
    """What comes out before the activation, at steps t and channels d."""
    y = tl.zeros_like(t)[:, None].to(tl.float32) + tl.zeros_like(d)[None, :].to(tl.float32)
    if bias is not None:
        y += tl.load(bias + d, mask=d < D, other=0.0)[None, :]
    alive = t < valid
    for o in tl.static_range(WIDTH):
        if o > 0:
            alive = _alive(alive, resets, row, t - o + 1, valid, T)
        tap = tl.load(weight + d * WIDTH + WIDTH - 1 - o, mask=d < D, other=0.0)[None, :]
        seen = _inputs(x, state, row, t - o, d, valid, x_row, x_step, D, WIDTH)
        y += tl.where(alive[:, None], tap * seen, 0.0)
    return y


@triton.jit
def _forward(
    x,
    weight,
    bias,
    state,
    resets,
    lengths,
    y,
    T,
    D,
    x_row,
    x_step,
    WIDTH: tl.constexpr,
    SILU: tl.constexpr,
    STEPS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    row = tl.program_id(2).to(tl.int64)
    t = tl.program_id(1) * STEPS + tl.arange(0, STEPS)
    d = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    valid = T if lengths is None else tl.load(lengths + row).to(tl.int32)
    z = _sums(x, weight, bias, state, resets, row, t, d, valid, x_row, x_step, T, D, WIDTH)
    if SILU:
        z = z * sigmoid(z)
    z = tl.where((t < valid)[:, None], z, 0.0)
    tl.store(y + (row * T + t)[:, None] * D + d[None, :], z, mask=(t < T)[:, None] & (d < D)[None, :])


@triton.jit
def _last(
    x,
    state,
    resets,
    lengths,
    last,
    T,
    D,
    x_row,
    x_step,
    WIDTH: tl.constexpr,
    PLACES: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """The inputs before the end, of which `o` steps back is the place WIDTH - 2 - o."""
    row = tl.program_id(1).to(tl.int64)
    d = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    o = tl.arange(0, PLACES)
    valid = T if lengths is None else tl.load(lengths + row).to(tl.int32)
    alive = o < WIDTH - 1
    for back in tl.static_range(1, WIDTH - 1):
        r = valid - back + tl.zeros_like(o)
        alive = alive & ((o < back) | _alive(o >= 0, resets, row, r, valid, T))
    seen = _inputs(x, state, row, valid - 1 - o, d, valid, x_row, x_step, D, WIDTH)
    at = (row * (WIDTH - 1) + WIDTH - 2 - o)[:, None] * D + d[None, :]
    tl.store(last + at, tl.where(alive[:, None], seen, 0.0), mask=(o < WIDTH - 1)[:, None] & (d < D)[None, :])


@triton.jit
def _taps(
    x,
    weight,
    bias,
    state,
    resets,
    lengths,
    d_y,
    d_sums,
    d_taps,
    T,
    D,
    x_row,
    x_step,
    WIDTH: tl.constexpr,
    SILU: tl.constexpr,
    STEPS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Gradients of the sums (B, T, D), and of taps and bias (B, tiles, WIDTH + 1, D), the present step first."""
    row = tl.program_id(2).to(tl.int64)
    t = tl.program_id(1) * STEPS + tl.arange(0, STEPS)
    d = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    valid = T if lengths is None else tl.load(lengths + row).to(tl.int32)
    at, there = (row * T + t)[:, None] * D + d[None, :], (t < valid)[:, None] & (d < D)[None, :]
    g = tl.load(d_y + at, mask=there, other=0.0)
    if SILU:
        z = _sums(x, weight, bias, state, resets, row, t, d, valid, x_row, x_step, T, D, WIDTH)
        s = sigmoid(z)
        g = g * s * (1.0 + z * (1.0 - s))
    tl.store(d_sums + at, g, mask=(t < T)[:, None] & (d < D)[None, :])
    to = d_taps + (row * tl.num_programs(1) + tl.program_id(1)) * (WIDTH + 1) * D + d
    alive = t < valid
    for o in tl.static_range(WIDTH):
        if o > 0:
            alive = _alive(alive, resets, row, t - o + 1, valid, T)
        seen = _inputs(x, state, row, t - o, d, valid, x_row, x_step, D, WIDTH)
        tl.store(to + o * D, tl.sum(tl.where(alive[:, None], seen * g, 0.0), 0), mask=d < D)
    tl.store(to + WIDTH * D, tl.sum(g, 0), mask=d < D)


@triton.jit
def _backward(
    weight,
    resets,
    lengths,
    d_sums,
    d_last,
    d_x,
    d_state,
    T,
    D,
    WIDTH: tl.constexpr,
    STEPS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Gradients of the inputs at steps u; those before the first are the state's."""
    row = tl.program_id(2).to(tl.int64)
    u = tl.program_id(1) * STEPS + tl.arange(0, STEPS) - (WIDTH - 1)
    d = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    inside = (d < D)[None, :]
    valid = T if lengths is None else tl.load(lengths + row).to(tl.int32)
    total = tl.zeros((STEPS, CHANNELS), tl.float32)
    alive = u < valid
    for o in tl.static_range(WIDTH):
        if o > 0:
            alive = _alive(alive, resets, row, u + o, valid, T)
        t = u + o
        there = (t >= 0) & (t < valid)
        g = tl.load(d_sums + (row * T + t)[:, None] * D + d[None, :], mask=there[:, None] & inside, other=0.0)
        tap = tl.load(weight + d * WIDTH + WIDTH - 1 - o, mask=d < D, other=0.0)[None, :]
        total += tl.where(alive[:, None], tap * g, 0.0)
    # a step o before the end lives on in the state where no document starts behind it
    o = valid - 1 - u
    alive = (o >= 0) & (o < WIDTH - 1)
    for back in tl.static_range(1, WIDTH - 1):
        r = valid - back + tl.zeros_like(u)
        alive = alive & ((o < back) | _alive(o >= 0, resets, row, r, valid, T))
    at = (row * (WIDTH - 1) + WIDTH - 2 - o)[:, None] * D + d[None, :]
    total += tl.load(d_last + at, mask=alive[:, None] & inside, other=0.0)
    before = (u < 0) & (u > -WIDTH)
    tl.store(d_x + (row * T + u)[:, None] * D + d[None, :], total, mask=((u >= 0) & (u < T))[:, None] & inside)
    tl.store(
        d_state + (row * (WIDTH - 1) + WIDTH - 1 + u)[:, None] * D + d[None, :], total, mask=before[:, None] & inside
    )


def _tiles(D: int, W: int) -> dict[str, int]:
    return {"WIDTH": W, "CHANNELS": tile(D, CHANNELS)}


def causal_conv1d_forward(
    x, weight, bias, state, resets, lengths, y, last, B, T, D, W, x_row, x_step, silu, threads
) -> None:
    tiles = _tiles(D, W)
    across, strides = triton.cdiv(D, tiles["CHANNELS"]), (T, D, x_row, x_step)
    given = x, weight, bias, state, resets, lengths, y
    _forward[across, triton.cdiv(T, STEPS), B](*given, *strides, SILU=bool(silu), STEPS=STEPS, **tiles)
    if W > 1:
        _last[across, B](x, state, resets, lengths, last, *strides, PLACES=triton.next_power_of_2(W - 1), **tiles)


def causal_conv1d_backward(
    x,
    weight,
    bias,
    state,
    resets,
    lengths,
    d_y,
    d_last,
    d_x,
    d_taps,
    d_state,
    B,
    T,
    D,
    W,
    x_row,
    x_step,
    silu,
    threads,
) -> None:
    tiles = _tiles(D, W)
    across, along = triton.cdiv(D, tiles["CHANNELS"]), triton.cdiv(T, STEPS)
    d_sums, parts = torch.empty_like(d_y), d_y.new_empty(B, along, W + 1, D)
    given = x, weight, bias, state, resets, lengths, d_y, d_sums, parts
    _taps[across, along, B](*given, T, D, x_row, x_step, SILU=bool(silu), STEPS=STEPS, **tiles)
    back = across, triton.cdiv(T + W - 1, STEPS), B
    _backward[back](weight, resets, lengths, d_sums, d_last, d_x, d_state, T, D, STEPS=STEPS, **tiles)
    torch.sum(parts, 1, out=d_taps)
