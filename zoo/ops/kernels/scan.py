"""h_t = a_t * h_{t-1} + b_t, elementwise, on (B, T, D), for GPUs: see `scan.cpp`, whose functions these are.

A program runs one block of channels of one row through time, a tile of STEPS at once: an associative scan within the
tile, whose last step the next tile starts from. All arithmetic is in float64, which memory hides: the roundings of
decays near 1 all have one direction and add up over a long sequence.
"""

from __future__ import annotations

import functools

import triton
import triton.language as tl

STEPS, CHANNELS, COMPLEX_CHANNELS, WARPS = 32, 32, 16, 4


@triton.jit
def _after(a, b, c, d):
    """The map x -> a x + b, then x -> c x + d."""
    return a * c, b * c + d


@triton.jit
def _after_complex(a, i, b, j, c, k, d, m):
    """The same of complex numbers, each its real and its imaginary part."""
    return a * c - i * k, a * k + i * c, b * c - j * k + d, b * k + j * c + m


@triton.jit
def _forward(
    a, b, state, resets, lengths, h, last, steps, D, STEPS: tl.constexpr, BLOCK: tl.constexpr, VARYING: tl.constexpr
):
    row = tl.program_id(1).to(tl.int64)
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < D
    time = tl.arange(0, STEPS)
    valid = steps if lengths is None else tl.load(lengths + row).to(tl.int32)
    x = tl.load(state + row * D + channel, mask=inside, other=0.0).to(tl.float64)
    decay = tl.zeros((STEPS, BLOCK), tl.float64)
    if not VARYING:
        decay += tl.load(a + channel, mask=inside, other=0.0).to(tl.float64)[None, :]
    for start in range(0, steps, STEPS):
        t = start + time
        at = (row * steps + t)[:, None] * D + channel[None, :]
        there = (t < valid)[:, None] & inside[None, :]
        if VARYING:
            decay = tl.load(a + at, mask=there, other=1.0).to(tl.float64)
        kept = tl.where(there, decay, 1.0)
        if resets is not None:
            fresh = tl.load(resets + row * steps + t, mask=t < valid, other=0) != 0
            kept = tl.where(fresh[:, None], 0.0, kept)
        total, y = tl.associative_scan((kept, tl.load(b + at, mask=there, other=0.0).to(tl.float64)), 0, _after)
        y += total * x[None, :]
        tl.store(h + at, tl.where(there, y, 0.0), mask=(t < steps)[:, None] & inside[None, :])
        x = tl.sum(tl.where((time == STEPS - 1)[:, None], y, 0.0), 0)
    tl.store(last + row * D + channel, x, mask=inside)


@triton.jit
def _backward(
    a,
    h,
    state,
    resets,
    lengths,
    d_h,
    d_last,
    d_a,
    d_b,
    d_state,
    steps,
    D,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
    VARYING: tl.constexpr,
):
    """g_t = d_h_t + a_{t+1} g_{t+1} from the last step back; d_b = g ; d_a = g h_{t-1}."""
    row = tl.program_id(1).to(tl.int64)
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < D
    time = tl.arange(0, STEPS)
    valid = steps if lengths is None else tl.load(lengths + row).to(tl.int32)
    x = tl.load(d_last + row * D + channel, mask=inside, other=0.0).to(tl.float64)
    constant = tl.zeros((BLOCK,), tl.float64)
    decay = tl.zeros((STEPS, BLOCK), tl.float64)
    if not VARYING:
        constant = tl.load(a + channel, mask=inside, other=0.0).to(tl.float64)
        decay += constant[None, :]
    sums = tl.zeros((BLOCK,), tl.float64)
    first = tl.load(state + row * D + channel, mask=inside, other=0.0).to(tl.float64)
    for start in range(0, steps, STEPS):
        t = valid - 1 - start - time
        at = (row * steps + t)[:, None] * D + channel[None, :]
        there = (t >= 0)[:, None] & inside[None, :]
        later = there & (t < valid - 1)[:, None]  # steps that another one follows
        if VARYING:
            decay = tl.load(a + at + D, mask=later, other=1.0).to(tl.float64)
        kept = tl.where(later, decay, 1.0)
        if resets is not None:
            fresh = tl.load(resets + row * steps + t + 1, mask=(t >= 0) & (t < valid - 1), other=0) != 0
            kept = tl.where(fresh[:, None], 0.0, kept)
        total, g = tl.associative_scan((kept, tl.load(d_h + at, mask=there, other=0.0).to(tl.float64)), 0, _after)
        g += total * x[None, :]
        before = tl.load(h + at - D, mask=there & (t > 0)[:, None], other=0.0).to(tl.float64)
        before = tl.where((t == 0)[:, None], first[None, :], before)
        if resets is not None:
            own = tl.load(resets + row * steps + t, mask=t >= 0, other=0) != 0
            before = tl.where(own[:, None], 0.0, before)
        tl.store(d_b + at, g, mask=there)
        product = tl.where(there, g * before, 0.0)
        if VARYING:
            tl.store(d_a + at, product, mask=there)
        else:
            sums += tl.sum(product, 0)
        padding = start + time
        blank = ((padding >= valid) & (padding < steps))[:, None] & inside[None, :]
        behind = (row * steps + padding)[:, None] * D + channel[None, :]
        tl.store(d_b + behind, tl.zeros((STEPS, BLOCK), tl.float64), mask=blank)
        if VARYING:
            tl.store(d_a + behind, tl.zeros((STEPS, BLOCK), tl.float64), mask=blank)
        x = tl.sum(tl.where((time == STEPS - 1)[:, None], g, 0.0), 0)  # of the first step, once there is none before it
    if valid > 0:
        if VARYING:
            constant = tl.load(a + row * steps * D + channel, mask=inside, other=0.0).to(tl.float64)
        if resets is not None:
            constant = tl.where(tl.load(resets + row * steps) != 0, 0.0, constant)
        x = constant * x
    tl.store(d_state + row * D + channel, x, mask=inside)
    if not VARYING:
        tl.store(d_a + row * D + channel, sums, mask=inside)


@triton.jit
def _pairs(pointer, at, mask, other: tl.constexpr):
    """The real and the imaginary parts of the numbers `at`; what is masked is `other`, a real number."""
    return (
        tl.load(pointer + 2 * at, mask=mask, other=other).to(tl.float64),
        tl.load(pointer + 2 * at + 1, mask=mask, other=0.0).to(tl.float64),
    )


@triton.jit
def _store_pairs(pointer, at, re, im, mask):
    tl.store(pointer + 2 * at, re, mask=mask)
    tl.store(pointer + 2 * at + 1, im, mask=mask)


@triton.jit
def _forward_complex(
    a, b, state, resets, lengths, h, last, steps, D, STEPS: tl.constexpr, BLOCK: tl.constexpr, VARYING: tl.constexpr
):
    row = tl.program_id(1).to(tl.int64)
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < D
    time = tl.arange(0, STEPS)
    end = (time == STEPS - 1)[:, None]
    valid = steps if lengths is None else tl.load(lengths + row).to(tl.int32)
    x, z = _pairs(state, row * D + channel, inside, 0.0)
    for start in range(0, steps, STEPS):
        t = start + time
        at = (row * steps + t)[:, None] * D + channel[None, :]
        there = (t < valid)[:, None] & inside[None, :]
        kept, turned = _pairs(a, at if VARYING else channel[None, :] + tl.zeros_like(at), there, 1.0)
        if resets is not None:
            fresh = tl.load(resets + row * steps + t, mask=t < valid, other=0) != 0
            kept, turned = tl.where(fresh[:, None], 0.0, kept), tl.where(fresh[:, None], 0.0, turned)
        value, other = _pairs(b, at, there, 0.0)
        total, angle, re, im = tl.associative_scan((kept, turned, value, other), 0, _after_complex)
        y = re + total * x[None, :] - angle * z[None, :]
        w = im + total * z[None, :] + angle * x[None, :]
        _store_pairs(h, at, tl.where(there, y, 0.0), tl.where(there, w, 0.0), (t < steps)[:, None] & inside[None, :])
        x, z = tl.sum(tl.where(end, y, 0.0), 0), tl.sum(tl.where(end, w, 0.0), 0)
    _store_pairs(last, row * D + channel, x, z, inside)


@triton.jit
def _backward_complex(
    a,
    h,
    state,
    resets,
    lengths,
    d_h,
    d_last,
    d_a,
    d_b,
    d_state,
    steps,
    D,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
    VARYING: tl.constexpr,
):
    """As above, with the conjugates of a and h."""
    row = tl.program_id(1).to(tl.int64)
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < D
    time = tl.arange(0, STEPS)
    end = (time == STEPS - 1)[:, None]
    valid = steps if lengths is None else tl.load(lengths + row).to(tl.int32)
    x, z = _pairs(d_last, row * D + channel, inside, 0.0)
    first, other_first = _pairs(state, row * D + channel, inside, 0.0)
    sums, other_sums = tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.float64)
    nothing = tl.zeros((STEPS, BLOCK), tl.float64)
    for start in range(0, steps, STEPS):
        t = valid - 1 - start - time
        at = (row * steps + t)[:, None] * D + channel[None, :]
        there = (t >= 0)[:, None] & inside[None, :]
        later = there & (t < valid - 1)[:, None]
        kept, turned = _pairs(a, at + D if VARYING else channel[None, :] + tl.zeros_like(at), later, 1.0)
        turned = -turned
        if resets is not None:
            fresh = tl.load(resets + row * steps + t + 1, mask=(t >= 0) & (t < valid - 1), other=0) != 0
            kept, turned = tl.where(fresh[:, None], 0.0, kept), tl.where(fresh[:, None], 0.0, turned)
        value, other = _pairs(d_h, at, there, 0.0)
        total, angle, re, im = tl.associative_scan((kept, turned, value, other), 0, _after_complex)
        g = re + total * x[None, :] - angle * z[None, :]
        q = im + total * z[None, :] + angle * x[None, :]
        before, other_before = _pairs(h, at - D, there & (t > 0)[:, None], 0.0)
        before = tl.where((t == 0)[:, None], first[None, :], before)
        other_before = tl.where((t == 0)[:, None], other_first[None, :], other_before)
        if resets is not None:
            own = tl.load(resets + row * steps + t, mask=t >= 0, other=0) != 0
            before, other_before = tl.where(own[:, None], 0.0, before), tl.where(own[:, None], 0.0, other_before)
        _store_pairs(d_b, at, g, q, there)
        product = tl.where(there, g * before + q * other_before, 0.0)
        other_product = tl.where(there, q * before - g * other_before, 0.0)
        if VARYING:
            _store_pairs(d_a, at, product, other_product, there)
        else:
            sums += tl.sum(product, 0)
            other_sums += tl.sum(other_product, 0)
        padding = start + time
        blank = ((padding >= valid) & (padding < steps))[:, None] & inside[None, :]
        behind = (row * steps + padding)[:, None] * D + channel[None, :]
        _store_pairs(d_b, behind, nothing, nothing, blank)
        if VARYING:
            _store_pairs(d_a, behind, nothing, nothing, blank)
        x, z = tl.sum(tl.where(end, g, 0.0), 0), tl.sum(tl.where(end, q, 0.0), 0)
    if valid > 0:
        re, im = _pairs(a, (row * steps * D if VARYING else 0) + channel, inside, 0.0)
        if resets is not None:
            fresh = tl.load(resets + row * steps) != 0
            re, im = tl.where(fresh, 0.0, re), tl.where(fresh, 0.0, im)
        x, z = re * x + im * z, re * z - im * x
    _store_pairs(d_state, row * D + channel, x, z, inside)
    if not VARYING:
        _store_pairs(d_a, row * D + channel, sums, other_sums, inside)


def _launch(kernel, widest: int, *arguments) -> None:
    """Arguments: the tensors, then B, T, D, and whether a differs from step to step."""
    *tensors, B, T, D, varying = arguments
    block, steps = (min(most, triton.next_power_of_2(n)) for most, n in ((widest, D), (STEPS, T)))
    kernel[triton.cdiv(D, block), B](*tensors, T, D, STEPS=steps, BLOCK=block, VARYING=bool(varying), num_warps=WARPS)


scan_forward_float = scan_forward_double = functools.partial(_launch, _forward, CHANNELS)
scan_backward_float = scan_backward_double = functools.partial(_launch, _backward, CHANNELS)
scan_forward_complex64 = scan_forward_complex128 = functools.partial(_launch, _forward_complex, COMPLEX_CHANNELS)
scan_backward_complex64 = scan_backward_complex128 = functools.partial(_launch, _backward_complex, COMPLEX_CHANNELS)
