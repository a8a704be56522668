"""Evaluation mode that several users of a model can ask for at once, in any order, from any thread."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from threading import Lock
from typing import Protocol
from weakref import WeakKeyDictionary

from torch import nn

_lock = Lock()
_held: WeakKeyDictionary[nn.Module, tuple[int, bool]] = WeakKeyDictionary()
"""How many ask for a module's evaluation mode, and its flag before the first of them."""


class HasModules(Protocol):
    def modules(self) -> Iterator[nn.Module]: ...


@contextlib.contextmanager
def evaluation_mode(model: HasModules) -> Iterator[None]:
    """The model and all its modules in evaluation mode; the last to leave gives every module its own flag back."""
    with _lock:
        modules = list(model.modules())
        for module in modules:
            users, before = _held.get(module, (0, module.training))
            _held[module] = users + 1, before
            module.training = False
    try:
        yield
    finally:
        with _lock:
            for module in modules:
                users, before = _held.pop(module)
                if users > 1:
                    _held[module] = users - 1, before
                else:
                    module.training = before
