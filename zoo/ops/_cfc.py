"""The closed-form continuous-time cell: the state at a step is a closed form in the time since the last one.

Hasani et al. 2022 (Closed-form continuous-time neural networks, Nature Machine Intelligence 4; arXiv 2106.13898,
equations 2 to 4).

    a = inputs_t + R h_{t-1} ;  a = W act(a) + bias for every further layer ;  the last a is cut into heads
    default  h_t = tanh(f) (1 - s) + tanh(g) s with s = sigmoid(rate dt_t + shift)
    no_gate  h_t = tanh(f) + tanh(g) s
    pure     h_t = level - level exp(-dt_t (|tau| + |f|)) f
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.core.errors import UsageError, unknown
from zoo.ops import common
from zoo.ops.bridge import Operator
from zoo.ops.common import blank
from zoo.ops.kernel import Call, Kernel
from zoo.ops.triton_kernel import TritonKernel

KERNEL, TRITON = Kernel("cfc"), TritonKernel("cfc")
MODES = ("default", "no_gate", "pure")
FEW_STEPS = 1  # decoding
LEGEND = (
    "inputs (B, T, M); recurrent (M, H); layers ((N, M), (N,)) each, the last N (or M) heads times H; state (B, H); "
    "timespans (B, T); tau, level (H,); lengths (B,) whole numbers; resets (B, T) bool."
)


def lecun_tanh(x: Tensor) -> Tensor:
    """1.7159 tanh(0.666 x) (LeCun et al. 1998, Efficient backprop, section 4.4)."""
    return 1.7159 * torch.tanh(0.666 * x)


CFC_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "lecun_tanh": lecun_tanh,
    "tanh": torch.tanh,
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
}


@common.without_autocast
def cfc(
    inputs: Tensor,
    recurrent: Tensor,
    layers: Sequence[tuple[Tensor, Tensor]] = (),
    state: Tensor | None = None,
    *,
    mode: str = "default",
    activation: str = "lecun_tanh",
    timespans: Tensor | None = None,
    tau: Tensor | None = None,
    level: Tensor | None = None,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The states of a CfC cell at every step.

    Args:
        inputs: (B, T, M), the inputs' part of the first layer, its bias included.
        recurrent: (M, H), the state's part of the first layer.
        layers: weight (N, M) and bias (N,) of every further layer, in order.
        state: (B, H), float32 (float64 for float64 inputs); None for zeros. Not changed.
        mode: "default" and "no_gate" take the heads f, g, rate and shift, or f, g and rate + shift without
            `timespans`; "pure" takes f alone, and `tau` and `level`.
        activation: that between layers.
        timespans: (B, T), time since the step before; None for 1 everywhere.
        tau, level: (H,), of the pure mode: the rate at f = 0, and where the state is drawn to.
        lengths: (B,) valid steps of a right-padded batch; later steps leave the state as it is and give zeros.
        resets: (B, T) bool; the state is zero before a step where it is true.
        backend: "auto", "reference" (one step at a time), "compiled" (float32, CPU) or "triton" (float32, GPU).
    Returns:
        h (B, T, H) in the inputs' dtype, and the last state (B, H).
    """
    if inputs.ndim != 3 or recurrent.ndim != 2 or 0 in inputs.shape or 0 in recurrent.shape:
        raise UsageError(f"cfc: inputs {tuple(inputs.shape)}, recurrent {tuple(recurrent.shape)}. Shapes: {LEGEND}")
    (B, T, width), H = inputs.shape, recurrent.shape[1]
    common.check("cfc", LEGEND, "recurrent", recurrent, inputs, (width, H))
    for weight, bias in layers:
        common.check("cfc", LEGEND, "a layer's weight", weight, inputs, (len(weight), width))
        common.check("cfc", LEGEND, "a layer's bias", bias, inputs, (len(weight),))
        width = len(weight)
    if mode not in MODES:
        raise unknown("mode", mode, MODES)
    if activation not in CFC_ACTIVATIONS:
        raise unknown("activation", activation, CFC_ACTIVATIONS)
    n_heads = 1 if mode == "pure" else 3 if timespans is None else 4
    if width != n_heads * H or (mode == "pure") != (tau is not None and level is not None):
        raise UsageError(f"cfc: {width} heads' channels for H = {H} in mode {mode!r} do not go. Shapes: {LEGEND}")
    common.check("cfc", LEGEND, "state", state, inputs, (B, H))
    common.check("cfc", LEGEND, "timespans", timespans, inputs, (B, T))
    lengths = common.check_packing("cfc", LEGEND, inputs, lengths, resets)
    dtype = common.state_dtype(inputs)
    common.check_dtypes("cfc", state, dtype, inputs=inputs, recurrent=recurrent)

    x = inputs.to(dtype)
    state = x.new_zeros(B, H) if state is None else state
    matrices = [recurrent.to(dtype), *(weight.to(dtype) for weight, _ in layers)]
    biases = [bias.to(dtype) for _, bias in layers]
    constants = [] if tau is None or level is None else [tau.to(dtype), level.to(dtype)]
    spans = None if timespans is None else timespans.to(dtype)
    if lengths is not None:
        padding = ~common.valid_steps(lengths, T)
        x, resets = blank(x, padding), None if resets is None else resets & ~padding
        spans = None if spans is None else blank(spans, padding)
    form = common.choose_form("cfc", backend, T, FEW_STEPS, _cfc.offers(x, state), ("reference",))
    if form == "reference":
        h, state = _reference(x, state, matrices, biases, constants, spans, lengths, resets, mode, activation)
    else:
        weights = torch.cat([matrix.flatten() for matrix in matrices])
        rows = torch.cat(biases) if biases else None
        widths = [H, *(len(matrix) for matrix in matrices)]
        tau, level = constants or (None, None)
        h, state, _ = _cfc.forms[form](
            x, state, weights, rows, tau, level, spans, lengths, resets, widths, mode, activation
        )
    return h.to(inputs.dtype), state


def _reference(
    x: Tensor,
    state: Tensor,
    matrices: list[Tensor],
    biases: list[Tensor],
    constants: list[Tensor],
    spans: Tensor | None,
    lengths: Tensor | None,
    resets: Tensor | None,
    mode: str,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """The definition, one step at a time."""
    recurrent, layers, act = matrices[0].T, list(zip(matrices[1:], biases, strict=True)), CFC_ACTIVATIONS[activation]

    def heads(a: Tensor, state: Tensor) -> Tensor:
        a = torch.addmm(a, state, recurrent)
        for weight, bias in layers:
            a = F.linear(act(a), weight, bias)
        return a

    return cfc_by_steps(heads, x, state, constants, spans, lengths, resets, mode)


def cfc_by_steps(
    heads: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    state: Tensor,
    constants: Sequence[Tensor],
    spans: Tensor | None,
    lengths: Tensor | None,
    resets: Tensor | None,
    mode: str,
) -> tuple[Tensor, Tensor]:
    """The loop over steps, `heads` giving those (B, heads * H) of x_t and a state (B, H); all else is as in `cfc`."""
    valid = None if lengths is None else common.valid_steps(lengths, x.shape[1])
    if valid is not None and resets is not None:
        resets = resets & valid
    steps = []
    for t, x_t in enumerate(x.unbind(1)):
        if resets is not None:
            state = blank(state, resets[:, t])
        a = heads(x_t, state)
        h = _update(a, state.shape[1], None if spans is None else spans[:, t, None], constants, mode)
        if valid is None:
            state = h
        else:
            state, h = torch.where(valid[:, t, None], h, state), blank(h, ~valid[:, t])
        steps.append(h)
    return torch.stack(steps, 1), state


def _update(a: Tensor, width: int, span: Tensor | None, constants: Sequence[Tensor], mode: str) -> Tensor:
    """The heads a (B, heads * H) to the next state (B, H); span (B, 1), or None for 1."""
    if mode == "pure":
        tau, level = constants
        rate = tau.abs() + a.abs()
        return level - level * torch.exp(-(rate if span is None else span * rate)) * a
    fg, gate = a.split([2 * width, a.shape[1] - 2 * width], 1)
    f, g = fg.tanh().chunk(2, 1)
    if span is not None:
        rate, shift = gate.chunk(2, 1)
        gate = torch.addcmul(shift, rate, span)
    s = gate.sigmoid()
    return torch.addcmul(f, g, s) if mode == "no_gate" else torch.lerp(f, g, s)


def _forward(
    call: Call, x, state, weights, biases, tau, level, spans, lengths, resets, widths, mode, activation, keep
) -> tuple[Tensor | None, ...]:
    """h (B, T, H), the last state and, to `keep` for the backward pass, every layer's pre-activations (B, T, *)."""
    h, last = x.new_empty(*x.shape[:2], state.shape[1]), torch.empty_like(state)
    saved = x.new_empty(*x.shape[:2], sum(widths[1:])) if keep else None
    reads = (x, weights, biases, torch.tensor(widths, device="cpu"), tau, level, state, spans, lengths, resets)
    call("cfc_forward", reads, (h, last, saved), *_numbers(x, widths, mode, activation))
    return h, last, saved


def _numbers(x: Tensor, widths: Sequence[int], mode: str, activation: str) -> tuple[int, ...]:
    B, T, _ = x.shape
    kinds = MODES.index(mode), list(CFC_ACTIVATIONS).index(activation)
    return len(widths) - 1, B, T, *kinds, min(B, torch.get_num_threads())


def _backward(
    call: Call, state, weights, tau, level, spans, lengths, resets, widths, mode, activation, h, saved, d_h, d_last
) -> tuple[Tensor | None, ...]:
    d, d_state = torch.empty_like(saved), d_last.clone()
    d_spans = None if spans is None else torch.zeros_like(spans)
    d_tau, d_level = (None if x is None else torch.zeros_like(state) for x in (tau, level))
    reads = (d_h, weights, torch.tensor(widths, device="cpu"), tau, level, spans, lengths, resets, saved)
    call("cfc_backward", reads, (d, d_state, d_tau, d_level, d_spans), *_numbers(d_h, widths, mode, activation))
    before = torch.cat([state[:, None], h[:, :-1]], 1)
    below = before if resets is None else blank(before, resets)
    d_weights, d_biases, at = [], [], 0
    for width in widths[1:]:
        d_layer = d[..., at : at + width].flatten(0, 1)
        d_weights.append((d_layer.T @ below.flatten(0, 1)).flatten())
        if at:
            d_biases.append(d_layer.sum(0))
        below = CFC_ACTIVATIONS[activation](saved[..., at : at + width])
        at += width
    d_tau, d_level = (None if x is None else x.sum(0) for x in (d_tau, d_level))
    d_rows = torch.cat(d_biases) if d_biases else None
    return d[..., : widths[1]].contiguous(), d_state, torch.cat(d_weights), d_rows, d_tau, d_level, d_spans


def _plain(
    x, state, weights, biases, tau, level, spans, lengths, resets, widths, mode, activation
) -> tuple[Tensor, Tensor]:
    """The operator `zoo::cfc` in plain PyTorch."""
    shapes = list(zip(widths[1:], widths[:-1], strict=True))
    matrices = [w.view(shape) for w, shape in zip(weights.split([m * n for m, n in shapes]), shapes, strict=True)]
    rows = [] if biases is None else list(biases.split(widths[2:]))
    constants = [] if tau is None else [tau, level]
    return _reference(x, state, matrices, rows, constants, spans, lengths, resets, mode, activation)


_cfc = Operator(
    KERNEL,
    """cfc(Tensor x, Tensor state, Tensor weights, Tensor? biases, Tensor? tau, Tensor? level, Tensor? spans,
    Tensor? lengths, Tensor? resets, int[] widths, str mode, str activation, bool keep)
    -> (Tensor h, Tensor last, Tensor saved)""",
    _forward,
    _backward,
    gradients="x state weights biases tau level spans",
    plain=_plain,
    triton=TRITON,
)
