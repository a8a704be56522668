"""States after a long past: read for real, or made by hand where reading would take too long."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from zoo.benchmarks.cells import NOT_OFFERED, NoFigure
from zoo.models.generation import PREFILL_CHUNK

PIECE = PREFILL_CHUNK
"""Tokens read at a time."""


def tells_state(layer: Any, batch_size: int, context: int) -> int:
    """Bytes of the state that a layer says it has.

    Raises:
        NoFigure: a layer without a state to continue from.
    """
    told = layer.state_bytes(batch_size, context, torch.float32)
    if not layer.causal:
        raise NoFigure(NOT_OFFERED, "it looks ahead, so it has no state")
    if told is None:
        raise NoFigure(NOT_OFFERED, "a public layer whose state is its own affair")
    return int(told)


def grows(layer: Any) -> bool:
    """Whether the state has a size that grows with the context."""
    return tells_state(layer, 1, 2**10) != tells_state(layer, 1, 2**20)


def at_context(layer: Any, context: int, *, room: int, batch_size: int = 1) -> tuple[Any, str]:
    """A state after `context` steps made by hand, and how: "random cache" or, where it has no cache, "measured".

    Tensors with a capacity hold random numbers in the rows that would be written, counts of steps are `context`; all
    else is at rest.
    """
    leaves, spec = tree_flatten(layer.init_state(batch_size, capacity=context + room))
    smallest = tree_leaves(layer.init_state(batch_size, capacity=1))
    axes = [_capacity_axis(leaf, least) for leaf, least in zip(leaves, smallest, strict=True)]
    if not any(axis is not None for axis in axes):
        return tree_unflatten(leaves, spec), "measured"
    for leaf, axis in zip(leaves, axes, strict=True):
        if axis is not None:
            written = leaf.narrow(axis, 0, min(context, leaf.shape[axis]))
            written.normal_(generator=torch.Generator(leaf.device).manual_seed(0))
        elif not leaf.is_floating_point():
            leaf.fill_(context)
    return tree_unflatten(leaves, spec), "random cache"


def _capacity_axis(leaf: Tensor, least: Tensor) -> int | None:
    """Where a tensor differs in shape from the one at a capacity of 1."""
    return next((axis for axis, (a, b) in enumerate(zip(leaf.shape, least.shape, strict=True)) if a != b), None)
