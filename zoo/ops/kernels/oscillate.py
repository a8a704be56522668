"""Driven oscillators for GPUs: see `oscillate.cpp`, whose functions, names and shapes these are.

A program runs a block of oscillators of one row and copy through time, a tile of STEPS at once: an associative scan of
maps of two numbers within the tile, whose last step the next tile starts from. All arithmetic is in float64, as in
`scan.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

STEPS, CHANNELS, WARPS = 32, 16, 4


@triton.jit
def _after(a, b, c, d, x, y, e, f, g, h, z, w):
    """The map of pairs by the matrix ((a, b), (c, d)), plus (x, y); then that by ((e, f), (g, h)), plus (z, w)."""
    return (
        e * a + f * c,
        e * b + f * d,
        g * a + h * c,
        g * b + h * d,
        e * x + f * y + z,
        g * x + h * y + w,
    )


@triton.jit
def _place(lengths, steps, copies, P, BLOCK: tl.constexpr):
    """Row and copy of a program; its oscillators, which of them there are, and the places of their z in a state; valid
    steps of the row."""
    number = tl.program_id(1).to(tl.int64)
    row, copy = number // copies, number % copies
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = steps if lengths is None else tl.load(lengths + row).to(tl.int32)
    return row, copy, channel, channel < P, (row * 2 * copies + copy) * P + channel, valid


@triton.jit
def _pair(x, inside, copies, P):
    """The z and the y of a state."""
    z, y = tl.load(x, mask=inside, other=0.0), tl.load(x + copies * P, mask=inside, other=0.0)
    return z.to(tl.float64), y.to(tl.float64)


@triton.jit
def _coefficient(x, constant, at, mask, other: tl.constexpr, VARYING: tl.constexpr):
    """A coefficient at the steps of a tile, `other` where the mask is false."""
    if VARYING:
        return tl.load(x + at, mask=mask, other=other).to(tl.float64)
    return tl.where(mask, constant[None, :], other)


@triton.jit
def _constant(x, channel, inside, VARYING: tl.constexpr):
    if VARYING:
        return tl.zeros(channel.shape, tl.float64)
    return tl.load(x + channel, mask=inside, other=0.0).to(tl.float64)


@triton.jit
def _last(x, STEPS: tl.constexpr):
    """The last step of a tile."""
    return tl.sum(tl.where((tl.arange(0, STEPS) == STEPS - 1)[:, None], x, 0.0), 0)


@triton.jit
def _forward(
    b,
    p,
    q,
    r,
    state,
    resets,
    lengths,
    y,
    last,
    z,
    steps,
    copies,
    P,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
    VARYING: tl.constexpr,
):
    row, copy, channel, inside, own, valid = _place(lengths, steps, copies, P, BLOCK)
    time = tl.arange(0, STEPS)
    speed, place = _pair(state + own, inside, copies, P)
    all_p, all_q, all_r = (
        _constant(p, channel, inside, VARYING),
        _constant(q, channel, inside, VARYING),
        _constant(r, channel, inside, VARYING),
    )
    for start in range(0, steps, STEPS):
        t = start + time
        at = ((row * steps + t) * copies + copy)[:, None] * P + channel[None, :]
        shared = (row * steps + t)[:, None] * P + channel[None, :]
        there = (t < valid)[:, None] & inside[None, :]
        of_p = _coefficient(p, all_p, shared, there, 1.0, VARYING)
        of_q = _coefficient(q, all_q, shared, there, 0.0, VARYING)
        of_r = _coefficient(r, all_r, shared, there, 0.0, VARYING)
        drive = of_p * tl.load(b + at, mask=there, other=0.0).to(tl.float64)
        zz, zy, yz, yy = of_p, -of_q, of_r * of_p, 1.0 - of_r * of_q
        if resets is not None:
            fresh = tl.load(resets + row * steps + t, mask=t < valid, other=0)[:, None] != 0
            zz, zy = tl.where(fresh, 0.0, zz), tl.where(fresh, 0.0, zy)
            yz, yy = tl.where(fresh, 0.0, yz), tl.where(fresh, 0.0, yy)
        zz, zy, yz, yy, to_z, to_y = tl.associative_scan((zz, zy, yz, yy, drive, of_r * drive), 0, _after)
        new_z = zz * speed[None, :] + zy * place[None, :] + to_z
        new_y = yz * speed[None, :] + yy * place[None, :] + to_y
        written = (t < steps)[:, None] & inside[None, :]
        tl.store(y + at, tl.where(there, new_y, 0.0), mask=written)
        if z is not None:
            tl.store(z + at, tl.where(there, new_z, 0.0), mask=written)
        speed, place = _last(new_z, STEPS), _last(new_y, STEPS)
    tl.store(last + own, speed, mask=inside)
    tl.store(last + own + copies * P, place, mask=inside)


@triton.jit
def _backward(
    b,
    p,
    q,
    r,
    state,
    resets,
    lengths,
    y,
    z,
    d_y,
    d_last,
    d_b,
    d_p,
    d_q,
    d_r,
    d_state,
    steps,
    copies,
    P,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
    VARYING: tl.constexpr,
):
    """With u and v the gradients of z and y, from the last step back: v_t = d_y_t + v_{t+1} - q_{t+1} u_{t+1} ;
    u_t = p_{t+1} u_{t+1} + r_t v_t ; d_p = u (z_{t-1} + b) ; d_q = -u y_{t-1} ; d_r = v z ; d_b = p u.

    Those of coefficients are of each copy: d_p, d_q, d_r (copies, B, T, P), or (copies, B, P).
    """
    row, copy, channel, inside, own, valid = _place(lengths, steps, copies, P, BLOCK)
    time = tl.arange(0, STEPS)
    u, v = _pair(d_last + own, inside, copies, P)
    first_z, first_y = _pair(state + own, inside, copies, P)
    all_p, all_q, all_r = (
        _constant(p, channel, inside, VARYING),
        _constant(q, channel, inside, VARYING),
        _constant(r, channel, inside, VARYING),
    )
    sum_p, sum_q = tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.float64)
    sum_r = tl.zeros((BLOCK,), tl.float64)
    rows = copy * (tl.num_programs(1) // copies) + row
    for start in range(0, steps, STEPS):
        t = valid - 1 - start - time
        at = ((row * steps + t) * copies + copy)[:, None] * P + channel[None, :]
        shared = (row * steps + t)[:, None] * P + channel[None, :]
        there = (t >= 0)[:, None] & inside[None, :]
        later = there & (t < valid - 1)[:, None]  # steps that another one follows
        next_p = _coefficient(p, all_p, shared + P, later, 1.0, VARYING)
        next_q = _coefficient(q, all_q, shared + P, later, 0.0, VARYING)
        of_p = _coefficient(p, all_p, shared, there, 1.0, VARYING)
        of_r = _coefficient(r, all_r, shared, there, 0.0, VARYING)
        gradient = tl.load(d_y + at, mask=there, other=0.0).to(tl.float64)
        vu, vv = -next_q, tl.full((STEPS, BLOCK), 1.0, tl.float64)
        if resets is not None:
            fresh = tl.load(resets + row * steps + t + 1, mask=(t >= 0) & (t < valid - 1), other=0)[:, None] != 0
            next_p, vu, vv = tl.where(fresh, 0.0, next_p), tl.where(fresh, 0.0, vu), tl.where(fresh, 0.0, vv)
        uu, uv = next_p + of_r * vu, of_r * vv
        uu, uv, vu, vv, to_u, to_v = tl.associative_scan((uu, uv, vu, vv, of_r * gradient, gradient), 0, _after)
        new_u = uu * u[None, :] + uv * v[None, :] + to_u
        new_v = vu * u[None, :] + vv * v[None, :] + to_v
        earlier = there & (t > 0)[:, None]
        before_z = tl.load(z + at - copies * P, mask=earlier, other=0.0).to(tl.float64)
        before_y = tl.load(y + at - copies * P, mask=earlier, other=0.0).to(tl.float64)
        before_z = tl.where((t == 0)[:, None], first_z[None, :], before_z)
        before_y = tl.where((t == 0)[:, None], first_y[None, :], before_y)
        if resets is not None:
            alone = tl.load(resets + row * steps + t, mask=t >= 0, other=0)[:, None] != 0
            before_z, before_y = tl.where(alone, 0.0, before_z), tl.where(alone, 0.0, before_y)
        tl.store(d_b + at, of_p * new_u, mask=there)
        of_p = tl.where(there, new_u * (before_z + tl.load(b + at, mask=there, other=0.0).to(tl.float64)), 0.0)
        of_q = tl.where(there, -new_u * before_y, 0.0)
        of_r = tl.where(there, new_v * tl.load(z + at, mask=there, other=0.0).to(tl.float64), 0.0)
        behind = start + time
        blank = ((behind >= valid) & (behind < steps))[:, None] & inside[None, :]
        nothing = tl.zeros((STEPS, BLOCK), tl.float64)
        tl.store(d_b + ((row * steps + behind) * copies + copy)[:, None] * P + channel[None, :], nothing, mask=blank)
        if VARYING:
            to = (rows * steps + t)[:, None] * P + channel[None, :]
            tl.store(d_p + to, of_p, mask=there)
            tl.store(d_q + to, of_q, mask=there)
            tl.store(d_r + to, of_r, mask=there)
            to = (rows * steps + behind)[:, None] * P + channel[None, :]
            tl.store(d_p + to, nothing, mask=blank)
            tl.store(d_q + to, nothing, mask=blank)
            tl.store(d_r + to, nothing, mask=blank)
        else:
            sum_p += tl.sum(of_p, 0)
            sum_q += tl.sum(of_q, 0)
            sum_r += tl.sum(of_r, 0)
        u, v = _last(new_u, STEPS), _last(new_v, STEPS)  # of the first step, once there is none before it
    if valid > 0:
        if VARYING:
            all_p = tl.load(p + row * steps * P + channel, mask=inside, other=0.0).to(tl.float64)
            all_q = tl.load(q + row * steps * P + channel, mask=inside, other=0.0).to(tl.float64)
        v = v - all_q * u
        u = all_p * u
        if resets is not None:
            fresh = tl.load(resets + row * steps) != 0
            u, v = tl.where(fresh, 0.0, u), tl.where(fresh, 0.0, v)
    tl.store(d_state + own, u, mask=inside)
    tl.store(d_state + own + copies * P, v, mask=inside)
    if not VARYING:
        tl.store(d_p + rows * P + channel, sum_p, mask=inside)
        tl.store(d_q + rows * P + channel, sum_q, mask=inside)
        tl.store(d_r + rows * P + channel, sum_r, mask=inside)


def _launch(kernel, tensors, B: int, T: int, copies: int, P: int, varying: int) -> None:
    block, steps = (min(most, triton.next_power_of_2(n)) for most, n in ((CHANNELS, P), (STEPS, T)))
    how = {"STEPS": steps, "BLOCK": block, "VARYING": bool(varying), "num_warps": WARPS}
    kernel[triton.cdiv(P, block), B * copies](*tensors, T, copies, P, **how)


def _launch_forward(*arguments) -> None:
    _launch(_forward, arguments[:-5], *arguments[-5:])


def _launch_backward(*arguments) -> None:
    *tensors, d_b, d_p, d_q, d_r, d_state = arguments[:-5]
    copies = arguments[-3]
    if copies == 1:
        _launch(_backward, arguments[:-5], *arguments[-5:])
        return
    parts = d_p.new_empty(3, copies, *d_p.shape)
    _launch(_backward, (*tensors, d_b, *parts, d_state), *arguments[-5:])
    for gradient, part in zip((d_p, d_q, d_r), parts, strict=True):
        torch.sum(part, 0, out=gradient)


oscillate_forward_float = oscillate_forward_double = _launch_forward
oscillate_backward_float = oscillate_backward_double = _launch_backward
