"""Softmax attention over a sequence that is cut over processes: keys and values go round, queries stay.

Liu et al. 2023, Ring Attention with Blockwise Transformers (arXiv 2310.01889). Every process holds the queries of its
piece. The keys and values of a piece visit the processes that can see them, one after another, each of which adds them
to its running softmax. In the backward pass they visit again, and each process sends their gradients home. A causal
mask sends no piece to earlier processes, and a window none further than it reaches, and only the rows within reach.

Shape legend: B batch, T queries of this piece, S keys of the visiting one, H heads, G groups (R = H / G heads share a
group's keys and values), K key and V value width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from zoo.ops import common
from zoo.ops.attention_forms import SCORES_LIMIT, Settings, block_logits, columns_times, rows_times
from zoo.ops.common import log_form, state_dtype
from zoo.ops.visibility import Visibility
from zoo.pieces import Pieces, first_derivative
from zoo.states import document_positions

Unpack = Callable[..., tuple[Tensor, Tensor]]
"""What visits (B, S, ...), and weights, to keys (B, S, G, K) and values (B, S, G, V)."""


class Plan(NamedTuple):
    """Which keys the queries of this piece see, all numbered from the start of the sequence.

    Attributes:
        first, last: (B or 1, T), the first and the last key that each query sees.
    """

    pieces: Pieces
    causal: bool
    window: int | None
    first: Tensor
    last: Tensor

    def rows(self, i: int, j: int) -> int:
        """Number of the last rows of piece i that queries of piece j can see; all where they may look ahead."""
        sizes = self.pieces.sizes
        if not self.causal:
            return sizes[i]
        if i >= j:
            return sizes[i] if i == j else 0
        if self.window is None:
            return sizes[i]
        return min(max(self.window - 1 - sum(sizes[i + 1 : j]), 0), sizes[i])

    def visitor(self, hop: int, rank: int) -> int | None:
        """The piece that is with a process after a number of hops, if one is."""
        i = rank - hop
        if not self.causal:
            return i % self.pieces.n
        return i if i >= 0 and self.rows(i, rank) else None

    def hops(self) -> int:
        """How often pieces move on."""
        n = self.pieces.n
        return max(hop for hop in range(n) if any(self.visitor(hop, rank) is not None for rank in range(n)))

    def blocks(
        self, i: int, n_rows: int, rows: Tensor, chunk_size: int | None
    ) -> Iterator[tuple[slice, slice, Visibility]]:
        """Blocks of queries (B, G, T, R, K), each with the rows of the visiting piece i that it may see."""
        (B, G, T, R, _), sizes = rows.shape, self.pieces.sizes
        size = chunk_size or max(min(SCORES_LIMIT // (B * G * R * n_rows), 128), 16)
        end = sum(sizes[: i + 1])
        number = torch.arange(end - n_rows, end, device=rows.device)[None]
        for a in range(0, T, size):
            b = min(a + size, T)
            own = self.causal and i == self.pieces.rank
            lo = max(a - self.window + 1, 0) if own and self.window is not None else 0
            yield slice(a, b), slice(lo, b if own else n_rows), Visibility(number, self.first, self.last)


def plan_of(q: Tensor, pieces: Pieces, causal: bool, window: int | None, resets: Tensor | None) -> Plan:
    """What the T queries of this piece see."""
    (B, T), device = q.shape[:2], q.device
    t = torch.arange(T, device=device)[None] + pieces.start
    first = torch.zeros_like(t)
    if resets is not None:
        first = t - document_positions(pieces.positions(B, resets, device), T, resets)
    if window is not None:
        first = torch.maximum(first, t - window + 1)
    if causal:
        return Plan(pieces, True, window, first, t)
    last = torch.full_like(t, sum(pieces.sizes) - 1)
    if resets is not None:
        end = T + pieces.following(B, resets, device)[:, None]  # the first step of the document after the last one
        starts = torch.where(resets, torch.arange(T, device=device), end)
        last = pieces.start + torch.cat([starts[:, 1:], end], 1).flip(1).cummin(1).values.flip(1) - 1
    if window is not None:
        last = torch.minimum(last, t + window - 1)
    return Plan(pieces, False, window, first, last)


@common.without_autocast
def ring_attention(
    q: Tensor, visiting: Tensor, weights: tuple[Tensor, ...], unpack: Unpack, plan: Plan, options: Settings
) -> Tensor:
    """o (B, T, H, V) of q (B, T, H, K) over the keys and values of all pieces.

    Args:
        visiting: (B, T, ...), what of this piece is sent to other processes.
        weights: the same in all processes, of which `unpack` makes keys and values.
    """
    log_form("attention", "ring")
    return _Ring.apply(q, visiting, options.sinks, plan, unpack, options, *weights)


def _visits(plan: Plan, visiting: Tensor) -> Iterator[tuple[int, int | None, Tensor]]:
    """(hop, piece, its rows) of what is with this process, its own piece first; the piece is None where none is."""
    pieces = plan.pieces
    rank, n = pieces.rank, pieces.n
    yield 0, rank, visiting
    held, following = visiting, (rank + 1) % n
    for hop in range(1, plan.hops() + 1):
        goes, comes = plan.visitor(hop, following), plan.visitor(hop, rank)
        if goes is not None:
            pieces.post(held[:, -plan.rows(goes, following) :], following)
        if comes is not None:
            shape = held.shape[0], plan.rows(comes, rank), *held.shape[2:]
            held = pieces.take(shape, (rank - 1) % n, dtype=held.dtype, device=held.device)
        yield hop, comes, held


def _grouped(x: Tensor, G: int) -> Tensor:
    """(B, T, H, K) to (B, G, T, R, K), every block of queries a stretch of memory."""
    return x.unflatten(2, (G, -1)).movedim(1, 2).contiguous()


class _Ring(torch.autograd.Function):
    """Keeps the log-sum-exp of each row, and recomputes the scores when the keys visit again."""

    @staticmethod
    def forward(ctx, q, visiting, sinks, plan, unpack, options, *weights):
        o = total = None
        for _, i, held in _visits(plan, visiting):
            if i is None:
                continue
            k, v = (x.transpose(1, 2).contiguous() for x in unpack(held, *weights))
            if o is None or total is None:
                rows = _grouped(q * options.scale, k.shape[1])
                o = rows.new_zeros(*rows.shape[:-1], v.shape[-1], dtype=state_dtype(q))
                total = torch.full_like(o[..., 0], -torch.inf)
                if sinks is not None:
                    total[:] = sinks.to(o.dtype).view(k.shape[1], 1, -1)
            for at, keys, seen in plan.blocks(i, held.shape[1], rows, options.chunk_size):
                logits, _ = block_logits(rows, k, None, seen, at, keys, options.softcap)
                new = torch.logaddexp(total[:, :, at], logits.logsumexp(-1))
                p = logits.sub_(new[..., None]).exp_().to(v.dtype)
                o[:, :, at] *= (total[:, :, at] - new).exp_()[..., None]
                o[:, :, at] += rows_times(p, v[:, :, keys])
                total[:, :, at] = new
        assert o is not None  # its own piece is with every process first
        ctx.plan, ctx.unpack, ctx.options = plan, unpack, options
        ctx.save_for_backward(q, visiting, sinks, o, total, *weights)
        return o.movedim(2, 1).flatten(2, 3).to(q.dtype)

    @staticmethod
    @common.without_autocast
    @first_derivative
    def backward(ctx, do):
        plan, options = ctx.plan, ctx.options
        q, visiting, sinks, o, total, *weights = ctx.saved_tensors
        pieces, dtype, G = plan.pieces, o.dtype, o.shape[1]
        rows, do = _grouped(q * options.scale, G), _grouped(do, G)
        mean = (do.to(dtype) * o).sum(-1)  # sum_s p_ts dp_ts
        dq, d_visiting = torch.zeros_like(rows, dtype=dtype), torch.zeros_like(visiting, dtype=dtype)
        d_weights = [torch.zeros_like(w) for w in weights]
        for hop, i, held in _visits(plan, visiting):
            if i is not None:
                d_held, *d_more = _gradients(ctx, i, held, weights, rows, do, total, mean, dq)
                for d_weight, d_each in zip(d_weights, d_more, strict=True):
                    d_weight += d_each
                if not hop:
                    d_visiting += d_held
                else:
                    pieces.post(d_held.to(dtype), i)
            host = (pieces.rank + hop) % pieces.n  # where this process's own piece is now
            if hop and plan.visitor(hop, host) == pieces.rank:
                shape = visiting.shape[0], plan.rows(pieces.rank, host), *visiting.shape[2:]
                d_visiting[:, -shape[1] :] += pieces.take(shape, host, dtype=dtype, device=q.device)
        dq = (dq * options.scale).movedim(2, 1).flatten(2, 3).to(q.dtype)
        d_sinks = None
        if sinks is not None:
            share = (sinks.to(dtype).view(G, 1, -1) - total).exp()
            d_sinks = -(share * mean).sum((0, 2)).flatten().to(sinks.dtype)
        return dq, d_visiting.to(visiting.dtype), d_sinks, None, None, None, *d_weights


def _gradients(ctx, i: int, held: Tensor, weights, rows, do, total, mean, dq: Tensor) -> tuple[Tensor, ...]:
    """Gradients of a visiting piece and of the weights; those of the queries are added to dq."""
    dtype, cap = dq.dtype, ctx.options.softcap
    with torch.enable_grad():
        given = [x.detach().requires_grad_() for x in (held, *weights)]
        k_graph, v_graph = (x.transpose(1, 2).contiguous() for x in ctx.unpack(*given))
    k, v = k_graph.detach(), v_graph.detach()
    dk, dv = torch.zeros_like(k, dtype=dtype), torch.zeros_like(v, dtype=dtype)
    for at, keys, seen in ctx.plan.blocks(i, held.shape[1], rows, ctx.options.chunk_size):
        logits, slope = block_logits(rows, k, None, seen, at, keys, cap)
        p = logits.sub_(total[:, :, at, :, None]).exp_()
        dv[:, :, keys] += columns_times(p.to(v.dtype), do[:, :, at])
        dp = rows_times(do[:, :, at], v[:, :, keys].mT).to(dtype)
        d_logits = dp.sub_(mean[:, :, at, :, None]).mul_(p)
        d_logits = (d_logits if slope is None else d_logits * slope).to(rows.dtype)
        dq[:, :, at] += rows_times(d_logits, k[:, :, keys])
        dk[:, :, keys] += columns_times(d_logits, rows[:, :, at])
    return torch.autograd.grad((k_graph, v_graph), given, (dk.to(k.dtype), dv.to(v.dtype)))
