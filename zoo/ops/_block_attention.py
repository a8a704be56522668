"""Softmax attention to a few blocks of keys, which each query chooses by the blocks' means.

Keys lie in blocks of `block_size` steps, counted from the start of their document.

Shape legend: as of `zoo.ops.attention`; M blocks, W width of a block's mean.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from zoo.core.errors import UsageError, unknown
from zoo.ops import common
from zoo.ops.attention_forms import SCORES_LIMIT, rows_times
from zoo.ops.choices import choose, chosen_rows
from zoo.ops.common import blank, log_form, state_dtype, valid_steps
from zoo.ops.derivatives import TRANSFORMED, traced, transformed
from zoo.ops.kv_cache import INITIAL_CAPACITY, KVCache, append, first_cache, in_order_of_time
from zoo.states import document_positions, grow

OP = "block_attention"
BACKENDS = ("auto", "reference", "chunked")
LEGEND = (
    "q (B, T, H, K); k (B, T, G, K) and v (B, T, G, V) with G dividing H; gates (B, T, H, 3), without a window (B, T, "
    "H, 2); lengths (B,) whole numbers; resets (B, T) bool; state BlockCache of k (B, N, G, K), v (B, N, G, V), means "
    "(B, M, G, K), with gates (B, M, G, K + V), length (B,)."
)


class BlockCache(NamedTuple):
    """The keys and values of the current document, and the means of its blocks.

    Attributes:
        k: (B, N, G, K), unwritten rows zero.
        v: (B, N, G, V), likewise.
        means: (B, M, G, W), float32 at least: of each block the sum of its keys so far / block_size, and of its values
            in the last V channels where they are compressed too.
        length: (B,) int64, steps of the current document so far.
    """

    k: Tensor
    v: Tensor
    means: Tensor
    length: Tensor

    @classmethod
    def empty(
        cls,
        batch_size: int,
        n_groups: int,
        width: int,
        mean_width: int,
        block_size: int,
        capacity: int | None = None,
        *,
        device=None,
        dtype=None,
    ) -> BlockCache:
        """No steps, with room for `capacity` (256 where not given)."""
        rows = max(INITIAL_CAPACITY if capacity is None else capacity, 1)
        k, v = (torch.zeros(batch_size, rows, n_groups, width, device=device, dtype=dtype) for _ in range(2))
        shape = batch_size, -(-rows // block_size), n_groups, mean_width
        means = torch.zeros(shape, device=device, dtype=state_dtype(k))
        return cls(k, v, means, torch.zeros(batch_size, dtype=torch.int64, device=device))

    def canonical(self) -> BlockCache:
        """Trimmed to the longest row."""
        k, v, length = in_order_of_time(KVCache(self.k, self.v, self.length))
        written = self.means.flatten(2).any(-1).any(0).nonzero()
        return BlockCache(k, v, self.means[:, : int(written.max()) + 1 if len(written) else 0], length)


class Blocks(NamedTuple):
    """Where blocks, queries and keys stand: numbers of keys, which lie in order of time, those of the state first.

    Attributes:
        start: (B or 1, M), first key of each block; S for blocks that are not there.
        block: (B or 1, S), block of each key; None where blocks lie side by side from the first key on.
        last: (B or 1, T), each query's own key.
        own: (B or 1, T), first key of each query's own block.
        document: (B or 1, T), first key of each query's document.
    """

    start: Tensor
    block: Tensor | None
    last: Tensor
    own: Tensor
    document: Tensor


class Choice(NamedTuple):
    """How queries choose and read: `n_blocks` blocks of `block_size` keys, a window, and the factor on q . k."""

    block_size: int
    n_blocks: int
    window: int | None
    scale: float


@common.without_autocast
def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: BlockCache | None = None,
    *,
    block_size: int,
    n_blocks: int,
    gates: Tensor | None = None,
    window: int | None = None,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    scale: float | None = None,
    chunk_size: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, BlockCache]:
    """Causal softmax attention of each query to `n_blocks` blocks of keys, its own among them.

    Without gates (MoBA, Lu et al. 2025, arXiv 2502.13189) each head chooses for itself: its query's own block, in which
    it sees the keys up to its own, and of the blocks before it those with the largest q . mean(k).

    With gates (NSA, Yuan et al. 2025, arXiv 2502.11089; means in place of learned compression, and the same keys for
    all branches, as in flash-linear-attention) the result is the sum of three branches, each times its gate:
    1. compressed: attention to the means of the keys and values of all blocks that end at the query or before it;
    2. chosen: attention to the keys of n_blocks blocks. The heads of a group choose together: first the query's own
       block, the one before, and the document's first; then those with the largest mean weight in branch 1;
    3. window: attention to the last `window` keys; left out where that is None.

    Of equals the latest block is chosen. The choice passes no gradient.

    Args:
        q: (B, T, H, K).
        k: (B, T, G, K), G dividing H.
        v: (B, T, G, V).
        state: cache of the steps before; None for none. Consumed: written in place where no gradient is needed.
        block_size: keys of a block; blocks are counted from the start of each document.
        n_blocks: blocks that a query attends to.
        gates: (B, T, H, 3), of the compressed, the chosen and the window's branch; without a window (B, T, H, 2).
        window: a query sees itself and the window - 1 keys before it.
        lengths: (B,) valid steps of a right-padded batch; nothing sees the later ones, whose outputs are zero.
        resets: (B, T) bool, true where a packed document starts; a step sees its own document only.
        scale: K ** -0.5 by default.
        chunk_size: queries a block of the chunked form; by default at most 128.
        backend: "reference" forms all T x S scores. "chunked" goes through blocks of queries and recomputes them in
            the backward pass: memory linear in T. "auto" takes blocks where there are many scores. Single steps copy
            the keys of their chosen blocks out of the state, and read no others; longer pieces do so where that is less
            work.
    Returns:
        o (B, T, H, V) and the next state.
    Raises:
        UsageError: shapes or options that do not go together.
    """
    lengths = _check(q, k, v, state, block_size, n_blocks, gates, window, lengths, resets, chunk_size, backend)
    T, G = q.shape[1], k.shape[2]
    choice = Choice(block_size, n_blocks, window, q.shape[-1] ** -0.5 if scale is None else scale)
    padding = None if lengths is None else ~valid_steps(lengths, T)
    if padding is not None:
        q, k, v = (blank(x, padding) for x in (q, k, v))
        gates = None if gates is None else blank(gates, padding)
    if state is not None:  # what the cache rounds is rounded in this pass too
        k, v = (x.to(state.k.dtype).to(q.dtype) for x in (k, v))
    averaged = (k if gates is None else torch.cat([k, v], -1)).to(state_dtype(q)) / block_size
    grouped = q.unflatten(2, (G, -1)), None if gates is None else gates.unflatten(2, (G, -1))
    if state is not None and T == 1:
        after = _append(state, k, v, averaged, block_size, lengths, resets)
        o = _single(*grouped, after, choice)
    else:
        o = _piece(*grouped, k, v, averaged, state, choice, resets, chunk_size, backend)
        after = _append(state, k, v, averaged, block_size, lengths, resets)
    o = o.flatten(2, 3)
    return (o if padding is None else blank(o, padding)), after


# ---- the state


def _append(
    state: BlockCache | None,
    k: Tensor,
    v: Tensor,
    averaged: Tensor,
    block_size: int,
    lengths: Tensor | None,
    resets: Tensor | None,
) -> BlockCache:
    """The state (consumed) after T steps more."""
    B, T, G, W = averaged.shape
    if state is None:
        kv = first_cache(KVCache, k, v, lengths=lengths, resets=resets)
        before, means = torch.zeros_like(kv.length), averaged.new_zeros(B, 0, G, W)
    else:
        before, means = state.length, state.means
        kv = append(KVCache(state.k, state.v, before), k, v, lengths=lengths, resets=resets)
    means = grow(means, -(-kv.k.shape[1] // block_size))
    # steps of the row's last document go into its blocks
    place = document_positions(before, T, resets) // block_size
    end = torch.full_like(before, T) if lengths is None else lengths
    first, t = (end - kv.length)[:, None], torch.arange(T, device=k.device)
    share = blank(averaged, ~((t >= first) & (t < end[:, None])))
    restarted = (first >= 0).view(B, 1, 1, 1)
    index = torch.arange(B, device=k.device)[:, None], place.clamp(max=means.shape[1] - 1)
    if means.requires_grad or transformed() or (torch.is_grad_enabled() and share.requires_grad):
        means = means.masked_fill(restarted, 0).index_put(index, share, accumulate=True)
    else:
        means = means.masked_fill_(restarted, 0).index_put_(index, share, accumulate=True)
    return BlockCache(kv.k, kv.v, means, kv.length)


def _in_order(past: Tensor, n_past: int, new: Tensor, before: Tensor) -> Tensor:
    """The written steps of a state (B, N, ...) and the new ones (B, T, ...) without a gap: (B, n_past + T, ...)."""
    both = torch.cat([past[:, :n_past].to(new.dtype), new], 1)
    if not traced() and bool((before == n_past).all()):
        return both
    at, length = torch.arange(both.shape[1], device=new.device), before[:, None]
    index = torch.where(at < length, at, at - length + n_past).clamp(max=both.shape[1] - 1)
    return both[torch.arange(len(new), device=new.device)[:, None], index]


# ---- where blocks are


def _blocks(before: Tensor, n_past: int, n_steps: int, block_size: int, resets: Tensor | None) -> Blocks:
    """The blocks of n_past + n_steps keys; `before` (B or 1,) of them come before the new ones."""
    S, device = n_past + n_steps, before.device
    keys = torch.arange(S, device=device)
    last = before[:, None] + keys[:n_steps]
    if resets is None:
        start = torch.arange(0, S, block_size, device=device)[None]
        return Blocks(start, None, last, last - last % block_size, torch.zeros_like(last))
    last = last.expand(len(resets), -1)
    positions = document_positions(before, n_steps, resets)
    starts = (keys % block_size == 0) & (keys < before[:, None])
    starts = starts.expand(len(resets), -1).scatter(1, last, positions % block_size == 0)
    block = starts.cumsum(1) - 1
    n = S if traced() else int(block.max()) + 1
    start = torch.full((len(resets), n), S, device=device)
    start = start.scatter_reduce(1, block, keys.expand_as(block), "amin")
    return Blocks(start, block, last, last - positions % block_size, last - positions)


def _candidates(blocks: Blocks, queries: slice, n: int, size: int, compressed: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Of the first n blocks, (B or 1, C, n) each: those that end before a query or at it, those that it may choose, and
    those that it always does."""
    start = blocks.start[:, None, :n]
    last, own, document = (x[:, queries, None] for x in (blocks.last, blocks.own, blocks.document))
    within = start >= document
    ended = within & (start + size - 1 <= last)
    if not compressed:
        mine = start == own
        return ended, (within & (start < own)) | mine, mine
    always = within & ((start == own) | (start == own - size) | (start == document))
    return ended, ended | always, always


# ---- attention


def _routed(
    q: Tensor, gates: Tensor | None, means: Tensor, blocks: Blocks, queries: slice, choice: Choice
) -> tuple[Tensor, Tensor]:
    """Which blocks are chosen, (B, G, C, R or 1, n), by queries q (B, G, C, R, K) of n means (B, G, n, W), and what the
    gated compressed branch gives, (B, G, C, R, V), or zero."""
    K, n = q.shape[-1], means.shape[2]
    places = _candidates(blocks, queries, n, choice.block_size, gates is not None)
    ended, seen, always = (x[:, None, :, None] for x in places)
    q = q.to(means.dtype)
    if gates is None:
        if n <= choice.n_blocks:
            return seen.expand(len(q), q.shape[1], -1, q.shape[3], -1), q.new_zeros(())
        return choose(rows_times(q.detach(), means[..., :K].detach().mT), seen, choice.n_blocks, always), q.new_zeros(
            ()
        )
    none = ~ended.any(-1, keepdim=True)
    scores = rows_times(q, means[..., :K].mT) * choice.scale
    p = scores.masked_fill(~(ended | none), -torch.inf).softmax(-1).masked_fill(none, 0)
    compressed = rows_times(p, means[..., K:]) * gates[..., :1]
    if n <= choice.n_blocks:
        return seen.expand(len(q), q.shape[1], -1, -1, -1), compressed
    return choose(p.detach().mean(3, keepdim=True), seen, choice.n_blocks, always), compressed


def _block(
    q: Tensor,
    gates: Tensor | None,
    k: Tensor,
    v: Tensor,
    means: Tensor,
    blocks: Blocks,
    queries: slice,
    near: int,
    choice: Choice,
) -> Tensor:
    """Queries q (B, G, C, R, K) against all keys (B, G, S, K), those that are not chosen masked: (B, G, C, R, V).

    `near` is the first key that a window may reach.
    """
    chosen, o = _routed(q, gates, means, blocks, queries, choice)
    S, dtype = k.shape[2], means.dtype
    if blocks.block is None:
        chosen = chosen.repeat_interleave(choice.block_size, -1)[..., :S]
    else:
        at = blocks.block[:, None, None, None, :S]
        chosen = chosen.expand(len(at), -1, -1, -1, -1).gather(-1, at.expand(*chosen.shape[:-1], -1))
    keys, last = torch.arange(S, device=q.device), blocks.last[:, None, queries, None, None]
    logits = rows_times(q, k.mT).to(dtype) * choice.scale
    p = logits.masked_fill(~(chosen & (keys <= last)), -torch.inf).softmax(-1)
    o_chosen = rows_times(p.to(v.dtype), v)
    if gates is None:
        return o_chosen
    o = o + o_chosen * gates[..., 1:2]
    if choice.window is not None:
        keys, first = keys[near:], blocks.document[:, None, queries, None, None]
        seen = (keys <= last) & (keys > last - choice.window) & (keys >= first)
        p = logits[..., near:].masked_fill(~seen, -torch.inf).softmax(-1)
        o = o + rows_times(p.to(v.dtype), v[:, :, near:]) * gates[..., 2:]
    return o.to(v.dtype)


def _block_by_rows(
    q: Tensor,
    gates: Tensor | None,
    k: Tensor,
    v: Tensor,
    means: Tensor,
    blocks: Blocks,
    queries: slice,
    choice: Choice,
) -> Tensor:
    """As `_block`, k and v (B, S, G, K): the keys of chosen blocks are copied out, and no others are read."""
    chosen, o = _routed(q, gates, means, blocks, queries, choice)
    n, G = min(choice.n_blocks, means.shape[2]), q.shape[1]
    number, count = chosen_rows(chosen, n)  # (B, G, C, R or 1, n)
    start = blocks.start[:, None, None, None].expand(*number.shape[:-1], -1).gather(-1, number)
    index = start[..., None] + torch.arange(choice.block_size, device=q.device)
    last = blocks.last[:, None, queries, None, None]
    there = torch.arange(n, device=q.device) < count[..., None]
    seen = (there[..., None] & (index <= last[..., None])).flatten(-2)
    groups = torch.arange(G, device=q.device)[:, None, None, None]
    o_chosen = _to_copies(q, k, v, index.flatten(-2), seen, groups, choice.scale, means.dtype)
    if gates is None:
        return o_chosen
    o = o + o_chosen * gates[..., 1:2]
    if choice.window is not None:
        index = last - torch.arange(min(choice.window, k.shape[1]), device=q.device)
        seen = index >= blocks.document[:, None, queries, None, None]
        index, seen = (x.expand(len(q), G, -1, -1, -1) for x in (index, seen))
        o = o + _to_copies(q, k, v, index, seen, groups, choice.scale, means.dtype) * gates[..., 2:]
    return o.to(v.dtype)


def _to_copies(q, k, v, index, seen, groups, scale, dtype) -> Tensor:
    """q (B, G, C, R, K) to the keys (B, S, G, K) of numbers `index` (B, G, C, R or 1, L) that are `seen`."""
    rows = torch.arange(len(q), device=q.device)[:, None, None, None, None]
    flat = (rows * k.shape[1] + index.clamp(0, k.shape[1] - 1)) * k.shape[2] + groups
    k, v = (x.flatten(0, 2).index_select(0, flat.flatten()).view(*flat.shape, -1).to(q.dtype) for x in (k, v))
    q = q.unsqueeze(4 if index.shape[3] > 1 or q.shape[3] == 1 else 3)  # (B, G, C, R, 1, K) or (B, G, C, 1, R, K)
    logits = (q @ k.mT).to(dtype) * scale
    p = logits.masked_fill(~seen.unsqueeze(4), -torch.inf).softmax(-1)
    return (p.to(v.dtype) @ v).flatten(3, 4)


def _single(q: Tensor, gates: Tensor | None, cache: BlockCache, choice: Choice) -> Tensor:
    """One query a row, (B, 1, G, R, K), against a cache that holds its own key already."""
    k, v, means, length = cache
    length = length.clamp(min=1)  # an empty row of the batch sees one zero key instead of none
    if not traced():
        most = int(length.max())
        means = means[:, : -(-most // choice.block_size)]
    start = torch.arange(means.shape[1], device=q.device)[None] * choice.block_size
    last = length[:, None] - 1
    blocks = Blocks(start, None, last, last - last % choice.block_size, torch.zeros_like(last))
    q, means, gates = q.movedim(1, 2), means.movedim(1, 2), None if gates is None else gates.movedim(1, 2)
    log_form(OP, "rows")
    return _block_by_rows(q, gates, k, v, means, blocks, slice(None), choice).to(q.dtype).movedim(2, 1)


def _rows_from(learns: bool, gated: bool, R: int) -> int:
    """How many times longer than what a query reads a row is, at least, where blocks are copied for each query.

    Measured in training: at 21 `nsa` takes 0.83 of the time that all scores take, `moba` at 32 as long. Without
    gradients: `moba`, whose heads copy keys of their own, as long at 32, four times as long at 8; `nsa`, with 4 heads a
    group that share a copy, 0.97 of the time at 11 and 0.6 at 16.
    """
    if learns:
        return 24
    return max(32 // R, 4) if gated else 32


def _piece(
    q: Tensor,
    gates: Tensor | None,
    k: Tensor,
    v: Tensor,
    averaged: Tensor,
    state: BlockCache | None,
    choice: Choice,
    resets: Tensor | None,
    chunk_size: int | None,
    backend: str,
) -> Tensor:
    """T queries (B, T, G, R, K) against the state (left as it is) and the new keys: (B, T, G, R, V)."""
    B, T, G, R, K = q.shape
    size, n_past, least, past = choice.block_size, 0, 0, None
    before = torch.zeros(1, dtype=torch.int64, device=q.device)
    if state is not None:
        n_past = state.k.shape[1]
        if not traced():
            least, n_past = (min(int(n), n_past) for n in state.length.aminmax())
        if n_past:
            before, past = state.length, state
            k, v = (_in_order(old, n_past, new, before) for old, new in ((past.k, k), (past.v, v)))
    S = n_past + T
    blocks = _blocks(before, n_past, T, size, resets)
    means = _means(averaged, past, before, blocks, size)
    form = backend
    if transformed() and form == "chunked":
        raise UsageError(f"{OP}: backend='chunked' does not serve {TRANSFORMED}.")
    if form == "auto":
        form = "reference" if transformed() or B * T * S * G * R <= SCORES_LIMIT else "chunked"
    learns = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, gates, k, v))
    read = choice.n_blocks * size + (choice.window or 0)
    by_rows = form == "chunked" and _rows_from(learns, gates is not None, R) * read < S
    log_form(OP, "rows" if by_rows else form)
    q, means, gates = q.movedim(1, 2), means.movedim(1, 2), None if gates is None else gates.movedim(1, 2)
    if not by_rows:
        k, v = (x.transpose(1, 2).contiguous() for x in (k, v))
    step = T if form == "reference" else chunk_size or max(min(SCORES_LIMIT // (B * S * G * R), 128), 16)
    if by_rows and chunk_size is None:
        step = max(min(SCORES_LIMIT // (B * G * R * read * K), step), 1)
    outputs = []
    for a in range(0, T, step):
        queries, hi = slice(a, min(a + step, T)), n_past + min(a + step, T)
        n = means.shape[2] if resets is not None else -(-hi // size)
        own = q[:, :, queries], None if gates is None else gates[:, :, queries]
        if by_rows:
            parts: Any = (_block_by_rows, *own, k, v, means[:, :, :n], blocks, queries, choice)
        else:
            near = 0 if choice.window is None else max(least + a - choice.window + 1, 0)
            parts = (_block, *own, k[:, :, :hi], v[:, :, :hi], means[:, :, :n], blocks, queries, near, choice)
        outputs.append(checkpoint(*parts, use_reentrant=False) if learns and step < T else parts[0](*parts[1:]))
    return torch.cat(outputs, 2).to(q.dtype).movedim(2, 1)


def _means(averaged: Tensor, past: BlockCache | None, before: Tensor, blocks: Blocks, size: int) -> Tensor:
    """The means of all blocks, (B, M, G, W); those of blocks that have not ended are less."""
    (B, T), n = averaged.shape[:2], blocks.start.shape[1]
    if past is None and blocks.block is None:
        return F.pad(averaged, (0, 0, 0, 0, 0, n * size - T)).unflatten(1, (n, size)).sum(2)
    means = averaged.new_zeros(B, 0, *averaged.shape[2:]) if past is None else past.means[:, :n].to(averaged.dtype)
    means = grow(means, n)
    place = blocks.last // size if blocks.block is None else blocks.block.gather(1, blocks.last)
    rows = torch.arange(B, device=averaged.device)[:, None]
    return means.index_put((rows, place.expand(B, -1)), averaged, accumulate=True)


def _check(q, k, v, state, block_size, n_blocks, gates, window, lengths, resets, chunk_size, backend) -> Tensor | None:
    """The lengths as int64 from 0 to T, once everything fits together."""
    if not (q.ndim == k.ndim == v.ndim == 4) or 0 in (*q.shape, *k.shape, *v.shape) or q.shape[2] % k.shape[2]:
        shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)}"
        raise UsageError(f"{OP}: {shapes} do not go together. Shapes: {LEGEND}")
    (B, T, H, K), (G, V) = q.shape, v.shape[2:]
    common.check(OP, LEGEND, "k", k, q, (B, T, G, K))
    common.check(OP, LEGEND, "v", v, q, (B, T, G, V))
    common.check(OP, LEGEND, "gates", gates, q, (B, T, H, 2 if window is None else 3))
    lengths = common.check_packing(OP, LEGEND, q, lengths, resets)
    if not q.is_floating_point() or k.dtype != q.dtype or v.dtype != q.dtype:
        raise UsageError(f"{OP}: q, k, v are {q.dtype}, {k.dtype}, {v.dtype}, expected one floating-point dtype.")
    options = {"block_size": block_size, "n_blocks": n_blocks, "window": window, "chunk_size": chunk_size}
    for name, value in options.items():
        absent = value is None and name in ("window", "chunk_size")
        if not absent and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise UsageError(f"{OP}: {name}={value!r} is not allowed: it should be a whole number from 1.")
    if window is not None and gates is None:
        raise UsageError(f"{OP}: window={window} belongs to gates, which are not given.")
    if backend not in BACKENDS:
        raise unknown("backend", backend, BACKENDS)
    if state is not None:
        N = state.k.shape[1]
        common.check(OP, LEGEND, "state.k", state.k, q, (B, N, G, K))
        common.check(OP, LEGEND, "state.v", state.v, q, (B, N, G, V))
        means = (B, state.means.shape[1], G, K if gates is None else K + V)
        common.check(OP, LEGEND, "state.means", state.means, q, means)
        common.check_counts(OP, LEGEND, state.length, q)
    return lengths
