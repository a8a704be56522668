"""The liquid time-constant cell: neurons whose synapses set how fast they forget.

Hasani et al. 2021 (Liquid time-constant networks, AAAI; arXiv 2006.04439), with the conductance-based synapses of
Lechner et al. 2020 (Neural circuit policies) and the fused semi-implicit Euler solver of the first (algorithm 1):

    capacity dv/dt = leak (rest - v) + sum_p weight_p sigmoid(sigma_p (u_p - mu_p)) (reversal_p - v)

over all sources p, inputs and neurons alike. A step of dt = timespan / unfolds takes v on the right at its end where it
enters linearly, and the sigmoids at its start:

    v <- (capacity v + dt (leak rest + sum_p pull_p s_p)) / (capacity + dt (leak + sum_p weight_p s_p + epsilon))

with pull = weight * reversal.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from zoo.core.errors import UsageError
from zoo.ops import common, native
from zoo.ops.common import blank
from zoo.ops.derivatives import gradients_of, once

FEW_STEPS = 1  # decoding
AT_ONCE = 1 << 22  # synapses of inputs that the step form computes at a time
LEGEND = (
    "x (B, T, P); sensory, inner: mu, sigma, weight, reversal, each (P, N) and (N, N); leak, rest, capacity (N,); "
    "state (B, N); timespans (B, T); lengths (B,) whole numbers; resets (B, T) bool."
)


class Synapses(NamedTuple):
    """Parameters of all synapses from P sources (rows) to N neurons (columns); a weight of 0 is none."""

    mu: Tensor
    sigma: Tensor
    weight: Tensor
    reversal: Tensor


@common.without_autocast
def ltc(
    x: Tensor,
    sensory: Synapses,
    inner: Synapses,
    leak: Tensor,
    rest: Tensor,
    capacity: Tensor,
    state: Tensor | None = None,
    *,
    unfolds: int = 6,
    epsilon: float = 1e-8,
    timespans: Tensor | None = None,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The potentials of an LTC cell at every step.

    Args:
        x: (B, T, P), what the sensory synapses see.
        sensory: synapses (P, N) from the inputs.
        inner: synapses (N, N) among the neurons.
        leak, rest, capacity: (N,), conductance and potential of the leak, capacity of the membrane.
        state: (B, N), float32 (float64 for float64 inputs); None for zeros. Not changed.
        unfolds: solver steps in each time step.
        epsilon: keeps the denominator from zero.
        timespans: (B, T), time since the step before; None for 1 everywhere.
        lengths: (B,) valid steps of a right-padded batch; later steps leave the state as it is and give zeros.
        resets: (B, T) bool; the state is zero before a step where it is true.
        backend: "auto", "reference" (one step at a time) or "compiled".
    Returns:
        v (B, T, N) in x's dtype, and the last state (B, N).
    """
    if x.ndim != 3 or leak.ndim != 1 or 0 in x.shape or 0 in leak.shape:
        raise UsageError(f"ltc: x {tuple(x.shape)}, leak {tuple(leak.shape)}. Expected shapes: {LEGEND}")
    (B, T, P), N = x.shape, len(leak)
    for what, synapses, n_from in (("sensory", sensory, P), ("inner", inner, N)):
        for field, part in zip(Synapses._fields, synapses, strict=True):
            common.check("ltc", LEGEND, f"{what}.{field}", part, x, (n_from, N))
    for what, part in {"rest": rest, "capacity": capacity}.items():
        common.check("ltc", LEGEND, what, part, x, (N,))
    common.check("ltc", LEGEND, "state", state, x, (B, N))
    common.check("ltc", LEGEND, "timespans", timespans, x, (B, T))
    lengths = common.check_packing("ltc", LEGEND, x, lengths, resets)
    if unfolds < 1:
        raise UsageError(f"ltc: unfolds={unfolds} is not allowed: it should be at least 1.")
    dtype = common.state_dtype(x)
    common.check_dtypes("ltc", state, dtype, x=x, leak=leak)

    inputs = x.to(dtype)
    state = inputs.new_zeros(B, N) if state is None else state
    # the pull of a synapse, weight * reversal, takes the reversal potential's place
    outer, between = (torch.stack([s.mu, s.sigma, s.weight, s.weight * s.reversal]).to(dtype) for s in (sensory, inner))
    cell = torch.stack([leak, rest, capacity]).to(dtype)
    spans = None if timespans is None else timespans.to(dtype)
    if lengths is not None:
        padding = ~common.valid_steps(lengths, T)
        inputs, resets = blank(inputs, padding), None if resets is None else resets & ~padding
        spans = None if spans is None else blank(spans, padding)
    offers = {"compiled": lambda: native.serves(inputs, state, kernel="ltc")}
    if common.choose_form("ltc", backend, T, FEW_STEPS, offers, ("reference",)) == "reference":
        v, state = _reference(inputs, state, outer, between, cell, spans, lengths, resets, unfolds, epsilon)
    else:
        parts = [inputs, state, outer, between, cell] + ([] if spans is None else [spans])
        keep = torch.is_grad_enabled() and any(part.requires_grad for part in parts)
        v, state, _ = _compiled(inputs, state, outer, between, cell, spans, lengths, resets, unfolds, epsilon, keep)
    return v.to(x.dtype), state


class _Sums:
    """Sources u (rows, P) through synapses (4, P, N): the sums over P of weight * reversal * s and of weight * s."""

    def __init__(self, synapses: Tensor):
        mu, self.sigma, weight, pull = synapses.mT.contiguous()[:, :, None]  # (N, 1, P)
        self.shift, self.weights = -self.sigma * mu, torch.cat([pull, weight], 1).mT

    def __call__(self, u: Tensor) -> tuple[Tensor, Tensor]:
        s = torch.addcmul(self.shift, self.sigma, u).sigmoid()  # (N, rows, P)
        pull, opened = (s @ self.weights).unbind(-1)
        return pull, opened  # each (N, rows)


def _reference(
    x: Tensor,
    v: Tensor,
    sensory: Tensor,
    inner: Tensor,
    cell: Tensor,
    spans: Tensor | None,
    lengths: Tensor | None,
    resets: Tensor | None,
    unfolds: int,
    epsilon: float,
) -> tuple[Tensor, Tensor]:
    """The definition, one step at a time; only the inputs' synapses are computed for many steps at once."""
    B, T, P = x.shape
    N = v.shape[1]
    leak, rest, capacity = cell
    size = max(1, AT_ONCE // (B * P * N))
    from_inputs, from_neurons = _Sums(sensory), _Sums(inner)
    seen = [from_inputs(part.flatten(0, 1)) for part in x.split(size, 1)]
    pulls, opens = (torch.cat([part[i].unflatten(1, (B, -1)) for part in seen], 2) for i in (0, 1))  # (N, B, T)
    pulls, opens = (leak * rest)[:, None, None] + pulls, (leak + epsilon)[:, None, None] + opens
    valid = None if lengths is None else common.valid_steps(lengths, T)
    steps = []
    for t, (pull_x, open_x) in enumerate(zip(pulls.unbind(2), opens.unbind(2), strict=True)):
        if resets is not None:
            v = blank(v, resets[:, t])
        dt = 1 / unfolds if spans is None else spans[:, t, None] / unfolds
        new = v
        for _ in range(unfolds):
            pull, open_ = from_neurons(new)
            drive, drain = (pull + pull_x).T, (open_ + open_x).T
            new = (capacity * new + dt * drive) / (capacity + dt * drain)
        v, new = (new, new) if valid is None else (torch.where(valid[:, t, None], new, v), blank(new, ~valid[:, t]))
        steps.append(new)
    return torch.stack(steps, 1), v


@torch.library.custom_op("zoo::ltc", mutates_args=())
def _compiled(
    x: Tensor,
    state: Tensor,
    sensory: Tensor,
    inner: Tensor,
    cell: Tensor,
    spans: Tensor | None,
    lengths: Tensor | None,
    resets: Tensor | None,
    unfolds: int,
    epsilon: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """v (B, T, N), the last state and, to `keep` for the backward pass, potentials and sums (B, T, unfolds, 3, N)."""
    v, last, saved = _empty(x, state, unfolds, keep)
    native.load("ltc").ltc_forward(
        x.contiguous(), sensory.contiguous(), inner.contiguous(), *cell, state.contiguous(),
        *_packing(spans, lengths, resets), v, last, saved if keep else None,
        *x.shape, state.shape[1], unfolds, epsilon,
    )  # fmt: skip
    return v, last, saved


def _empty(x: Tensor, state: Tensor, unfolds: int, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    (B, T, _), N = x.shape, state.shape[1]
    last = torch.empty_like(state, memory_format=torch.contiguous_format)
    return x.new_empty(B, T, N), last, x.new_empty(B, T, unfolds, 3, N if keep else 0)


def _packing(*fields: Tensor | None) -> list[Tensor | None]:
    return [None if field is None else field.contiguous() for field in fields]


@_compiled.register_fake
def _(x, state, sensory, inner, cell, spans, lengths, resets, unfolds, epsilon, keep):
    return _empty(x, state, unfolds, keep)


@torch.library.custom_op("zoo::ltc_backward", mutates_args=())
def _compiled_backward(
    d_v: Tensor,
    d_last: Tensor,
    saved: Tensor,
    x: Tensor,
    sensory: Tensor,
    inner: Tensor,
    cell: Tensor,
    spans: Tensor | None,
    lengths: Tensor | None,
    resets: Tensor | None,
    epsilon: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, the first state, both sets of synapses, the cell's constants and the timespans."""
    unfolds, N, n_blocks = saved.shape[2], saved.shape[4], min(len(x), torch.get_num_threads())
    d_x, d_cell = torch.zeros_like(x, memory_format=torch.contiguous_format), cell.new_zeros(n_blocks, *cell.shape)
    d_sensory, d_inner = (s.new_zeros(n_blocks, *s.shape) for s in (sensory, inner))
    d_state, d_spans = d_last.clone(memory_format=torch.contiguous_format), d_x.new_zeros(_spans_shape(x, spans))
    native.load("ltc").ltc_backward(
        d_v.contiguous(), x.contiguous(), sensory.contiguous(), inner.contiguous(), *cell,
        *_packing(spans, lengths, resets), saved, d_state, d_x, d_sensory, d_inner, d_cell,
        None if spans is None else d_spans, *x.shape, N, unfolds, epsilon, n_blocks,
    )  # fmt: skip
    return d_x, d_state, d_sensory.sum(0), d_inner.sum(0), d_cell.sum(0), d_spans


def _spans_shape(x: Tensor, spans: Tensor | None) -> Sequence[int]:
    return (0,) if spans is None else x.shape[:2]


@_compiled_backward.register_fake
def _(d_v, d_last, saved, x, sensory, inner, cell, spans, lengths, resets, epsilon):
    likes = (torch.empty_like(p, memory_format=torch.contiguous_format) for p in (x, d_last, sensory, inner, cell))
    return *likes, x.new_empty(_spans_shape(x, spans))


def _keep_for_backward(ctx, inputs, output):
    *tensors, ctx.unfolds, ctx.epsilon, _ = inputs
    ctx.save_for_backward(*tensors, output[2])


def _backward_again(ctx, *d: Tensor):
    inputs = (*ctx.saved_tensors[:-1], ctx.unfolds, ctx.epsilon)
    return *gradients_of(_reference, inputs, d[:2]), None


@once(_backward_again)
def _backward(ctx, d_v: Tensor, d_last: Tensor, _):
    x, _, *given, saved = ctx.saved_tensors  # once: checkpoints give them no second time
    *gradients, d_spans = _compiled_backward(d_v, d_last, saved, x, *given, ctx.epsilon)
    return *gradients, None if given[3] is None else d_spans, *5 * [None]


_compiled.register_autograd(_backward, setup_context=_keep_for_backward)
