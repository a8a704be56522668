"""A registered name with options, `mhc(streams=3)`: how norms and residual kinds are written, as words are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from zoo.core.errors import UsageError, quoted
from zoo.core.options import Options
from zoo.core.registry import Registry, split_spec
from zoo.pattern.literals import Reader, literal_text


class Named(NamedTuple):
    """A registered name, and options of its class."""

    name: str
    config: Options

    @property
    def text(self) -> str:
        """The text that reads back as this; options at their defaults are left out."""
        options = ", ".join(f"{k}={literal_text(v)}" for k, v in self.config.changed().items())
        return f"{self.name}({options})" if options else self.name


def read_named(registry: Registry[Any], value: Any) -> Named:
    """What a text, `mhc` or `mhc(streams=3)`, or a mapping with the key `name` stands for.

    Raises:
        UsageError: an unknown name or option, or none of these forms.
    """
    if not isinstance(value, str | Mapping):
        raise UsageError(f"A {registry.kind} is a name, with its options in brackets, not {quoted(value)}.")
    if isinstance(value, Mapping):
        name, options = split_spec(value, {}, registry.kind)
    else:
        reader = Reader(value, registry.kind.capitalize())
        kind, name = reader.peek()
        if kind != "name":
            raise registry.unknown(value)
        reader.at += 1
        registry[name]  # an unknown name comes before what is wrong with its options
        options = reader.options(name)
        if reader.peek()[0] != "end":
            raise reader.error("one name is expected, with its options in brackets")
    return Named(name, registry[name].Config(**{k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}))
