"""Weights of one model put into another: names, shapes and words decide which fit, before a value is copied."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from zoo.backbone import Backbone
from zoo.core.errors import UsageError
from zoo.models.config import ModelConfig
from zoo.models.create import create_backbone, create_model
from zoo.models.ends import Ends
from zoo.models.weights import Transfer
from zoo.protocol import Mixer

VOCABULARY = ("embedding.weight", "head.weight", "head_bias")
"""Weights with a row for every token id."""


class Misfit(NamedTuple):
    """A weight that was to be taken and does not fit, and why."""

    name: str
    why: str


def check_plain(model: Ends | Backbone, what: str) -> None:
    """Refuses a model that has other weights than its config says: one with adapters, pruned or parametrized.

    Raises:
        UsageError: it names the first weight that is too many or missing.
    """
    made = outline(model.config) if isinstance(model, Ends) else outline_of_layers(model.config)
    own, expected = model.state_dict(), made.state_dict()
    for name in [*own, *expected]:
        if name not in own or name not in expected or own[name].shape != expected[name].shape:
            reason = "an adapter, a pruned or a parametrized weight: merge or remove it first"
            raise UsageError(f"{what}: {name} of this model is not what its config says, as with {reason}.")


def outline(config: ModelConfig) -> Ends:
    """The model of a config without memory for its weights."""
    with torch.device("meta"):
        return create_model(config)


def outline_of_layers(config: ModelConfig) -> Backbone:
    """The backbone of a config without memory for its weights."""
    with torch.device("meta"):
        return create_backbone(config)


def words_of(model: nn.Module) -> dict[str, Mixer]:
    """The mixers of a model by the name of their place; those within other mixers are left out."""
    found: dict[str, Mixer] = {}
    for name, module in model.named_modules():
        if isinstance(module, Mixer) and not any(name.startswith(f"{outer}.") for outer in found):
            found[name] = module
    return found


def plan(
    source: Ends, target: Ends, takes: Callable[[str], bool], *, resize: bool = False
) -> tuple[Transfer, list[Misfit]]:
    """What becomes of the weights of a model that are put into another one, and which of them do not fit.

    Args:
        source: the model that the weights are from; both may be outlines.
        target: the model that the weights are put into.
        takes: whether a weight of this name is to be taken.
        resize: take weights with a row for every token id though the number of rows differs.

    Returns:
        A transfer in which what does not fit is fresh or left out, and a list of it.
    """
    theirs, ours = source.state_dict(), target.state_dict()
    words, own = words_of(source), words_of(target)
    others = {p: (words[p].name, m.name) for p, m in own.items() if p in words and words[p].name != m.name}
    kept, resized, fresh, misfits = [], [], [], []
    for name, tensor in ours.items():
        why = None
        if not takes(name):
            fresh.append(name)
            continue
        if place := next((p for p in others if name.startswith(f"{p}.")), None):
            why = "of {} there and of {} here".format(*others[place])
        elif name not in theirs:
            why = "not there"
        elif theirs[name].shape == tensor.shape:
            kept.append(name)
        elif resize and name in VOCABULARY and theirs[name].shape[1:] == tensor.shape[1:]:
            resized.append(name)
        else:
            why = f"{tuple(theirs[name].shape)} there and {tuple(tensor.shape)} here"
        if why is not None:
            fresh.append(name)
            misfits.append(Misfit(name, why))
    gone = [n for n in theirs if n not in ours and takes(n) and not any(n.startswith(f"{p}.") for p in others)]
    misfits += [Misfit(name, "not in the model") for name in gone]
    left = [name for name in theirs if name not in kept and name not in resized]
    return Transfer(tuple(kept), tuple(resized), tuple(fresh), tuple(left)), misfits


@torch.no_grad()
def put(weights: Mapping[str, Tensor], model: nn.Module, transfer: Transfer) -> None:
    """Copy the weights that a transfer keeps or resizes into a model, whose own dtypes and devices stay."""
    slots = model.state_dict()
    for name in (*transfer.kept, *transfer.resized):
        slot, given = slots[name], weights[name]
        if slot.shape == given.shape:
            slot.copy_(given)
        else:
            rows = min(len(slot), len(given))
            slot[:rows].copy_(given[:rows])


__all__ = ["VOCABULARY", "Misfit", "check_plain", "outline", "outline_of_layers", "plan", "put", "words_of"]
