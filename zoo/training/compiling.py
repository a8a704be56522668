"""Compilation of a model's layers before its training, so that no step waits for it."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from zoo.models.ends import Ends


def compile_layers(model: Ends, loss: Callable[[], Tensor]) -> float:
    """Compile the layers by one pass forward and back, of which nothing stays, and return the seconds that it took.

    Args:
        model: whose layers are compiled where they stand.
        loss: runs the model on inputs of the shapes of training.
    """
    started, random = time.perf_counter(), torch.get_rng_state()
    backbone = model.backbone
    whole = not model.recompute or model.config.recursion is not None
    for module in [backbone] if whole else backbone.recomputed_parts():  # what is computed again is compiled within
        module.compile()
    buffers = [buffer.clone() for buffer in model.buffers()]
    loss().backward()
    model.zero_grad(set_to_none=True)
    for buffer, before in zip(model.buffers(), buffers, strict=True):
        buffer.copy_(before)
    torch.set_rng_state(random)
    return time.perf_counter() - started


__all__ = ["compile_layers"]
