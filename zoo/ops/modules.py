"""When the weights of a layer may be read in place of calling it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as hooks
from torch.utils.module_tracker import ModuleTracker

from zoo.ops.common import state_dtype


def bare(*layers: nn.Module, cls: type[nn.Module] = nn.Linear) -> bool:
    """Whether each is of exactly this class and nothing is attached to it, so that to read its weights is to call it.

    Attached are: hooks, its own or those of all modules; a `forward` of its own; what replaces its weight at every
    call, such as pruning; a parametrization, an adapter or a quantised layer in its place; a weight of another kind.
    """
    for layer in layers:
        if type(layer) is not cls or layer._forward_hooks or layer._forward_pre_hooks:
            return False
        if layer._backward_hooks or layer._backward_pre_hooks or "forward" in layer.__dict__:
            return False
        for parameter in layer._parameters.values():
            if parameter is not None and type(parameter) is not nn.Parameter and type(parameter) is not Tensor:
                return False
    return not _watched()


def _watched() -> bool:
    """Whether there are hooks on all modules, other than those by which torch counts FLOPs, which need only names."""
    before, after = hooks._global_forward_pre_hooks, hooks._global_forward_hooks
    if hooks._global_backward_hooks or hooks._global_backward_pre_hooks:
        return True
    return bool(before or after) and not all(
        isinstance(getattr(hook, "__self__", None), ModuleTracker) for hook in (*before.values(), *after.values())
    )


def widely(layer: Any, x: Tensor) -> Tensor:
    """layer(x) of a linear layer or a norm, in float32 at least; where something is attached, in the layer's dtype."""
    dtype = state_dtype(x)
    if type(layer) not in WIDE or not bare(layer, cls=type(layer)):
        return narrowly(layer, x).to(dtype)
    weight, bias = (None if p is None else p.to(dtype) for p in (layer.weight, layer.bias))
    return WIDE[type(layer)](layer, x.to(dtype), weight, bias).to(dtype)


def _group_norm(layer: nn.GroupNorm, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Of rows (N, C) by `layer_norm`, which is a third of `group_norm`'s time on a CPU."""
    if x.ndim != 2 or weight is None or bias is None:
        return F.group_norm(x, layer.num_groups, weight, bias, layer.eps)
    groups = x.unflatten(1, (layer.num_groups, -1))
    return torch.addcmul(bias, F.layer_norm(groups, groups.shape[2:], eps=layer.eps).flatten(1), weight)


WIDE: dict[type, Callable[..., Tensor]] = {
    nn.Linear: lambda layer, x, weight, bias: F.linear(x, weight, bias),
    nn.LayerNorm: lambda layer, x, weight, bias: F.layer_norm(x, layer.normalized_shape, weight, bias, layer.eps),
    nn.GroupNorm: _group_norm,
}


def narrowly(layer: nn.Module, *inputs: Tensor) -> Tensor:
    """layer(*inputs), those in the dtype of the layer's parameters where it has any."""
    own = next((p.dtype for p in layer.parameters() if p.is_floating_point()), inputs[0].dtype)
    return layer(*(x.to(own) for x in inputs))
