"""Weights of one model put into another."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from zoo.core.errors import UsageError
from zoo.models.create import create_model
from zoo.models.ends import Ends
from zoo.models.weights import Transfer
from zoo.protocol import Mixer

VOCABULARY = ("embedding.weight", "head.weight", "head_bias")
"""Weights with a row for every token id."""


def check_plain(model: nn.Module, what: str) -> None:
    """Refuses a model that has other weights than its config says: one with adapters, pruned or parametrized.

    Raises:
        UsageError: it names the first weight that is too many or missing.
    """
    own, expected = model.state_dict(), outline(model.config).state_dict()  # type: ignore[arg-type]
    for name in [*own, *expected]:
        if name not in own or name not in expected or own[name].shape != expected[name].shape:
            reason = "an adapter, a pruned or a parametrized weight: merge or remove it first"
            raise UsageError(f"{what}: {name} of this model is not what its config says, as with {reason}.")


def outline(config: Any) -> Ends:
    """The model of a config without memory for its weights."""
    with torch.device("meta"):
        return create_model(config)


def words_of(model: nn.Module) -> dict[str, Mixer]:
    """The mixers of a model by the name of their place; those within other mixers are left out."""
    found: dict[str, Mixer] = {}
    for name, module in model.named_modules():
        if isinstance(module, Mixer) and not any(name.startswith(f"{outer}.") for outer in found):
            found[name] = module
    return found


@torch.no_grad()
def put(
    weights: Mapping[str, Tensor], model: nn.Module, takes: Callable[[str], bool], *, resize: bool = False
) -> Transfer:
    """Put the weights of the names that `takes` accepts into a model; all others keep the model's own values.

    Args:
        weights: by name.
        model: the model, which is changed. Its weights keep their dtype and device.
        takes: whether a weight of this name is taken.
        resize: take weights with a row for every token id though the number of rows differs.

    Raises:
        UsageError: a weight of another shape is to be taken.
    """
    kept, resized, fresh = [], [], []
    own = model.state_dict()
    for name, slot in own.items():
        if name not in weights or not takes(name):
            fresh.append(name)
            continue
        given = weights[name]
        if given.shape == slot.shape:
            slot.copy_(given)
            kept.append(name)
        elif resize and name in VOCABULARY and given.shape[1:] == slot.shape[1:]:
            rows = min(len(given), len(slot))
            slot[:rows] = given[:rows].to(slot.device, slot.dtype)
            resized.append(name)
        else:
            raise UsageError(f"{name} is {tuple(given.shape)} there and {tuple(slot.shape)} in the model.")
    left = [name for name in weights if name not in own or not takes(name)]
    return Transfer(tuple(kept), tuple(resized), tuple(fresh), tuple(left))


__all__ = ["VOCABULARY", "check_plain", "outline", "put", "words_of"]
