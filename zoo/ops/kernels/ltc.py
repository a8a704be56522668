"""The liquid time-constant cell for GPUs: see `ltc.cpp`, whose functions, names and shapes these are.

A program runs a row (backward: a block of rows) through all steps and unfolds, in one launch. Potentials pass from
thread to thread through memory with barriers; sums over synapses are of one tile of sources and targets at a time, and
gradients of synapses are summed in float64.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from zoo.ops.kernels.tiles import tile

WIDEST = 32  # sources, and targets, at once
SIGMA, WEIGHT, PULL = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)  # after mu


@triton.jit
def _sums(synapses, sources, n_from, N, j, fresh, pull, opened, UNITS: tl.constexpr):
    """Add to pull and opened of targets j (UNITS,) what comes through all synapses; sources are zero if `fresh`."""
    parts = n_from * N
    for first in range(0, n_from, UNITS):
        p = first + tl.arange(0, UNITS)
        u = tl.where(fresh != 0, 0.0, tl.load(sources + p, mask=p < n_from, other=0.0))
        at = synapses + p[:, None] * N + j[None, :]
        there = (p < n_from)[:, None] & (j < N)[None, :]
        mu = tl.load(at, mask=there, other=0.0)
        sigma = tl.load(at + SIGMA * parts, mask=there, other=0.0)
        s = 1.0 / (1.0 + tl.exp(sigma * (mu - u[:, None])))
        pull += tl.sum(tl.load(at + PULL * parts, mask=there, other=0.0) * s, 0)
        opened += tl.sum(tl.load(at + WEIGHT * parts, mask=there, other=0.0) * s, 0)
    return pull, opened


@triton.jit
def _forward(
    x,
    sensory,
    inner,
    leak,
    rest,
    capacity,
    spans,
    lengths,
    resets,
    v,
    saved,
    potentials,
    seen,
    T,
    P,
    N,
    unfolds,
    epsilon,
    UNITS: tl.constexpr,
):
    """`potentials` (B, 2, N): the state is in the first, and unfolds go to and fro. `seen` (B, 2, N) is scratch."""
    row = tl.program_id(0).to(tl.int64)
    valid = T if lengths is None else tl.load(lengths + row).to(tl.int32)
    own, kept = potentials + row * 2 * N, seen + row * 2 * N
    unit = tl.arange(0, UNITS)
    done = 0
    for t in range(valid):
        at = row * T + t
        fresh = tl.full((), 0, tl.int32)
        if resets is not None:
            fresh = (tl.load(resets + at) != 0).to(tl.int32)
        dt = (1.0 if spans is None else tl.load(spans + at)) / unfolds
        for first in range(0, N, UNITS):
            j = first + unit
            nothing = tl.zeros((UNITS,), tl.float32)
            pull, opened = _sums(sensory, x + at * P, P, N, j, fresh * 0, nothing, nothing, UNITS)
            tl.store(kept + j, pull, mask=j < N)
            tl.store(kept + N + j, opened, mask=j < N)
        tl.debug_barrier()
        for k in range(unfolds):
            old, new = own + (done % 2) * N, own + ((done + 1) % 2) * N
            blank = fresh if k == 0 else fresh * 0
            for first in range(0, N, UNITS):
                j = first + unit
                pull = tl.load(kept + j, mask=j < N, other=0.0)
                opened = tl.load(kept + N + j, mask=j < N, other=0.0)
                pull, opened = _sums(inner, old, N, N, j, blank, pull, opened, UNITS)
                before = tl.where(blank != 0, 0.0, tl.load(old + j, mask=j < N, other=0.0))
                if saved is not None:
                    to = saved + (at * unfolds + k) * 3 * N + j
                    tl.store(to, before, mask=j < N)
                    tl.store(to + N, pull, mask=j < N)
                    tl.store(to + 2 * N, opened, mask=j < N)
                g = tl.load(leak + j, mask=j < N, other=0.0)
                c = tl.load(capacity + j, mask=j < N, other=1.0)
                drive = g * tl.load(rest + j, mask=j < N, other=0.0) + pull
                after = (c * before + dt * drive) / (c + dt * (g + opened + epsilon))
                tl.store(new + j, after, mask=j < N)
                tl.store(v + at * N + j, after, mask=j < N)  # that of the last unfold stays
            done += 1
            tl.debug_barrier()
    for t in range(valid, T):
        for first in range(0, N, UNITS):
            j = first + unit
            tl.store(v + (row * T + t) * N + j, tl.zeros((UNITS,), tl.float32), mask=j < N)
    if done % 2 == 1:
        for first in range(0, N, UNITS):
            j = first + unit
            tl.store(own + j, tl.load(own + N + j, mask=j < N, other=0.0), mask=j < N)


@triton.jit
def _through(synapses, sources, n_from, N, i, d_pull, d_opened, total, gradients, UNITS: tl.constexpr):
    """Add to `total` of sources i (UNITS,) what comes back through all synapses, and to `gradients` those of them."""
    parts = n_from * N
    u = tl.load(sources + i, mask=i < n_from, other=0.0)
    for first in range(0, N, UNITS):
        j = first + tl.arange(0, UNITS)
        place = i[:, None] * N + j[None, :]
        there = (i < n_from)[:, None] & (j < N)[None, :]
        at, to = synapses + place, gradients + place
        num = tl.load(d_pull + j, mask=j < N, other=0.0)[None, :]
        den = tl.load(d_opened + j, mask=j < N, other=0.0)[None, :]
        over = u[:, None] - tl.load(at, mask=there, other=0.0)
        sigma = tl.load(at + SIGMA * parts, mask=there, other=0.0)
        e = tl.exp(-sigma * over)
        s = 1.0 / (1.0 + e)
        d_s = tl.load(at + PULL * parts, mask=there, other=0.0) * num
        d_s += tl.load(at + WEIGHT * parts, mask=there, other=0.0) * den
        d_x = tl.where(there, d_s * (1.0 - s) * s, 0.0)
        total += tl.sum(d_x * sigma, 1)
        tl.store(to, tl.load(to, mask=there, other=0.0) - d_x * sigma, mask=there)
        tl.store(to + SIGMA * parts, tl.load(to + SIGMA * parts, mask=there, other=0.0) + d_x * over, mask=there)
        tl.store(to + WEIGHT * parts, tl.load(to + WEIGHT * parts, mask=there, other=0.0) + s * den, mask=there)
        tl.store(to + PULL * parts, tl.load(to + PULL * parts, mask=there, other=0.0) + s * num, mask=there)
    return total


@triton.jit
def _backward(
    d_out,
    x,
    sensory,
    inner,
    leak,
    rest,
    capacity,
    spans,
    lengths,
    resets,
    saved,
    d_state,
    d_x,
    d_spans,
    d_sensory,
    d_inner,
    d_cell,
    scratch,
    B,
    T,
    P,
    N,
    unfolds,
    epsilon,
    UNITS: tl.constexpr,
):
    """d_sensory, d_inner and d_cell are a program's, of float64. `scratch` (programs, 5, N): d_pull, d_open, their sums
    over unfolds, and d_v."""
    program, n_programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    unit = tl.arange(0, UNITS)
    d_pull, d_opened = scratch + program * 5 * N, scratch + (program * 5 + 1) * N
    pulls, opens, d_v = d_opened + N, d_opened + 2 * N, d_opened + 3 * N
    of_sensory, of_inner = d_sensory + program * 4 * P * N, d_inner + program * 4 * N * N
    of_cell = d_cell + program * 3 * N
    for row in range(program * B // n_programs, (program + 1) * B // n_programs):
        valid = T if lengths is None else tl.load(lengths + row).to(tl.int32)
        carry = d_state + row * N
        for back in range(valid):
            at = row * T + valid - 1 - back
            dt = (1.0 if spans is None else tl.load(spans + at)) / unfolds
            d_dt = tl.zeros((UNITS,), tl.float32)
            for first in range(0, N, UNITS):
                j = first + unit
                above = tl.load(d_out + at * N + j, mask=j < N, other=0.0) + tl.load(carry + j, mask=j < N, other=0.0)
                tl.store(d_v + j, above, mask=j < N)
                tl.store(pulls + j, tl.zeros((UNITS,), tl.float32), mask=j < N)
                tl.store(opens + j, tl.zeros((UNITS,), tl.float32), mask=j < N)
            tl.debug_barrier()
            for count in range(unfolds):
                before = saved + (at * unfolds + unfolds - 1 - count) * 3 * N
                for first in range(0, N, UNITS):
                    j = first + unit
                    inside = j < N
                    old = tl.load(before + j, mask=inside, other=0.0)
                    g, r = tl.load(leak + j, mask=inside, other=0.0), tl.load(rest + j, mask=inside, other=0.0)
                    c = tl.load(capacity + j, mask=inside, other=1.0)
                    drive = g * r + tl.load(before + N + j, mask=inside, other=0.0)
                    drain = g + tl.load(before + 2 * N + j, mask=inside, other=0.0) + epsilon
                    below = c + dt * drain
                    d_above = tl.load(d_v + j, mask=inside, other=0.0) / below
                    after = (c * old + dt * drive) / below
                    d_below = -d_above * after
                    tl.store(d_pull + j, dt * d_above, mask=inside)
                    tl.store(d_opened + j, dt * d_below, mask=inside)
                    tl.store(pulls + j, tl.load(pulls + j, mask=inside, other=0.0) + dt * d_above, mask=inside)
                    tl.store(opens + j, tl.load(opens + j, mask=inside, other=0.0) + dt * d_below, mask=inside)
                    tl.store(d_v + j, c * d_above, mask=inside)
                    to = of_cell + j
                    d_leak = tl.load(to, mask=inside, other=0.0) + dt * (r * d_above + d_below)
                    tl.store(to, d_leak, mask=inside)
                    tl.store(to + N, tl.load(to + N, mask=inside, other=0.0) + dt * g * d_above, mask=inside)
                    d_capacity = tl.load(to + 2 * N, mask=inside, other=0.0) + d_above * (old - after)
                    tl.store(to + 2 * N, d_capacity, mask=inside)  # near rest the two cancel
                    d_dt += tl.where(inside, drive * d_above + drain * d_below, 0.0)
                tl.debug_barrier()
                for first in range(0, N, UNITS):
                    i = first + unit
                    total = tl.load(d_v + i, mask=i < N, other=0.0)
                    total = _through(inner, before, N, N, i, d_pull, d_opened, total, of_inner, UNITS)
                    tl.store(d_v + i, total, mask=i < N)
                tl.debug_barrier()
            for first in range(0, P, UNITS):
                i = first + unit
                total = tl.zeros((UNITS,), tl.float32)
                total = _through(sensory, x + at * P, P, N, i, pulls, opens, total, of_sensory, UNITS)
                tl.store(d_x + at * P + i, total, mask=i < P)
            if d_spans is not None:
                tl.store(d_spans + at, tl.sum(d_dt, 0) / unfolds)
            fresh = tl.full((), 0, tl.int32)
            if resets is not None:
                fresh = (tl.load(resets + at) != 0).to(tl.int32)
            for first in range(0, N, UNITS):
                j = first + unit
                d_before = tl.load(d_v + j, mask=j < N, other=0.0)
                tl.store(carry + j, tl.where(fresh != 0, 0.0, d_before), mask=j < N)
            tl.debug_barrier()


def _how(N: int) -> dict[str, int]:
    return {"UNITS": tile(N, WIDEST), "num_warps": 4}


def ltc_forward(
    x,
    sensory,
    inner,
    leak,
    rest,
    capacity,
    state,
    spans,
    lengths,
    resets,
    v,
    last,
    saved,
    B,
    T,
    P,
    N,
    unfolds,
    epsilon,
) -> None:
    potentials, seen = torch.stack([state, state], 1), x.new_empty(B, 2, N)
    if saved is not None and lengths is not None:
        saved.zero_()
    tensors = x, sensory, inner, leak, rest, capacity, spans, lengths, resets, v, saved, potentials, seen
    _forward[(B,)](*tensors, T, P, N, unfolds, epsilon, **_how(N))
    last.copy_(potentials[:, 0])


def ltc_backward(
    d_out,
    x,
    sensory,
    inner,
    leak,
    rest,
    capacity,
    spans,
    lengths,
    resets,
    saved,
    d_state,
    d_x,
    d_sensory,
    d_inner,
    d_cell,
    d_spans,
    B,
    T,
    P,
    N,
    unfolds,
    epsilon,
    n_blocks,
) -> None:
    wide = [torch.zeros_like(d, dtype=torch.float64) for d in (d_sensory, d_inner, d_cell)]
    tensors = d_out, x, sensory, inner, leak, rest, capacity, spans, lengths, resets, saved, d_state, d_x, d_spans
    scratch = x.new_empty(n_blocks, 5, N)
    _backward[(n_blocks,)](*tensors, *wide, scratch, B, T, P, N, unfolds, epsilon, **_how(N))
    for d, sums in zip((d_sensory, d_inner, d_cell), wide, strict=True):
        d.copy_(sums)
