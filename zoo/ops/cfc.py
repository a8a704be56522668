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
from zoo.ops import common, native
from zoo.ops.common import blank
from zoo.ops.derivatives import gradients_of, once

MODES = ("default", "no_gate", "pure")
FEW_STEPS = 1  # decoding
LEGEND = (
    "inputs (B, T, M); recurrent (M, H); layers ((N, M), (N,)) each, the last N (or M) heads times H; state (B, H); "
    "timespans (B, T); tau, level (H,); lengths (B,) whole numbers; resets (B, T) bool."
)


def lecun_tanh(x: Tensor) -> Tensor:
    """1.7159 tanh(0.666 x) (LeCun et al. 1998, Efficient backprop, section 4.4)."""
    return 1.7159 * torch.tanh(0.666 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
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
        backend: "auto", "reference" (one step at a time) or "compiled".
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
    if activation not in ACTIVATIONS:
        raise unknown("activation", activation, ACTIVATIONS)
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
    offers = {"compiled": lambda: native.serves(x, state, kernel="cfc")}
    if common.choose_form("cfc", backend, T, FEW_STEPS, offers, ("reference",)) == "reference":
        h, state = _reference(x, state, matrices, biases, constants, spans, lengths, resets, mode, activation)
    else:
        parts = [x, state, *matrices, *biases, *constants] + ([] if spans is None else [spans])
        keep = torch.is_grad_enabled() and any(part.requires_grad for part in parts)
        h, state, _ = _compiled(x, state, matrices, biases, constants, spans, lengths, resets, mode, activation, keep)
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
    recurrent, layers, act = matrices[0].T, list(zip(matrices[1:], biases, strict=True)), ACTIVATIONS[activation]

    def heads(a: Tensor, state: Tensor) -> Tensor:
        a = torch.addmm(a, state, recurrent)
        for weight, bias in layers:
            a = F.linear(act(a), weight, bias)
        return a

    return by_steps(heads, x, state, constants, spans, lengths, resets, mode)


def by_steps(
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


@torch.library.custom_op("zoo::cfc", mutates_args=())
def _compiled(
    x: Tensor,
    state: Tensor,
    matrices: Sequence[Tensor],
    biases: Sequence[Tensor],
    constants: Sequence[Tensor],
    spans: Tensor | None,
    lengths: Tensor | None,
    resets: Tensor | None,
    mode: str,
    activation: str,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """h (B, T, H), the last state and, to `keep` for the backward pass, every layer's pre-activations (B, T, *)."""
    h, last, saved = _empty(x, state, matrices, keep)
    native.load("cfc").cfc_forward(
        x.contiguous(), _joined(matrices), _joined(biases) if biases else None, *_shape(matrices),
        *(constants or (None, None)), state.contiguous(), *_packing(spans, lengths, resets),
        h, last, saved if keep else None, *_numbers(x, mode, activation),
    )  # fmt: skip
    return h, last, saved


def _empty(x: Tensor, state: Tensor, matrices: Sequence[Tensor], keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    h = x.new_empty(*x.shape[:2], state.shape[1])
    return h, torch.empty_like(state, memory_format=torch.contiguous_format), _pre_activations(x, matrices, keep)


def _pre_activations(x: Tensor, matrices: Sequence[Tensor], keep: bool) -> Tensor:
    return x.new_empty(*x.shape[:2], sum(len(w) for w in matrices) if keep else 0)


def _joined(weights: Sequence[Tensor]) -> Tensor:
    """All weights in one block of memory."""
    return torch.cat([w.flatten() for w in weights])


def _shape(matrices: Sequence[Tensor]) -> tuple[Tensor, int]:
    """Widths of the state and of every layer, and the number of layers."""
    return torch.tensor([matrices[0].shape[1], *(len(w) for w in matrices)], device="cpu"), len(matrices)


def _packing(*fields: Tensor | None) -> list[Tensor | None]:
    return [None if field is None else field.contiguous() for field in fields]


def _numbers(x: Tensor, mode: str, activation: str) -> tuple[int, ...]:
    B, T, _ = x.shape
    return B, T, MODES.index(mode), list(ACTIVATIONS).index(activation), min(B, torch.get_num_threads())


@_compiled.register_fake
def _(x, state, matrices, biases, constants, spans, lengths, resets, mode, activation, keep):
    return _empty(x, state, matrices, keep)


@torch.library.custom_op("zoo::cfc_backward", mutates_args=())
def _compiled_backward(
    d_h: Tensor,
    d_last: Tensor,
    saved: Tensor,
    matrices: Sequence[Tensor],
    constants: Sequence[Tensor],
    spans: Tensor | None,
    lengths: Tensor | None,
    resets: Tensor | None,
    mode: str,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of all pre-activations (B, T, *), of the first state, of tau and level (2, B, H), of the timespans."""
    d, d_state, d_constants, d_spans = _empty_gradients(d_last, saved, constants, spans)
    d_state.copy_(d_last)
    d_constants.zero_()
    native.load("cfc").cfc_backward(
        d_h.contiguous(), _joined(matrices), *_shape(matrices), *(constants or (None, None)),
        *_packing(spans, lengths, resets), saved, d, d_state, *(d_constants if len(constants) else (None, None)),
        None if spans is None else d_spans.zero_(), *_numbers(d_h, mode, activation),
    )  # fmt: skip
    return d, d_state, d_constants, d_spans


def _empty_gradients(d_last: Tensor, saved: Tensor, constants: Sequence[Tensor], spans: Tensor | None):
    d_state = torch.empty_like(d_last, memory_format=torch.contiguous_format)
    d_spans = saved.new_empty(saved.shape[:2] if spans is not None else 0)
    return torch.empty_like(saved), d_state, d_last.new_empty(len(constants), *d_last.shape), d_spans


@_compiled_backward.register_fake
def _(d_h, d_last, saved, matrices, constants, spans, lengths, resets, mode, activation):
    return _empty_gradients(d_last, saved, constants, spans)


def _keep_for_backward(ctx, inputs, output):
    x, state, matrices, biases, constants, spans, lengths, resets, mode, activation, _ = inputs
    h, _, saved = output
    ctx.n_layers, ctx.names = len(matrices), (mode, activation)
    ctx.save_for_backward(x, state, h, saved, spans, lengths, resets, *matrices, *biases, *constants)


def _lists(ctx, rest: list[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Matrices, biases (one less) and constants, from all of them in a row."""
    n = ctx.n_layers
    return rest[:n], rest[n : 2 * n - 1], rest[2 * n - 1 :]


def _backward_again(ctx, *d: Tensor):
    x, state, _, _, spans, lengths, resets, *rest = ctx.saved_tensors
    inputs = (x, state, *_lists(ctx, rest), spans, lengths, resets, *ctx.names)
    return *gradients_of(_reference, inputs, d[:2]), None


@common.without_autocast
@once(_backward_again)
def _backward(ctx, d_h: Tensor, d_last: Tensor, _):
    _, state, h, saved, spans, lengths, resets, *rest = ctx.saved_tensors
    matrices, _, constants = _lists(ctx, rest)
    d, d_state, d_constants, d_spans = _compiled_backward(
        d_h, d_last, saved, matrices, constants, spans, lengths, resets, *ctx.names
    )
    before = torch.cat([state[:, None], h[:, :-1]], 1)
    below = before if resets is None else blank(before, resets)
    d_matrices, d_biases, at = [], [], 0
    for weight in matrices:
        d_layer = d[..., at : at + len(weight)].flatten(0, 1)
        d_matrices.append(d_layer.T @ below.flatten(0, 1))
        if at:
            d_biases.append(d_layer.sum(0))
        below = ACTIVATIONS[ctx.names[1]](saved[..., at : at + len(weight)])
        at += len(weight)
    d_x = d[..., : len(matrices[0])]
    d_spans = None if spans is None else d_spans
    return d_x, d_state, d_matrices, d_biases, list(d_constants.sum(1)), d_spans, *5 * [None]


_compiled.register_autograd(_backward, setup_context=_keep_for_backward)
