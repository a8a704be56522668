"""The elementwise linear recurrence h_t = a_t * h_{t-1} + b_t, of real or complex numbers.

The core of the RG-LRU (De et al. 2024, eq. 4), the minGRU (Feng et al. 2024, section 3.1), the LRU (Orvieto et al.
2023, eq. 1) and S5 (Smith et al. 2022, eq. 2). Only products of the given a's and sums are formed, never a quotient or
a logarithm, so that a_t = 0 is no special case and each result is as exact as the step-by-step one, however strong the
decay.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zoo.core.errors import UsageError
from zoo.ops import common, sizes
from zoo.ops.bridge import Operator
from zoo.ops.common import blank, widest
from zoo.ops.cut import by_factors
from zoo.ops.derivatives import once, transformed
from zoo.ops.kernel import Call, Kernel, suffix
from zoo.ops.triton_kernel import TritonKernel
from zoo.pieces import Pieces

DTYPES = (torch.float32, torch.float64, torch.complex64, torch.complex128)
KERNEL, TRITON = Kernel("scan", dtypes=DTYPES), TritonKernel("scan", dtypes=DTYPES)
FEW_STEPS = 2  # decoding
Scan = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
LEGEND = "a (B, T, ...) or (...); b (B, T, ...); state (B, ...); lengths (B,) whole numbers; resets (B, T) bool."


@common.without_autocast
def scan(
    a: Tensor,
    b: Tensor,
    state: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    pieces: Pieces | None = None,
    chunk_size: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """h_t = a_t * h_{t-1} + b_t, elementwise, of real or complex numbers.

    Gradients of complex numbers are torch's: those of a loss L have the direction of dL/dRe + i dL/dIm.

    Args:
        a: (B, T, ...) as b, or (...), the same at all steps of all rows.
        b: (B, T, ...).
        state: h_0 (B, ...), float32 (float64 for float64 inputs), complex where a or b is; None for zeros. Not changed.
        lengths: (B,) valid steps of a right-padded batch; later steps leave the state alone and give zeros.
        resets: (B, T) bool; the state is forgotten before a step where it is true.
        pieces: of a sequence that is cut over processes, of which the other arguments are one piece; `state` is then
            that before the first one.
        chunk_size: steps a chunk of the chunked form, rounded up to a power of two.
        backend: "auto", "reference" (one step at a time), "chunked", "compiled" (C++, on a CPU) or "triton" (on a GPU).
    Returns:
        all h (B, T, ...) in b's dtype (complex where a is), h_T (B, ...).
    """
    if b.ndim < 2 or 0 in b.shape:
        raise UsageError(f"scan: b has shape {tuple(b.shape)}. Expected shapes: {LEGEND}")
    n_steps = b.shape[1]
    common.check("scan", LEGEND, "a", a, b, tuple(b.shape), tuple(b.shape[2:]))
    common.check("scan", LEGEND, "state", state, b, (b.shape[0], *b.shape[2:]))
    lengths = common.check_packing("scan", LEGEND, b, lengths, resets)
    dtype = common.state_dtype(a, b)
    common.check_numbers("scan", state, dtype, a=a, b=b)
    if pieces is not None:
        how: Any = {"resets": resets, "chunk_size": chunk_size, "backend": backend}
        return by_factors(pieces, lambda b, state: scan(a, b, state, **how), b, state)
    chunk = common.chunk_length(chunk_size, sizes.chunk("scan", "chunked"), n_steps)
    decay, inputs = a.to(dtype), b.to(dtype)
    form = common.choose_form("scan", backend, n_steps, FEW_STEPS, compiled_scan.offers(inputs))

    state = inputs.new_zeros(b.shape[0], *b.shape[2:]) if state is None else state
    if form in compiled_scan.forms:
        h, state = compiled_scan.forms[form](decay, inputs, state, resets, lengths)
    else:
        decay, inputs = _masked(decay, inputs, resets, lengths)
        if form == "reference":
            h, state = _reference(decay, inputs, state)
        else:
            h, state = _Chunks.apply(decay, inputs, state, chunk)
        h = h if lengths is None else blank(h, ~common.valid_steps(lengths, n_steps))
    return h if dtype.is_complex and not b.is_complex() else h.to(b.dtype), state


def _masked(a: Tensor, b: Tensor, resets: Tensor | None, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """a (B, T, ...) and b such that nothing passes a reset, and padded steps leave the state as it is."""
    a = a.expand_as(b)
    if resets is not None:
        a = blank(a, resets)
    if lengths is not None:
        padding = ~common.valid_steps(lengths, b.shape[1])
        b = blank(b, padding)
        a = a.masked_fill(padding.reshape(*padding.shape, *[1] * (a.ndim - 2)), 1)
    return a, b


def _reference(a: Tensor, b: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The definition, one step at a time."""
    outputs = []
    for t in range(b.shape[1]):
        state = a[:, t] * state + b[:, t]
        outputs.append(state)
    return torch.stack(outputs, 1), state


def _adjoint(run: Scan, a: Tensor, d_h: Tensor, d_last: Tensor) -> Tensor:
    """g_t = d_h_t + conj(a_{t+1}) g_{t+1} from the last step back, d_last beside d_h_T: a scan in reversed time."""
    later = torch.cat([torch.ones_like(a[:, :1]), a[:, 1:].conj().flip(1)], 1)
    return run(later, d_h.flip(1), d_last)[0].flip(1)


def _gradients(a: Tensor, state: Tensor, h: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Those of a, b and the state: d_b = g, the adjoint, and d_a_t = g_t * conj(h_{t-1})."""
    before = torch.cat([state[:, None], h[:, :-1]], 1)
    return g * before.conj(), g, a[:, 0].conj() * g[:, 0]


def _again(
    a: Tensor, state: Tensor, h: Tensor, d_h: Tensor, d_last: Tensor, *, form: Scan
) -> tuple[Tensor, Tensor, Tensor]:
    """The backward pass of both forms by a scan that can be differentiated in turn."""
    return _gradients(a, state, h, _adjoint(_reference if transformed() else form, a, d_h, d_last))


class _Chunks(torch.autograd.Function):
    """All chunks at once."""

    @staticmethod
    def forward(a: Tensor, b: Tensor, state: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
        h = scan_chunks(a, b, state, chunk)
        return h, common.owned(h[:, -1])

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0], inputs[2], output[0])
        ctx.chunk = inputs[3]

    @staticmethod
    @common.without_autocast
    @once(lambda ctx, *d: (*_again(*ctx.saved_tensors, *d, form=lambda *x: _Chunks.apply(*x, ctx.chunk)), None))
    def backward(ctx, d_h: Tensor, d_last: Tensor):
        a, state, h = ctx.saved_tensors
        return *_gradients(a, state, h, adjoint_chunks(a, d_h, d_last, ctx.chunk)), None


def scan_chunks(a: Tensor, b: Tensor, state: Tensor, chunk: int) -> Tensor:
    """All h (B, T, ...), in 2 * chunk steps that each take one step of all chunks, and a scan over the chunks.

    The first pass finds what each chunk makes of a state of zero, and its whole decay; a scan over these gives the
    states between the chunks, from which the second pass goes on as the definition does. The first is in float64:
    products of decays near 1 all round the same way, which adds up over thousands of chunks.
    """
    n_steps = b.shape[1]
    if n_steps <= chunk:
        return _advance(a.unsqueeze(1), b.unsqueeze(1), state.unsqueeze(1)).squeeze(1)
    missing = -n_steps % chunk
    if missing:
        a, b = (torch.cat([x, x.new_zeros(x.shape[0], missing, *x.shape[2:])], 1) for x in (a, b))
    a, b = a.unflatten(1, (-1, chunk)), b.unflatten(1, (-1, chunk))
    wide = torch.promote_types(widest(b.device), b.dtype)
    total, after = a[:, :-1, 0].to(wide, copy=True), b[:, :-1, 0].to(wide, copy=True)
    for i in range(1, chunk):
        total.mul_(a[:, :-1, i])
        after.mul_(a[:, :-1, i]).add_(b[:, :-1, i])
    starts = torch.cat([state[:, None].to(wide), scan_chunks(total, after, state.to(wide), chunk)], 1)
    return _advance(a, b, starts.to(b.dtype)).flatten(1, 2)[:, :n_steps]


def _advance(a: Tensor, b: Tensor, state: Tensor) -> Tensor:
    """The steps of (B, n, C, ...) one after the other, all chunks at once, each from its state (B, n, ...)."""
    h = b.clone(memory_format=torch.contiguous_format)
    for i in range(b.shape[2]):
        state = h[:, :, i].addcmul_(a[:, :, i], state)
    return h


def adjoint_chunks(a: Tensor, d_h: Tensor, d_last: Tensor, chunk: int) -> Tensor:
    """The adjoint, not for autograd."""
    return _adjoint(lambda a, b, state: (scan_chunks(a, b, state, chunk), state), a, d_h, d_last)


def _real(x: Tensor) -> Tensor:
    """Complex numbers as pairs of real ones, which is how they lie in memory."""
    return torch.view_as_real(x) if x.is_complex() else x


def _scan_forward(
    call: Call, a: Tensor, b: Tensor, state: Tensor, resets: Tensor | None, lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    h, last = torch.empty_like(b), torch.empty_like(state)
    reads = (*map(_real, (a, b, state)), resets, lengths)
    call(f"scan_forward_{suffix(b)}", reads, (_real(h), _real(last)), *_sizes(a, b))
    return h, last


def _scan_backward(
    call: Call,
    a: Tensor,
    h: Tensor,
    state: Tensor,
    resets: Tensor | None,
    lengths: Tensor | None,
    d_h: Tensor,
    d_last: Tensor,
) -> tuple[Tensor, ...]:
    constant = a.ndim < h.ndim
    d_a = torch.empty_like(state if constant else h)  # of each row, where a is the same in all
    gradients = d_a, torch.empty_like(h), torch.empty_like(state)
    reads = (*map(_real, (a, h, state)), resets, lengths, _real(d_h), _real(d_last))
    call(f"scan_backward_{suffix(h)}", reads, tuple(map(_real, gradients)), *_sizes(a, h))
    return d_a.sum(0) if constant else d_a, *gradients[1:]


def _scan_again(
    a: Tensor,
    state: Tensor,
    resets: Tensor | None,
    lengths: Tensor | None,
    h: Tensor,
    d_h: Tensor,
    d_last: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    decay, d_h = _masked(a, d_h, resets, lengths)
    d_decay, d_b, d_state = _again(decay, state, h, d_h, d_last, form=scan)
    for mask in (resets, None if lengths is None else ~common.valid_steps(lengths, h.shape[1])):
        d_decay = d_decay if mask is None else blank(d_decay, mask)
    d_b = d_b if lengths is None else blank(d_b, ~common.valid_steps(lengths, h.shape[1]))
    return d_decay.sum((0, 1)) if a.ndim < h.ndim else d_decay, d_b, d_state


compiled_scan = Operator(  # every block of channels runs through time on its own
    KERNEL,
    "scan(Tensor a, Tensor b, Tensor state, Tensor? resets, Tensor? lengths) -> (Tensor h, Tensor last)",
    _scan_forward,
    _scan_backward,
    gradients="a b state",
    again=_scan_again,
    triton=TRITON,
)


def _sizes(a: Tensor, b: Tensor) -> tuple[int, int, int, int]:
    """B, T, channels, and whether a differs from step to step."""
    return b.shape[0], b.shape[1], math.prod(b.shape[2:]), int(a.ndim == b.ndim)
