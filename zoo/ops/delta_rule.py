"""The gated delta rule: S_t = (I - beta_t k_t k_t^T) diag(exp g_t) S_{t-1} + beta_t k_t v_t^T, o_t = scale S_t^T q_t.

DeltaNet (Schlag et al. 2021; chunked form: Yang et al. 2024, Parallelizing Linear Transformers with the Delta Rule,
section 3), Gated DeltaNet with one decay a head (Yang et al. 2025, eq. 10 and section 3.3) and Kimi Delta Attention
with one a channel (Kimi Team 2025, eq. 1). beta up to 2 gives eigenvalues down to -1 (Grazzi et al. 2025).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from zoo.ops import common
from zoo.ops.common import Heads, blank, from_chunks, to_chunks
from zoo.ops.decay import even_odd, join_squares, pair_decays, pair_scores

CHUNK = 64
FEW_STEPS = 4  # up to here the step form is the faster one


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
    scale: float | None = None,
    chunk_size: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """S_t = (I - beta_t k_t k_t^T) diag(exp g_t) S_{t-1} + beta_t k_t v_t^T ; o_t = scale * S_t^T q_t.

    Args:
        q, k: (B, T, G, K), G dividing H; consecutive H / G heads share a group. Keys are used as given: callers
            normalise them (for |k| = 1 and beta in [0, 2] the state cannot grow on its own).
        v: (B, T, H, V).
        beta: (B, T, H), how much of the old value a step replaces.
        log_decay: g <= 0, (B, T, H) for one decay a head, (B, T, H, K) for one a channel; None for none.
        state: S_0 (B, H, K, V), float32 (float64 for float64 inputs); None for zeros. Not changed.
        lengths: (B,) valid steps of a right-padded batch; later steps leave the state alone and give zeros.
        resets: (B, T) bool; the state is forgotten before a step where it is true.
        scale: K ** -0.5 by default.
        chunk_size: steps a chunk of the chunked form, rounded up to a power of two.
        backend: "auto", "reference" (one step at a time) or "chunked".
    Returns:
        o (B, T, H, V) in v's dtype, S_T (B, H, K, V).
    """
    heads = common.prepare_heads("delta_rule", q, k, v, log_decay, state, lengths, resets, beta)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if common.choose_form(backend, v.shape[1], FEW_STEPS) == "reference":
        o, state = _reference(heads, scale)
    else:
        o, state = _chunked(heads, scale, common.chunk_length(chunk_size, CHUNK, v.shape[1]))
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
    solve = unit_lower_inverse(beta * k_scores) * beta.mT
    u, w = solve @ v, solve @ (k * ends.since_start)
    u, before, state = corrected_values(u, w, k * ends.until_end, ends.total, heads.state)
    o = (q * ends.since_start) @ before + q_scores @ u
    return from_chunks(o, n_steps), state


def corrected_values(u: Tensor, w: Tensor, k: Tensor, total: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """From chunk to chunk: values_c = u_c - w_c S_c and S_{c+1} = total_c S_c + k_c^T values_c.

    Args:
        u: (n, B, G, R, C, V); w, k: (n, B, G, R, C, K); total: (n, B, G, R, 1, K or 1); state: S_0 (B, G, R, K, V).
    Returns:
        the values, the states before each chunk (n, B, G, R, K, V), the last state.
    """
    shape = u.shape[:4]
    u, w, k = (x.expand(*shape, -1, -1).flatten(1, 3) for x in (u, w, k))
    total = total.mT.expand(*shape, -1, -1).flatten(1, 3)
    u, before, last = _CorrectedValues.apply(u, w, k, total, state.flatten(0, 2))
    return u.unflatten(1, shape[1:]), before.unflatten(1, shape[1:]), last.unflatten(0, shape[1:])


class _CorrectedValues(torch.autograd.Function):
    """`corrected_values` on (n, heads, ...), with its own backward pass: the loop writes into whole buffers."""

    @staticmethod
    def forward(u: Tensor, w: Tensor, k: Tensor, total: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        values, states = u.clone(), torch.cat([state[None], state.new_zeros(len(u), *state.shape)])
        for c in range(len(u)):
            values[c].baddbmm_(w[c], states[c], alpha=-1)
            torch.mul(states[c], total[c], out=states[c + 1])
            states[c + 1].baddbmm_(k[c].mT, values[c])
        return values, states[:-1], states[-1].clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[1:4], *output[:2])

    @staticmethod
    @once_differentiable
    def backward(ctx, d_values: Tensor, d_states: Tensor, d_last: Tensor):
        w, k, total, values, states = ctx.saved_tensors
        d_u, adjoint = d_values.clone(), torch.cat([d_states, d_last[None]])
        for c in reversed(range(len(w))):
            d_u[c].baddbmm_(k[c], adjoint[c + 1])
            adjoint[c].addcmul_(adjoint[c + 1], total[c]).baddbmm_(w[c].mT, d_u[c], alpha=-1)
        d_total = (adjoint[1:] * states).sum_to_size(total.shape) if ctx.needs_input_grad[3] else None
        return d_u, (d_u @ states.mT).neg_(), values @ adjoint[1:].mT, d_total, adjoint[0]


def unit_lower_inverse(lower: Tensor) -> Tensor:
    """(I + strictly lower part of (n, B, G, R, C, C))^-1, C a power of two."""
    return _UnitLowerInverse.apply(lower)


class _UnitLowerInverse(torch.autograd.Function):
    """By doubling: [[A, 0], [B, C]]^-1 = [[A^-1, 0], [-C^-1 B A^-1, C^-1]], all blocks of a size at once.

    As stable as substitution, and made of matrix products, which run far faster than a batch of triangular solves.
    """

    @staticmethod
    def forward(lower: Tensor) -> Tensor:
        size, inverse = lower.shape[-1], torch.ones_like(lower[..., :1, None])  # (..., m blocks, s, s), s = 1
        while (m := inverse.shape[-3]) > 1:
            cut = lower.unflatten(-1, (m // 2, 2, size // m)).unflatten(-4, (m // 2, 2, size // m))
            corners = cut[..., 1, :, :, 0, :].diagonal(dim1=-4, dim2=-2).movedim(-1, -3)
            left, right = even_odd(inverse)
            inverse = join_squares(inverse, -(right @ corners @ left))
        return inverse.squeeze(-3)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_inverse: Tensor):
        (inverse,) = ctx.saved_tensors
        below = torch.ones_like(inverse[0, 0, 0, 0]).tril(-1)
        return (inverse.mT @ d_inverse @ inverse.mT).mul_(-below)
