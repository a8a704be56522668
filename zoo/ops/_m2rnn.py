"""The RNN whose state is a matrix, and whose transition is nonlinear: M2RNN.

Mishra et al., M2RNN: Non-Linear RNNs with Matrix-Valued States for Scalable Language Modeling (2026, arXiv 2603.14360).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from zoo.core.errors import UsageError
from zoo.ops import common
from zoo.ops.bridge import Operator
from zoo.ops.common import blank
from zoo.ops.derivatives import TRANSFORMS, once_only, transformed
from zoo.ops.kernel import Call, Kernel
from zoo.ops.triton_kernel import TritonKernel

KERNEL, TRITON = Kernel("m2rnn"), TritonKernel("m2rnn")
CHUNK = 16  # steps between the states that are kept for the backward pass
FEW_STEPS = 0
CUT = "m2rnn: gradient_clipping= cuts gradients: they are not those of the function, and have no second derivatives."
LEGEND = (
    "q, k (B, T, G, K) with G dividing H; v (B, T, H, V); weight (H, V, V); log_decay (B, T, H); state (B, H, K, V); "
    "lengths (B,) whole numbers; resets (B, T) bool."
)


@common.without_autocast
def m2rnn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    log_decay: Tensor,
    state: Tensor | None = None,
    *,
    gradient_clipping: float | None = None,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """H_t = f_t H_{t-1} + (1 - f_t) tanh(H_{t-1} W + k_t v_t^T) ; y_t = H_t^T q_t, with f_t = exp(log_decay_t).

    Args:
        q, k: (B, T, G, K); each of the G serves H / G heads.
        v: (B, T, H, V).
        weight: (H, V, V), W of every head.
        log_decay: (B, T, H), never positive.
        state: (B, H, K, V), float32 (float64 for float64 inputs); None for zeros. Not changed.
        gradient_clipping: in the backward pass, the gradient of every number of every H_t is cut to +- this; None for
            not at all. Where it cuts, gradients are not those of the function; second derivatives, forward mode and
            torch.func are refused.
        lengths: (B,) valid steps of a right-padded batch; later steps leave the state alone and give zeros.
        resets: (B, T) bool; the state is forgotten before a step where it is true.
        backend: "auto", "reference" (one step at a time), "compiled" (float32, CPU) or "triton" (float32, GPU).
    Returns:
        y (B, T, H, V) in v's dtype, the last state (B, H, K, V).
    """
    if q.ndim != 4 or v.ndim != 4 or 0 in q.shape or 0 in v.shape or v.shape[2] % q.shape[2]:
        raise UsageError(f"m2rnn: q {tuple(q.shape)} and v {tuple(v.shape)} do not go together. Shapes: {LEGEND}")
    (B, T, H, V), (G, K) = v.shape, q.shape[2:]
    common.check("m2rnn", LEGEND, "q", q, v, (B, T, G, K))
    common.check("m2rnn", LEGEND, "k", k, v, (B, T, G, K))
    common.check("m2rnn", LEGEND, "weight", weight, v, (H, V, V))
    common.check("m2rnn", LEGEND, "log_decay", log_decay, v, (B, T, H))
    common.check("m2rnn", LEGEND, "state", state, v, (B, H, K, V))
    lengths = common.check_packing("m2rnn", LEGEND, v, lengths, resets)
    dtype = common.state_dtype(q, k, v)
    common.check_dtypes("m2rnn", state, dtype, q=q, k=k, v=v, weight=weight, log_decay=log_decay)
    if gradient_clipping is not None and not gradient_clipping > 0:
        raise UsageError(f"m2rnn: gradient_clipping={gradient_clipping} is not allowed: it should be above 0, or None.")
    if gradient_clipping is not None and transformed():
        raise UsageError(f"m2rnn: gradient_clipping= cuts gradients, which {TRANSFORMS} do not know of.")

    padding = None if lengths is None else ~common.valid_steps(lengths, T)
    if padding is not None and resets is not None:
        resets = resets & ~padding
    v_dtype, weight = v.dtype, weight.to(dtype)
    q, k, v, decay = (x.to(dtype) if padding is None else blank(x.to(dtype), padding) for x in (q, k, v, log_decay))
    kept, written = decay.exp(), -decay.expm1()  # f and 1 - f, the latter exact where f is nearly 1
    state = v.new_zeros(B, H, K, V) if state is None else state
    limit = math.inf if gradient_clipping is None else float(gradient_clipping)
    form = common.choose_form("m2rnn", backend, T, FEW_STEPS, _m2rnn.offers(v), ("reference",))
    if form == "reference":
        y, state = _reference(q, k, v, weight, kept, written, state, resets, limit)
    else:
        y, state, _ = _m2rnn.forms[form](q, k, v, weight, kept, written, state, resets, limit)
    if gradient_clipping is not None:
        y, state = once_only(y, CUT), once_only(state, CUT)
    return y.to(v_dtype), state


def _reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    kept: Tensor,
    written: Tensor,
    state: Tensor,
    resets: Tensor | None,
    limit: float,
) -> tuple[Tensor, Tensor]:
    """The definition, one step at a time; heads come first, so that a step's products are one batch of matrices."""
    share = v.shape[2] // q.shape[2]
    h = state.transpose(0, 1)  # (H, B, K, V)
    steps = zip(*(x.permute(1, 2, 0, *range(3, x.ndim)) for x in (q, k, v, kept, written)), strict=True)
    outputs = []
    for t, (q_t, k_t, v_t, kept_t, written_t) in enumerate(steps):  # (G, B, K) twice, (H, B, V), (H, B) twice
        if resets is not None:
            h = h.masked_fill(resets[:, t, None, None], 0)
        q_t, k_t = (x.repeat_interleave(share, 0) for x in (q_t, k_t))
        outer = k_t[..., None] * v_t[..., None, :]
        new = torch.baddbmm(outer.flatten(1, 2), h.flatten(1, 2), weight).tanh().view_as(outer)
        h = kept_t[..., None, None] * h + written_t[..., None, None] * new
        h = h if limit == math.inf else _Clipped.apply(h, limit)
        outputs.append((q_t[..., None, :] @ h).squeeze(-2))
    return torch.stack(outputs).permute(2, 0, 1, 3), common.owned(h.transpose(0, 1))


class _Clipped(torch.autograd.Function):
    """x, whose gradient is cut to +-limit, number by number."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, limit: float) -> Tensor:
        ctx.limit = limit
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.clamp(-ctx.limit, ctx.limit), None


def _forward(call: Call, q, k, v, weight, kept, written, state, resets, limit, keep) -> tuple[Tensor | None, ...]:
    """Outputs, the last state and, to `keep` for the backward pass, the states at chunks' starts (B, n, H, K, V)."""
    B, T, H, V = v.shape
    last, outputs = state.clone(), torch.empty_like(v)
    saved = state.new_empty(B, -(-T // CHUNK), *state.shape[1:]) if keep else None
    reads = (q, k, v, weight, kept, written, resets)
    call("m2rnn_forward", reads, (last, outputs, saved), B, T, q.shape[2], H, q.shape[3], V, CHUNK)
    return outputs, last, saved


def _backward(
    call: Call, q, k, v, weight, kept, written, resets, limit, saved, d_outputs, d_last
) -> tuple[Tensor, ...]:
    (B, T, H, V), (G, K) = v.shape, q.shape[2:]
    parts = min(H // G, -(-torch.get_num_threads() // (B * G)) if v.is_cpu else H // G)
    d_state, d_v, d_kept, d_written = (
        d_last.clone(),
        torch.empty_like(v),
        torch.empty_like(kept),
        torch.empty_like(kept),
    )
    d_q, d_k = (q.new_zeros(parts, *q.shape) for _ in range(2))
    d_weight = weight.new_empty(B, *weight.shape)
    reads = (q, k, v, weight, kept, written, resets, saved, d_outputs)
    writes = (d_state, d_q, d_k, d_v, d_weight, d_kept, d_written)
    call("m2rnn_backward", reads, writes, B, T, G, H, K, V, CHUNK, parts, limit)
    return d_q.sum(0), d_k.sum(0), d_v, d_weight.sum(0), d_kept, d_written, d_state


_m2rnn = Operator(
    KERNEL,
    """m2rnn(Tensor q, Tensor k, Tensor v, Tensor weight, Tensor kept, Tensor written, Tensor state, Tensor? resets,
    float limit, bool keep) -> (Tensor outputs, Tensor last, Tensor saved)""",
    _forward,
    _backward,
    gradients="q k v weight kept written state",
    plain=_reference,
    triton=TRITON,
)
