"""Linear attention with an optional decay: S_t = diag(exp g_t) S_{t-1} + k_t v_t^T, o_t = scale S_t^T q_t.

One recurrence for linear attention (Katharopoulos et al. 2020), retention (Sun et al. 2023, eq. 5), the state-space
duality of Mamba-2 (Dao and Gu 2024, section 6: k = B, q = C, v = dt x) and, with a decay per channel, gated linear
attention (Yang et al. 2024, eq. 3; its chunked form is their section 4).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zoo.ops import common, heads_pass, sizes
from zoo.ops.adapters import flash_linear_attention, mamba_ssm
from zoo.ops.bridge import Operator
from zoo.ops.common import Heads, blank, from_chunks, to_chunks
from zoo.ops.cut import by_decay
from zoo.ops.decay import pair_decays, pair_scores
from zoo.ops.derivatives import guarded, once, transformed
from zoo.ops.kernel import Call, Kernel, Strided
from zoo.ops.single_step import STEPPING, heads_step
from zoo.pieces import Pieces

KERNEL = Kernel("linear_attention")
FEW_STEPS, COMPILED_FEW_STEPS = 8, 1  # up to here the step form is faster than the chunked, the compiled one


@common.without_autocast
def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    state: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    pieces: Pieces | None = None,
    scale: float | None = None,
    chunk_size: int | None = None,
    backend: str = "auto",
    in_place: bool = False,
) -> tuple[Tensor, Tensor]:
    """S_t = diag(exp g_t) S_{t-1} + k_t v_t^T ; o_t = scale * S_t^T q_t.

    Args:
        q, k: (B, T, G, K), G dividing H; consecutive H / G heads share a group.
        v: (B, T, H, V).
        log_decay: g <= 0, (B, T, H) for one decay a head, (B, T, H, K) for one a channel; None for none.
        state: S_0 (B, H, K, V), float32 (float64 for float64 inputs); None for zeros.
        lengths: (B,) valid steps of a right-padded batch; later steps leave the state alone and give zeros.
        resets: (B, T) bool; the state is forgotten before a step where it is true.
        pieces: of a sequence that is cut over processes, of which the other arguments are one piece; `state` is then
            that before the first one.
        scale: K ** -0.5 by default.
        chunk_size: steps a chunk of the chunked form, rounded up to a power of two.
        backend: "auto", "reference" (one step at a time), "chunked", or "compiled" (C++, float32 on a CPU).
        in_place: the state given is not read again, so that a single step without gradients may write the next one over
            it.
    Returns:
        o (B, T, H, V) in v's dtype, S_T (B, H, K, V).
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if lengths is resets is pieces is None and backend in STEPPING:
        done = heads_step("linear_attention", q, k, v, log_decay, None, None, None, state, scale, in_place)
        if done is not None:
            return done
    if pieces is not None:
        how: Any = {"resets": resets, "scale": scale, "chunk_size": chunk_size, "backend": backend}
        run = lambda v, state: linear_attention(q, k, v, log_decay, state, **how)  # noqa: E731
        return by_decay(pieces, run, q, v, log_decay, state, resets, scale)
    heads = common.prepare_heads("linear_attention", q, k, v, log_decay, state, lengths, resets)
    chunk = common.chunk_length(chunk_size, sizes.chunk("linear_attention", "chunked", q.shape[-1]), v.shape[1])
    refused = KERNEL.why_not(heads.v)
    few_steps = FEW_STEPS if refused else COMPILED_FEW_STEPS
    offers = {
        "fla": lambda: flash_linear_attention.why_not(v, q.shape[-1], chosen=backend == "fla"),
        "mamba_ssm": lambda: mamba_ssm.why_not_ssd(v, heads, chosen=backend == "mamba_ssm"),
        "compiled": lambda: refused,
    }
    form = common.choose_form("linear_attention", backend, v.shape[1], few_steps, offers)
    if form == "compiled":
        o, state = _compiled(heads, scale)
    elif form == "fla":
        o, state = _guarded(heads, scale, flash_linear_attention.linear_attention(heads, scale, v.dtype))
    elif form == "mamba_ssm":
        o, state = _guarded(heads, scale, mamba_ssm.linear_attention(heads, scale, v.dtype))
    elif form == "reference":
        o, state = _reference(heads, scale)
    else:
        o, state = _chunked(heads, scale, chunk)
    return o.flatten(2, 3).to(v.dtype), state.flatten(1, 2)


def _guarded(heads: Heads, scale: float, outputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """What another library's kernel gave, with second derivatives."""
    return guarded(lambda *given: _reference(Heads(*given), scale), outputs, heads)


def _reference(heads: Heads, scale: float) -> tuple[Tensor, Tensor]:
    """The definition, one step at a time."""
    q, k, v, g, _, state, resets = heads
    outputs = []
    for t in range(v.shape[1]):
        if resets is not None:
            state = blank(state, resets[:, t])
        if g is not None:
            state = g[:, t, ..., None].exp() * state
        state = state + k[:, t, :, None, :, None] * v[:, t, ..., None, :]
        outputs.append(scale * (q[:, t, :, None, None, :] @ state).squeeze(-2))
    return torch.stack(outputs, 1), state


def _chunked(heads: Heads, scale: float, chunk: int) -> tuple[Tensor, Tensor]:
    """Attention inside each chunk, all chunks at once; the recurrence runs only from chunk to chunk.

    With E_i the decay since the chunk's start, X_j that until its end, D_ij that from j to i and S the state before:
    o_i = (E_i q_i)^T S + sum_{j <= i} (q_i^T D_ij k_j) v_j ;  S' = E_C S + sum_j (X_j k_j) v_j^T.
    One decay a head is applied to v and o, which have heads, not to the q and k that a group shares.
    """
    n_steps, a = heads.v.shape[1], common.chunk_decays(heads, chunk)
    q, k, v = to_chunks(heads.q * scale, chunk), to_chunks(heads.k, chunk), to_chunks(heads.v, chunk)
    q, k = q.unsqueeze(3), k.unsqueeze(3)  # (n, B, G, 1, C, K) beside v (n, B, G, R, C, V)
    if a is None:
        scores = (q @ k.mT) * torch.ones(chunk, chunk, dtype=q.dtype, device=q.device).tril()
        before, state = running_state(_writes(k, v), None, heads.state)
        read = _reads(q, before)
    elif a.shape[-1] == 1:
        decays, ends = pair_decays(a)
        scores = (q @ k.mT) * decays
        before, state = running_state(_writes(k, v * ends.until_end), chunk_totals(heads, chunk), heads.state)
        read = _reads(q, before) * ends.since_start
    else:
        (scores,), ends = pair_scores([q], k, a)
        before, state = running_state(_writes(k * ends.until_end, v), chunk_totals(heads, chunk), heads.state)
        read = _reads(q * ends.since_start, before)
    o = read + torch.einsum("nbgrij,nbgrjv->nbgriv", scores, v)
    return from_chunks(o, n_steps), state


def chunk_totals(heads: Heads, chunk: int) -> Tensor:
    """Decay over each chunk, (n, B, G, R, 1, K or 1): of its sum, one rounding where a product would have one a step.

    Over many chunks of a slow decay the roundings of products add up, all in one direction where it is constant.
    """
    g = heads.v.new_zeros(*heads.v.shape[:4], 1) if heads.g is None else heads.g
    totals = to_chunks(g, chunk).sum(-2, keepdim=True).exp()
    if heads.resets is None:
        return totals
    forgotten = to_chunks(heads.resets[..., None, None, None].to(g.dtype), chunk).amax(-2, keepdim=True)
    return totals.masked_fill(forgotten > 0, 0)


def _writes(k: Tensor, v: Tensor) -> Tensor:
    """sum_j k_j v_j^T of every chunk, (n, B, G, R, K, V)."""
    return torch.einsum("nbgrjk,nbgrjv->nbgrkv", k, v)


def _reads(q: Tensor, state: Tensor) -> Tensor:
    """S^T q_i of every chunk, (n, B, G, R, C, V)."""
    return torch.einsum("nbgrik,nbgrkv->nbgriv", q, state)


def running_state(writes: Tensor, total: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
    """S_{c+1} = diag(total_c) S_c + writes_c from chunk to chunk: the states before each chunk, and the last one.

    Args:
        writes: (n, B, G, R, K, V); total: (n, B, G, R, 1, K or 1), or None for no decay; state: S_0 (B, G, R, K, V).
    """
    total = None if total is None else total.mT
    return _by_chunks(writes, total, state) if transformed() else _RunningState.apply(writes, total, state)


def _by_chunks(writes: Tensor, total: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
    """`_RunningState` in plain operators."""
    states = [state]
    for c, written in enumerate(writes):
        states.append((states[-1] if total is None else states[-1] * total[c]) + written)
    return torch.stack(states[:-1]), states[-1]


def _running_again(ctx, d_states: Tensor, d_last: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
    """The backward pass of `_RunningState` as what it is, a running state from the last chunk back."""
    total, states = ctx.saved_tensors
    run = _by_chunks if transformed() else _RunningState.apply
    adjoint, first = run(d_states.flip(0), None if total is None else total.flip(0), d_last)
    adjoint = adjoint.flip(0)
    return adjoint, None if total is None else (adjoint * states).sum_to_size(total.shape), first


class _RunningState(torch.autograd.Function):
    """`running_state` with its own backward pass: one buffer each way, where autograd would copy at every chunk."""

    @staticmethod
    def forward(writes: Tensor, total: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
        states = torch.cat([state[None], writes])
        for c in range(len(writes)):
            _accumulate(states[c + 1], states[c], None if total is None else total[c])
        return states[:-1], states[-1].clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[1], output[0])

    @staticmethod
    @common.without_autocast
    @once(_running_again)
    def backward(ctx, d_states: Tensor, d_last: Tensor):
        total, states = ctx.saved_tensors
        adjoint = torch.cat([d_states, d_last[None]])  # of every S_c, summed from the last one back
        for c in reversed(range(len(states))):
            _accumulate(adjoint[c], adjoint[c + 1], None if total is None else total[c])
        d_total = (adjoint[1:] * states).sum_to_size(total.shape) if ctx.needs_input_grad[1] else None
        return adjoint[1:], d_total, adjoint[0]


def _accumulate(target: Tensor, source: Tensor, factor: Tensor | None) -> None:
    """target += factor * source, in place."""
    target.add_(source) if factor is None else target.addcmul_(source, factor)


SEGMENT = 128  # steps between the states kept for the compiled backward pass, for K or V up to as many
CACHE = 1 << 19  # bytes that the states of one task may take


def _compiled(heads: Heads, scale: float) -> tuple[Tensor, Tensor]:
    """Blocks of 16 or 32 steps with everything of a head in the nearest caches: `kernels/linear_attention.cpp`."""
    q, k, v, g, _, state, resets = heads
    if g is not None:
        g = g.flatten(2, 3)
        g = g.squeeze(-1) if g.shape[-1] == 1 else g
    o, last, _ = compiled_linear_attention(q, k, v.flatten(2, 3), g, state.flatten(1, 2), resets, scale)
    return o.unflatten(2, v.shape[2:4]), last.unflatten(1, v.shape[2:4])


def _forward(call: Call, q, k, v, g, state, resets, scale, keep) -> tuple[Tensor | None, ...]:
    """o, the last state, and where `keep` every SEGMENT-th one before it, for the backward pass."""
    q, k, v = _rows(q), _rows(k), _rows(v)
    if not keep and heads_pass.takes("linear_attention", q, v, g):
        by_steps = heads_pass.KERNEL if call is KERNEL else call
        return *heads_pass.heads_pass(by_steps, q, k, v, None, None, None, g, state, resets, scale), None
    B, H, K, V = state.shape
    o, last = v.new_empty(v.shape), torch.empty_like(state)
    saved = v.new_empty(B, H, (v.shape[1] - 1) // _segment(q, v), K, V) if keep else None
    reads = (Strided(q), Strided(k), Strided(v), g, state, resets)
    call("linear_attention_forward", reads, (o, last, saved), *_numbers(q, k, v, g, _parts(q, v)), scale)
    return o, last, saved


def _segment(q: Tensor, v: Tensor) -> int:
    return SEGMENT * -(-min(q.shape[-1], v.shape[-1]) // SEGMENT)


def _rows(x: Tensor) -> Tensor:
    """x (B, T, heads, D) with the heads of a step side by side, copied only where they are not."""
    close = x.stride(3) == 1 and (x.shape[2] == 1 or x.stride(2) == x.shape[3])
    return x if close else x.contiguous()


def _parts(q: Tensor, v: Tensor) -> int:
    """Units that the heads of a group are cut into: enough for all threads, their states small enough for the cache."""
    (B, _, G, _), H = q.shape, v.shape[2]
    return min(H // G, max(-(-torch.get_num_threads() // (B * G)), -(-(H // G) * _states(q, v) // CACHE)))


def _states(q: Tensor, v: Tensor) -> int:
    """Bytes of the states of one head in a segment of the backward pass."""
    return 4 * q.shape[3] * v.shape[3] * (1 + _segment(q, v) // 32)


def _spans(q: Tensor, v: Tensor, parts: int) -> int:
    """Tasks that the units of a row are cut into, likewise: the fewer, the more of what lies side by side is read at a
    time."""
    (B, _, G, _), H = q.shape, v.shape[2]
    return min(G * parts, max(-(-torch.get_num_threads() // B), -(-H * _states(q, v) // CACHE)))


def _numbers(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, parts: int) -> list[int]:
    strides = (x.stride(axis) for x in (q, k, v) for axis in (0, 1))
    (B, T, G, K), (H, V) = q.shape, v.shape[2:]
    return [B, T, G, H, K, V, parts, _spans(q, v, parts), _segment(q, v), *strides, g is not None and g.ndim == 4]


def _backward(call: Call, q, k, v, g, state, resets, saved, d_o, d_last, scale) -> tuple[Tensor | None, ...]:
    q, k, v = _rows(q), _rows(k), _rows(v)
    d_q, d_k, d_v, d_state = (x.new_empty(x.shape) for x in (q, k, v, state))
    d_g, parts = None if g is None else torch.empty_like(g), _parts(q, v)
    if parts > 1:
        d_q, d_k = (x.new_empty(parts, *x.shape) for x in (q, k))
    reads = (Strided(q), Strided(k), Strided(v), g, state, resets, saved, d_o, d_last)
    writes = (d_q, d_k, d_v, d_g, d_state)
    call("linear_attention_backward", reads, writes, *_numbers(q, k, v, g, parts), scale)
    return (d_q.sum(0), d_k.sum(0), d_v, d_g, d_state) if parts > 1 else writes


def _plain(q, k, v, g, state, resets, scale) -> tuple[Tensor, Tensor]:
    """The operator `zoo::linear_attention` in plain PyTorch."""
    by_group = (q.shape[2], -1)
    v = v.unflatten(2, by_group)
    g = None if g is None else g.unflatten(2, by_group).reshape(*v.shape[:4], -1)
    o, state = _chunked(
        Heads(q, k, v, g, None, state.unflatten(1, by_group), resets), scale, sizes.chunk("linear_attention", "chunked")
    )
    return o.flatten(2, 3), state.flatten(1, 2)


compiled_linear_attention = Operator(
    KERNEL,
    """linear_attention(Tensor q, Tensor k, Tensor v, Tensor? g, Tensor state, Tensor? resets, float scale, bool keep)
    -> (Tensor o, Tensor last, Tensor saved)""",
    _forward,
    _backward,
    gradients="q k v g state",
    plain=_plain,
    strided="q k v",
)
