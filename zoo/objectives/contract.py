"""What the methods of an objective return is checked, so that a mistake in one's own is named where it is made."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor

from zoo.core.errors import UsageError


def encoded(kind: type, method: Callable[..., Any]) -> Callable[..., Any]:
    """`encode`, whose result is checked."""

    @functools.wraps(method)
    def checked(self: Any, *args: Any, **more: Any) -> Any:
        found = method(self, *args, **more)
        if not isinstance(found, kind):
            raise _wrong(self, "encode", "returned", found, "an Encoded(tokens, positions, targets)")
        return found

    return checked


def updating(kind: type, method: Callable[..., Any]) -> Callable[..., Any]:
    """`updates`, each of which is checked."""

    @functools.wraps(method)
    def checked(self: Any, *args: Any, **more: Any) -> Iterator[Any]:
        expected = "an Update(loss, logits, targets, rows)"
        for update in _each(self, "updates", method(self, *args, **more), kind, expected):
            if update.loss.ndim:
                raise _wrong(self, "updates", "yielded a loss", update.loss, "one number: take its mean")
            yield update

    return checked


def solving(kind: type, method: Callable[..., Any]) -> Callable[..., Any]:
    """`solve`, each of whose frames is checked."""

    @functools.wraps(method)
    def checked(self: Any, *args: Any, **more: Any) -> Iterator[Any]:
        return _each(self, "solve", method(self, *args, **more), kind, "a Frame(tokens, hidden)")

    return checked


def evaluated(method: Callable[..., Any]) -> Callable[..., Any]:
    """`evaluate`, whose result is checked."""

    @functools.wraps(method)
    def checked(self: Any, model: Any, batch: Any) -> Any:
        found = method(self, model, batch)
        pair = isinstance(found, tuple) and len(found) == 2 and all(isinstance(part, Tensor) for part in found)
        if not pair or found[0].shape != batch.targets.shape:
            given = tuple(found[0].shape) if pair else found
            expected = f"(predictions {tuple(batch.targets.shape)}, loss)"
            raise _wrong(self, "evaluate", "returned predictions" if pair else "returned", given, expected)
        return found

    return checked


def _each(objective: Any, method: str, found: Any, kind: type, expected: str) -> Iterator[Any]:
    """What a method yields, one or more of a kind."""
    if not isinstance(found, Iterable) or isinstance(found, Tensor):
        raise _wrong(objective, method, "returned", found, f"to yield {expected}")
    each = None
    for each in found:
        if not isinstance(each, kind):
            raise _wrong(objective, method, "yielded", each, expected)
        yield each
    if each is None:
        raise _wrong(objective, method, "yielded", "nothing", f"at least one {kind.__name__}")


def _wrong(objective: Any, method: str, did: str, found: Any, expected: str) -> UsageError:
    is_shape = isinstance(found, tuple) and all(isinstance(n, int) for n in found)
    given = found if is_shape or isinstance(found, str) else f"a {type(found).__name__}"
    if isinstance(found, Tensor):
        given = f"a Tensor {tuple(found.shape)}"
    name = getattr(objective, "name", type(objective).__name__)
    return UsageError(f"The objective {name!r}: {method} {did} {given}, expected {expected}.")
