"""Which layers are the same one under several names: `mha`, `gqa` and `mqa` are at a width where each has one head."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from zoo.backbone import Backbone
from zoo.core.options import Options
from zoo.pattern import Word, create_mixer, parse
from zoo.protocol import Place

Make = Callable[[], nn.Module]
_OWN = ("forward", "step", "init_state")
_LONG = 16  # steps that two layers of one configuration are tried on
_LARGE = 2**26  # weights beyond which they are not, and count as the same


def layer_of(text: str, width: int, length: int | None = None) -> nn.Module:
    """The layer that a word or a pattern of several stands for, at a width.

    Raises:
        UsageError: an unknown word or option, or one that does not fit the width.
    """
    nodes = parse(text).nodes
    if len(nodes) == 1 and isinstance(word := nodes[0], Word) and not word.step.changed():
        return create_mixer(word.config, width, place=Place(length=length))
    return Backbone(parse(text), width, length=length)


def same_layers(texts: Iterable[str], width: int, length: int | None = None) -> list[list[str]]:
    """Words and patterns, those that are one layer at this width together, each group in the order given.

    What cannot be built is a group of its own.
    """
    groups: dict[Hashable, list[list[str]]] = {}
    for text in dict.fromkeys(texts):
        found = groups.setdefault(_signature(text, width, length) or ("alone", text), [])
        same = next((group for group in found if _alike(group[0], text, width, length)), None)
        if same is None:
            found.append([text])
        else:
            same.append(text)
    order = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    return sorted((group for found in groups.values() for group in found), key=lambda group: order[group[0]])


@functools.cache
def _signature(text: str, width: int, length: int | None) -> Hashable | None:
    """The resolved configuration of a layer, None where it cannot be built."""
    try:
        with torch.device("meta"):
            return resolved(layer_of(text, width, length))
    except Exception:  # of a text from elsewhere: whatever cannot be built has a row of its own
        return None


def resolved(layer: nn.Module) -> Hashable:
    """The configuration of a built layer with every default filled in, whatever it is called.

    That is, of it and of each module in it: the functions that compute, its options (as the layer settled them, where
    it keeps an attribute of an option's name), its other plain attributes, and the shapes of its tensors.
    """
    return tuple((path, *_own(module)) for path, module in layer.named_modules())


def _own(module: nn.Module) -> tuple[Hashable, ...]:
    plain = {k: v for k, v in vars(module).items() if k not in ("config", "training") and _is_plain(v)}
    config = getattr(module, "config", None)
    options = dict(config) if isinstance(config, Options) else {}
    settled = {k: getattr(module, k, v) if _is_plain(getattr(module, k, v)) else v for k, v in options.items()}
    facts = {k: v for k, v in {**settled, **plain}.items() if v is not None}  # an option that is not set, or not there
    functions = tuple(getattr(type(module), name, None) for name in _OWN)
    tensors = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    return functions, tuple(sorted((k, repr(v)) for k, v in facts.items())), tuple((n, t.shape) for n, t in tensors)


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str | torch.dtype)


@torch.no_grad()
def _alike(one: str, other: str, width: int, length: int | None) -> bool:
    """Whether two layers of one configuration have the same weights from one seed, and give the same for one input."""
    with torch.device("meta"):
        if sum(p.numel() for p in layer_of(one, width, length).parameters()) > _LARGE:
            return True
    found = []
    for text in (one, other):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            layer = layer_of(text, width, length).eval()
            x = torch.randn(1, min(_LONG, length or _LONG), width)
            for p in layer.parameters():  # a zero would hide what lies behind it
                p.add_(0.1 * torch.randn_like(p))
            found.append([layer(x)[0], *layer.state_dict().values()])
    return len(found[0]) == len(found[1]) and all(
        a.shape == b.shape and torch.equal(a, b) for a, b in zip(*found, strict=True)
    )


def joined(names: Sequence[str]) -> str:
    """The names of one layer as one: `gqa = mha`."""
    return " = ".join(names)
