"""The elementwise linear recurrence h_t = a_t * h_{t-1} + b_t.

The core of the RG-LRU (De et al. 2024, eq. 4) and the minGRU (Feng et al. 2024, section 3.1). Only products of the
given a's and sums are formed, never a quotient or a logarithm, so that a_t = 0 is no special case and each result is
as exact as the step-by-step one, however strong the decay.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from zoo.core.errors import UsageError
from zoo.ops import common
from zoo.ops.bridge import Operator
from zoo.ops.common import blank, widest
from zoo.ops.derivatives import once, transformed
from zoo.ops.kernel import Call, Kernel, suffix

KERNEL = Kernel("scan", dtypes=(torch.float32, torch.float64))
CHUNK = 16
FEW_STEPS = 2  # decoding
Scan = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
LEGEND = "a, b (B, T, ...); state (B, ...); lengths (B,) whole numbers; resets (B, T) bool."


@common.without_autocast
def scan(
    a: Tensor,
    b: Tensor,
    state: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    chunk_size: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """h_t = a_t * h_{t-1} + b_t, elementwise.

    Args:
        a, b: (B, T, ...), of one shape.
        state: h_0 (B, ...), float32 (float64 for float64 inputs); None for zeros. Not changed.
        lengths: (B,) valid steps of a right-padded batch; later steps leave the state alone and give zeros.
        resets: (B, T) bool; the state is forgotten before a step where it is true.
        chunk_size: steps a chunk of the chunked form, rounded up to a power of two.
        backend: "auto", "reference" (one step at a time), "chunked", or "compiled" (C++, on a CPU).
    Returns:
        all h (B, T, ...) in b's dtype, h_T (B, ...).
    """
    if b.ndim < 2 or 0 in b.shape:
        raise UsageError(f"scan: b has shape {tuple(b.shape)}. Expected shapes: {LEGEND}")
    n_steps = b.shape[1]
    common.check("scan", LEGEND, "a", a, b, tuple(b.shape))
    common.check("scan", LEGEND, "state", state, b, (b.shape[0], *b.shape[2:]))
    lengths = common.check_packing("scan", LEGEND, b, lengths, resets)
    dtype = common.state_dtype(a, b)
    common.check_dtypes("scan", state, dtype, a=a, b=b)
    chunk = common.chunk_length(chunk_size, CHUNK, n_steps)
    decay, inputs = a.to(dtype), b.to(dtype)
    offers = {"compiled": lambda: KERNEL.why_not(inputs)}
    form = common.choose_form("scan", backend, n_steps, FEW_STEPS, offers)

    state = inputs.new_zeros(b.shape[0], *b.shape[2:]) if state is None else state
    if resets is not None:
        decay = blank(decay, resets)
    if lengths is not None:  # a padded step leaves the state as it is
        padding = ~common.valid_steps(lengths, n_steps)
        inputs = blank(inputs, padding)
        decay = decay.masked_fill(padding.reshape(*padding.shape, *[1] * (decay.ndim - 2)), 1)
    if form == "reference":
        h, state = _reference(decay, inputs, state)
    elif form == "compiled":
        h, state = compiled_scan(decay, inputs, state)
    else:
        h, state = _Chunks.apply(decay, inputs, state, chunk)
    return (h if lengths is None else blank(h, padding)).to(b.dtype), state


def _reference(a: Tensor, b: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The definition, one step at a time."""
    outputs = []
    for t in range(b.shape[1]):
        state = a[:, t] * state + b[:, t]
        outputs.append(state)
    return torch.stack(outputs, 1), state


def _adjoint(run: Scan, a: Tensor, d_h: Tensor, d_last: Tensor) -> Tensor:
    """g_t = d_h_t + a_{t+1} g_{t+1} from the last step back, with d_last beside d_h_T: a scan in reversed time."""
    later = torch.cat([torch.ones_like(a[:, :1]), a[:, 1:].flip(1)], 1)
    return run(later, d_h.flip(1), d_last)[0].flip(1)


def _gradients(a: Tensor, state: Tensor, h: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Those of a, b and the state: d_b = g, the adjoint, and d_a_t = g_t * h_{t-1}."""
    return torch.cat([(g[:, 0] * state)[:, None], g[:, 1:] * h[:, :-1]], 1), g, a[:, 0] * g[:, 0]


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
    wide = widest(b.device)
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


def _scan_forward(call: Call, a: Tensor, b: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    h, last = torch.empty_like(b), torch.empty_like(state)
    call(f"scan_forward_{suffix(b)}", (a, b, state), (h, last), *_sizes(b))
    return h, last


def _scan_backward(call: Call, a: Tensor, h: Tensor, state: Tensor, d_h: Tensor, d_last: Tensor) -> tuple[Tensor, ...]:
    gradients = torch.empty_like(a), torch.empty_like(h), torch.empty_like(state)
    call(f"scan_backward_{suffix(h)}", (a, h, state, d_h, d_last), gradients, *_sizes(h))
    return gradients


def _scan_again(a: Tensor, state: Tensor, h: Tensor, d_h: Tensor, d_last: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _again(a, state, h, d_h, d_last, form=compiled_scan)


compiled_scan = Operator(  # every block of channels runs through time on its own
    KERNEL,
    "scan(Tensor a, Tensor b, Tensor state) -> (Tensor h, Tensor last)",
    _scan_forward,
    _scan_backward,
    gradients="a b state",
    again=_scan_again,
)


def _sizes(x: Tensor) -> tuple[int, int, int]:
    return x.shape[0], x.shape[1], math.prod(x.shape[2:])
