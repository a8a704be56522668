"""Latent attention to a few chosen steps: an indexer scores every step, and each query attends to its best.

The score of step s for query t is I_ts = sum_j w_tj relu(q_tj . k_s), with few small heads j and one key a step. All
heads of the attention share the choice.

Shape legend: as of `zoo.ops.latent_attention`; J heads of the indexer, E width of its keys.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from zoo.core.errors import UsageError, unknown
from zoo.ops import common
from zoo.ops._latent_attention import (
    ROWS_A_THREAD,
    LatentCache,
    cheaper_absorbed,
    check_latents,
    decode_latents,
    keys_and_values,
    per_group,
)
from zoo.ops.attention_forms import SCORES_LIMIT, Settings, decode
from zoo.ops.choices import choose, chosen_rows
from zoo.ops.common import blank, log_form, state_dtype, valid_steps
from zoo.ops.derivatives import TRANSFORMED, gradients_of, once, traced, transformed
from zoo.ops.kernel import Kernel
from zoo.ops.kv_cache import INITIAL_CAPACITY, KVCache, append, first_cache, in_order_of_time
from zoo.ops.visibility import Visibility, visibility_of

KERNEL = Kernel("index_scores")
BACKENDS = ("auto", "reference", "chunked")
LEGEND = (
    "q (B, T, H, N + P); latent (B, T, r); key (B, T, P); expand (G, N + V, r) with G dividing H; index of q "
    "(B, T, J, E), key (B, T, E), weight (B, T, J); lengths (B,) whole numbers; resets (B, T) bool; state "
    "SparseLatentCache of kv (B, rows, r + P), index_key (B, rows, E), length (B,), or LatentCache with a choice."
)


class SparseLatentCache(NamedTuple):
    """What `LatentCache` holds, and the indexer's keys.

    Attributes:
        kv: (B, rows, r + P), latent before key, unwritten rows zero.
        index_key: (B, rows, E), likewise.
        length: (B,) int64, steps of the current document so far.
    """

    kv: Tensor
    index_key: Tensor
    length: Tensor

    @classmethod
    def empty(
        cls, batch_size: int, width: int, index_width: int, capacity: int | None = None, *, device=None, dtype=None
    ) -> SparseLatentCache:
        """No steps, with room for `capacity` (256 where not given); widths are r + P and E."""
        rows = max(INITIAL_CAPACITY if capacity is None else capacity, 1)
        kv, index_key = (torch.zeros(batch_size, rows, n, device=device, dtype=dtype) for n in (width, index_width))
        return cls(kv, index_key, torch.zeros(batch_size, dtype=torch.int64, device=device))

    def canonical(self) -> SparseLatentCache:
        """Trimmed to the longest row."""
        return in_order_of_time(self)


class SparseIndex(NamedTuple):
    """The indexer's projections of T steps: q (B, T, J, E), key (B, T, E), weight (B, T, J)."""

    q: Tensor
    key: Tensor
    weight: Tensor


class SparseChoice(NamedTuple):
    """What a call chose by, for others over the same steps that attend to the same ones.

    Attributes:
        top_k: how many steps a query attends to.
        by: of a piece the indexer's projections, constants, with the keys of all steps that a query could see.
        rows: (B, 1, M), of a single step the rows of the cache that were chosen; None for all of them.
        n_rows: (B, 1), how many of `rows` they are.
    """

    top_k: int | None
    by: SparseIndex | None = None
    rows: Tensor | None = None
    n_rows: Tensor | None = None


@common.without_autocast
def sparse_latent_attention(
    q: Tensor,
    latent: Tensor,
    key: Tensor,
    expand: Tensor,
    index: SparseIndex | SparseChoice | None,
    state: SparseLatentCache | LatentCache | None = None,
    *,
    top_k: int | None,
    align: bool = False,
    causal: bool = True,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    scale: float | None = None,
    absorb: bool | None = None,
    chunk_size: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, SparseLatentCache | LatentCache | tuple[()], Tensor | None, SparseChoice]:
    """`latent_attention` of each query t to the top_k steps of largest I_ts that it sees, among equals the latest.

    The choice passes no gradient: the indexer learns by the divergence, and by nothing else.

    Args:
        q, latent, key, expand, causal, lengths, resets, scale, absorb: as of `latent_attention`.
        index: what is chosen by; or the choice of another call over the same steps, with as many of them before, which
            chose `top_k` too; or None for the latest `top_k` steps. With either of these the state is a `LatentCache`,
            and `align` is not offered.
        state: cache of the steps before; None for none. Consumed: written in place where no gradient is needed.
        top_k: how many steps; a query that sees no more attends to all, and with None every one does.
        align: also give KL(p_t || softmax I_t) of every query, over the steps it attends to, with p_t the mean of its
            heads' attention, as a constant.
        chunk_size: queries a block; by default at most 128, fewer where all scores of a block would be too many.
        backend: "reference" forms all T x S scores. "chunked" goes through blocks of queries and recomputes them in
            the backward pass: memory linear in T. "auto" takes blocks where there are many scores. Single steps
            without `align` copy their chosen rows of the state in all forms, and read no others but the indexer's
            keys; longer pieces without gradients do so where that is less work. Under "auto" a single step scores and
            attends by compiled kernels where there are some.
    Returns:
        o (B, T, H, V), the next state, the divergence (B, T), zero in the padding (None without `align`), and the
        choice, for calls that follow it.
    Raises:
        UsageError: shapes or options that do not go together.
    """
    given = index if isinstance(index, SparseChoice) else None
    lengths = _check(q, latent, key, expand, index, state, top_k, align, causal, lengths, resets, chunk_size, backend)
    T, width, N = q.shape[1], q.shape[-1], q.shape[-1] - key.shape[-1]
    settings = Settings(width**-0.5 if scale is None else scale, None, None, chunk_size, backend)
    kv = torch.cat([latent, key], -1)
    padding = None if lengths is None else ~valid_steps(lengths, T)
    if padding is not None:
        q, kv = blank(q, padding), blank(kv, padding)
    if padding is not None and isinstance(index, SparseIndex):
        index = SparseIndex._make(blank(x, padding) for x in index)
    if state is not None:  # what the cache rounds is rounded in this pass too
        kv = kv.to(state.kv.dtype).to(q.dtype)
    if isinstance(state, SparseLatentCache) and isinstance(index, SparseIndex):
        index = index._replace(key=index.key.to(state.index_key.dtype).to(index.key.dtype))
    new = (kv, index.key) if isinstance(index, SparseIndex) else (kv,)
    after: Any = None
    divergence = None
    single = state is not None and T == 1 and not align
    if state is not None and (single if given is None else given.by is None):
        after = append(state, *new, lengths=lengths, resets=resets)
        choice = index if isinstance(index, SparseChoice) else _chosen(index, after, top_k, settings)
        o = _single(q, choice, after, expand, N, absorb, settings)
    else:
        keys, n_past = kv, 0
        if state is not None:
            n_past = _written(state)
            keys = torch.cat([state.kv[:, :n_past].to(kv.dtype), kv], 1)
        by: Any = index.by if isinstance(index, SparseChoice) else index or _alike(q, keys.shape[1])
        if isinstance(state, SparseLatentCache):
            by = by._replace(key=torch.cat([state.index_key[:, :n_past].to(by.key.dtype), by.key], 1))
        past = None if not n_past or state is None else KVCache(state.kv, state.kv, state.length)
        visibility = visibility_of(T, past, n_past, causal, None, lengths, resets, q.device)
        reach = n_past if causal else None
        choice = given or SparseChoice(top_k, SparseIndex._make(x.detach() for x in by))
        o, divergence = _piece(q, keys, expand, N, by, visibility, reach, top_k, absorb, align, settings)
    if padding is not None:
        o, divergence = blank(o, padding), None if divergence is None else blank(divergence, padding)
    if not causal:
        return o, (), divergence, choice
    if after is None and state is None:
        kind: Any = SparseLatentCache if isinstance(index, SparseIndex) else LatentCache
        after = first_cache(kind, *new, lengths=lengths, resets=resets)
    elif after is None and state is not None:
        after = append(state, *new, lengths=lengths, resets=resets)
    return o, after, divergence, choice


# ---- the choice


def index_scores(q: Tensor, key: Tensor, weight: Tensor) -> Tensor:
    """I (B, T, S), in float32 at least, of q (B, T, J, E), key (B, S, E) and weight (B, T, J)."""
    dtype = state_dtype(q)
    each = (q.to(dtype).flatten(1, 2) @ key.to(dtype).mT).relu_().unflatten(1, q.shape[1:3])  # (B, T, J, S)
    return (weight.to(dtype).unsqueeze(2) @ each).squeeze(2)


# ---- attention to chosen steps


def _alike(q: Tensor, n_steps: int) -> SparseIndex:
    """An index that scores all steps alike, for queries (B, T, H, K): the latest are chosen."""
    B, T = q.shape[:2]
    return SparseIndex(q.new_zeros(B, T, 1, 1), q.new_zeros(B, n_steps, 1), q.new_zeros(B, T, 1))


def _chosen(index: SparseIndex | None, cache: Any, top_k: int | None, settings: Settings) -> SparseChoice:
    """The choice of one query a row, of a cache that holds its own step already."""
    most = _written(cache)
    if top_k is None or most <= top_k:
        return SparseChoice(top_k)
    seen = torch.arange(most, device=cache.kv.device) < cache.length[:, None, None]
    alike = cache.kv.new_zeros(len(cache.kv), 1, most)
    scores = alike if index is None else _cached_scores(index, cache.index_key, most, settings)
    return SparseChoice(top_k, None, *chosen_rows(choose(scores, seen, top_k), top_k))


def _single(
    q: Tensor,
    choice: SparseChoice,
    cache: SparseLatentCache | LatentCache,
    expand: Tensor,
    N: int,
    absorb: bool | None,
    settings: Settings,
) -> Tensor:
    """One query a row, against a cache that holds its own step already: (B, 1, H, V)."""
    if choice.rows is None or choice.n_rows is None:
        return _to_rows(q, cache.kv, cache.length, expand, N, absorb, settings)
    return _to_rows(q, _gathered(cache.kv, choice.rows), choice.n_rows.squeeze(1), expand, N, absorb, settings)


def _cached_scores(index: SparseIndex, key: Tensor, most: int, settings: Settings) -> Tensor:
    """`index_scores` of single queries (B, 1, J, E) and the first `most` rows of the cached keys (B, rows, E)."""
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in (key, *index))
    plain = settings.backend != "auto" or learns or torch.compiler.is_compiling()
    if plain or KERNEL.why_not(index.q, key, index.weight) is not None:
        return index_scores(index.q, key[:, :most].to(index.q.dtype), index.weight)
    log_form("sparse_latent_attention", "compiled")
    (B, rows, E), J, threads = key.shape, index.q.shape[2], torch.get_num_threads()
    parts = max(1, min(-(-threads // B), most // ROWS_A_THREAD))
    scores, (q, weight) = key.new_empty(B, 1, most), (x.contiguous() for x in (index.q, index.weight))
    KERNEL("index_scores", (q, key, weight), (scores,), B, rows, most, J, E, parts, threads)
    return scores


def _written(cache: SparseLatentCache | LatentCache) -> int:
    """Rows up to the last one written, at least; compiled code takes them all."""
    rows = cache.kv.shape[1]
    return rows if traced() else min(rows, int(cache.length.max()))


def _gathered(kv: Tensor, rows: Tensor) -> Tensor:
    """The rows (B, C, M) of kv (B, S, W), as (B C, M, W)."""
    first = torch.arange(len(kv), device=kv.device) * kv.shape[1]
    picked = kv.flatten(0, 1).index_select(0, (rows + first[:, None, None]).flatten())
    return picked.view(-1, rows.shape[-1], kv.shape[-1])


def _to_rows(
    q: Tensor, kv: Tensor, count: Tensor, expand: Tensor, N: int, absorb: bool | None, settings: Settings
) -> Tensor:
    """q (B, 1, H, N + P) to the first `count` (B,) rows of kv (B, M, r + P): (B, 1, H, V)."""
    _, both, r = expand.shape
    if absorb is False:
        k, v = keys_and_values(kv.to(q.dtype), expand, N, r)
        return decode(q, KVCache(k, v, count), settings)
    keys, values = expand.to(q.dtype).split([N, both - N], 1)
    q = torch.cat([per_group(q[..., :N], keys), q[..., N:]], -1)
    return per_group(decode_latents(q, LatentCache(kv, count), r, settings), values.mT)


def _piece(
    q: Tensor,
    kv: Tensor,
    expand: Tensor,
    N: int,
    index: SparseIndex,
    visibility: Visibility,
    n_past: int | None,
    top_k: int | None,
    absorb: bool | None,
    align: bool,
    settings: Settings,
) -> tuple[Tensor, Tensor | None]:
    """T queries against S steps, `n_past` of them before their own (None: they look ahead): o (B, T, H, V) and the
    divergence (B, T)."""
    (B, T, H, width), (S, W), (_, both, r) = q.shape, kv.shape[1:], expand.shape
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in (q, kv, expand, *index))
    top_k = None if top_k is None or top_k >= S else top_k
    scored = max(H, index.q.shape[2]) if top_k is not None or align else H
    form = settings.backend
    if transformed() and form == "chunked":
        raise UsageError(f"sparse_latent_attention: backend='chunked' does not serve {TRANSFORMED}.")
    if form == "auto":
        form = "reference" if transformed() or B * T * S * scored <= SCORES_LIMIT else "chunked"
    log_form("sparse_latent_attention", form)
    size = T if form == "reference" else settings.chunk_size or max(min(SCORES_LIMIT // (B * S * scored), 128), 16)
    blocks = []
    for a in range(0, T, size):
        b = min(a + size, T)
        blocks.append((slice(a, b), slice(S if n_past is None else n_past + b)))
    less_work = top_k is not None and top_k * (r + W) < S * (width + both - N) // 4
    if form == "chunked" and top_k is not None and less_work and not (learns or align):
        return _piece_by_rows(q, kv, expand, N, index, visibility, blocks, top_k, absorb, settings), None
    if absorb is None:
        absorb = cheaper_absorbed(T, H, expand, N, kv if S > T else None)
    if absorb:
        keys, values = expand.to(q.dtype).split([N, both - N], 1)
        q = torch.cat([per_group(q[..., :N], keys), q[..., N:]], -1)
        k, v = kv.unsqueeze(1), kv[..., :r].unsqueeze(1)
    else:
        k, v = (x.transpose(1, 2).contiguous() for x in keys_and_values(kv, expand, N, r))
    # (B, G, T, R, K) and (B, G, S, K): every block is a stretch of memory, and one batched product
    q = (q * settings.scale).unflatten(2, (k.shape[1], -1)).movedim(1, 2).contiguous()
    inputs = q, k, v, *index
    if form == "reference":
        o, divergence = _block(inputs, visibility.mask(), top_k, align)
    elif torch.compiler.is_compiling():
        parts = [(_cut(inputs, *block), visibility.mask(*block), top_k, align) for block in blocks]
        outputs = [checkpoint(_block, *part, use_reentrant=False) for part in parts]
        o, divergence = torch.cat([o for o, _ in outputs], 2), torch.cat([d for _, d in outputs], 1)
    else:
        o, divergence = _Recomputed.apply(*inputs, *visibility, tuple(blocks), top_k, align)
    o = o.movedim(2, 1).flatten(2, 3)
    return per_group(o, values.mT) if absorb else o, divergence if align else None


def _block(inputs: Sequence[Tensor], seen: Tensor, top_k: int | None, align: bool) -> tuple[Tensor, Tensor]:
    """q (B, G, C, R, K) against k, v (B, G, S, ...): o (B, G, C, R, V) and the divergence (B, C), or zero."""
    q, k, v, *index = inputs
    dtype, shape, chosen, scores = state_dtype(q), q.shape[2:4], seen, None
    chooses = top_k is not None and top_k < k.shape[2]
    if chooses or align:
        scores = index_scores(*index)
    if top_k is not None and chooses and scores is not None:
        chosen = choose(scores, seen, top_k)
    logits = (q.flatten(2, 3) @ k.mT).to(dtype).unflatten(2, shape)  # (B, G, C, R, S)
    p = logits.masked_fill_(~chosen[:, None, :, None], -torch.inf).softmax(-1)
    o = (p.to(v.dtype).flatten(2, 3) @ v).unflatten(2, shape)
    if not align or scores is None:
        return o, q.new_zeros(len(q), shape[0], dtype=dtype)
    target = p.detach().mean((1, 3))
    log_share = scores.masked_fill(~chosen, -torch.inf).log_softmax(-1).masked_fill(~chosen, 0)
    return o, (torch.xlogy(target, target) - target * log_share).sum(-1)


def _places(own: slice, reach: slice) -> tuple[tuple[slice, ...], ...]:
    """Where a block's parts of q, k, v and of the index lie."""
    every = slice(None)
    return (every, every, own), (every, every, reach), (every, every, reach), (every, own), (every, reach), (every, own)


def _cut(inputs: Sequence[Tensor], own: slice, reach: slice) -> list[Tensor]:
    """A block's parts of q, k, v and of the index."""
    return [x[place] for x, place in zip(inputs, _places(own, reach), strict=True)]


def _by_blocks(q, k, v, index_q, index_key, index_weight, number, first, last, blocks, top_k, align):
    """`_Recomputed` in plain operators."""
    inputs, visibility = (q, k, v, index_q, index_key, index_weight), Visibility(number, first, last)
    parts = [_block(_cut(inputs, *block), visibility.mask(*block), top_k, align) for block in blocks]
    return torch.cat([o for o, _ in parts], 2), torch.cat([divergence for _, divergence in parts], 1)


def _recomputed_again(ctx, *d):
    plain = functools.partial(_by_blocks, blocks=ctx.blocks, top_k=ctx.top_k, align=ctx.align)
    return *gradients_of(plain, ctx.saved_tensors, d), None, None, None


class _Recomputed(torch.autograd.Function):
    """`_block` by blocks of queries, each made again in the backward pass.

    What outlives a block is allocated before the first of them, so that the memory of one serves the next.
    """

    @staticmethod
    def forward(q, k, v, index_q, index_key, index_weight, number, first, last, blocks, top_k, align):
        inputs, visibility = (q, k, v, index_q, index_key, index_weight), Visibility(number, first, last)
        o = q.new_empty(q.shape[:-1] + v.shape[-1:])
        divergence = q.new_empty(len(q), q.shape[2], dtype=state_dtype(q))
        for own, reach in blocks:
            parts = _cut(inputs, own, reach)
            o[:, :, own], divergence[:, own] = _block(parts, visibility.mask(own, reach), top_k, align)
        return o, divergence

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.blocks, ctx.top_k, ctx.align = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    @common.without_autocast
    @once(_recomputed_again)
    def backward(ctx, do, d_divergence):
        *inputs, number, first, last = ctx.saved_tensors
        visibility, outer = Visibility(number, first, last), (do, d_divergence) if ctx.align else (do,)
        n = 6 if ctx.align else 3  # without the divergence nothing reaches the index
        totals = [torch.zeros_like(x, dtype=state_dtype(x)) for x in inputs[:n]]
        for own, reach in ctx.blocks:
            places = _places(own, reach)
            parts = [part.detach().requires_grad_(i < n) for i, part in enumerate(_cut(inputs, own, reach))]
            with torch.enable_grad():
                outputs = _block(parts, visibility.mask(own, reach), ctx.top_k, ctx.align)
            weights = [g[place] for g, place in zip(outer, (places[0], places[3]), strict=False)]
            gradients = torch.autograd.grad(outputs[: len(outer)], parts[:n], weights)
            for total, place, gradient in zip(totals, places, gradients, strict=False):
                total[place] += gradient
            del parts, outputs, gradients, gradient  # before the next block is made
        found = [total.to(x.dtype) for total, x in zip(totals, inputs, strict=False)]
        return *found, *[None] * (12 - n)


def _piece_by_rows(q, kv, expand, N, index, visibility, blocks, top_k, absorb, settings) -> Tensor:
    """`_piece` with each query's own rows copied out, so that of the work only the scores grow with S."""
    outputs = []
    for own, reach in blocks:
        seen = visibility.mask(own, reach).expand(len(q), -1, -1)
        if top_k < reach.stop:
            seen = choose(index_scores(index.q[:, own], index.key[:, reach], index.weight[:, own]), seen, top_k)
        rows, count = chosen_rows(seen, min(top_k, reach.stop))
        room = max(SCORES_LIMIT // (len(q) * rows.shape[-1] * kv.shape[-1]), 1)
        parts = zip(q[:, own].split(room, 1), rows.split(room, 1), count.split(room, 1), strict=True)
        for queries, chosen, n in parts:
            alone = queries.flatten(0, 1).unsqueeze(1)
            o = _to_rows(alone, _gathered(kv, chosen), n.flatten(), expand, N, absorb, settings)
            outputs.append(o.squeeze(1).unflatten(0, queries.shape[:2]))
    return torch.cat(outputs, 1)


def _check(
    q, latent, key, expand, index, state, top_k, align, causal, lengths, resets, chunk_size, backend
) -> Tensor | None:
    """The lengths as int64 from 0 to T, once everything fits together."""
    op = "sparse_latent_attention"
    lengths = check_latents(op, LEGEND, q, latent, key, expand, state, causal, lengths, resets)
    for name, value in (("top_k", top_k), ("chunk_size", chunk_size)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise UsageError(f"{op}: {name}={value!r} is not allowed: it should be a whole number from 1.")
    if backend not in BACKENDS:
        raise unknown("backend", backend, BACKENDS)
    B, T = q.shape[:2]
    if align and not isinstance(index, SparseIndex):
        raise UsageError(f"{op}: align=True needs an index of its own.")
    if index is None:
        return lengths
    if isinstance(index, SparseChoice):
        if index.top_k != top_k:
            raise UsageError(f"{op}: top_k={top_k} follows a choice of top_k={index.top_k}: give both the same.")
        if index.by is not None:
            common.check(op, LEGEND, "index.by.q", index.by.q, q, (B, T, *index.by.q.shape[2:]))
        elif T > 1 or state is None:
            raise UsageError(f"{op}: {T} steps cannot follow the choice of a single step, which reads a state.")
        return lengths
    if index.q.ndim != 4:
        raise UsageError(f"{op}: index.q has shape {tuple(index.q.shape)}, expected four axes. Shapes: {LEGEND}")
    J, E = index.q.shape[2:]
    common.check(op, LEGEND, "index.q", index.q, q, (B, T, J, E))
    common.check(op, LEGEND, "index.key", index.key, q, (B, T, E))
    common.check(op, LEGEND, "index.weight", index.weight, q, (B, T, J))
    if state is not None:
        common.check(op, LEGEND, "state.index_key", state.index_key, q, (B, state.kv.shape[1], E))
    return lengths
