"""Causal depthwise convolution over a short window: y_t = activation(bias + sum_w weight[:, w] * x_{t - W + 1 + w}).

The short convolution before the mixing in Mamba (Gu and Dao 2023), H3 (Fu et al. 2023) and most linear-time mixers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.core.errors import UsageError, unknown
from zoo.ops import common
from zoo.ops.adapters import causal_conv1d as adapter
from zoo.ops.bridge import Operator
from zoo.ops.common import blank
from zoo.ops.cut import edge_before
from zoo.ops.derivatives import gradients_of, guarded, once
from zoo.ops.kernel import Call, Kernel, Strided
from zoo.ops.single_step import STEPPING, conv_step
from zoo.ops.triton_kernel import TritonKernel
from zoo.pieces import Pieces

KERNEL, TRITON = Kernel("causal_conv1d"), TritonKernel("causal_conv1d")
ACTIVATIONS = (None, "silu")
FEW_STEPS = 1  # decoding
LEGEND = "x (B, T, D); weight (D, W); bias (D,); state (B, W - 1, D); lengths (B,) whole numbers; resets (B, T) bool."


@common.without_autocast
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    state: Tensor | None = None,
    *,
    activation: str | None = None,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    pieces: Pieces | None = None,
    chunk_size: int | None = None,
    backend: str = "auto",
    in_place: bool = False,
) -> tuple[Tensor, Tensor]:
    """y_t = activation(bias + sum_w weight[:, w] * x_{t - W + 1 + w}), the window reaching back into the state.

    Args:
        x: (B, T, D).
        weight: (D, W), the last column for the present step.
        bias: (D,).
        state: (B, W - 1, D), the W - 1 inputs before x in time order, float32 (float64 for float64 inputs); None for
            zeros.
        activation: None or "silu".
        lengths: (B,) valid steps of a right-padded batch; later steps stay out of the state and give zeros.
        resets: (B, T) bool; the window is forgotten before a step where it is true.
        pieces: of a sequence that is cut over processes, of which the other arguments are one piece; `state` is then
            that before the first one.
        chunk_size: taken for the sake of one signature for all ops, and without effect: nothing is cut here. (A
            `scale` is not taken: it would be a factor on the weight.)
        backend: "auto", "reference" (one step at a time), "chunked" (all steps at once), "compiled" (C++, float32 on a
            CPU), "triton" (float32 on a GPU), or "causal_conv1d" (that library).
        in_place: the state given is not read again, so that a single step without gradients may write the next one over
            it.
    Returns:
        y (B, T, D) in x's dtype, state (B, W - 1, D): the last W - 1 inputs, zeros where forgotten.
    """
    if lengths is resets is pieces is None and backend in STEPPING and activation in ACTIVATIONS:
        done = conv_step(x, weight, bias, state, activation == "silu", in_place)
        if done is not None:
            return done
    if x.ndim != 3 or weight.ndim != 2 or 0 in x.shape or 0 in weight.shape:
        raise UsageError(f"causal_conv1d: x {tuple(x.shape)}, weight {tuple(weight.shape)}. Expected shapes: {LEGEND}")
    (B, T, D), W = x.shape, weight.shape[1]
    common.check("causal_conv1d", LEGEND, "weight", weight, x, (D, W))
    common.check("causal_conv1d", LEGEND, "bias", bias, x, (D,))
    common.check("causal_conv1d", LEGEND, "state", state, x, (B, W - 1, D))
    lengths = common.check_packing("causal_conv1d", LEGEND, x, lengths, resets)
    dtype = common.state_dtype(x)
    common.check_dtypes("causal_conv1d", state, dtype, x=x, weight=weight, bias=bias)
    if activation not in ACTIVATIONS:
        raise unknown("activation", activation, [str(name) for name in ACTIVATIONS])
    common.chunk_length(chunk_size, T, T)

    inputs, weight = x.to(dtype), weight.to(dtype)
    if pieces is not None:
        state, inputs = edge_before(pieces, inputs, W - 1, state, resets)
    if state is None:
        state = inputs.new_zeros(B, W - 1, D)
    bias = None if bias is None else bias.to(dtype)
    offers = {
        "causal_conv1d": lambda: adapter.why_not(x, weight, lengths, resets),
        **compiled_conv.offers(inputs),
    }
    chosen = common.choose_form("causal_conv1d", backend, T, FEW_STEPS, offers)
    if chosen in compiled_conv.forms:
        y, state = compiled_conv.forms[chosen](inputs, weight, bias, state, resets, lengths, activation == "silu")
        return y.to(x.dtype), state
    if chosen == "causal_conv1d":
        plain = functools.partial(_plain, resets=None, lengths=None, silu=activation == "silu")  # it serves no others
        given = inputs, weight, bias, state
        y, state = guarded(plain, adapter.causal_conv1d(inputs.to(x.dtype), weight, bias, state, activation), given)
        return y.to(x.dtype), state
    form = _reference if chosen == "reference" else _chunked
    y, state = _plain(inputs, weight, bias, state, resets, lengths, activation == "silu", form)
    return y.to(x.dtype), state


def _plain(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor,
    resets: Tensor | None,
    lengths: Tensor | None,
    silu: bool,
    form: Callable[..., tuple[Tensor, Tensor]] | None = None,
) -> tuple[Tensor, Tensor]:
    """All of it in plain PyTorch, chunked where no other `form` is given."""
    if lengths is not None:
        padding = ~common.valid_steps(lengths, x.shape[1])
        x = blank(x, padding)
        resets = None if resets is None else resets & ~padding
    y, state = (form or _chunked)(x, weight, state, lengths, resets)
    y = y if bias is None else y + bias
    y = F.silu(y) if silu else y
    return (y if lengths is None else blank(y, padding)), state


def _reference(
    x: Tensor, weight: Tensor, state: Tensor, lengths: Tensor | None, resets: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The definition, one step at a time."""
    outputs = []
    for t in range(x.shape[1]):
        if resets is not None:
            state = blank(state, resets[:, t])
        window = torch.cat([state, x[:, t, None]], 1)
        outputs.append((window * weight.T).sum(1))
        state = window[:, 1:] if lengths is None else torch.where((t < lengths)[:, None, None], window[:, 1:], state)
    return torch.stack(outputs, 1), common.owned(state)


def _chunked(
    x: Tensor, weight: Tensor, state: Tensor, lengths: Tensor | None, resets: Tensor | None
) -> tuple[Tensor, Tensor]:
    """All steps at once, one tap of the window after the other."""
    n_steps, reach = x.shape[1], weight.shape[1] - 1
    window, keep = torch.cat([state, x], 1), None
    if resets is not None:  # a tap is felt only by a step of the same document
        document = F.pad(resets.cumsum(1), (reach, 0))
        keep = (document.unfold(1, n_steps, 1) == document[:, None, reach:]).to(x.dtype)
    y = _Taps.apply(window, weight, keep)
    if resets is not None:
        window = blank(window, document != document[:, -1:])
    if lengths is None:
        return y, common.owned(window[:, n_steps:])
    last = lengths[:, None] + torch.arange(reach, device=x.device)
    return y, window.gather(1, last[..., None].expand(-1, -1, x.shape[2]))


class _Taps(torch.autograd.Function):
    """y_t = sum_w weight[:, w] * keep_w,t * window_{t + w}, summed in place: a depthwise conv1d takes 3 times as long.

    window (B, T + W - 1, D), weight (D, W), keep (B, W, T) of 0 and 1, or None.
    """

    @staticmethod
    def forward(window: Tensor, weight: Tensor, keep: Tensor | None) -> Tensor:
        n_steps = window.shape[1] - weight.shape[1] + 1
        y = window.new_zeros(window.shape[0], n_steps, window.shape[2])
        into = y[:]  # a view: compiled by torch 2.11, an output that is itself changed in place has no gradient
        for w, tap in enumerate(weight.T.contiguous()):
            into.addcmul_(_kept(window[:, w : w + n_steps], keep, w), tap)
        return y

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    @common.without_autocast
    @once(lambda ctx, *gradients: gradients_of(_taps, ctx.saved_tensors, gradients))
    def backward(ctx, d_y: Tensor):
        window, weight, keep = ctx.saved_tensors
        d_window, d_weight = torch.zeros_like(window), []
        for w, tap in enumerate(weight.T.contiguous()):
            d_kept = _kept(d_y, keep, w)
            d_window[:, w : w + d_y.shape[1]].addcmul_(d_kept, tap)
            d_weight.append((d_kept * window[:, w : w + d_y.shape[1]]).sum((0, 1)))
        return d_window, torch.stack(d_weight, 1), None


def _taps(window: Tensor, weight: Tensor, keep: Tensor | None) -> Tensor:
    """`_Taps` in plain operators."""
    n_steps = window.shape[1] - weight.shape[1] + 1
    return sum(_kept(window[:, w : w + n_steps], keep, w) * tap for w, tap in enumerate(weight.T))  # type: ignore


def _kept(x: Tensor, keep: Tensor | None, w: int) -> Tensor:
    """x (B, T, D) where tap w belongs to the same document as the step."""
    return x if keep is None else x * keep[:, w, :, None]


def _conv_forward(call: Call, x, weight, bias, state, resets, lengths, silu) -> tuple[Tensor, Tensor]:
    """Everything in one pass over x."""
    x, *numbers = _as_it_lies(x, weight, silu)
    y, last = x.new_empty(x.shape), torch.empty_like(state)
    call("causal_conv1d_forward", (Strided(x), weight, bias, state, resets, lengths), (y, last), *numbers)
    return y, last


def _as_it_lies(x: Tensor, weight: Tensor, silu: bool) -> tuple[Any, ...]:
    """x with its channels side by side, and the sizes that both functions of the kernel take."""
    x = x if x.stride(2) == 1 else x.contiguous()
    return x, *x.shape, weight.shape[1], x.stride(0), x.stride(1), silu, torch.get_num_threads()


def _conv_backward(call: Call, x, weight, bias, state, resets, lengths, silu, d_y, d_last) -> tuple[Tensor, ...]:
    x, *numbers = _as_it_lies(x, weight, silu)
    (B, _, D), W = x.shape, weight.shape[1]
    d_x, d_taps, d_state = x.new_empty(x.shape), x.new_empty(B, W + 1, D), torch.empty_like(state)
    reads = (Strided(x), weight, bias, state, resets, lengths, d_y, d_last)
    call("causal_conv1d_backward", reads, (d_x, d_taps, d_state), *numbers)
    taps = d_taps.sum(0)
    return d_x, taps[:W].flip(0).T.contiguous(), taps[W].clone(), d_state


compiled_conv = Operator(
    KERNEL,
    """causal_conv1d(Tensor x, Tensor weight, Tensor? bias, Tensor state, Tensor? resets, Tensor? lengths, bool silu)
    -> (Tensor y, Tensor last)""",
    _conv_forward,
    _conv_backward,
    gradients="x weight bias state",
    plain=_plain,
    strided="x",
    triton=TRITON,
)
