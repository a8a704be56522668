"""Diagonal plus low rank: S_t = diag(exp g_t) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T, o_t = scale S_t^T q_t.

The recurrence of RWKV-7 (Peng et al. 2025, arXiv 2503.14456, section 4: a = -kappa, b = kappa * rate) and the
most general of the delta rules: with a = -k exp g and b = beta k it is Kimi Delta Attention. The chunked form follows
Yang et al. 2024 (arXiv 2406.06484, section 3), whose WY form holds for any pair a, b.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zoo.ops import common, sizes
from zoo.ops._delta_rule import unit_lower_inverse
from zoo.ops.adapters import flash_linear_attention
from zoo.ops.common import LEGEND, Heads, blank, from_chunks, to_chunks, valid_steps
from zoo.ops.cut import by_transition
from zoo.ops.delta_kernel import KERNEL, compiled_delta
from zoo.ops.derivatives import gradients_of, guarded, once
from zoo.ops.single_step import STEPPING, heads_step
from zoo.pieces import Pieces

FEW_STEPS = 8  # up to here the step form is the faster one
SLICE = 2**16  # numbers of a tensor that are decayed at a time: what stays in the cache


@common.without_autocast
def dplr(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
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
    """S_t = diag(exp g_t) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T ; o_t = scale * S_t^T q_t.

    Args:
        q, k: (B, T, G, K), G dividing H; consecutive H / G heads share a group.
        v: (B, T, H, V).
        a, b: (B, T, H, K): what a step reads of the state before it decays, and where it writes that. Used as given:
            for |a| = |b| = 1, a = -b and g = 0 a step takes one direction out of the state.
        log_decay: g <= 0, (B, T, H) for one decay a head, (B, T, H, K) for one a channel; None for none.
        state: S_0 (B, H, K, V), float32 (float64 for float64 inputs); None for zeros.
        lengths: (B,) valid steps of a right-padded batch; later steps leave the state alone and give zeros.
        resets: (B, T) bool; the state is forgotten before a step where it is true.
        pieces: of a sequence that is cut over processes, of which the other arguments are one piece; `state` is then
            that before the first one.
        scale: K ** -0.5 by default.
        chunk_size: steps a chunk of the chunked form, rounded up to a power of two.
        backend: "auto", "reference" (one step at a time), "chunked", "compiled" (C++, float32 on a CPU), or "fla"
            (flash-linear-attention, on GPUs).
        in_place: the state given is not read again, so that a single step without gradients may write the next one over
            it.
    Returns:
        o (B, T, H, V) in v's dtype, S_T (B, H, K, V).
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if lengths is resets is pieces is None and backend in STEPPING:
        done = heads_step("dplr", q, k, v, log_decay, None, a, b, state, scale, in_place)
        if done is not None:
            return done
    if pieces is not None:
        how: Any = {"resets": resets, "scale": scale, "chunk_size": chunk_size, "backend": backend}
        run = lambda v, state: dplr(q, k, v, a, b, log_decay, state, **how)  # noqa: E731
        return by_transition(pieces, run, v, state, q.shape[-1])
    heads = common.prepare_heads("dplr", q, k, v, log_decay, state, lengths, resets)
    a, b = (_prepare(name, x, heads, lengths) for name, x in (("a", a), ("b", b)))
    if heads.resets is not None:  # nothing is read of a state that was just forgotten
        a = blank(a, heads.resets)
    chunk = common.chunk_length(chunk_size, sizes.chunk("dplr", "chunked"), v.shape[1])
    offers = {
        "fla": lambda: flash_linear_attention.why_not(v, q.shape[-1], chosen=backend == "fla"),
        "compiled": lambda: KERNEL.why_not(heads.v),
    }
    form = common.choose_form("dplr", backend, v.shape[1], FEW_STEPS, offers)
    if form == "reference":
        o, state = _reference(heads, a, b, scale)
    elif form == "compiled":
        o, state = compiled_delta(heads, scale, a, b)
    elif form == "fla":
        plain = lambda a, b, *given: _reference(Heads(*given), a, b, scale)  # noqa: E731
        o, state = guarded(plain, flash_linear_attention.dplr(heads, a, b, scale, v.dtype), (a, b, *heads))
    else:
        o, state = _chunked(heads, a, b, scale, chunk)
    return o.flatten(2, 3).to(v.dtype), state.flatten(1, 2)


def _prepare(name: str, x: Tensor, heads: Heads, lengths: Tensor | None) -> Tensor:
    """a or b, checked, as (B, T, G, R, K) in the arithmetic's dtype, zero in the padding."""
    B, T, G, R, _ = heads.v.shape
    K = heads.q.shape[-1]
    common.check("dplr", f"{LEGEND[:-1]}; a, b (B, T, H, K).", name, x, heads.v, (B, T, G * R, K))
    common.check_dtypes("dplr", None, heads.v.dtype, **{name: x})
    x = x.to(heads.v.dtype).unflatten(2, (G, R))
    return x if lengths is None else blank(x, ~valid_steps(lengths, T))


def _reference(heads: Heads, a: Tensor, b: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The definition, one step at a time."""
    q, k, v, g, _, state, resets = heads
    outputs = []
    for t in range(v.shape[1]):
        if resets is not None:
            state = blank(state, resets[:, t])
        removed = b[:, t, ..., None] * (a[:, t, ..., None, :] @ state)
        if g is not None:
            state = g[:, t, ..., None].exp() * state
        state = state + removed + k[:, t, :, None, :, None] * v[:, t, ..., None, :]
        outputs.append(scale * (q[:, t, :, None, None, :] @ state).squeeze(-2))
    return torch.stack(outputs, 1), state


def _chunked(heads: Heads, a: Tensor, b: Tensor, scale: float, chunk: int) -> tuple[Tensor, Tensor]:
    """Inside a chunk the values u_i = a_i^T S_{i-1} that all steps read are found at once.

    Two vectors read the state: q_i after step i, a_i before it. Two write into it: k_j the value v_j, b_j the value
    u_j. With S the state before the chunk, E_i the decay since its start, X_j that until its end and D_ij that from
    step j to step i, score(r, w)_ij = r_i^T D_ij w_j for j <= i where r = q, and r_i^T D_{i-1,j} w_j for j < i where
    r = a. Then

        (I - score(a, b)) u = (E_{i-1} a_i)^T S + score(a, k) v
        o = (E_i q_i)^T S + score(q, k) v + score(q, b) u ;  S' = E_C S + sum_j (X_j k_j) v_j^T + (X_j b_j) u_j^T

    Reads q, a, writes k, b and values v, u alternate, so that each of these is one product for both.
    """
    q, k, v, g, _, state, resets = heads
    B, T, G, R = v.shape[:4]
    K = q.shape[-1]
    if g is None:
        g = v.new_zeros(B, T, 1, 1, 1)
    if resets is not None:
        g = g.masked_fill(resets[:, :, None, None, None], -torch.inf)
    q, k = (x.unsqueeze(3).expand(B, T, G, R, K) for x in (q * scale, k))
    reads, writes = (to_chunks(torch.cat(pair, -1), chunk).unflatten(-1, (2, K)) for pair in ((q, a), (k, b)))
    g = to_chunks(g, chunk).expand(*reads.shape[:5], K)
    parts = (x.flatten(1, 3) for x in (reads, writes, g, to_chunks(v, chunk)))
    o, last, *_ = _Chunks.apply(*parts, state.flatten(0, 2))
    return from_chunks(o.unflatten(1, (B, G, R)), T), last.unflatten(0, (B, G, R))


class _Chunks(torch.autograd.Function):
    """o and the last state from reads, writes (n, heads, C, 2, K), g (n, heads, C, K), v (n, heads, C, V) and state.

    forward: values u = (I - A)^-1 (read_a S + score(a, k) v) with A = score(a, b).
    backward, with d_u all that reaches u: d_rhs = (I - A)^-T d_u, and the gradients of all scores are (d_o, d_rhs)
    (v, u)^T, those of all reads (d_o, d_rhs) S^T: neither the inverse nor (I - A)^-1 read_a needs one of its own.
    """

    @staticmethod
    def forward(reads, writes, g, v, state):
        scores, read, write, total = decayed(reads, writes, g)
        (q_scores, a_scores), (q_read, a_read), (k_write, b_write) = (_pairs(x) for x in (scores, read, write))
        inverse = unit_lower_inverse(-a_scores[..., 1::2])
        recall, u = inverse @ a_read, inverse @ (a_scores[..., ::2].contiguous() @ v)
        states = torch.cat([state[None], k_write.mT @ v])
        for c in range(len(v)):
            u[c].baddbmm_(recall[c], states[c])
            states[c + 1].addcmul_(states[c], total[c]).baddbmm_(b_write[c].mT, u[c])
        values = torch.stack([v, u], 3).flatten(2, 3)
        o = q_read @ states[:-1]
        o[:].add_(q_scores @ values)  # through a view: see `_causal_conv1d._Taps`
        return o, states[-1].clone(), scores, read, write, total, inverse, recall, values, states[:-1]

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(*output[2:])
        ctx.save_for_backward(*inputs, *output[2:])

    @staticmethod
    @common.without_autocast
    @once(lambda ctx, *d: gradients_of(_by_steps, ctx.saved_tensors[:5], d[:2]))
    def backward(ctx, d_o, d_last, *_):
        reads, writes, g, _, _, scores, read, write, total, inverse, recall, values, states = ctx.saved_tensors
        q_scores, (k_write, b_write) = _pairs(scores)[0], _pairs(write)
        d_u = q_scores[..., 1::2].contiguous().mT @ d_o
        adjoint = torch.cat([_pairs(read)[0].mT @ d_o, d_last[None]])  # adjoint[c]: of the state before c
        for c in reversed(range(len(values))):
            d_u[c].baddbmm_(b_write[c], adjoint[c + 1])
            adjoint[c].addcmul_(adjoint[c + 1], total[c]).baddbmm_(recall[c].mT, d_u[c])
        d_out = torch.stack([d_o, inverse.mT @ d_u], 3).flatten(2, 3)
        d_v = (scores[..., ::2].contiguous().mT @ d_out).add_(k_write @ adjoint[1:])
        d_total = (adjoint[1:] * states).sum(-1, keepdim=True)
        d_scores, d_read, d_write = d_out @ values.mT, d_out @ states.mT, values @ adjoint[1:].mT
        d_g = decayed_backward(reads, writes, g, d_scores, (read, write, total), (d_read, d_write, d_total))
        return d_read.view_as(reads), d_write.view_as(writes), d_g, d_v, adjoint[0]


def _by_steps(reads, writes, g, v, state) -> tuple[Tensor, Tensor]:
    """`_Chunks` in plain operators."""
    steps, outputs = zip(*(x.transpose(1, 2).flatten(0, 1) for x in (reads, writes, g, v)), strict=True), []
    for read, write, log_decay, value in steps:  # (heads, 2, K), (heads, 2, K), (heads, K), (heads, V)
        (q, a), (k, b) = (x.unsqueeze(-2).unbind(1) for x in (read, write))
        state = log_decay.exp()[..., None] * state + b.mT * (a @ state) + k.mT * value[:, None]
        outputs.append((q @ state).squeeze(1))
    return torch.stack(outputs).unflatten(0, (len(v), -1)).transpose(1, 2), state


def _pairs(x: Tensor) -> tuple[Tensor, Tensor]:
    """(..., 2 C, D) -> those of q, k or v, and those of a, b or u, (..., C, D)."""
    return x[..., ::2, :], x[..., 1::2, :]


def decayed(reads: Tensor, writes: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All that depends on the decays inside of chunks, built as in `zoo.ops.decay`: nothing is ever divided.

    Args:
        reads, writes: (n, heads, C, 2, K): q and a, k and b.
        g: (n, heads, C, K), logarithms of the decays, minus infinity where all is forgotten.
    Returns:
        scores (n, heads, 2 C, 2 C), zero for steps to come; reads decayed since the chunk's start and writes until its
        end, each (n, heads, 2 C, K); the decay of the whole chunk, (n, heads, K, 1).
    """
    n, H, C, _, K = reads.shape
    reads, writes, g = (x.flatten(0, 1) for x in (reads, writes, g))
    scores, total = reads.new_zeros(n * H, 2 * C, 2 * C), reads.new_empty(n * H, K)
    read, write = torch.empty_like(reads), torch.empty_like(writes)
    for part in _slices(g):
        r, w = reads[part], writes[part]
        *levels, (start, end) = _levels(g[part])
        _diagonal(scores[part]).copy_((r[:, :, :1] * w).sum(-1))
        for i, level in enumerate(levels):
            rows, columns = _decayed_pairs(r, w, *level, 2**i)
            _corners(scores[part], 2 * 2**i).copy_(rows.flatten(2, 3) @ columns.flatten(2, 3).mT)
        torch.mul(r, start, out=read[part])
        torch.mul(w, end, out=write[part])
        total[part] = start[:, -1, 0]
    return scores.unflatten(0, (n, H)), read.view(n, H, -1, K), write.view(n, H, -1, K), total.view(n, H, K, 1)


def decayed_backward(
    reads: Tensor,
    writes: Tensor,
    g: Tensor,
    d_scores: Tensor,
    ends: tuple[Tensor, Tensor, Tensor],
    d_ends: tuple[Tensor, Tensor, Tensor],
) -> Tensor:
    """The gradient of g, from those of what `decayed` gave; those of reads and writes replace those in d_ends.

    Every decay is a product, so that the gradient of its logarithm is its own times itself, and what comes for the
    logarithm of a block of steps is passed on to its parts as it is: there are only sums.

    Args:
        reads, writes, g: as given to it.
        d_scores: of the scores; what stands at steps to come is not looked at.
        ends, d_ends: what it gave for the chunk's ends, (read, write, total), and their gradients.
    """
    shape, K = g.shape, g.shape[-1]
    reads, writes, g, d_scores = (x.flatten(0, 1) for x in (reads, writes, g, d_scores))
    (read, write), (d_reads, d_writes) = ((x.view_as(reads) for x in pair[:2]) for pair in (ends, d_ends))
    d_total, d_g = (ends[2] * d_ends[2]).view(-1, K), torch.empty_like(g)
    for part in _slices(g):
        r, w, d_r, d_w = reads[part], writes[part], d_reads[part], d_writes[part]
        *levels, (start, end) = _levels(g[part])
        d_start, d_end = d_r * read[part], d_w * write[part]  # of the logarithms
        d_start[:, -1, 0] += d_total[part]
        d_r.mul_(start)
        d_w.mul_(end)
        for level, (start, end) in reversed(list(enumerate(levels))):
            size = 2**level
            (d_start_left, d_start_right), (d_end_left, _) = _blocks(d_start, size), _blocks(d_end, size)
            d_start_left[..., -1, 0, :] += d_start_right.sum((-3, -2))
            d_start_right[..., -1, 0, :] += d_end_left.sum((-3, -2))
            rows, columns = _decayed_pairs(r, w, start, end, size)
            d_corners = _corners(d_scores[part], 2 * size)
            d_rows = (d_corners @ columns.flatten(2, 3)).view_as(rows)
            d_columns = (d_corners.mT @ rows.flatten(2, 3)).view_as(columns)
            d_start_right.addcmul_(d_rows, rows)
            d_end_left.addcmul_(d_columns, columns)
            _blocks(d_r, size)[1].addcmul_(d_rows, _blocks(start, size)[1])
            _blocks(d_w, size)[0].addcmul_(d_columns, _blocks(end, size)[0])
        d_diagonal = _diagonal(d_scores[part]).unsqueeze(-1)
        d_r[:, :, 0].add_((d_diagonal * w).sum(2))
        d_w.addcmul_(d_diagonal, r[:, :, :1])
        d_g[part] = d_start[:, :, 0]
    return d_g.view(shape)


def _slices(g: Tensor) -> list[slice]:
    """Parts of (heads, C, K) that stay in a CPU's cache from one level to the next: a third less time in all."""
    n = len(g)
    if g.device.type != "cpu" or torch.compiler.is_compiling():
        return [slice(0, n)]
    step = max(1, SLICE // g[0].numel())
    return [slice(i, min(i + step, n)) for i in range(0, n, step)]


def _levels(g: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Decays inside blocks of 1, 2, 4, ..., C steps: since the block's start, with the step's own (for q) and without
    (for a), (heads, C, 2, K); and until the block's end, (heads, C, 1, K)."""
    start, end = g.new_ones(*g.shape[:2], 2, g.shape[2]), torch.ones_like(g).unsqueeze(2)
    start[:, :, 0] = g.exp()
    levels = [(start, end)]
    while (size := 2 ** (len(levels) - 1)) < g.shape[1]:
        start, end = (x.clone() for x in levels[-1])
        left, right = _blocks(start, size)
        _blocks(end, size)[0].mul_(right[..., -1:, :1, :])
        right.mul_(left[..., -1:, :1, :])
        levels.append((start, end))
    return levels


def _decayed_pairs(r: Tensor, w: Tensor, start: Tensor, end: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Reads of right blocks since their start, writes of left ones until their end, (heads, pairs, size, 2, K)."""
    return _blocks(r, size)[1] * _blocks(start, size)[1], _blocks(w, size)[0] * _blocks(end, size)[0]


def _blocks(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """(heads, C, ., K) -> left and right block of each pair of blocks of `size` steps, (heads, pairs, size, ., K)."""
    left, right = x.unflatten(1, (-1, 2, size)).unbind(2)
    return left, right


def _corners(scores: Tensor, size: int) -> Tensor:
    """(heads, 2 C, 2 C) -> rows of right blocks of `size` by columns of the left ones, (heads, pairs, size, size)."""
    cut = scores.unflatten(2, (-1, 2, size)).unflatten(1, (-1, 2, size))
    return cut[:, :, 1, :, :, 0].diagonal(dim1=1, dim2=3).movedim(-1, 1)


def _diagonal(scores: Tensor) -> Tensor:
    """(heads, 2 C, 2 C) -> what q_i reads of k_i and b_i, with no decay between, (heads, C, 2)."""
    size = scores.shape[1] // 2
    return scores.view(-1, size, 2, size, 2)[:, :, 0].diagonal(dim1=1, dim2=2).mT
