"""Stacks of layers for tests that write their sums out by hand, and what these tests compare."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import zoo
from zoo.backbone import Backbone
from zoo.objectives.base import with_losses
from zoo.pattern import parse
from zoo.protocol import Context, Place

D, EPS = 16, 1e-5


def backbone(pattern: str, **options) -> Backbone:
    """A stack in float64 whose weights are off their inits."""
    torch.manual_seed(0)
    stack = Backbone(parse(pattern), D, **options).double()
    with torch.no_grad():
        for p in stack.parameters():
            p += 0.1 * torch.randn_like(p)
    return stack


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def places_of(monkeypatch: pytest.MonkeyPatch, pattern: str, **options) -> tuple[Backbone, list[Place]]:
    """A stack, and the places of its words in the order in which they were made."""
    places: list[Place] = []

    def make(config, d_model, place):
        places.append(place)
        return zoo.create_mixer(config, d_model, place=place)

    monkeypatch.setattr("zoo.steps.create_mixer", make)
    return backbone(pattern, **options), places


def counted_flops(stack: Backbone) -> int:
    """Matmul FLOPs of the fifth token, as torch counts them."""
    state = stack.init_state(1, capacity=5)
    with torch.no_grad():
        _, state = stack(torch.randn(1, 4, D), state)
        with FlopCounterMode(display=False) as counter:
            stack.step(torch.randn(1, D), state)
    return counter.get_total_flops()


def losses_by_hand(body: Backbone, x: torch.Tensor, n: int) -> list[torch.Tensor]:
    """The losses that n runs of a body leave, one after the other."""
    losses: list[torch.Tensor] = []
    for _ in range(n):
        own = Context()
        x, _ = body(x, None, own)
        losses += own.losses
    return losses


def gradients(model, *, recompute: bool) -> list[torch.Tensor | None]:
    """Of all parameters, of a loss over some tokens and of what layers add to it."""
    model.recompute = recompute
    context = Context()
    with_losses(model(torch.arange(10).view(2, 5), None, context)[0].sin().sum(), context).backward()
    return [p.grad for p in model.parameters()]
