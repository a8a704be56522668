"""States: what every layer carries from one piece of a sequence to the next, and what can be done with any of them.

Shapes: B batch, T time. A state has the batch first in every tensor, so that all of this works for any combination of
mixers, and for the state of a whole model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

State = Any
"""A NamedTuple of tensors (or a nest of them), batch first in every leaf; `()` when stateless."""


def tree_bytes(tree: Any) -> int:
    """Bytes of all tensors of a state."""
    return sum(t.numel() * t.element_size() for t in tree_leaves(tree) if isinstance(t, Tensor))


def fork(state: State) -> State:
    """A copy of `state`: consuming one does not change the other."""
    return tree_map(torch.clone, state)


def select(state: State, rows: Tensor | Sequence[int]) -> State:
    """The state of the batch rows `rows` (indices, repeats allowed, or a bool mask), copied."""

    def pick(leaf: Tensor) -> Tensor:
        index = torch.as_tensor(rows, device=leaf.device)
        return leaf[index].clone()

    return tree_map(pick, state)


def join(states: Sequence[State]) -> State:
    """One state with the rows of all states, in order. Buffers of unequal capacity are padded with zeros."""
    if not states:
        raise ValueError("join needs at least one state.")

    def cat(*leaves: Tensor) -> Tensor:
        if len({leaf.shape[1:] for leaf in leaves}) > 1:
            size = max(leaf.shape[1] for leaf in leaves)
            leaves = tuple(grow(leaf, size) for leaf in leaves)
        return torch.cat(leaves)

    return tree_map(cat, *states)


def grow(buffer: Tensor, size: int) -> Tensor:
    """`buffer` (B, n, ...) with zeros appended to (B, size, ...)."""
    if buffer.shape[1] >= size:
        return buffer
    return torch.cat([buffer, buffer.new_zeros(buffer.shape[0], size - buffer.shape[1], *buffer.shape[2:])], 1)


def canonical(state: State) -> State:
    """The written part of a state in time order: two states of the same past compare equal.

    A state type whose tensors have unwritten rows or a rotated order defines `canonical(self)`; all others are
    canonical as they are.
    """
    if hasattr(state, "canonical"):
        return state.canonical()
    if isinstance(state, tuple):
        parts = [canonical(part) for part in state]
        return type(state)(*parts) if hasattr(state, "_fields") else tuple(parts)
    return state


def document_positions(start: Tensor, length: int, resets: Tensor | None) -> Tensor:
    """Position of each of `length` new steps in its document, (B, T) int64.

    Args:
        start: (B,) int64, number of steps of the current document already seen.
        length: T.
        resets: (B, T) bool, true where a document starts.
    """
    t = torch.arange(length, device=start.device)
    if resets is None:
        return start[:, None] + t
    last = torch.where(resets, t, -1).cummax(1).values
    return torch.where(last >= 0, t - last, start[:, None] + t)


def next_position(positions: Tensor, start: Tensor, lengths: Tensor | None) -> Tensor:
    """Number of steps of the current document after a pass, (B,): 1 + the position of each row's last valid step.

    Args:
        positions: (B, T) as from `document_positions`.
        start: (B,) as given to it; kept by rows of length 0.
        lengths: (B,) valid steps, or None for all.
    """
    if lengths is None:
        return positions[:, -1] + 1
    last = positions.gather(1, (lengths - 1).clamp(min=0)[:, None]).squeeze(1) + 1
    return torch.where(lengths > 0, last, start)
