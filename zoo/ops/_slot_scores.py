"""Scores of slots that hold keys: S_t = diag(exp g_t) S_{t-1} + s_t k_t^T, o_t = scale S_t q_t.

The recurrence of `linear_attention`, read from its other side: there the decays act on the channels that a query is
multiplied by, here on the channels of the output, the slots. It is the first pass of gated slot attention (Zhang et al.
2024, arXiv 2409.07146, section 3). Its gradients are those of `linear_attention`, with the roles exchanged: d_q is what
linear attention reads with queries d_o, keys s and values k.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.core.errors import UsageError
from zoo.ops import common, sizes
from zoo.ops._linear_attention import KERNEL, chunk_totals, running_state
from zoo.ops._linear_attention import _backward as _linear_attention_backward
from zoo.ops._linear_attention import _forward as _linear_attention_forward
from zoo.ops.bridge import Operator
from zoo.ops.common import Heads, blank, from_chunks, to_chunks
from zoo.ops.decay import decayed_sums
from zoo.ops.kernel import Call

FEW_STEPS, COMPILED_FEW_STEPS = 8, 1  # up to here the step form is faster than the chunked, the compiled one
LEGEND = (
    "q, k (B, T, H, K); slots, log_decay (B, T, H, M); state (B, H, M, K); lengths (B,) whole numbers; "
    "resets (B, T) bool."
)


@common.without_autocast
def slot_scores(
    q: Tensor,
    k: Tensor,
    slots: Tensor,
    log_decay: Tensor,
    state: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    scale: float | None = None,
    chunk_size: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """S_t = diag(exp g_t) S_{t-1} + s_t k_t^T ; o_t = scale * S_t q_t: how well q matches the key in every slot.

    Args:
        q, k: (B, T, H, K).
        slots: s, (B, T, H, M): how much of the key is written to every slot.
        log_decay: g <= 0, (B, T, H, M).
        state: S_0 (B, H, M, K), float32 (float64 for float64 inputs); None for zeros. Not changed.
        lengths: (B,) valid steps of a right-padded batch; later steps leave the state alone and give zeros.
        resets: (B, T) bool; the state is forgotten before a step where it is true.
        scale: K ** -0.5 by default.
        chunk_size: steps a chunk of the chunked form, rounded up to a power of two.
        backend: "auto", "reference" (one step at a time), "chunked", or "compiled" (C++, float32 on a CPU).
    Returns:
        o (B, T, H, M) in q's dtype, S_T (B, H, M, K).
    """
    if q.ndim != 4 or slots.ndim != 4 or 0 in q.shape or 0 in slots.shape or q.shape[:3] != slots.shape[:3]:
        raise UsageError(
            f"slot_scores: q {tuple(q.shape)} and slots {tuple(slots.shape)} do not go together. Shapes: {LEGEND}"
        )
    (B, T, H, K), M = q.shape, slots.shape[-1]
    common.check("slot_scores", LEGEND, "k", k, q, (B, T, H, K))
    common.check("slot_scores", LEGEND, "log_decay", log_decay, q, (B, T, H, M))
    common.check("slot_scores", LEGEND, "state", state, q, (B, H, M, K))
    lengths = common.check_packing("slot_scores", LEGEND, q, lengths, resets)
    common.check_dtypes("slot_scores", None, q.dtype, q=q)
    out_dtype, scale = q.dtype, K**-0.5 if scale is None else scale
    if lengths is not None:
        q = blank(q, ~common.valid_steps(lengths, T))
    heads = common.prepare_heads("slot_scores", slots, slots, k, log_decay, state, lengths, resets)
    q = q.to(heads.v.dtype)
    refused = KERNEL.why_not(heads.v)
    few_steps = FEW_STEPS if refused else COMPILED_FEW_STEPS
    form = common.choose_form("slot_scores", backend, T, few_steps, {"compiled": lambda: refused}, decode="compiled")
    if form == "compiled":
        g, state = heads.g.squeeze(3), heads.state.squeeze(2)  # type: ignore[union-attr]
        o, last = compiled_slot_scores(q, heads.v.squeeze(3), heads.k, g, state, heads.resets, scale)
    elif form == "reference":
        o, last = _reference(q, heads, scale)
    else:
        o, last = _chunked(q, heads, scale, common.chunk_length(chunk_size, sizes.chunk("slot_scores", "chunked"), T))
    return o.to(out_dtype), last


def _reference(q: Tensor, heads: Heads, scale: float) -> tuple[Tensor, Tensor]:
    """The definition, one step at a time."""
    k, slots, g, state = heads.v.squeeze(3), heads.k, heads.g.squeeze(3), heads.state.squeeze(2)  # type: ignore[union-attr]
    outputs = []
    for t in range(q.shape[1]):
        if heads.resets is not None:
            state = blank(state, heads.resets[:, t])
        state = g[:, t, ..., None].exp() * state + slots[:, t, ..., None] * k[:, t, :, None, :]
        outputs.append(scale * (state @ q[:, t, ..., None]).squeeze(-1))
    return torch.stack(outputs, 1), state


def _chunked(q: Tensor, heads: Heads, scale: float, chunk: int) -> tuple[Tensor, Tensor]:
    """All chunks at once; the recurrence runs only from chunk to chunk.

    With E_i the decay since the chunk's start, X_j that until its end, D_ij that from j to i and S the state before:
    o_i = E_i (S q_i) + sum_{j <= i} (q_i . k_j) D_ij s_j ;  S' = E_C S + sum_j (X_j s_j) k_j^T.
    """
    a = common.chunk_decays(heads, chunk)  # (n, B, H, 1, C, M)
    q, slots = to_chunks(q * scale, chunk).unsqueeze(3), to_chunks(heads.k, chunk).unsqueeze(3)
    k = to_chunks(heads.v, chunk)
    sums, ends = decayed_sums(q @ k.mT, slots, a)  # type: ignore[arg-type]  # there are decays
    writes = torch.einsum("nbgrjm,nbgrjk->nbgrmk", slots * ends.until_end, k)
    before, last = running_state(writes, chunk_totals(heads, chunk), heads.state)
    o = sums + ends.since_start * torch.einsum("nbgrik,nbgrmk->nbgrim", q, before)
    return from_chunks(o, heads.v.shape[1]).squeeze(3), last.squeeze(2)


def _forward(call: Call, q, k, slots, g, state, resets, scale) -> tuple[Tensor, Tensor]:
    (B, T, H, M), K = slots.shape, k.shape[-1]
    o, last = torch.empty_like(slots), torch.empty_like(state)
    call("slot_scores_forward", (q, k, slots, g, state, resets), (o, last), B, T, H, M, K, scale)
    return o, last


def _backward(call: Call, q, k, slots, g, state, resets, scale, d_o, d_last) -> tuple[Tensor | None, ...]:
    d_q, _, saved = _linear_attention_forward(call, d_o, slots, k, g, state, resets, scale, True)
    backward = _linear_attention_backward(call, d_o, slots, k, g, state, resets, saved, q, d_last, scale)
    _, d_slots, d_k, d_g, d_state = backward
    return d_q, d_k, d_slots, d_g, d_state


def _plain(q, k, slots, g, state, resets, scale) -> tuple[Tensor, Tensor]:
    """The operator `zoo::slot_scores` in plain PyTorch."""
    heads = Heads(slots, slots, k.unsqueeze(3), g.unsqueeze(3), None, state.unsqueeze(2), resets)
    return _chunked(q, heads, scale, sizes.chunk("slot_scores", "chunked"))


compiled_slot_scores = Operator(
    KERNEL,
    """slot_scores(Tensor q, Tensor k, Tensor slots, Tensor g, Tensor state, Tensor? resets, float scale)
    -> (Tensor o, Tensor last)""",
    _forward,
    _backward,
    gradients="q k slots g state",
    plain=_plain,
)
