"""The closed-form continuous-time cell for GPUs: see `cfc.cpp`, whose functions, names and shapes these are.

A program runs a block of rows through all steps and all levels, in one launch. What its threads need of each other, the
level below and the state, passes through memory with barriers; weights come out of the caches. Products are exact
float32.
"""

from __future__ import annotations

import itertools

import torch
import triton
import triton.language as tl

from zoo.ops.kernels.elementary import sigmoid, tanh
from zoo.ops.kernels.tiles import tile

ROWS = 16  # the least that a product takes
WIDEST = 64  # units at once
FIELDS = tl.constexpr(5)  # of a level: width below, own width, and where its weights, biases and numbers begin
NO_GATE, PURE = tl.constexpr(1), tl.constexpr(2)
LECUN_TANH, TANH, RELU, SILU = (tl.constexpr(i) for i in range(4))
LECUN_OUT, LECUN_IN = tl.constexpr(1.7159), tl.constexpr(0.666)


@triton.jit
def _active(a, KIND: tl.constexpr):
    if KIND == LECUN_TANH:
        z = tanh(a * LECUN_IN) * LECUN_OUT
    elif KIND == TANH:
        z = tanh(a)
    elif KIND == RELU:
        z = tl.maximum(a, 0.0)
    elif KIND == SILU:
        z = a * sigmoid(a)
    else:
        z = 0.5 * a * (1.0 + tl.erf(0.70710678 * a))
    return z


@triton.jit
def _slope(a, KIND: tl.constexpr):
    if KIND == LECUN_TANH:
        z = tanh(a * LECUN_IN)
        d = (1.0 - z * z) * (LECUN_OUT * LECUN_IN)
    elif KIND == TANH:
        z = tanh(a)
        d = 1.0 - z * z
    elif KIND == RELU:
        d = tl.where(a > 0, 1.0, 0.0)
    elif KIND == SILU:
        z = sigmoid(a)
        d = z * (1.0 + a * (1.0 - z))
    else:
        d = 0.5 * (1.0 + tl.erf(0.70710678 * a)) + a * 0.39894228 * tl.exp(-0.5 * a * a)
    return d


@triton.jit
def _forward(
    inputs,
    weights,
    biases,
    table,
    tau,
    level,
    spans,
    lengths,
    resets,
    h,
    last,
    numbers,
    B,
    T,
    H,
    M,
    S,
    n_levels,
    KEPT: tl.constexpr,
    MODE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
):
    """`last` (B, H) holds the state. `numbers` (B, T, S), or (B, 1, S) where nothing is KEPT for the backward pass."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = row < B
    unit = tl.arange(0, UNITS)
    valid = tl.where(there, T, 0) if lengths is None else tl.load(lengths + row, mask=there, other=0)
    for t in range(T):
        fresh = row < 0
        if resets is not None:
            fresh = tl.load(resets + row * T + t, mask=there, other=0) != 0
        kept = there & (fresh == 0)
        place = (row * T + t) * S if KEPT else row * S
        for number in range(n_levels):
            below = tl.load(table + number * FIELDS).to(tl.int32)
            width = tl.load(table + number * FIELDS + 1).to(tl.int32)
            w = weights + tl.load(table + number * FIELDS + 2)
            bias = tl.load(table + number * FIELDS + 3)
            at = tl.load(table + number * FIELDS + 4)
            for first in range(0, width, UNITS):
                j = first + unit
                here = there[:, None] & (j < width)[None, :]
                if number == 0:
                    a = tl.load(inputs + ((row * T + t) * M)[:, None] + j[None, :], mask=here, other=0.0)
                else:
                    a = tl.load(biases + bias + j, mask=j < width, other=0.0)[None, :] + tl.zeros(
                        (ROWS, UNITS), tl.float32
                    )
                for low in range(0, below, UNITS):
                    k = low + unit
                    if number == 0:
                        x = tl.load(
                            last + (row * H)[:, None] + k[None, :], mask=kept[:, None] & (k < H)[None, :], other=0.0
                        )
                    else:
                        x = tl.load(
                            numbers + (place + at - below)[:, None] + k[None, :],
                            mask=there[:, None] & (k < below)[None, :],
                            other=0.0,
                        )
                        x = tl.where((k < below)[None, :], _active(x, ACTIVATION), 0.0)
                    whole = (k < below)[:, None] & (j < width)[None, :]
                    part = tl.load(w + k[:, None] + j[None, :] * below, mask=whole, other=0.0)
                    a = tl.dot(x, part, a, input_precision="ieee")
                tl.store(numbers + (place + at)[:, None] + j[None, :], a, mask=here)
            tl.debug_barrier()
        goes_on = (t < valid)[:, None]
        heads = tl.load(table + (n_levels - 1) * FIELDS + 4)
        span = tl.full((ROWS,), 1.0, tl.float32)
        if spans is not None:
            span = tl.load(spans + row * T + t, mask=there, other=1.0)
        for first in range(0, H, UNITS):
            j = first + unit
            inside = (j < H)[None, :]
            here = there[:, None] & inside
            f_at = numbers + (place + heads)[:, None] + j[None, :]
            f = tl.load(f_at, mask=here, other=0.0)
            if MODE == PURE:
                drawn = tl.load(level + j, mask=j < H, other=0.0)[None, :]
                rate = tl.abs(tl.load(tau + j, mask=j < H, other=0.0))[None, :] + tl.abs(f)
                y = drawn - drawn * tl.exp(-span[:, None] * rate) * f
            else:
                g = tanh(tl.load(f_at + H, mask=here, other=0.0))
                f = tanh(f)
                if spans is None:
                    s_at = f_at + 2 * H
                    s = tl.load(s_at, mask=here, other=0.0)
                else:
                    s_at = f_at + 3 * H
                    s = tl.load(s_at, mask=here, other=0.0)
                    s += tl.load(f_at + 2 * H, mask=here, other=0.0) * span[:, None]
                s = sigmoid(s)
                y = (f if MODE == NO_GATE else f * (1.0 - s)) + s * g
                if KEPT:
                    tl.store(f_at, f, mask=here)
                    tl.store(f_at + H, g, mask=here)
                    tl.store(s_at, s, mask=here)
            tl.store(h + ((row * T + t) * H)[:, None] + j[None, :], tl.where(goes_on, y, 0.0), mask=here)
            tl.store(last + (row * H)[:, None] + j[None, :], y, mask=here & goes_on)
        tl.debug_barrier()


@triton.jit
def _backward(
    d_h,
    weights,
    table,
    tau,
    level,
    spans,
    lengths,
    resets,
    saved,
    d,
    d_state,
    d_tau,
    d_level,
    d_spans,
    B,
    T,
    H,
    S,
    n_levels,
    MODE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = row < B
    unit = tl.arange(0, UNITS)
    valid = tl.where(there, T, 0) if lengths is None else tl.load(lengths + row, mask=there, other=0)
    heads = tl.load(table + (n_levels - 1) * FIELDS + 4)
    for back in range(T):
        t = T - 1 - back
        goes_on = t < valid
        place = (row * T + t) * S
        span = tl.full((ROWS,), 1.0, tl.float32)
        if spans is not None:
            span = tl.load(spans + row * T + t, mask=there, other=1.0)
        d_span = tl.zeros((ROWS,), tl.float32)
        for first in range(0, H, UNITS):
            j = first + unit
            here = there[:, None] & (j < H)[None, :]
            going = goes_on[:, None] & here
            states = (row * H)[:, None] + j[None, :]
            at = (place + heads)[:, None] + j[None, :]
            dy = tl.load(d_state + states, mask=going, other=0.0)
            dy += tl.load(d_h + ((row * T + t) * H)[:, None] + j[None, :], mask=going, other=0.0)
            f = tl.load(saved + at, mask=going, other=0.0)
            if MODE == PURE:
                own = tl.load(tau + j, mask=j < H, other=0.0)[None, :]
                drawn = tl.load(level + j, mask=j < H, other=0.0)[None, :]
                rate = tl.abs(own) + tl.abs(f)
                e = tl.exp(-span[:, None] * rate)
                pull = drawn * e * dy
                tl.store(d + at, -pull * (1.0 - span[:, None] * tl.abs(f)), mask=here)
                sign = tl.where(own > 0, 1.0, tl.where(own < 0, -1.0, 0.0))
                old = tl.load(d_tau + states, mask=going, other=0.0)
                tl.store(d_tau + states, old + pull * f * span[:, None] * sign, mask=going)
                old = tl.load(d_level + states, mask=going, other=0.0)
                tl.store(d_level + states, old + dy * (1.0 - e * f), mask=going)
                d_span += tl.sum(pull * f * rate, 1)
            else:
                g = tl.load(saved + at + H, mask=going, other=0.0)
                gate = 2 * H if spans is None else 3 * H
                s = tl.load(saved + at + gate, mask=going, other=0.0)
                through = dy if MODE == NO_GATE else dy * (1.0 - s)
                tl.store(d + at, through * (1.0 - f * f), mask=here)
                tl.store(d + at + H, dy * s * (1.0 - g * g), mask=here)
                ds = dy * (g if MODE == NO_GATE else g - f) * s * (1.0 - s)
                tl.store(d + at + gate, ds, mask=here)
                if spans is not None:
                    tl.store(d + at + 2 * H, ds * span[:, None], mask=here)
                    d_span += tl.sum(ds * tl.load(saved + at + 2 * H, mask=going, other=0.0), 1)
        if d_spans is not None:
            tl.store(d_spans + row * T + t, d_span, mask=goes_on)
        tl.debug_barrier()
        for count in range(n_levels):
            number = n_levels - 1 - count
            below = tl.load(table + number * FIELDS).to(tl.int32)
            width = tl.load(table + number * FIELDS + 1).to(tl.int32)
            w = weights + tl.load(table + number * FIELDS + 2)
            at = tl.load(table + number * FIELDS + 4)
            for first in range(0, below, UNITS):
                j = first + unit
                total = tl.zeros((ROWS, UNITS), tl.float32)
                for low in range(0, width, UNITS):
                    k = low + unit
                    x = tl.load(
                        d + (place + at)[:, None] + k[None, :],
                        mask=goes_on[:, None] & (k < width)[None, :],
                        other=0.0,
                    )
                    whole = (k < width)[:, None] & (j < below)[None, :]
                    part = tl.load(w + k[:, None] * below + j[None, :], mask=whole, other=0.0)
                    total = tl.dot(x, part, total, input_precision="ieee")
                here = there[:, None] & (j < below)[None, :]
                if number == 0:
                    if resets is not None:
                        fresh = tl.load(resets + row * T + t, mask=there, other=0) != 0
                        total = tl.where(fresh[:, None], 0.0, total)
                    tl.store(d_state + (row * H)[:, None] + j[None, :], total, mask=here & goes_on[:, None])
                else:
                    own = (place + at - below)[:, None] + j[None, :]
                    a = tl.load(saved + own, mask=here & goes_on[:, None], other=0.0)
                    tl.store(d + own, total * _slope(a, ACTIVATION), mask=here)
            tl.debug_barrier()


def _table(widths: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, list[int]]:
    """The fields of every level, on the device, and the widths."""
    sizes, rows = widths.tolist(), []
    at = weights = biases = 0
    for number, (below, width) in enumerate(itertools.pairwise(sizes)):
        rows.append([below, width, weights, biases, at])
        at, weights, biases = at + width, weights + below * width, biases + width * (number > 0)
    return torch.tensor(rows, dtype=torch.int64, device=device), sizes


def _how(mode: int, activation: int, sizes: list[int]) -> dict[str, int]:
    units = tile(max(sizes), WIDEST)
    how = {"MODE": mode, "ACTIVATION": activation, "ROWS": ROWS, "UNITS": units}
    return {**how, "num_warps": 4 if units < WIDEST else 8, "num_stages": 2}


def cfc_forward(
    inputs,
    weights,
    biases,
    widths,
    tau,
    level,
    state,
    spans,
    lengths,
    resets,
    h,
    last,
    saved,
    n_levels,
    B,
    T,
    mode,
    activation,
    n_blocks,
) -> None:
    table, sizes = _table(widths, inputs.device)
    last.copy_(state)
    numbers = inputs.new_empty(B, sum(sizes[1:])) if saved is None else saved
    tensors = inputs, weights, biases, table, tau, level, spans, lengths, resets, h, last, numbers
    numbered = B, T, sizes[0], sizes[1], sum(sizes[1:]), n_levels
    how = _how(mode, activation, sizes)
    _forward[(triton.cdiv(B, ROWS),)](*tensors, *numbered, KEPT=saved is not None, **how)


def cfc_backward(d_h, weights, widths, *arguments) -> None:
    *tensors, n_levels, B, T, mode, activation, _ = arguments
    table, sizes = _table(widths, d_h.device)
    numbered = B, T, sizes[0], sum(sizes[1:]), n_levels
    _backward[(triton.cdiv(B, ROWS),)](d_h, weights, table, *tensors, *numbered, **_how(mode, activation, sizes))
