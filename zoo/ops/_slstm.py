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
from zoo.ops import common
from zoo.ops.bridge import Operator
from zoo.ops.common import blank
from zoo.ops.kernel import Call, Kernel
from zoo.ops.triton_kernel import TritonKernel

KERNEL, TRITON = Kernel("slstm"), TritonKernel("slstm")
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
        backend: "auto", "reference" (one step at a time), "compiled" (float32, CPU) or "triton" (float32, GPU).
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
    form = common.choose_form("slstm", backend, T, FEW_STEPS, _slstm.offers(inputs), ("reference",), decode="compiled")
    if form == "reference":
        h, state = _reference(inputs, weight, state, lengths, resets)
    else:
        h, *last, _ = _slstm.forms[form](inputs, weight, *state, lengths, resets)
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


def _forward(call: Call, gates, weight, h, c, n, m, lengths, resets, keep) -> tuple[Tensor | None, ...]:
    """Outputs, the last h, c, n, m and, to `keep` for the backward pass, what every step came to (B, T, H, 7, D)."""
    B, T, _, H, D = gates.shape
    state = [x.clone() for x in (h, c, n, m)]
    outputs, saved = gates.new_empty(B, T, H, D), gates.new_empty(B, T, H, 7, D) if keep else None
    reads = (gates, weight.flatten(1, 2).mT.contiguous(), lengths, resets)
    call("slstm_forward", reads, (*state, outputs, saved), B, T, H, D, torch.get_num_threads())
    return outputs, *state, saved


def _backward(
    call: Call,
    gates,
    weight,
    h,
    c,
    n,
    lengths,
    resets,
    outputs,
    saved,
    d_outputs,
    d_last_h,
    d_last_c,
    d_last_n,
    d_last_m,
) -> tuple[Tensor, ...]:
    B, T, _, H, D = gates.shape
    d_gates, d_state = torch.empty_like(gates), [d.clone() for d in (d_last_h, d_last_c, d_last_n, d_last_m)]
    reads = (weight, lengths, resets, c, n, saved, d_outputs)
    call("slstm_backward", reads, (*d_state, d_gates), B, T, H, D, torch.get_num_threads())
    before = torch.cat([h[:, None], outputs[:, :-1]], 1)  # a padded step's is not the state, but has no gradient
    if resets is not None:
        before = blank(before, resets)
    d_weight = d_gates.permute(3, 2, 4, 0, 1).flatten(3).flatten(1, 2) @ before.permute(2, 0, 1, 3).flatten(1, 2)
    return d_gates, d_weight.view_as(weight), *d_state


def _plain(gates, weight, h, c, n, m, lengths, resets) -> list[Tensor]:
    """The operator `zoo::slstm` in plain PyTorch."""
    outputs, last = _reference(gates, weight, SLSTMState(h, c, n, m), lengths, resets)
    return [outputs, *last]


_slstm = Operator(
    KERNEL,
    """slstm(Tensor gates, Tensor weight, Tensor h, Tensor c, Tensor n, Tensor m, Tensor? lengths, Tensor? resets,
    bool keep) -> (Tensor outputs, Tensor last_h, Tensor last_c, Tensor last_n, Tensor last_m, Tensor saved)""",
    _forward,
    _backward,
    gradients="gates weight h c n m",
    plain=_plain,
    triton=TRITON,
)
