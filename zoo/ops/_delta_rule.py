"""The gated delta rule: S_t = (I - beta_t k_t k_t^T) diag(exp g_t) S_{t-1} + beta_t k_t v_t^T, o_t = scale S_t^T q_t.

DeltaNet (Schlag et al. 2021; chunked form: Yang et al. 2024, Parallelizing Linear Transformers with the Delta Rule,
section 3), Gated DeltaNet with one decay a head (Yang et al. 2025, eq. 10 and section 3.3) and Kimi Delta Attention
with one a channel (Kimi Team 2025, eq. 1). beta up to 2 gives eigenvalues down to -1 (Grazzi et al. 2025).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zoo.ops import common, sizes
from zoo.ops.adapters import flash_linear_attention, flash_qla
from zoo.ops.common import Heads, blank, from_chunks, to_chunks
from zoo.ops.cut import by_transition
from zoo.ops.decay import even_odd, join_squares, pair_decays, pair_scores
from zoo.ops.delta_kernel import KERNEL, compiled_delta
from zoo.ops.derivatives import gradients_of, guarded, once
from zoo.ops.single_step import STEPPING, heads_step
from zoo.pieces import Pieces

FEW_STEPS = 8  # up to here the step form is the faster one
LIBRARIES = {"fla": flash_linear_attention, "flash_qla": flash_qla}


@common.without_autocast
def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
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
    """S_t = (I - beta_t k_t k_t^T) diag(exp g_t) S_{t-1} + beta_t k_t v_t^T ; o_t = scale * S_t^T q_t.

    Args:
        q, k: (B, T, G, K), G dividing H; consecutive H / G heads share a group. Keys are used as given: callers
            normalise them (for |k| = 1 and beta in [0, 2] the state cannot grow on its own).
        v: (B, T, H, V).
        beta: (B, T, H), how much of the old value a step replaces.
        log_decay: g <= 0, (B, T, H) for one decay a head, (B, T, H, K) for one a channel; None for none.
        state: S_0 (B, H, K, V), float32 (float64 for float64 inputs); None for zeros.
        lengths: (B,) valid steps of a right-padded batch; later steps leave the state alone and give zeros.
        resets: (B, T) bool; the state is forgotten before a step where it is true.
        pieces: of a sequence that is cut over processes, of which the other arguments are one piece; `state` is then
            that before the first one.
        scale: K ** -0.5 by default.
        chunk_size: steps a chunk of the chunked form, rounded up to a power of two.
        backend: "auto", "reference" (one step at a time), "chunked", "compiled" (C++, float32 on a CPU), or "fla" or
            "flash_qla" (on a GPU).
        in_place: the state given is not read again, so that a single step without gradients may write the next one over
            it.
    Returns:
        o (B, T, H, V) in v's dtype, S_T (B, H, K, V).
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if lengths is resets is pieces is None and backend in STEPPING:
        done = heads_step("delta_rule", q, k, v, log_decay, beta, None, None, state, scale, in_place)
        if done is not None:
            return done
    if pieces is not None:
        how: Any = {"resets": resets, "scale": scale, "chunk_size": chunk_size, "backend": backend}
        run = lambda v, state: delta_rule(q, k, v, beta, log_decay, state, **how)  # noqa: E731
        return by_transition(pieces, run, v, state, q.shape[-1])
    heads = common.prepare_heads("delta_rule", q, k, v, log_decay, state, lengths, resets, beta)
    chunk = common.chunk_length(chunk_size, sizes.chunk("delta_rule", "chunked", q.shape[-1]), v.shape[1])
    offers = {
        "fla": lambda: flash_linear_attention.why_not(v, q.shape[-1], chosen=backend == "fla"),
        "flash_qla": lambda: flash_qla.why_not(v, heads),
        "compiled": lambda: KERNEL.why_not(heads.v),
    }
    form = common.choose_form("delta_rule", backend, v.shape[1], FEW_STEPS, offers)
    if form == "reference":
        o, state = _reference(heads, scale)
    elif form == "compiled":
        o, state = compiled_delta(heads, scale)
    elif form in LIBRARIES:
        plain = lambda *given: _reference(Heads(*given), scale)  # noqa: E731
        o, state = guarded(plain, LIBRARIES[form].delta_rule(heads, scale, v.dtype), heads)
    else:
        o, state = _chunked(heads, scale, chunk)
    return o.flatten(2, 3).to(v.dtype), state.flatten(1, 2)


def _reference(heads: Heads, scale: float) -> tuple[Tensor, Tensor]:
    """The definition, one step at a time."""
    q, k, v, g, beta, state, resets = heads
    assert beta is not None
    outputs = []
    for t in range(v.shape[1]):
        if resets is not None:
            state = blank(state, resets[:, t])
        if g is not None:
            state = g[:, t, ..., None].exp() * state
        k_t = k[:, t, :, None, :, None]  # (B, G, 1, K, 1) beside state (B, G, R, K, V)
        recalled = k_t.mT @ state
        state = state + k_t * (beta[:, t, ..., None] * (v[:, t, ..., None, :] - recalled))
        outputs.append(scale * (q[:, t, :, None, None, :] @ state).squeeze(-2))
    return torch.stack(outputs, 1), state


def _chunked(heads: Heads, scale: float, chunk: int) -> tuple[Tensor, Tensor]:
    """The WY form: inside a chunk, all steps write new values u_j = beta_j (v_j - what is recalled for k_j) at once.

    With E_i the decay since the chunk's start, X_j that until its end, D_ij that from j to i and S the state before:
    (I + diag(beta) strictly_lower(k_i^T D_ij k_j)) u = beta (v - (E k)^T S), and with u the rest is linear attention:
    o_i = (E_i q_i)^T S + sum_{j <= i} (q_i^T D_ij k_j) u_j ;  S' = E_C S + sum_j (X_j k_j) u_j^T.
    """
    assert heads.beta is not None
    n_steps, a = heads.v.shape[1], common.chunk_decays(heads, chunk)
    q, k = to_chunks(heads.q * scale, chunk).unsqueeze(3), to_chunks(heads.k, chunk).unsqueeze(3)
    v, beta = to_chunks(heads.v, chunk), to_chunks(heads.beta, chunk)
    if a is None:
        a = v.new_ones(1, 1, 1, 1, chunk, 1)
    if a.shape[-1] == 1:
        decays, ends = pair_decays(a)
        q_scores, k_scores = (q @ k.mT) * decays, (k @ k.mT) * decays
    else:
        (q_scores, k_scores), ends = pair_scores([q, k], k, a)
    q, k_start, k_end, total = q * ends.since_start, k * ends.since_start, k * ends.until_end, ends.total.mT
    shape = v.shape[:4]
    parts = (x.expand(*shape, -1, -1).flatten(1, 3) for x in (q_scores, k_scores, q, k_start, k_end, total, v, beta))
    o, state, *_ = _Chunks.apply(*parts, heads.state.flatten(0, 2))
    return from_chunks(o.unflatten(1, shape[1:]), n_steps), state.unflatten(0, shape[1:])


class _Chunks(torch.autograd.Function):
    """All that comes after the decays, on (n, heads, C, .), with q, k_start = E k and k_end = X k decayed.

    forward: values u = (I + L)^-1 beta (v - k_start S) with L = strictly_lower(beta k_scores).
    backward, with d_u all that reaches u: d_rhs = (I + L)^-T d_u; d_L = -d_rhs u^T; d_v = beta d_rhs;
    d_k_start = -beta d_rhs S^T. Neither the inverse nor (I + L)^-1 beta k_start needs a gradient of its own, and the
    loops over chunks write into whole buffers.
    """

    @staticmethod
    def forward(q_scores, k_scores, q, k_start, k_end, total, v, beta, state):
        inverse = unit_lower_inverse(beta * k_scores)
        recall, values = inverse @ (beta * k_start), inverse @ (beta * v)
        states = torch.cat([state[None], state.new_zeros(len(v), *state.shape)])
        for c in range(len(v)):
            values[c].baddbmm_(recall[c], states[c], alpha=-1)
            torch.mul(states[c], total[c], out=states[c + 1]).baddbmm_(k_end[c].mT, values[c])
        o = q @ states[:-1]
        o[:].add_(q_scores @ values)  # through a view: see `_causal_conv1d._Taps`
        return o, states[-1].clone(), inverse, recall, values, states[:-1]

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(*output[2:])
        ctx.save_for_backward(*inputs, *output[2:])

    @staticmethod
    @common.without_autocast
    @once(lambda ctx, *d: gradients_of(_by_chunks, ctx.saved_tensors[:9], d[:2]))
    def backward(ctx, d_o, d_last, *_):
        q_scores, k_scores, q, k_start, k_end, total, v, beta, _, inverse, recall, values, states = ctx.saved_tensors
        d_u, adjoint = q_scores.mT @ d_o, torch.cat([q.mT @ d_o, d_last[None]])  # adjoint[c]: of the state before c
        for c in reversed(range(len(v))):
            d_u[c].baddbmm_(k_end[c], adjoint[c + 1])
            adjoint[c].addcmul_(adjoint[c + 1], total[c]).baddbmm_(recall[c].mT, d_u[c], alpha=-1)
        d_rhs = inverse.mT @ d_u
        d_lower = (d_rhs @ values.mT).mul_(-torch.ones_like(k_scores[0, 0]).tril(-1))
        d_k_start = (d_rhs @ states.mT).neg_()
        d_beta = sum((d * x).sum(-1, keepdim=True) for d, x in ((d_rhs, v), (d_k_start, k_start), (d_lower, k_scores)))
        d_total = (adjoint[1:] * states).sum_to_size(total.shape) if ctx.needs_input_grad[5] else None
        d_v, d_k_start, d_k_scores = d_rhs.mul_(beta), d_k_start.mul_(beta), d_lower.mul_(beta)
        d_q_scores, d_q, d_k_end = d_o @ values.mT, d_o @ states.mT, values @ adjoint[1:].mT
        return d_q_scores, d_k_scores, d_q, d_k_start, d_k_end, d_total, d_v, d_beta, adjoint[0]


def _by_chunks(q_scores, k_scores, q, k_start, k_end, total, v, beta, state) -> tuple[Tensor, Tensor]:
    """`_Chunks` in plain operators."""
    lower, outputs = beta * k_scores, []
    for c in range(len(v)):
        right = beta[c] * (v[c] - k_start[c] @ state)
        u = torch.linalg.solve_triangular(lower[c], right, upper=False, unitriangular=True)
        outputs.append(q[c] @ state + q_scores[c] @ u)
        state = total[c] * state + k_end[c].mT @ u
    return torch.stack(outputs), state


def unit_lower_inverse(lower: Tensor) -> Tensor:
    """(I + strictly lower part of (..., C, C))^-1, C a power of two; not for autograd.

    By doubling: [[A, 0], [B, C]]^-1 = [[A^-1, 0], [-C^-1 B A^-1, C^-1]], all blocks of a size at once. As stable as
    substitution, and made of matrix products, which run many times faster than a batch of triangular solves.
    """
    size, inverse = lower.shape[-1], torch.ones_like(lower[..., :1, None])  # (..., m blocks, s, s), s = 1
    while (m := inverse.shape[-3]) > 1:
        cut = lower.unflatten(-1, (m // 2, 2, size // m)).unflatten(-4, (m // 2, 2, size // m))
        corners = cut[..., 1, :, :, 0, :].diagonal(dim1=-4, dim2=-2).movedim(-1, -3)
        left, right = even_odd(inverse)
        inverse = join_squares(inverse, (right @ corners @ left).neg_())
    return inverse.squeeze(-3)
