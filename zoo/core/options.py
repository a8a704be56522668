"""Strict options: everything a user can set is a field of an `Options` class, which refuses what it does not know."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar, get_args

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from zoo.core.errors import UsageError, closest, quoted, unknown


def describe(error: ValidationError, model: type[BaseModel], what: str) -> str:
    """One line for a pydantic error: the first thing that is wrong, with the closest match and the full list."""
    # A name that is not known comes first: what is reported missing beside it is often the one that was meant.
    first = min(error.errors(include_url=False), key=lambda e: e["type"] != "extra_forbidden")
    path = [str(p) for p in first["loc"]]
    where = ".".join(path)
    if first["type"] == "extra_forbidden":
        owner = _model_at(model, path[:-1])
        allowed = list(owner.model_fields) if owner else []
        return str(
            unknown(f"option of {what}" if len(path) < 2 else f"key in {'.'.join(path[:-1])}", path[-1], allowed)
        )
    if first["type"] == "missing":
        return f"{what} needs {where!r}, which was not given."
    cause = (first.get("ctx") or {}).get("error")
    if isinstance(cause, UsageError):  # a validator of ours has already said it all
        return str(cause)
    message = first["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    prefix = f"{what}: {where}={quoted(first['input'])}" if where else f"{what}"
    hint = ""
    if first["type"] == "bool_type":
        message = "a boolean: true or false"
    elif first["type"] in ("model_type", "model_attributes_type") and (nested := _model_at(model, path)):
        message = f"a mapping of the keys {', '.join(nested.model_fields)}"
    if first["type"] == "literal_error" and isinstance(first["input"], str):
        hint = closest(
            first["input"], [w.strip("' ") for w in first["ctx"]["expected"].replace(" or ", ",").split(",")]
        )
    return f"{prefix} is not allowed: it should be {message}.{hint}" if where else f"{what}: {message}"


def _model_at(model: type[BaseModel] | None, path: list[str]) -> type[BaseModel] | None:
    for name in path:
        if model is None or name not in model.model_fields:
            return None
        annotation = model.model_fields[name].annotation
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        model = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)
    return model


MOST = 2**24
"""How large a whole number among options may be where its field names no other bound: above every size and count that a
model or a task of this kind has, and low enough for two of them to be multiplied in 64 bits."""


class Options(BaseModel):
    """Strict, frozen options: an unknown name, a wrong type or a number beyond any use is a `UsageError` at
    construction. A number of numpy's is taken as the Python number that it is."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
    _most: ClassVar[int] = MOST
    _label: ClassVar[str | None] = None
    """What messages call the options: the class keyword `label`, of a registered word its name."""

    def __init_subclass__(cls, *, label: str | None = None, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        cls._label = label or cls._label

    def __init__(self, **data: Any):
        try:
            super().__init__(**{name: _of_python(value) for name, value in data.items()})
        except ValidationError as error:
            what = type(self)._label or type(self).__name__
            raise UsageError(describe(error, type(self), what)) from None

    @model_validator(mode="after")
    def _is_within_reach(self) -> Any:
        bounded = _bounded(type(self))
        for name in type(self).model_fields:
            for value in _scalars(getattr(self, name)):
                told = ""
                if isinstance(value, str):
                    told = "hold no character NUL" if "\0" in value else ""
                elif abs(value) > self._most and name not in bounded:
                    told = f"be at most {self._most:,}"
                if told:
                    what = type(self)._label or type(self).__name__
                    raise UsageError(f"{what}: {name}={quoted(value)} is not allowed: it should {told}.")
        return self

    @classmethod
    def of(cls, value: Any) -> Any:
        """The options that a mapping spells; any other value as it is, for validation to judge."""
        return cls(**{str(k): v for k, v in value.items()}) if isinstance(value, Mapping) else value

    def given(self) -> dict[str, Any]:
        """The options that were named at construction, defaults or not, in order of declaration."""
        return {k: getattr(self, k) for k in type(self).model_fields if k in self.model_fields_set}

    def changed(self) -> dict[str, Any]:
        """The options that differ from their defaults, in order of declaration."""
        fields = type(self).model_fields
        return {
            k: getattr(self, k)
            for k, f in fields.items()
            if getattr(self, k) != f.get_default(call_default_factory=True)
        }


def unfrozen(options: type[Options]) -> str | None:
    """Which option of a class has a list, a set or a mapping as its default, which can be changed, in a few words."""
    for name, field in options.model_fields.items():
        if isinstance(field.get_default(call_default_factory=True), list | set | dict):
            return f"its option {name} is no constant: use a tuple"
    return None


def tuples(value: Any) -> Any:
    """YAML's lists as the tuples that strict options ask for, in mappings too."""
    if isinstance(value, Mapping):
        return {k: tuples(v) for k, v in value.items()}
    return tuple(map(tuples, value)) if isinstance(value, list | tuple) else value


@functools.cache
def _bounded(options: type[Options]) -> frozenset[str]:
    """The fields that say themselves how large they may be."""
    fields = options.model_fields.items()
    return frozenset(name for name, field in fields if _has_upper_bound([*field.metadata, field.annotation]))


def _has_upper_bound(parts: Iterable[Any]) -> bool:
    inner = [part for part in parts if not isinstance(part, str | int | float)]
    return any(
        getattr(part, "le", getattr(part, "lt", None)) is not None
        or _has_upper_bound([*getattr(part, "metadata", ()), *getattr(part, "__metadata__", ()), *get_args(part)])
        for part in inner
    )


def _scalars(value: Any) -> Iterator[int | str]:
    """The whole numbers and texts of an option's value; those in mappings are options of something else."""
    if isinstance(value, tuple | list):
        for part in value:
            yield from _scalars(part)
    elif isinstance(value, int | str) and not isinstance(value, bool):
        yield value


def _of_python(value: Any) -> Any:
    """A value, or those of a list, without numpy's types of number."""
    if type(value) in (tuple, list):
        return type(value)(part.item() if isinstance(part, np.generic) else part for part in value)
    return value.item() if isinstance(value, np.generic) else value
