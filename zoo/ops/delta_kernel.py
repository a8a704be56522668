"""The compiled form of the delta rule and of DPLR: `kernels/delta.cpp` as an operator with a backward pass.

One kernel serves both, since they differ only in what is read and written: the delta rule reads the state for k and
writes back the difference to what it should have read; DPLR reads it for a, writes that for b, and v for k.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zoo.ops import heads_pass, sizes
from zoo.ops.bridge import Operator
from zoo.ops.common import Heads, blank
from zoo.ops.kernel import Call, Kernel

CACHE = 1 << 18  # bytes that the states of one task of the forward pass may take
LANES = 16  # what the sizes of kept states are multiples of


KERNEL = Kernel("delta", sizes={"STEPS": LANES})


def compiled_delta(
    heads: Heads, scale: float, a: Tensor | None = None, b: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """o (B, T, G, R, V) and S_T (B, G, R, K, V): of DPLR where a, b (B, T, G, R, K) are given, else of the delta rule.

    All of a chunk stays in the cache, and only one state a chunk is kept for the gradients. Without gradients small
    states go through the sequence a few steps at a time (`heads_pass`).
    """
    q, k, v, g, beta, state, resets = heads
    if a is not None:  # the kernel has DPLR with one decay a channel
        g = a.new_zeros(1).expand(a.shape) if g is None else g.expand(a.shape)
    elif g is not None and g.shape[-1] == 1:
        g = g.squeeze(-1)
    steps = [None if x is None else x.flatten(2, 3) for x in (v, beta, a, b, g)]
    o, last, _ = _delta(q, k, *steps, state.flatten(1, 2), resets, scale)
    return o.unflatten(2, v.shape[2:4]), last.unflatten(1, v.shape[2:4])


def _forward(call: Call, q, k, v, beta, a, b, g, state, resets, scale, keep) -> tuple[Tensor | None, ...]:
    """o, S_T and, where they are to be kept, the states before each chunk. Heads lie side by side, as in the ops."""
    if not keep and heads_pass.takes("delta_rule" if a is None else "dplr", q, v, g):
        by_steps = heads_pass.KERNEL if call is KERNEL else call
        return *heads_pass.heads_pass(by_steps, q, k, v, beta, a, b, g, state, resets, scale), None
    (B, T, H, V), (G, K), chunk = v.shape, q.shape[2:], _chunk(q)
    o, last = torch.empty_like(v), torch.empty_like(state)
    kept = v.new_empty(B, H, -(-T // chunk), _padded(K), _padded(V)) if keep else None
    reads = (q, k, v, beta, a, b, g, state, resets)
    numbers = (B, T, G, H, K, V, chunk, heads_pass.spans_of(B, H, 4 * K * V, CACHE), _per_channel(g), scale)
    call("delta_forward", reads, (o, last, kept), *numbers)
    return o, last, kept


def _backward(call: Call, q, k, v, beta, a, b, g, resets, kept, d_o, d_last, scale) -> list[Tensor | None]:
    (B, T, H, V), (G, K) = v.shape, q.shape[2:]
    parts = _parts(B * G, H // G)
    out: list[Any] = [None if x is None else torch.empty_like(x) for x in (q, k, v, beta, a, b, g, d_last)]
    d_q, d_k = (q.new_empty(B, T, G, parts, K) if parts > 1 else x for x in out[:2])
    reads = (q, k, v, beta, a, b, g, resets, kept, d_o, d_last)
    numbers = (B, T, G, H, K, V, _chunk(q), parts, _per_channel(g), scale)
    call("delta_backward", reads, (d_q, d_k, *out[2:]), *numbers)
    return [d_q.sum(3), d_k.sum(3), *out[2:]] if parts > 1 else out


def _plain(q, k, v, beta, a, b, g, state, resets, scale) -> tuple[Tensor, Tensor]:
    """The operator `zoo::delta` in plain PyTorch, one step at a time."""
    q, k = (x.repeat_interleave(v.shape[2] // x.shape[2], 2) for x in (q, k))
    decays = None if g is None else (g if g.ndim == 4 else g.unsqueeze(-1)).exp().unsqueeze(-1)  # (B, T, H, K or 1, 1)
    outputs = []
    for t in range(v.shape[1]):
        if resets is not None:
            state = blank(state, resets[:, t])
        q_t, k_t, v_t = (x[:, t].unsqueeze(-2) for x in (q, k, v))  # (B, H, 1, K or V)
        read = None if a is None else a[:, t].unsqueeze(-2) @ state
        state = state if decays is None else decays[:, t] * state
        if read is None:
            state = state + k_t.mT * (beta[:, t, ..., None] * (v_t - k_t @ state))
        else:
            state = state + b[:, t].unsqueeze(-1) * read + k_t.mT * v_t
        outputs.append(scale * (q_t @ state).squeeze(-2))
    return torch.stack(outputs, 1), state


_delta = Operator(
    KERNEL,
    """delta(Tensor q, Tensor k, Tensor v, Tensor? beta, Tensor? a, Tensor? b, Tensor? g, Tensor state, Tensor? resets,
    float scale, bool keep) -> (Tensor o, Tensor last, Tensor kept)""",
    _forward,
    _backward,
    gradients="q k v beta a b g state",
    plain=_plain,
)


def _parts(groups: int, heads: int) -> int:
    """Into how many parts the heads of a group are cut, so that all threads have some: a divisor of `heads`."""
    wanted = -(-torch.get_num_threads() // groups)
    return next(n for n in range(1, heads + 1) if heads % n == 0 and (n >= wanted or n == heads))


def _chunk(q: Tensor) -> int:
    return sizes.chunk("delta_rule", "compiled", q.shape[3])


def _padded(width: int) -> int:
    return -(-width // LANES) * LANES


def _per_channel(g: Tensor | None) -> bool:
    return g is not None and g.ndim == 4
