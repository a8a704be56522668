"""Models without their first weights."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from zoo.core.errors import UsageError


class Uninitialised(TorchFunctionMode):
    """Skips the random inits of weights that are about to be read, or only counted."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def where_none_are_held() -> contextlib.AbstractContextManager[Any]:
    """`Uninitialised` where the default device is "meta", where an init takes a millisecond for no numbers."""
    return Uninitialised() if torch.get_default_device().type == "meta" else contextlib.nullcontext()


class HasParameters(Protocol):
    def parameters(self) -> Iterator[nn.Parameter]: ...


def require_numbers(model: HasParameters, doing: str) -> None:
    """Refuse a model whose weights are on the device "meta", which holds shapes and no numbers.

    Raises:
        UsageError: it is one; `doing` names the function that needs them.
    """
    if any(p.is_meta for p in model.parameters()):
        raise UsageError(f'{doing} needs weights, and this model, on the device "meta", has their shapes alone.')
