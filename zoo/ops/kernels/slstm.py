"""The scalar LSTM for GPUs: see `slstm.cpp`, whose functions, names and shapes these are.

A program runs one head of a block of rows through all steps, in one launch. What its threads need of each other, the
output of the step before, passes through memory with a barrier; weights come out of the caches, so that any width of a
head has a place. Products are exact float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from zoo.ops.kernels.elementary import log_sigmoid, sigmoid, tanh
from zoo.ops.kernels.tiles import tile

ROWS = 16  # the least that a product takes
WIDEST = 64  # units at once
INPUT, FORGET, FORGOTTEN, VALUE, OUTPUT, CELL, SIZE, N_SAVED = (tl.constexpr(i) for i in range(8))


@triton.jit
def _forward(
    gates, weights, lengths, resets, h0, c, n, m, h, saved, B, T, H, D, ROWS: tl.constexpr, UNITS: tl.constexpr
):
    """m is (B, H, D) of float64: it enters by differences alone."""
    head = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = row < B
    unit = tl.arange(0, UNITS)
    valid = tl.where(there, T, 0) if lengths is None else tl.load(lengths + row, mask=there, other=0)
    states = ((row * H + head) * D)[:, None]
    for t in range(T):
        goes_on = t < valid
        fresh = row < 0
        if resets is not None:
            fresh = tl.load(resets + row * T + t, mask=goes_on, other=0) != 0
        kept = (goes_on & (fresh == 0))[:, None]
        place = ((row * T + t) * H + head)[:, None]
        for first in range(0, D, UNITS):
            j = first + unit
            here = there[:, None] & (j < D)[None, :]
            at = (((row * T + t) * 4 * H + head) * D)[:, None] + j[None, :]
            i = tl.load(gates + at, mask=here, other=0.0)
            f = tl.load(gates + at + H * D, mask=here, other=0.0)
            z = tl.load(gates + at + 2 * H * D, mask=here, other=0.0)
            o = tl.load(gates + at + 3 * H * D, mask=here, other=0.0)
            for low in range(0, D, UNITS):
                k = low + unit
                known = kept & (k < D)[None, :]
                if t == 0:
                    x = tl.load(h0 + states + k[None, :], mask=known, other=0.0)
                else:
                    x = tl.load(h + (place - H) * D + k[None, :], mask=known, other=0.0)
                w = weights + (head * D + k[:, None]) * 4 * D + j[None, :]
                whole = (k < D)[:, None] & (j < D)[None, :]
                i = tl.dot(x, tl.load(w, mask=whole, other=0.0), i, input_precision="ieee")
                f = tl.dot(x, tl.load(w + D, mask=whole, other=0.0), f, input_precision="ieee")
                z = tl.dot(x, tl.load(w + 2 * D, mask=whole, other=0.0), z, input_precision="ieee")
                o = tl.dot(x, tl.load(w + 3 * D, mask=whole, other=0.0), o, input_precision="ieee")
            known = kept & (j < D)[None, :]
            cell = tl.load(c + states + j[None, :], mask=known, other=0.0)
            size = tl.load(n + states + j[None, :], mask=known, other=0.0)
            top = tl.load(m + states + j[None, :], mask=known, other=0.0)
            rest = size == 0.0
            before = top + log_sigmoid(f).to(tl.float64)
            top = tl.where(rest | (i > before), i.to(tl.float64), before)
            write = tl.exp((i - top).to(tl.float32))
            keep = tl.where(rest, 0.0, tl.exp((before - top).to(tl.float32)))
            value, out = tanh(z), sigmoid(o)
            cell = keep * cell + write * value
            size = keep * size + write
            y = tl.where(goes_on[:, None], out * cell / size, 0.0)
            going = goes_on[:, None] & here
            tl.store(c + states + j[None, :], cell, mask=going)
            tl.store(n + states + j[None, :], size, mask=going)
            tl.store(m + states + j[None, :], top, mask=going)
            tl.store(h + place * D + j[None, :], y, mask=here)
            if saved is not None:
                to = saved + place * N_SAVED * D + j[None, :]
                tl.store(to + INPUT * D, write, mask=going)
                tl.store(to + FORGET * D, keep, mask=going)
                tl.store(to + FORGOTTEN * D, sigmoid(-f), mask=going)
                tl.store(to + VALUE * D, value, mask=going)
                tl.store(to + OUTPUT * D, out, mask=going)
                tl.store(to + CELL * D, cell, mask=going)
                tl.store(to + SIZE * D, size, mask=going)
        tl.debug_barrier()  # the next step reads this one's output
    for first in range(0, D, UNITS):
        j = first + unit
        there_last = (valid > 0)[:, None] & (j < D)[None, :]
        y = tl.load(h + ((row * T + valid - 1) * H + head)[:, None] * D + j[None, :], mask=there_last, other=0.0)
        tl.store(h0 + states + j[None, :], y, mask=there_last)


@triton.jit
def _backward(
    turned,
    lengths,
    resets,
    c0,
    n0,
    saved,
    d_h,
    d_h0,
    d_c,
    d_n,
    d_m,
    d_gates,
    B,
    T,
    H,
    D,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
):
    head = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = row < B
    unit = tl.arange(0, UNITS)
    valid = tl.where(there, T, 0) if lengths is None else tl.load(lengths + row, mask=there, other=0)
    states = ((row * H + head) * D)[:, None]
    for back in range(T):
        t = T - 1 - back
        goes_on = t < valid
        fresh = row < 0
        if resets is not None:
            fresh = tl.load(resets + row * T + t, mask=goes_on, other=0) != 0
        kept = (goes_on & (fresh == 0))[:, None]
        place = ((row * T + t) * H + head)[:, None]
        for first in range(0, D, UNITS):
            j = first + unit
            here = there[:, None] & (j < D)[None, :]
            going, known = goes_on[:, None] & here, kept & here
            at, own = states + j[None, :], place * D + j[None, :]
            of = saved + place * N_SAVED * D + j[None, :]
            i = tl.load(of + INPUT * D, mask=going, other=0.0)
            f = tl.load(of + FORGET * D, mask=going, other=0.0)
            z = tl.load(of + VALUE * D, mask=going, other=0.0)
            o = tl.load(of + OUTPUT * D, mask=going, other=0.0)
            size = tl.load(of + SIZE * D, mask=going, other=1.0)
            ratio = tl.load(of + CELL * D, mask=going, other=0.0) / size
            if t == 0:
                c_before = tl.load(c0 + at, mask=known, other=0.0)
                n_before = tl.load(n0 + at, mask=known, other=0.0)
            else:
                c_before = tl.load(of - H * N_SAVED * D + CELL * D, mask=known, other=0.0)
                n_before = tl.load(of - H * N_SAVED * D + SIZE * D, mask=known, other=0.0)
            dh = tl.load(d_h0 + at, mask=going, other=0.0) + tl.load(d_h + own, mask=going, other=0.0)
            dm = tl.load(d_m + at, mask=going, other=0.0)
            dc = tl.load(d_c + at, mask=going, other=0.0) + dh * o / size
            dn = tl.load(d_n + at, mask=going, other=0.0) - dh * o * ratio / size
            d_kept, d_input = f * (dc * c_before + dn * n_before), i * (dc * z + dn)
            from_kept = i < 1.0  # m is what was kept, or else the input gate
            to_kept = tl.where(from_kept, dm - d_input, d_kept)
            to_input = tl.where(from_kept, d_input, dm - d_kept)
            sums = d_gates + (((row * T + t) * 4 * H + head) * D)[:, None] + j[None, :]
            tl.store(sums, tl.where(going, to_input, 0.0), mask=here)
            forgotten = tl.load(of + FORGOTTEN * D, mask=going, other=0.0)
            tl.store(sums + H * D, tl.where(going, to_kept * forgotten, 0.0), mask=here)
            tl.store(sums + 2 * H * D, tl.where(going, dc * i * (1.0 - z * z), 0.0), mask=here)
            tl.store(sums + 3 * H * D, tl.where(going, dh * ratio * o * (1.0 - o), 0.0), mask=here)
            tl.store(d_c + at, dc * f, mask=going)
            tl.store(d_n + at, dn * f, mask=going)
            tl.store(d_m + at, tl.where(f > 0.0, to_kept, 0.0), mask=going)
        tl.debug_barrier()
        for first in range(0, D, UNITS):
            j = first + unit
            total = tl.zeros((ROWS, UNITS), tl.float32)
            for low in range(0, D, UNITS):
                k = low + unit
                whole = (k < D)[:, None] & (j < D)[None, :]
                known = goes_on[:, None] & (k < D)[None, :]
                for gate in range(4):
                    x = tl.load(
                        d_gates + ((((row * T + t) * 4 + gate) * H + head) * D)[:, None] + k[None, :],
                        mask=known,
                        other=0.0,
                    )
                    w = tl.load(turned + ((head * 4 + gate) * D + k[:, None]) * D + j[None, :], mask=whole, other=0.0)
                    total = tl.dot(x, w, total, input_precision="ieee")
            going = goes_on[:, None] & there[:, None] & (j < D)[None, :]
            tl.store(d_h0 + states + j[None, :], tl.where(kept, total, 0.0), mask=going)
        tl.debug_barrier()


def _launch(kernel, tensors, B: int, T: int, H: int, D: int) -> None:
    units = tile(D, WIDEST)
    warps = 4 if units < WIDEST else 8
    kernel[H, triton.cdiv(B, ROWS)](*tensors, B, T, H, D, ROWS=ROWS, UNITS=units, num_warps=warps, num_stages=2)


def slstm_forward(gates, weights, lengths, resets, h0, c, n, m, h, saved, B, T, H, D, threads) -> None:
    wide = m.to(torch.float64)
    if saved is not None and lengths is not None:
        saved.zero_()
    _launch(_forward, (gates, weights, lengths, resets, h0, c, n, wide, h, saved), B, T, H, D)
    m.copy_(wide)


def slstm_backward(*arguments) -> None:
    *tensors, B, T, H, D, _ = arguments
    _launch(_backward, tensors, B, T, H, D)
