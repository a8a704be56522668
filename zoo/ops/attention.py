"""Softmax attention, o_t = sum_s softmax_s(scale q_t . k_s) v_s over the keys that step t sees, and its cache.

Whatever hides a key (causality, a window, packed documents, padding, unwritten rows of a cache), it is one rule here:
number the new steps 0 to T - 1 and the cached ones backwards from -1; query t sees the keys from first_t to last_t.

Shape legend: B batch, T new steps, S keys, H heads, G groups (dividing H; R = H / G heads share a group's k and v),
K key and V value width of a head, N rows of a cache.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.core.errors import UsageError, unknown
from zoo.ops import common
from zoo.ops.common import blank, log_form, state_dtype, valid_steps
from zoo.ops.derivatives import TRANSFORMED, batched, gradients_of, guarded, once, traced, transformed
from zoo.protocol import document_positions, grow, next_position

BACKENDS = ("auto", "reference", "chunked", "sdpa")
LEGEND = (
    "q (B, T, H, K); k (B, T, G, K) and v (B, T, G, V) with G dividing H; sinks (H,); lengths (B,) whole numbers; "
    "resets (B, T) bool; state KVCache of k (B, N, G, K), v (B, N, G, V), length (B,)."
)
INITIAL_CAPACITY = 256
MASK_LIMIT = 1 << 22  # rows x queries x keys up to which torch's kernel with an explicit mask is the faster form
SCORES_LIMIT = 1 << 22  # scores that the chunked form holds at once


class KVCache(NamedTuple):
    """The keys and values of the current document, as `attention` was given them.

    Position p lies in row p % N. A cache that is full grows, unless N is the window: then it is a ring.

    Attributes:
        k: (B, N, G, K), unwritten rows zero.
        v: (B, N, G, V), likewise.
        length: (B,) int64, steps of the current document so far, those that a window has dropped included.
    """

    k: Tensor
    v: Tensor
    length: Tensor

    def canonical(self) -> KVCache:
        """Only the stored keys, oldest first, trimmed to the longest row."""
        return in_order_of_time(self)


Cache = TypeVar("Cache", bound=NamedTuple)
"""A NamedTuple of buffers (B, N, ...), row p % N of each that of position p, and last `length` (B,)."""


def in_order_of_time(cache: Cache) -> Cache:
    """Only the stored rows, oldest first, trimmed to the longest row of the batch."""
    *buffers, length = cache
    N = buffers[0].shape[1]
    held = length.clamp(max=N)
    age = torch.arange(int(held.max()), device=held.device)
    row = (length - held)[:, None] + age
    beyond = age >= held[:, None]
    batch = torch.arange(len(held), device=held.device)[:, None]
    return type(cache)._make([*(blank(x[batch, row % N], beyond) for x in buffers), length])


def init_cache(
    batch_size: int,
    n_groups: int,
    key_width: int,
    value_width: int,
    *,
    capacity: int | None = None,
    window: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> KVCache:
    """An empty cache of `capacity` rows (256 where not given), at most `window`."""
    rows = max(INITIAL_CAPACITY if capacity is None else capacity, 1)
    rows = rows if window is None else min(rows, window)
    return KVCache(
        torch.zeros(batch_size, rows, n_groups, key_width, device=device, dtype=dtype),
        torch.zeros(batch_size, rows, n_groups, value_width, device=device, dtype=dtype),
        torch.zeros(batch_size, dtype=torch.int64, device=device),
    )


@common.without_autocast
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: KVCache | None = None,
    *,
    causal: bool = True,
    window: int | None = None,
    sinks: Tensor | None = None,
    softcap: float | None = None,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    scale: float | None = None,
    chunk_size: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, KVCache | tuple[()]]:
    """o_t = sum_s p_ts v_s with p_ts = exp(l_ts) / (exp(sink) + sum_s' exp(l_ts')), l_ts = cap(scale q_t . k_s).

    Args:
        q: (B, T, H, K).
        k: (B, T, G, K), G dividing H; consecutive H / G heads share a group.
        v: (B, T, G, V).
        state: cache of the steps before; None for none. Consumed: written in place where no gradient is needed.
        causal: no step sees a later one. Otherwise there is no state: `()` is returned.
        window: a step sees itself and the window - 1 keys before it (if not causal, as many after it).
        sinks: (H,) logits of one more key without a value (GPT-OSS); none by default.
        softcap: c in cap(l) = c tanh(l / c) (Gemma 2); none by default.
        lengths: (B,) valid steps of a right-padded batch; nothing sees the later ones, whose outputs are zero.
        resets: (B, T) bool, true where a packed document starts; a step sees its own document only.
        scale: K ** -0.5 by default.
        chunk_size: queries a block of the chunked form; by default 128 (half a window), fewer for large batches.
        backend: "reference" forms all T x S scores. "chunked" goes through blocks of queries, and recomputes
            their scores in the backward pass (Dao 2023, FlashAttention-2): memory linear in T. "sdpa" is
            `torch.nn.functional.scaled_dot_product_attention`, with a T x S mask unless plainly causal or not at
            all; it knows neither sinks nor softcap. "auto" takes the fastest, and gives sinks
            to sdpa as one more key where no mask is needed.
    Returns:
        o (B, T, H, V) and the next state.
    Raises:
        UsageError: shapes or options that do not go together.
    """
    lengths = _check(q, k, v, state, causal, window, sinks, softcap, lengths, resets, chunk_size, backend)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if lengths is not None:
        padding = ~valid_steps(lengths, q.shape[1])
        q, k, v = (blank(x, padding) for x in (q, k, v))
    options = Settings(scale, softcap, sinks, chunk_size, backend)
    if state is not None and q.shape[1] == 1:
        after = append(state, k, v, window=window, lengths=lengths, resets=resets)
        o = decode(q, after, options)
    else:
        o = attend(q, k, v, state, causal, window, lengths, resets, options)
        if not causal:
            return (o if lengths is None else blank(o, padding)), ()
        if state is None:
            after = first_cache(KVCache, k, v, window=window, lengths=lengths, resets=resets)
        else:
            after = append(state, k, v, window=window, lengths=lengths, resets=resets)
    return (o if lengths is None else blank(o, padding)), after


class Settings(NamedTuple):
    """What is done with the scores, and by which form."""

    scale: float
    softcap: float | None
    sinks: Tensor | None
    chunk_size: int | None
    backend: str

    def form(self, sdpa: bool, *, sinks: bool = False) -> str:
        """The chosen form; under "auto" sdpa if it is available and better, else chunked.

        Args:
            sdpa: whether it is the better one.
            sinks: whether it could serve sinks.
        """
        if transformed():
            if self.backend not in ("auto", "reference"):
                raise UsageError(f"attention: backend='{self.backend}' does not serve {TRANSFORMED}.")
            return log_form("attention", "reference")
        if self.backend != "auto":
            return log_form("attention", self.backend)
        able = self.softcap is None and (sinks or self.sinks is None)
        return log_form("attention", "sdpa" if sdpa and able else "chunked")


# ---- what a step sees


class Sight(NamedTuple):
    """Query t sees the keys numbered first[t] to last[t], itself (numbered t) always among them."""

    number: Tensor  # (B or 1, S)
    first: Tensor  # (B or 1, T or 1)
    last: Tensor  # (B or 1, T or 1)

    def mask(self, queries: slice = slice(None), keys: slice = slice(None)) -> Tensor:
        """(B or 1, T, S) bool, true where a key is seen."""
        first, last = (x[:, queries] if x.shape[1] > 1 else x for x in (self.first, self.last))
        number = self.number[:, None, keys]
        return (number >= first[..., None]) & (number <= last[..., None])


def sight_of(
    n_steps: int,
    past: KVCache | None,
    n_past: int,
    causal: bool,
    window: int | None,
    lengths: Tensor | None,
    resets: Tensor | None,
    device: torch.device,
) -> Sight:
    t = torch.arange(n_steps, device=device)[None]
    number, first = t.clone(), torch.zeros_like(t)  # a clone: the compiler takes no tensor twice
    if past is not None:
        start, rows = past.length[:, None], torch.arange(n_past, device=device)
        old = -1 - (start - 1 - rows) % past.k.shape[1]  # an unwritten row gets a number before the document's start
        number, first = torch.cat([old, t.expand(len(old), -1)], 1), -start
    if resets is not None:
        start = past.length if past is not None else t.new_zeros(len(resets))
        first = t - document_positions(start, n_steps, resets)
    if window is not None:
        first = torch.maximum(first, t - window + 1)
    if causal:
        return Sight(number, first, t)
    last = torch.full_like(t, n_steps - 1)
    if resets is not None:
        starts = torch.where(resets, t, n_steps).flip(1).cummin(1).values.flip(1)
        last = F.pad(starts[:, 1:], (0, 1), value=n_steps) - 1
    if window is not None:
        last = torch.minimum(last, t + window - 1)
    if lengths is not None:
        last = torch.minimum(last, lengths[:, None] - 1)
    return Sight(number, first, torch.maximum(last, t))


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past: KVCache | None,
    causal: bool,
    window: int | None,
    lengths: Tensor | None,
    resets: Tensor | None,
    options: Settings,
) -> Tensor:
    """T queries against the cache (left as it is) and the T new keys."""
    T, n_past = q.shape[1], 0
    if past is not None:
        n_past = past.k.shape[1]
        if not traced():
            n_past = min(n_past, int(past.length.max()))
        # what the cache rounds is rounded in this pass too, so that no cut shows
        k, v = (x.to(past.k.dtype).to(q.dtype) for x in (k, v))
        past = past if n_past else None
    if past is not None:
        k, v = (torch.cat([old[:, :n_past].to(q.dtype), x], 1) for old, x in ((past.k, k), (past.v, v)))
    window = window if window is not None and window < T + n_past else None
    ragged = lengths is not None and not causal
    masked = past is not None or window is not None or resets is not None or ragged
    small = len(q) * T * k.shape[1] <= MASK_LIMIT and (window is None or window + 64 >= T / 3)
    precise = q.dtype == state_dtype(q) and options.scale != 0
    form = options.form(sdpa=small or not masked, sinks=not masked and precise)
    if form == "sdpa" and not masked:
        return _sdpa(q, k, v, None, options, causal=causal)
    sight = sight_of(T, past, n_past, causal, window, lengths, resets, q.device)
    if form == "chunked":
        return _chunked(q, k, v, sight, n_past, causal, window, options)
    attend = _reference if form == "reference" else _sdpa
    return attend(q, k, v, sight.mask(), options)


# ---- forms


def _reference(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, options: Settings) -> Tensor:
    """The definition; `seen` (B or 1, T, S) is true where a query sees a key, None where all see all."""
    dtype, out = state_dtype(q), q.dtype
    q, k, v = (x.to(dtype).transpose(1, 2) for x in (q, k, v))  # (B, H, T, K), (B, G, S, K), (B, G, S, V)
    q = q.unflatten(1, (k.shape[1], -1)) * options.scale
    logits = _rows(q, k.mT)  # (B, G, R, T, S)
    if options.softcap is not None:
        logits = options.softcap * torch.tanh(logits / options.softcap)
    if seen is not None:
        logits = logits.masked_fill(~seen[:, None, None], -torch.inf)
    p = _softmax(logits, options.sinks)
    return _rows(p, v).flatten(1, 2).transpose(1, 2).to(out)


def _softmax(logits: Tensor, sinks: Tensor | None) -> Tensor:
    """Softmax of (B, G, R, T, S) along S, the sink's share left out."""
    if sinks is None:
        return logits.softmax(-1)
    sinks = sinks.to(logits.dtype).view(*logits.shape[1:3], 1, 1)
    return torch.cat([logits, sinks.expand(*logits.shape[:-1], 1)], -1).softmax(-1)[..., :-1]


def _sdpa(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, options: Settings, *, causal: bool = False) -> Tensor:
    """Torch's kernels; on a CPU they need K = V, so the narrower ones are filled up with zeros."""
    if options.sinks is not None:
        o = _sdpa(
            *_with_sink(q, k, v, options.sinks / options.scale, causal),
            seen,
            options._replace(sinks=None),
            causal=causal,
        )
        return o[:, -q.shape[1] :]
    K, V = q.shape[-1], v.shape[-1]
    if K < V:
        q, k = F.pad(q, (0, V - K)), F.pad(k, (0, V - K))
    if V < K:
        v = F.pad(v, (0, K - V))
    o = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=None if seen is None else seen[:, None],
        is_causal=causal,
        scale=options.scale,
        enable_gqa=q.shape[2] != k.shape[2],
    ).transpose(1, 2)

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = torch.ones(1, q.shape[1], k.shape[1], dtype=torch.bool, device=q.device).tril() if causal else seen
        return _reference(q, k, v, mask, options)

    return guarded(plain, (o,), (q, k, v))[0][..., :V]


def _with_sink(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The sink as a first key without a value, alone in having a further channel, where queries hold its logit `sinks`.

    If causal, a query comes before the others too, so that the rest sees what it saw, and the sink.
    """
    (B, T, H, K), G = q.shape, k.shape[2]
    q = torch.cat([q, sinks.to(q.dtype).view(H, 1).expand(B, T, H, 1)], -1)
    sink = F.pad(k.new_ones(B, 1, G, 1), (K, 0))
    k, v = torch.cat([sink, F.pad(k, (0, 1))], 1), F.pad(v, (0, 0, 0, 0, 1, 0))
    return F.pad(q, (0, 0, 0, 0, 1, 0)) if causal else q, k, v


def decode(q: Tensor, cache: KVCache, options: Settings) -> Tensor:
    """One query a row, (B, 1, H, K), against the written rows of a cache that holds its own key already."""
    held = cache.length.clamp(1, cache.k.shape[1])  # an empty row of the batch sees one zero key instead of none
    k, v, masked = cache.k, cache.v, True
    if not traced():
        fewest, most = torch.stack(held.aminmax()).tolist()
        k, v, masked = k[:, :most], v[:, :most], fewest < most
    k, v = k.to(q.dtype), v.to(q.dtype)
    seen = None
    if masked:
        seen = (torch.arange(k.shape[1], device=q.device) < held[:, None])[:, None]
    # the CPU kernel reads a group's keys once for each of its heads
    form = options.form(sdpa=q.shape[2] < 4 * k.shape[2] or q.device.type != "cpu")
    if form == "chunked":
        return _by_group(q, k, v, seen, options)
    attend = _reference if form == "reference" else _sdpa
    return attend(q, k, v, seen, options)


def _by_group(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, options: Settings) -> Tensor:
    """`_reference` for T = 1, with one matrix product a group: it reads k and v where they lie."""
    q = q.squeeze(1).unflatten(1, (k.shape[2], -1)) * options.scale  # (B, G, R, K)
    logits = torch.stack([q[:, g] @ k[:, :, g].mT for g in range(k.shape[2])], 1).to(state_dtype(q))
    if options.softcap is not None:
        logits = options.softcap * torch.tanh(logits / options.softcap)
    if seen is not None:
        logits = logits.masked_fill(~seen[:, None], -torch.inf)
    p = _softmax(logits.unsqueeze(3), options.sinks).squeeze(3).to(v.dtype)
    return torch.cat([p[:, g] @ v[:, :, g] for g in range(k.shape[2])], 1).unsqueeze(1)


def _chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sight: Sight,
    n_past: int,
    causal: bool,
    window: int | None,
    options: Settings,
) -> Tensor:
    """Blocks of queries, each against the stretch of keys that it can see."""
    (B, T, H, _), (S, G) = q.shape, k.shape[1:3]
    size = options.chunk_size
    if size is None:
        reach = S if window is None else min(S, 2 * window)
        size = max(min(SCORES_LIMIT // (B * H * reach), 128 if window is None else max(window // 2, 64)), 16)
    blocks = []
    for a in range(0, T, size):
        b = min(a + size, T)
        lo = 0 if window is None or a < window else n_past + a - window + 1
        hi = n_past + (b if causal else T if window is None else min(b + window - 1, T))
        blocks.append((a, b, lo, hi))
    # (B, G, T, R, K) and (B, G, S, K): every block is a stretch of memory, and one batched product
    q = (q * options.scale).unflatten(2, (G, H // G)).movedim(1, 2).contiguous()
    k, v = (x.transpose(1, 2).contiguous() for x in (k, v))
    sinks = None if options.sinks is None else options.sinks.to(state_dtype(q)).view(G, 1, H // G)
    o, _ = _Blocked.apply(q, k, v, sinks, *sight, options.softcap, tuple(blocks))
    return o.movedim(2, 1).flatten(2, 3)


def _blocked_again(ctx, do, _):
    plain = functools.partial(_by_blocks, softcap=ctx.softcap, blocks=ctx.blocks)
    return *gradients_of(plain, ctx.saved_tensors[:7], do), None, None


class _Blocked(torch.autograd.Function):
    """Attention by blocks of queries that keeps only the log-sum-exp of each row, and recomputes the scores."""

    @staticmethod
    def forward(q, k, v, sinks, number, first, last, softcap, blocks):
        sight, total = Sight(number, first, last), q.new_empty(q.shape[:-1], dtype=state_dtype(q))
        o = q.new_empty(q.shape[:-1] + v.shape[-1:])
        for a, b, lo, hi in blocks:
            logits, _ = _block_logits(q[:, :, a:b], k[:, :, lo:hi], sight, slice(a, b), slice(lo, hi), softcap)
            block_total = logits.logsumexp(-1)
            if sinks is not None:
                block_total = torch.logaddexp(block_total, sinks)
            p = logits.sub_(block_total[..., None]).exp_().to(v.dtype)
            o[:, :, a:b] = _rows(p, v[:, :, lo:hi])
            total[:, :, a:b] = block_total
        return o, total

    @staticmethod
    def setup_context(ctx, inputs, output):
        q, k, v, sinks, number, first, last, ctx.softcap, ctx.blocks = inputs
        ctx.save_for_backward(q, k, v, sinks, number, first, last, *output)
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    @common.without_autocast
    @once(_blocked_again)
    def backward(ctx, do, _):
        q, k, v, sinks, number, first, last, o, total = ctx.saved_tensors
        sight, dtype = Sight(number, first, last), total.dtype
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k, dtype=dtype), torch.zeros_like(v, dtype=dtype)
        do = do.contiguous()
        mean = (do.to(dtype) * o.to(dtype)).sum(-1)  # sum_s p_ts dp_ts
        for a, b, lo, hi in ctx.blocks:
            queries, keys = slice(a, b), slice(lo, hi)
            logits, slope = _block_logits(q[:, :, a:b], k[:, :, lo:hi], sight, queries, keys, ctx.softcap)
            p = logits.sub_(total[:, :, a:b, :, None]).exp_()
            dv[:, :, lo:hi] += _columns(p.to(v.dtype), do[:, :, a:b])
            dp = _rows(do[:, :, a:b], v[:, :, lo:hi].mT).to(dtype)
            d_logits = dp.sub_(mean[:, :, a:b, :, None]).mul_(p)
            if slope is not None:
                d_logits = d_logits * slope
            d_logits = d_logits.to(q.dtype)
            dq[:, :, a:b] = _rows(d_logits, k[:, :, lo:hi])
            dk[:, :, lo:hi] += _columns(d_logits, q[:, :, a:b])
        d_sinks = None if sinks is None else -((sinks - total).exp() * mean).sum((0, 2))[:, None]
        return dq, dk.to(k.dtype), dv.to(v.dtype), d_sinks, None, None, None, None, None


def _by_blocks(q, k, v, sinks, number, first, last, softcap, blocks) -> Tensor:
    """`_Blocked` in plain operators."""
    sight, outputs = Sight(number, first, last), []
    for a, b, lo, hi in blocks:
        logits, _ = _block_logits(q[:, :, a:b], k[:, :, lo:hi], sight, slice(a, b), slice(lo, hi), softcap)
        if sinks is not None:
            logits = torch.cat([logits, sinks.unsqueeze(-1).expand(*logits.shape[:-1], 1)], -1)
        outputs.append(_rows(logits.softmax(-1)[..., : hi - lo].to(v.dtype), v[:, :, lo:hi]))
    return torch.cat(outputs, 2)


def _block_logits(q, k, sight, queries, keys, softcap) -> tuple[Tensor, Tensor | None]:
    """Masked logits (B, G, C, R, S) of a block, and the slope of the soft cap there."""
    logits, slope = _rows(q, k.mT).to(state_dtype(q)), None
    if softcap is not None:
        bent = torch.tanh(logits / softcap)
        logits, slope = softcap * bent, 1 - bent.square()
    return logits.masked_fill_(~sight.mask(queries, keys)[:, None, :, None], -torch.inf), slope


def _rows(x: Tensor, y: Tensor) -> Tensor:
    """(B, G, C, R, M) with (B, G, M, N) to (B, G, C, R, N)."""
    return (x.flatten(2, 3) @ y).unflatten(2, x.shape[2:4])


def _columns(x: Tensor, y: Tensor) -> Tensor:
    """(B, G, C, R, M) with (B, G, C, R, N) to (B, G, M, N), summed over C and R."""
    return x.flatten(2, 3).mT @ y.flatten(2, 3)


# ---- cache


def append(
    cache: Cache,
    *new: Tensor,
    window: int | None = None,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
) -> Cache:
    """`cache` (consumed) with T steps written into it; arguments as of `attention`.

    Args:
        cache: of n buffers.
        new: n tensors (B, T, ...), in the order of the buffers.

    A row whose document starts anew holds only the steps since then. Where gradients are needed the buffers are
    replaced, otherwise they are written in place. Compiled code cannot grow them: their capacity must suffice.
    """
    (B, T), before = new[0].shape[:2], cache[-1]
    positions = document_positions(before, T, resets)
    length = next_position(positions, before, lengths)
    if not torch.compiler.is_compiling():
        cache = _with_room(cache, T, length, window)
    N = cache[0].shape[1]
    # the newest n steps of each row lie in different rows of the cache, whatever was padded or reset
    newest = torch.arange(-min(T, N), 0, device=length.device)
    position = length[:, None] + newest
    step = newest + T if lengths is None else lengths[:, None] + newest
    batch = torch.arange(B, device=length.device)[:, None]
    restarted = None if resets is None else length < before + (T if lengths is None else lengths)
    differentiable = transformed() or (torch.is_grad_enabled() and any(x.requires_grad for x in new))

    def write(buffer: Tensor, new: Tensor) -> Tensor:
        in_place, new = not (buffer.requires_grad or differentiable), new.to(buffer.dtype)
        if lengths is None and resets is None:
            new = new[:, T - len(newest) :]
        else:
            if restarted is not None:
                stale = _along(restarted, buffer)
                buffer = buffer.masked_fill_(stale, 0) if in_place else buffer.masked_fill(stale, 0)
            fresh = _along((step >= 0) & (position >= 0), buffer)
            steps = step.clamp(min=0).expand(len(new), -1)
            new = torch.where(fresh, new[batch, steps], buffer[batch, position % N])
        index = (batch, position % N)
        return buffer.index_put_(index, new) if in_place else buffer.index_put(index, new)

    return type(cache)._make([*map(write, cache[:-1], new), length])


def _along(mask: Tensor, x: Tensor) -> Tensor:
    """`mask` (B,) or (B, N) with as many axes as x."""
    return mask.view(mask.shape + (1,) * (x.ndim - mask.ndim))


def _with_room(cache: Cache, n_steps: int, length: Tensor, window: int | None) -> Cache:
    rows = cache[0].shape[1]
    if rows == window:
        return cache
    if batched():  # whose values cannot be read: T more rows are room enough
        rows += n_steps
    elif (needed := int(length.max())) <= rows:
        return cache
    else:
        rows = max(2 * rows, needed)
    rows = rows if window is None else min(rows, window)
    return type(cache)._make([*(grow(x, rows) for x in cache[:-1]), cache[-1]])


def first_cache(
    kind: type[Cache],
    *new: Tensor,
    window: int | None = None,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
) -> Cache:
    """The cache after a first pass over `new` (B, T, ...).

    It holds copies, as they may be views of what is wider; where gradients are needed, the tensors themselves.
    """
    B, T = new[0].shape[:2]
    N = min(T, window or T)
    if lengths is not None or resets is not None:
        empty = kind._make([*(x.new_zeros(B, N, *x.shape[2:]) for x in new), _counts(new[0], 0)])
        return append(empty, *new, window=window, lengths=lengths, resets=resets)
    if window == N:
        new = tuple(x[:, T - N :].roll(T % N, 1) for x in new)
    return kind._make([*(x if x.requires_grad else common.owned(x) for x in new), _counts(new[0], T)])


def _counts(like: Tensor, n: int) -> Tensor:
    return torch.full((len(like),), n, dtype=torch.int64, device=like.device)


# ---- checks


def _check(q, k, v, state, causal, window, sinks, softcap, lengths, resets, chunk_size, backend) -> Tensor | None:
    """The lengths as int64 from 0 to T, once everything fits together."""
    op = "attention"
    if not (q.ndim == k.ndim == v.ndim == 4) or 0 in (*q.shape, *k.shape, *v.shape) or q.shape[2] % k.shape[2]:
        shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)}"
        raise UsageError(f"{op}: {shapes} do not go together. Shapes: {LEGEND}")
    (B, T, H, K), (G, V) = q.shape, v.shape[2:]
    common.check(op, LEGEND, "k", k, q, (B, T, G, K))
    common.check(op, LEGEND, "v", v, q, (B, T, G, V))
    common.check(op, LEGEND, "sinks", sinks, q, (H,))
    lengths = common.check_packing(op, LEGEND, q, lengths, resets)
    if not q.is_floating_point() or k.dtype != q.dtype or v.dtype != q.dtype:
        raise UsageError(f"{op}: q, k, v are {q.dtype}, {k.dtype}, {v.dtype}, expected one floating-point dtype.")
    for name, value in (("window", window), ("chunk_size", chunk_size)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise UsageError(f"{op}: {name}={value!r} is not allowed: it should be a whole number from 1.")
    if softcap is not None and not (softcap > 0 and math.isfinite(softcap)):
        raise UsageError(f"{op}: softcap={softcap!r} is not allowed: it should be a number above 0.")
    if backend not in BACKENDS:
        raise unknown("backend", backend, BACKENDS)
    if backend == "sdpa" and (sinks is not None or softcap is not None):
        missing = "sinks" if sinks is not None else "softcap"
        raise UsageError(f'{op}: backend="sdpa" does not know {missing}: take "auto", "chunked" or "reference".')
    if state is not None and not causal:
        raise UsageError(f"{op}: attention that is not causal reads whole sequences and takes no state.")
    if state is not None:
        N = state.k.shape[1]
        common.check(op, LEGEND, "state.k", state.k, q, (B, N, G, K))
        common.check(op, LEGEND, "state.v", state.v, q, (B, N, G, V))
        common.check_counts(op, LEGEND, state.length, q)
        if window is not None and window < N:
            raise UsageError(f"{op}: state has {N} rows, more than window={window}: it is of another window.")
    return lengths
