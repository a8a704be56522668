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

from typing import NamedTuple

import torch
from torch import Tensor

from zoo.core.errors import UsageError
from zoo.ops import common
from zoo.ops.bridge import Operator
from zoo.ops.common import blank
from zoo.ops.kernel import Call, Kernel
from zoo.ops.triton_kernel import TritonKernel

KERNEL, TRITON = Kernel("ltc"), TritonKernel("ltc")
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
        backend: "auto", "reference" (one step at a time), "compiled" (float32, CPU) or "triton" (float32, GPU).
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
    form = common.choose_form(
        "ltc", backend, T, FEW_STEPS, _ltc.offers(inputs, state), ("reference",), decode="compiled"
    )
    if form == "reference":
        v, state = _reference(inputs, state, outer, between, cell, spans, lengths, resets, unfolds, epsilon)
    else:
        v, state, _ = _ltc.forms[form](inputs, state, outer, between, cell, spans, lengths, resets, unfolds, epsilon)
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


def _forward(call: Call, x, state, sensory, inner, cell, spans, lengths, resets, unfolds, epsilon, keep):
    """v (B, T, N), the last state and, to `keep` for the backward pass, potentials and sums (B, T, unfolds, 3, N)."""
    (B, T, P), N = x.shape, state.shape[1]
    v, last, saved = x.new_empty(B, T, N), torch.empty_like(state), x.new_empty(B, T, unfolds, 3, N) if keep else None
    reads = (x, sensory, inner, *cell, state, spans, lengths, resets)
    call("ltc_forward", reads, (v, last, saved), B, T, P, N, unfolds, epsilon)
    return v, last, saved


def _backward(
    call: Call, x, sensory, inner, cell, spans, lengths, resets, epsilon, saved, d_v, d_last
) -> tuple[Tensor | None, ...]:
    unfolds, N = saved.shape[2], saved.shape[4]
    n_blocks = min(len(x), torch.get_num_threads()) if x.is_cpu else len(x)
    d_x, d_cell = torch.zeros_like(x), cell.new_zeros(n_blocks, *cell.shape)
    d_sensory, d_inner = (s.new_zeros(n_blocks, *s.shape) for s in (sensory, inner))
    d_state, d_spans = d_last.clone(), None if spans is None else torch.zeros_like(spans)
    reads = (x, sensory, inner, *cell, spans, lengths, resets, saved)
    writes = (d_state, d_x, d_sensory, d_inner, d_cell, d_spans)
    call("ltc_backward", (d_v, *reads), writes, *x.shape, N, unfolds, epsilon, n_blocks)
    return d_x, d_state, d_sensory.sum(0), d_inner.sum(0), d_cell.sum(0), d_spans


_ltc = Operator(
    KERNEL,
    """ltc(Tensor x, Tensor state, Tensor sensory, Tensor inner, Tensor cell, Tensor? spans, Tensor? lengths,
    Tensor? resets, int unfolds, float epsilon, bool keep) -> (Tensor v, Tensor last, Tensor saved)""",
    _forward,
    _backward,
    gradients="x state sensory inner cell spans",
    plain=_reference,
    triton=TRITON,
)
