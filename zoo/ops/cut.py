"""Linear recurrences over a sequence that is cut over processes: every piece from rest at once, then one small chain.

A linear recurrence is affine in its state: from S_in a piece ends at S_rest + A S_in, and its outputs are o_rest +
M_t S_in. All processes compute o_rest, S_rest, A and M at the same time. Then the states go from process to process:
each hop costs one product with A, and its bytes do not depend on the length of the sequence.

Shape legend: B batch, T time, G groups, R heads of a group, H = G R heads, K key and V value width of a head.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.ops.common import blank, state_dtype
from zoo.pieces import Pieces

Run = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]


def by_transition(pieces: Pieces, run: Run, v: Tensor, state: Tensor | None, key_width: int) -> tuple[Tensor, Tensor]:
    """A recurrence over matrices S (K, V) whose transition has no closed form.

    With v = 0 and the identity as state, the recurrence gives A and M. Both runs are one: values are K wider.

    Args:
        run: (v (B, T, H, any width), state (B, H, K, the same width)) to (o, last state), linear in both together.
        v: (B, T, H, V).
        state: (B, H, K, V) before the first piece; None for zeros.
    """
    (B, T, H, V), K = v.shape, key_width
    if pieces.is_first:
        o, last = run(v, state)
        return pieces.send(o, last), last
    rest = v.new_zeros(B, H, K, V, dtype=state_dtype(v))
    eye = torch.eye(K, dtype=rest.dtype, device=v.device).expand(B, H, K, K)
    both, ends = run(torch.cat([v, v.new_zeros(B, T, H, K)], -1), torch.cat([rest, eye], -1))
    (o, reads), (last, transition) = both.split([V, K], -1), ends.split([V, K], -1)
    (before,) = pieces.receive(rest)
    last = last + transition @ before
    o = pieces.send(o, last)
    return o + torch.einsum("bthk,bhkv->bthv", reads.to(before.dtype), before).to(o.dtype), last


def by_decay(
    pieces: Pieces,
    run: Run,
    q: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: Tensor | None,
    resets: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """A recurrence over matrices S (K, V) that only decay: A is the decay of the piece, M_t is q_t times that so far.

    Args:
        run: as of `by_transition`, called once.
        q: (B, T, G, K).
        v: (B, T, H, V).
        log_decay: (B, T, H), (B, T, H, K) or None.
        resets: (B, T).
    """
    if pieces.is_first:
        o, last = run(v, state)
        return pieces.send(o, last), last
    (B, T, H, V), G, dtype = v.shape, q.shape[2], state_dtype(q, v)
    o, last = run(v, None)
    decay = v.new_ones(B, T, 1, 1, 1, dtype=dtype)
    if log_decay is not None:
        decay = log_decay.to(dtype).cumsum(1).exp().reshape(B, T, G, H // G, -1)
    if resets is not None:
        decay = blank(decay, resets.cumsum(1) > 0)
    (before,) = pieces.receive(v.new_zeros(B, H, q.shape[-1], V, dtype=dtype))
    total = decay[:, -1].expand(B, G, H // G, -1).flatten(1, 2)[..., None]  # (B, H, K or 1, 1)
    last = last + total * before
    o = pieces.send(o, last)
    grouped, q = before.unflatten(1, (G, H // G)), q.to(dtype) * scale
    if decay.shape[-1] == 1:
        read = torch.einsum("btgk,bgrkv->btgrv", q, grouped) * decay
    else:
        read = torch.einsum("btgrk,bgrkv->btgrv", q[:, :, :, None] * decay, grouped)
    return o + read.flatten(2, 3).to(o.dtype), last


def by_factors(pieces: Pieces, run: Run, b: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """An elementwise recurrence h_t = a_t h_{t-1} + b_t: A and M are the products of a, which it gives for b = 0.

    Args:
        run: (b (B, T, ...), state (B, ...)) to (all h, the last).
    """
    if pieces.is_first:
        h, last = run(b, state)
        return pieces.send(h, last), last
    h, last = run(b, None)
    factors, total = run(torch.zeros_like(b), torch.ones_like(last))
    (before,) = pieces.receive(torch.zeros_like(last))
    last = last + total * before
    h = pieces.send(h, last)
    return h + (factors.to(before.dtype) * before[:, None]).to(h.dtype), last


def edge_before(
    pieces: Pieces, x: Tensor, reach: int, state: Tensor | None, resets: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The last `reach` inputs before this piece, (B, reach, D), and x, through which their gradient comes.

    Args:
        x: (B, T, D), the inputs of this piece.
        state: (B, reach, D), those before the first piece; None for zeros.
        resets: (B, T) bool, true where a document starts: it has nothing before it.
    """
    before = x.new_zeros(len(x), reach, x.shape[2]) if state is None else state
    if not reach:
        return before, x
    if min(pieces.sizes) >= reach:  # the inputs of one piece are enough, so that all pass theirs on at once
        return pieces.shift(_last(x, reach, resets), before), x
    (before,) = pieces.receive(before)
    return before, pieces.send(x, _last(torch.cat([before, x], 1), reach, resets))


def _last(x: Tensor, reach: int, resets: Tensor | None) -> Tensor:
    """The last inputs (B, reach, D), zeros where they are of another document than the last one."""
    last = x[:, -reach:]
    if resets is None:
        return last
    document = F.pad(resets.cumsum(1), (max(x.shape[1] - resets.shape[1], 0), 0))
    return blank(last, (document != document[:, -1:])[:, -reach:])
