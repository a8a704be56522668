"""How a parameter is trained where that differs from the rest: its module says so, by the parameter's name.

The rules belong to modules, not to tensors, so that they last where a parameter is replaced: by a copy of the model,
by weights that are first given memory (`to_empty`), by shards.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import nn


class Rule(NamedTuple):
    """What the optimizer does with a parameter.

    Attributes:
        weight_decay: whether it is decayed, if it is a matrix; vectors and embeddings never are.
        lr_scale: factor on its learning rate.
        by_row: whether it is a table of which a batch uses few rows, so that each row may be trained by itself.
    """

    weight_decay: bool = True
    lr_scale: float = 1.0
    by_row: bool = False


def set_rule(
    module: nn.Module, name: str, *, weight_decay: bool = True, lr_scale: float = 1.0, by_row: bool = False
) -> None:
    """Sets how `module`'s own parameter `name` is trained; one that is None, or comes later, may have a rule too."""
    module.__dict__.setdefault("_parameter_rules", {})[name] = Rule(weight_decay, lr_scale, by_row)


def rules_of(model: nn.Module) -> dict[int, Rule]:
    """The rules of a model's parameters by `id`; those that have none are left out."""
    found = {}
    for module in model.modules():
        for name, rule in module.__dict__.get("_parameter_rules", {}).items():
            parameter = _parameter(module, name)
            if parameter is not None:
                found[id(parameter)] = rule
    return found


def _parameter(module: nn.Module, name: str) -> nn.Parameter | None:
    """A module's parameter, where pruning or a parametrization keeps the trained values under another name, too."""
    parametrized = getattr(module, "parametrizations", {})
    if name in parametrized:
        return getattr(parametrized[name], "original", None)
    return module._parameters.get(name) if name in module._parameters else module._parameters.get(f"{name}_orig")
