"""Evaluations in which processes call a model unequally often, though every call needs all of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from zoo.backbone import Backbone
from zoo.models.modes import evaluation_mode
from zoo.protocol import Context
from zoo.training.group import Group


@contextlib.contextmanager
def called_together(model: nn.Module, group: Group, device: torch.device) -> Iterator[None]:
    """Each process may call the model within, without gradients, as often as it likes; all leave with the last one.

    Before each pass through the layers a process announces it. One that is done passes a single step of zeros through
    the same layers, so that it takes part in what they exchange, until all are done.
    """
    networks = [module for module in model.children() if isinstance(module, Backbone)]

    def announcing(i: int) -> Any:
        def announce(*_: Any) -> None:
            group.largest(i + 1, torch.is_autocast_enabled(device.type))

        return announce

    hooks = [network.register_forward_pre_hook(announcing(i)) for i, network in enumerate(networks)]
    try:
        yield
        for hook in hooks:
            hook.remove()
        with group.contact(), torch.no_grad(), evaluation_mode(model):
            while (told := group.largest(0, 0))[0]:
                number, autocast = told
                with torch.autocast(device.type, enabled=bool(autocast), dtype=torch.bfloat16):
                    _pass(networks[number - 1], device)
    finally:
        for hook in hooks:
            hook.remove()


def _pass(network: Backbone, device: torch.device) -> None:
    """One step of zeros through all layers."""
    dtype = next(network.parameters()).dtype
    x = torch.zeros(1, 1, network.d_model, device=device, dtype=dtype)
    network(x, None, Context(tokens=torch.zeros(1, 1, dtype=torch.int64, device=device)))


__all__ = ["called_together"]
