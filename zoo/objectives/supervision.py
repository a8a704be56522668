"""Parts of deep supervision: weights of steps, stages of depth, and the winner among several candidates."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from zoo.models.modes import evaluation_mode
from zoo.models.recursive import RecursiveState
from zoo.objectives.base import Carry
from zoo.tasks.protocol import IGNORE

Count = Annotated[int, Field(ge=1)]
Stage = tuple[Count, Count, Count]
"""Batches, cycles and updates of a stage of a curriculum."""


def step_weights(decay: float, n: int) -> Tensor:
    """(n,) float32 weights of supervision steps, each `decay` times the one before, of mean 1."""
    weights = decay ** torch.arange(n, dtype=torch.float64)
    return (weights * n / weights.sum()).float()


def depth_at(stages: Sequence[Stage], batch: int) -> tuple[int, int] | None:
    """Cycles and updates of a batch, numbered from 0; None after the last stage."""
    for batches, cycles, updates in stages:
        if batch < batches:
            return cycles, updates
        batch -= batches
    return None


def noised(h: Tensor, deviation: float, generator: torch.Generator, n: int, rows: slice | Tensor) -> Tensor:
    """y or z (m, ...) of some rows of a batch, with normal noise of this deviation.

    Args:
        generator: of the noise, which is drawn for all rows of the batch, so that a row has the same one in any part.
        n: rows of the batch.
        rows: m of them, which y and z are of.
    """
    return h + deviation * torch.randn(n, *h.shape[1:], generator=generator)[rows].to(h)


def drawn_noise(deviation: float, seed: int, n: int, rows: Tensor) -> Callable[[Tensor], Tensor]:
    """Adds noise to y or z (m, ...) as `noised`, another at each call, by generators of the seed and those after it."""
    calls = itertools.count()
    return lambda h: noised(h, deviation, torch.Generator().manual_seed(seed + next(calls)), n, rows)


@torch.no_grad()
def winner(
    model: Any, carry: Carry, nats: Callable[[Tensor, Tensor], Tensor], how: dict[str, Any]
) -> tuple[RecursiveState, Tensor]:
    """The state whose next answer has the least loss, and the next z of all K candidates (n, K, ...).

    Args:
        model: of which each candidate is given one supervision step.
        carry: of n places: `tokens`, `targets`, their `answer`, which all candidates share, and `latents` (n, K, ...).
        nats: the losses (m,) of logits (m, V) for targets (m,).
        how: further arguments of `RecursiveModel.think`.
    """
    latents, targets, puzzles = carry["latents"], carry["targets"], carry.get("puzzles")
    n, K = latents.shape[:2]
    rows, cells = (targets != IGNORE).nonzero(as_tuple=True)
    state = RecursiveState(carry["answer"].repeat_interleave(K, 0), latents.flatten(0, 1))
    numbers = None if puzzles is None else puzzles.repeat_interleave(K, 0)
    losses = torch.zeros(n, K, dtype=torch.float32, device=latents.device)
    with evaluation_mode(model):
        thought = model.think(carry["tokens"].repeat_interleave(K, 0), state, puzzles=numbers, **how)
        for k, hidden in enumerate(thought.hidden.unflatten(0, (n, K)).unbind(1)):
            found = nats(model.logits(hidden[rows, cells]), targets[rows, cells])
            losses[:, k].index_add_(0, rows, found.to(losses.dtype))
    best = losses.argmin(1)
    first = RecursiveState(carry["answer"], latents[torch.arange(n, device=best.device), best])
    return first, thought.state.latents.unflatten(0, (n, K))


__all__ = ["Stage", "depth_at", "drawn_noise", "noised", "step_weights", "winner"]
