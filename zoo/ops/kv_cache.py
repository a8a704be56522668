"""The cache of attention: keys and values of the current document, written at the end or in a ring."""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from zoo.ops import common
from zoo.ops.common import blank
from zoo.ops.derivatives import batched, transformed
from zoo.states import document_positions, grow, next_position

INITIAL_CAPACITY = 256


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


class DecayingCache(NamedTuple):
    """What `KVCache` holds, and the decays of `attention` with `log_decay`.

    Attributes:
        k: (B, N, G, K), unwritten rows zero.
        v: (B, N, G, V), likewise.
        log_decay: (B, N, H), likewise, float32 at least. Sums are taken backwards from a query, so that those of near
            keys are exact at any length.
        length: (B,) int64, steps of the current document so far, those that a window has dropped included.
    """

    k: Tensor
    v: Tensor
    log_decay: Tensor
    length: Tensor

    def canonical(self) -> DecayingCache:
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


def init_decaying_cache(
    batch_size: int,
    n_groups: int,
    key_width: int,
    n_heads: int,
    *,
    capacity: int | None = None,
    window: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> DecayingCache:
    """An empty cache with decays of `n_heads` heads, as `init_cache`; values are as wide as keys."""
    k, v, length = init_cache(
        batch_size, n_groups, key_width, key_width, capacity=capacity, window=window, device=device, dtype=dtype
    )
    decays = torch.zeros(batch_size, k.shape[1], n_heads, device=device, dtype=common.state_dtype(k))
    return DecayingCache(k, v, decays, length)


@common.without_autocast
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
        cache = with_room(cache, T, length, window)
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


def with_room(cache: Cache, n_steps: int, length: Tensor, window: int | None) -> Cache:
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


def room_for_step(cache: Cache, window: int | None) -> Cache:
    """The cache with a row for one more step."""
    rows = cache[0].shape[1]
    if rows == window or int(cache[-1].max()) < rows:
        return cache
    return with_room(cache, 1, cache[-1] + 1, window)


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
