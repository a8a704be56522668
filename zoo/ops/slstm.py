"""The scalar LSTM: exponential gates, a normaliser, and heads whose units see each other's past.

Beck et al., xLSTM: Extended Long Short-Term Memory (2024, arXiv 2405.04517), eq. 8 to 18. Gates are exponentials, so
the state is kept as c exp(-m), n exp(-m) with m the running maximum of the log gates; their ratio h does not depend on
m.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.core.errors import UsageError
from zoo.ops import common, native
from zoo.ops.common import blank
from zoo.ops.derivatives import gradients_of, once

FEW_STEPS = 1  # decoding
LEGEND = "gates (B, T, 4, H, D); weight (H, 4, D, D); state 4 times (B, H, D); lengths (B,); resets (B, T) bool."


class SLSTMState(NamedTuple):
    """Output, cell, normaliser (the last two times exp(-m)) and stabiliser; zeros at rest, and n = 0 there alone."""

    h: Tensor  # (B, H, D)
    c: Tensor  # (B, H, D)
    n: Tensor  # (B, H, D)
    m: Tensor  # (B, H, D)


@common.without_autocast
def slstm(
    gates: Tensor,
    weight: Tensor,
    state: SLSTMState | None = None,
    *,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, SLSTMState]:
    """c_t = f_t c_{t-1} + i_t tanh(z_t) ; n_t = f_t n_{t-1} + i_t ; h_t = sigmoid(o_t) c_t / n_t, elementwise.

    i_t and sigmoid's f_t come from the preactivations (i, f, z, o)_t = gates_t + weight h_{t-1}, i_t by exp, f_t by
    sigmoid; both are kept times exp(-m) with m_t = max(log f_t + m_{t-1}, log i_t), and m_t = log i_t from rest.

    Args:
        gates: (B, T, 4, H, D), the inputs' part of the preactivations of i, f, z, o, biases included.
        weight: (H, 4, D, D), of each head its four gates' weights, rows for outputs.
        state: (h, c, n, m), each (B, H, D), float32 (float64 for float64 inputs); None for zeros. Not changed.
        lengths: (B,) valid steps of a right-padded batch; later steps leave the state alone and give zeros.
        resets: (B, T) bool; the state is forgotten before a step where it is true.
        backend: "auto", "reference" (one step at a time) or "compiled" (float32 on the CPU).
    Returns:
        h (B, T, H, D) in gates' dtype, the state after the last step.
    """
    if gates.ndim != 5 or gates.shape[2] != 4 or 0 in gates.shape:
        raise UsageError(f"slstm: gates has shape {tuple(gates.shape)}. Expected shapes: {LEGEND}")
    B, T, _, H, D = gates.shape
    common.check("slstm", LEGEND, "weight", weight, gates, (H, 4, D, D))
    lengths = common.check_packing("slstm", LEGEND, gates, lengths, resets)
    dtype = common.state_dtype(gates)
    for name, leaf in zip(SLSTMState._fields, state or (), strict=False):
        common.check("slstm", LEGEND, f"state's {name}", leaf, gates, (B, H, D))
        common.check_dtypes("slstm", leaf, dtype)
    common.check_dtypes("slstm", None, dtype, gates=gates, weight=weight)
    inputs, weight = gates.to(dtype), weight.to(dtype)
    if state is None:
        state = SLSTMState(*(inputs.new_zeros(B, H, D) for _ in SLSTMState._fields))
    offers = {"compiled": lambda: native.serves(inputs, kernel="slstm")}
    if common.choose_form("slstm", backend, T, FEW_STEPS, offers, ("reference",)) == "reference":
        h, state = _reference(inputs, weight, state, lengths, resets)
    else:
        keep = torch.is_grad_enabled() and any(x.requires_grad for x in (inputs, weight, *state))
        h, *last, _ = _kernel(inputs, weight, *state, lengths, resets, keep)
        state = SLSTMState(*last)
    return h.to(gates.dtype), state


def _reference(
    gates: Tensor, weight: Tensor, state: SLSTMState, lengths: Tensor | None, resets: Tensor | None
) -> tuple[Tensor, SLSTMState]:
    """The definition, one step at a time; heads come first, so that a step's products are one batch of matrices."""
    weight = weight.flatten(1, 2).mT  # (H, D, 4 D)
    valid = None if lengths is None else common.valid_steps(lengths, gates.shape[1])
    if valid is not None and resets is not None:
        resets = resets & valid
    h, c, n, m = (leaf.transpose(0, 1) for leaf in state)  # (H, B, D)
    outputs = []
    for t, inputs in enumerate(gates.permute(1, 3, 0, 2, 4).flatten(3)):  # (H, B, 4 D)
        if resets is not None:
            h, c, n, m = (leaf.masked_fill(resets[:, t, None], 0) for leaf in (h, c, n, m))
        i, f, z, o = torch.baddbmm(inputs, h, weight).chunk(4, -1)
        at_rest = t == 0 or resets is not None  # may be: then nothing is kept
        kept = F.logsigmoid(f) + (m.masked_fill(n == 0, -torch.inf) if at_rest else m)
        top = torch.maximum(kept, i)
        i, f = (i - top).exp(), (kept - top).exp()
        new_c, new_n = torch.addcmul(f * c, i, z.tanh()), torch.addcmul(i, f, n)
        new = (o.sigmoid() * new_c / new_n, new_c, new_n, top)
        outputs.append(new[0])
        if valid is None:
            h, c, n, m = new
        else:
            h, c, n, m = (torch.where(valid[:, t, None], a, b) for a, b in zip(new, (h, c, n, m), strict=True))
    y = torch.stack(outputs).permute(2, 0, 1, 3)
    return y if valid is None else blank(y, ~valid), SLSTMState(
        *(common.owned(leaf.transpose(0, 1)) for leaf in (h, c, n, m))
    )


@torch.library.custom_op("zoo::slstm", mutates_args=(), device_types="cpu")
def _kernel(
    gates: Tensor,
    weight: Tensor,
    h: Tensor,
    c: Tensor,
    n: Tensor,
    m: Tensor,
    lengths: Tensor | None,
    resets: Tensor | None,
    keep: bool,
) -> list[Tensor]:
    """Outputs, the last h, c, n, m and, to `keep` for the backward pass, what every step came to (B, T, H, 7, D)."""
    out = _outputs(gates, keep)
    outputs, *last, saved = out
    for leaf, first in zip(last, (h, c, n, m), strict=True):
        leaf.copy_(first)
    native.load("slstm").slstm_forward(
        gates.contiguous(), weight.flatten(1, 2).mT.contiguous(), *_packing(lengths, resets),
        *last, outputs, saved if keep else None, *_sizes(gates),
    )  # fmt: skip
    return out


def _outputs(gates: Tensor, keep: bool) -> list[Tensor]:
    B, T, _, H, D = gates.shape
    shapes = [(B, T, H, D), *4 * [(B, H, D)], (B, T if keep else 0, H, 7, D)]
    return [gates.new_empty(shape) for shape in shapes]


def _packing(lengths: Tensor | None, resets: Tensor | None) -> list[Tensor | None]:
    return [None if lengths is None else lengths.contiguous(), None if resets is None else resets.contiguous()]


def _sizes(gates: Tensor) -> tuple[int, ...]:
    B, T, _, H, D = gates.shape
    return B, T, H, D, torch.get_num_threads()


@_kernel.register_fake
def _(gates, weight, h, c, n, m, lengths, resets, keep):
    return _outputs(gates, keep)


@torch.library.custom_op("zoo::slstm_backward", mutates_args=(), device_types="cpu")
def _kernel_backward(
    d_out: list[Tensor],
    gates: Tensor,
    weight: Tensor,
    c: Tensor,
    n: Tensor,
    lengths: Tensor | None,
    resets: Tensor | None,
    saved: Tensor,
) -> list[Tensor]:
    """Gradients of gates, h, c, n and m, given those of the outputs and of the last h, c, n and m."""
    d_gates = torch.empty_like(gates, memory_format=torch.contiguous_format)
    d_state = [torch.empty_like(d, memory_format=torch.contiguous_format).copy_(d) for d in d_out[1:]]
    native.load("slstm").slstm_backward(
        weight.contiguous(), *_packing(lengths, resets), c.contiguous(), n.contiguous(), saved,
        d_out[0].contiguous(), *d_state, d_gates, *_sizes(gates),
    )  # fmt: skip
    return [d_gates, *d_state]


@_kernel_backward.register_fake
def _(d_out, gates, weight, c, n, lengths, resets, saved):
    return [x.new_empty(x.shape) for x in (gates, *d_out[1:])]


def _save(ctx, inputs, output):
    *tensors, ctx.keep = inputs
    ctx.save_for_backward(*tensors, output[0], output[-1])


def _plain(gates, weight, h, c, n, m, lengths, resets) -> list[Tensor]:
    """The operator `zoo::slstm` in plain PyTorch."""
    outputs, last = _reference(gates, weight, SLSTMState(h, c, n, m), lengths, resets)
    return [outputs, *last]


@once(lambda ctx, d: (*gradients_of(_plain, ctx.saved_tensors[:8], list(d[:5])), None))
def _backward(ctx, d_out):
    assert ctx.keep
    gates, weight, h, c, n, _, lengths, resets, outputs, saved = ctx.saved_tensors
    d_gates, *d_state = _kernel_backward(list(d_out[:5]), gates, weight, c, n, lengths, resets, saved)
    before = torch.cat([h[:, None], outputs[:, :-1]], 1)  # a padded step's is not the state, but has no gradient
    if resets is not None:
        before = blank(before, resets)
    d_weight = d_gates.permute(3, 2, 4, 0, 1).flatten(3).flatten(1, 2) @ before.permute(2, 0, 1, 3).flatten(1, 2)
    return d_gates, d_weight.view_as(weight), *d_state, None, None, None


_kernel.register_autograd(_backward, setup_context=_save)
