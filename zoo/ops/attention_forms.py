"""The forms of softmax attention: all scores at once, torch's kernels, blocks of queries, and single queries.

Shape legend: B batch, T queries, S keys, H heads, G groups (dividing H; R = H / G heads share a group's k and v), K key
and V value width of a head.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.core.errors import UsageError
from zoo.ops import common
from zoo.ops.common import log_form, state_dtype, widest
from zoo.ops.derivatives import TRANSFORMED, gradients_of, guarded, once, traced, transformed
from zoo.ops.kv_cache import DecayingCache, KVCache
from zoo.ops.visibility import Visibility

SCORES_LIMIT = 1 << 22  # scores that the chunked form holds at once


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


def reference(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, options: Settings, fade: Tensor | None = None
) -> Tensor:
    """The definition.

    Args:
        seen: (B or 1, T, S), true where a query sees a key; None where all see all.
        fade: (B, H, T, S), what is added to the logits; None for nothing.
    """
    dtype, out = state_dtype(q), q.dtype
    q, k, v = (x.to(dtype).transpose(1, 2) for x in (q, k, v))  # (B, H, T, K), (B, G, S, K), (B, G, S, V)
    q = q.unflatten(1, (k.shape[1], -1)) * options.scale
    logits = rows_times(q, k.mT)  # (B, G, R, T, S)
    if options.softcap is not None:
        logits = options.softcap * torch.tanh(logits / options.softcap)
    if fade is not None:
        logits = logits + fade.to(dtype).unflatten(1, logits.shape[1:3])
    if seen is not None:
        logits = logits.masked_fill(~seen[:, None, None], -torch.inf)
    p = _softmax(logits, options.sinks)
    return rows_times(p, v).flatten(1, 2).transpose(1, 2).to(out)


def _softmax(logits: Tensor, sinks: Tensor | None) -> Tensor:
    """Softmax of (B, G, R, T, S) along S, the sink's share left out."""
    if sinks is None:
        return logits.softmax(-1)
    sinks = sinks.to(logits.dtype).view(*logits.shape[1:3], 1, 1)
    return torch.cat([logits, sinks.expand(*logits.shape[:-1], 1)], -1).softmax(-1)[..., :-1]


def sdpa(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, options: Settings, *, causal: bool = False) -> Tensor:
    """Torch's kernels; on a CPU they need K = V, so the narrower ones are filled up with zeros."""
    if options.sinks is not None:
        o = sdpa(
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
        return reference(q, k, v, mask, options)

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


def sums_of_decays(cache: DecayingCache, n_rows: int) -> Tensor:
    """(B, n_rows, H): for each of the first rows of a cache the sum of the log decays up to its step, its own included.

    In float64 where there is one: so the difference of two sums is exact to float32 at any length.
    """
    decays, N = cache.log_decay[:, :n_rows].to(widest(cache.log_decay.device)), cache.k.shape[1]
    if n_rows < N:
        return decays.cumsum(1)
    # the rows may lie as in a ring: in order of time, with unwritten ones, which are zero, before the others
    rows, length = torch.arange(N, device=decays.device), cache.length[:, None]
    order, place = (x.remainder(N)[..., None].expand_as(decays) for x in (length + rows, rows - length))
    return decays.gather(1, order).cumsum(1).gather(1, place)


def newest(sums: Tensor, cache: DecayingCache) -> Tensor:
    """(B, 1, H): the sum up to the newest step, of `sums_of_decays`."""
    last = ((cache.length - 1) % cache.k.shape[1]).clamp(max=sums.shape[1] - 1)
    return sums.gather(1, last[:, None, None].expand(-1, 1, sums.shape[2]))


def decode(q: Tensor, cache: KVCache | DecayingCache, options: Settings) -> Tensor:
    """One query a row, (B, 1, H, K), against the written rows of a cache that holds its own key already."""
    held = cache.length.clamp(1, cache.k.shape[1])  # an empty row of the batch sees one zero key instead of none
    k, v, masked = cache.k, cache.v, True
    if not traced():
        fewest, most = torch.stack(held.aminmax()).tolist()
        k, v, masked = k[:, :most], v[:, :most], fewest < most
    k, v = k.to(q.dtype), v.to(q.dtype)
    seen = fade = None
    if isinstance(cache, DecayingCache):
        sums = sums_of_decays(cache, k.shape[1])
        fade = (newest(sums, cache) - sums).to(state_dtype(q)).mT.unsqueeze(2)
    if masked:
        seen = (torch.arange(k.shape[1], device=q.device) < held[:, None])[:, None]
    # the CPU kernel reads a group's keys once for each of its heads
    form = options.form(sdpa=fade is None and (q.shape[2] < 4 * k.shape[2] or q.device.type != "cpu"))
    if form == "chunked":
        return _by_group(q, k, v, seen, options, fade)
    return sdpa(q, k, v, seen, options) if form == "sdpa" else reference(q, k, v, seen, options, fade)


def _by_group(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, options: Settings, fade: Tensor | None) -> Tensor:
    """`reference` for T = 1, with one matrix product a group: it reads k and v where they lie."""
    q = q.squeeze(1).unflatten(1, (k.shape[2], -1)) * options.scale  # (B, G, R, K)
    logits = torch.stack([q[:, g] @ k[:, :, g].mT for g in range(k.shape[2])], 1).to(state_dtype(q))
    if options.softcap is not None:
        logits = options.softcap * torch.tanh(logits / options.softcap)
    if fade is not None:
        logits = logits + fade.squeeze(2).unflatten(1, logits.shape[1:3])
    if seen is not None:
        logits = logits.masked_fill(~seen[:, None], -torch.inf)
    p = _softmax(logits.unsqueeze(3), options.sinks).squeeze(3).to(v.dtype)
    return torch.cat([p[:, g] @ v[:, :, g] for g in range(k.shape[2])], 1).unsqueeze(1)


def chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visibility: Visibility,
    n_past: int,
    causal: bool,
    window: int | None,
    options: Settings,
    sums: Tensor | None = None,
) -> Tensor:
    """Blocks of queries, each against the stretch of keys that it can see.

    Args:
        sums: (B, S, H), for each key the sum of the log decays up to it; None for no decay.
    """
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
    if sums is not None:
        sums = sums.unflatten(2, (G, H // G)).movedim(1, 3).contiguous()  # (B, G, R, S)
    o, _ = _Blocked.apply(q, k, v, sinks, sums, *visibility, options.softcap, tuple(blocks))
    return o.movedim(2, 1).flatten(2, 3)


def _blocked_again(ctx, do, _):
    plain = functools.partial(_by_blocks, softcap=ctx.softcap, blocks=ctx.blocks)
    return *gradients_of(plain, ctx.saved_tensors[:8], do), None, None


class _Blocked(torch.autograd.Function):
    """Attention by blocks of queries that keeps only the log-sum-exp of each row, and recomputes the scores."""

    @staticmethod
    def forward(q, k, v, sinks, sums, number, first, last, softcap, blocks):
        visibility, total = Visibility(number, first, last), q.new_empty(q.shape[:-1], dtype=state_dtype(q))
        o = q.new_empty(q.shape[:-1] + v.shape[-1:])
        for a, b, lo, hi in blocks:
            logits, _ = block_logits(q, k, sums, visibility, slice(a, b), slice(lo, hi), softcap)
            block_total = logits.logsumexp(-1)
            if sinks is not None:
                block_total = torch.logaddexp(block_total, sinks)
            p = logits.sub_(block_total[..., None]).exp_().to(v.dtype)
            o[:, :, a:b] = rows_times(p, v[:, :, lo:hi])
            total[:, :, a:b] = block_total
        return o, total

    @staticmethod
    def setup_context(ctx, inputs, output):
        q, k, v, sinks, sums, number, first, last, ctx.softcap, ctx.blocks = inputs
        ctx.save_for_backward(q, k, v, sinks, sums, number, first, last, *output)
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    @common.without_autocast
    @once(_blocked_again)
    def backward(ctx, do, _):
        q, k, v, sinks, sums, number, first, last, o, total = ctx.saved_tensors
        visibility, dtype = Visibility(number, first, last), total.dtype
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k, dtype=dtype), torch.zeros_like(v, dtype=dtype)
        do = do.contiguous()
        mean = (do.to(dtype) * o.to(dtype)).sum(-1)  # sum_s p_ts dp_ts
        d_sums, own = None if sums is None else torch.zeros_like(sums), k.shape[2] - q.shape[2]
        for a, b, lo, hi in ctx.blocks:
            queries, keys = slice(a, b), slice(lo, hi)
            logits, slope = block_logits(q, k, sums, visibility, queries, keys, ctx.softcap)
            p = logits.sub_(total[:, :, a:b, :, None]).exp_()
            dv[:, :, lo:hi] += columns_times(p.to(v.dtype), do[:, :, a:b])
            dp = rows_times(do[:, :, a:b], v[:, :, lo:hi].mT).to(dtype)
            d_logits = dp.sub_(mean[:, :, a:b, :, None]).mul_(p)
            if d_sums is not None:  # rows sum to zero but for rounding, which must be the same in both sums
                d_sums[..., lo:hi] -= d_logits.sum(2)
                d_sums[..., own + a : own + b] += d_logits.sum(-1).movedim(2, 3)
            if slope is not None:
                d_logits = d_logits * slope
            d_logits = d_logits.to(q.dtype)
            dq[:, :, a:b] = rows_times(d_logits, k[:, :, lo:hi])
            dk[:, :, lo:hi] += columns_times(d_logits, q[:, :, a:b])
        d_sinks = None if sinks is None else -((sinks - total).exp() * mean).sum((0, 2))[:, None]
        return dq, dk.to(k.dtype), dv.to(v.dtype), d_sinks, d_sums, None, None, None, None, None


def _by_blocks(q, k, v, sinks, sums, number, first, last, softcap, blocks) -> Tensor:
    """`_Blocked` in plain operators."""
    visibility, outputs = Visibility(number, first, last), []
    for a, b, lo, hi in blocks:
        logits, _ = block_logits(q, k, sums, visibility, slice(a, b), slice(lo, hi), softcap)
        if sinks is not None:
            logits = torch.cat([logits, sinks.unsqueeze(-1).expand(*logits.shape[:-1], 1)], -1)
        outputs.append(rows_times(logits.softmax(-1)[..., : hi - lo].to(v.dtype), v[:, :, lo:hi]))
    return torch.cat(outputs, 2)


def block_logits(q, k, sums, visibility, queries, keys, softcap) -> tuple[Tensor, Tensor | None]:
    """Masked logits (B, G, C, R, S) of a block, and the slope of the soft cap there."""
    logits, slope = rows_times(q[:, :, queries], k[:, :, keys].mT).to(state_dtype(q)), None
    if softcap is not None:
        bent = torch.tanh(logits / softcap)
        logits, slope = softcap * bent, 1 - bent.square()
    if sums is not None:
        own = k.shape[2] - q.shape[2]  # keys before the first query's own
        _fade(logits, sums, slice(own + queries.start, own + queries.stop), keys)
    return logits.masked_fill_(~visibility.mask(queries, keys)[:, None, :, None], -torch.inf), slope


def _fade(logits: Tensor, sums: Tensor, queries: slice, keys: slice) -> None:
    """Add to a block's logits (B, G, C, R, S) what its keys have decayed by.

    The sums (B, G, R, S) are wide numbers. To keys before the block the decay is a term a query and a term a key, both
    counted from the block's first query: neither is positive, so that no digits cancel, and nothing as large as the
    block is made. Within the block the difference is taken of the wide numbers.
    """
    first, n = sums[..., queries.start, None], queries.start - keys.start
    at_query = sums[..., queries]
    before, within = (x.to(logits.dtype) for x in (first - sums[..., keys.start : queries.start], at_query - first))
    logits[..., :n].add_(before[:, :, None]).add_(within.movedim(3, 2)[..., None])
    own = at_query.movedim(3, 2)[..., None] - sums[:, :, None, :, queries.start : keys.stop]
    logits[..., n:].add_(own.to(logits.dtype))


def rows_times(x: Tensor, y: Tensor) -> Tensor:
    """(B, G, C, R, M) with (B, G, M, N) to (B, G, C, R, N)."""
    return (x.flatten(2, 3) @ y).unflatten(2, x.shape[2:4])


def columns_times(x: Tensor, y: Tensor) -> Tensor:
    """(B, G, C, R, M) with (B, G, C, R, N) to (B, G, M, N), summed over C and R."""
    return x.flatten(2, 3).mT @ y.flatten(2, 3)
