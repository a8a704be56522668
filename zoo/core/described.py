"""Options for a person to read: of every option its name, type, default and meaning, from its class."""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
import re
import sys
import textwrap
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, get_args, get_origin

from zoo.core.options import Options


class Described(NamedTuple):
    """What is said of an option.

    Attributes:
        name: with the names of the sections around it, by dots.
        type: what may be given.
        default: as in Python, or "required".
        about: its meaning.
    """

    name: str
    type: str
    default: str
    about: str


def described(options: type[Options]) -> list[Described]:
    """All options of a class, in order of declaration; those of a section within it are one option."""
    meanings = _meanings(options)
    found = []
    for name, field in options.model_fields.items():
        value = None if field.is_required() else field.get_default(call_default_factory=True)
        default = "required" if field.is_required() else "{}" if isinstance(value, Options) else repr(value)
        found.append(Described(name, type_name(field.annotation), default, field.description or meanings.get(name, "")))
    return found


def described_within(options: type[Options], prefix: str = "") -> Iterator[Described]:
    """As `described`, with the options of every section behind it, such as `target.value`."""
    for each in described(options):
        yield each._replace(name=prefix + each.name)
        for section in sections(options.model_fields[each.name].annotation):
            yield from described_within(section, f"{prefix}{each.name}.")


def sections(kind: Any) -> list[type[Options]]:
    """The classes of options in a type."""
    if isinstance(kind, type) and issubclass(kind, Options):
        return [kind]
    return [section for part in get_args(kind) for section in sections(part)]


def type_name(kind: Any) -> str:
    """A type as a person writes it: what may be given."""
    if kind is type(None):
        return "None"
    if get_origin(kind) is Literal:
        return " or ".join(repr(value) if isinstance(value, str) else str(value) for value in get_args(kind))
    if hasattr(kind, "__metadata__"):
        return type_name(get_args(kind)[0])
    if get_origin(kind) is tuple:
        inner = [type_name(part) for part in get_args(kind) if part is not ...]
        return f"several {inner[0]}" if ... in get_args(kind) else f"({', '.join(inner)})"
    if get_origin(kind) is dict or sections(kind) == [kind]:
        return "KEY=VALUE"
    if get_args(kind):
        return " or ".join(dict.fromkeys(type_name(part) for part in get_args(kind)))
    return getattr(kind, "__name__", str(kind))


def _meanings(options: type[Options]) -> dict[str, str]:
    """The meaning of each option by name."""
    found: dict[str, str] = {}
    for cls in reversed([c for c in options.__mro__ if issubclass(c, Options)]):
        # what an option means may be said where it is used, by a class of the same module
        module = sys.modules[cls.__module__]
        users = [c for _, c in inspect.getmembers(module, inspect.isclass) if c.__module__ == cls.__module__]
        for user in [*users, cls]:
            said = attributes(user).items()
            found |= {name: text for name, text in said if user is cls or name not in found}
    return found


def attributes(cls: type) -> dict[str, str]:
    """The description of each field of a class: "name: text" in its docstring, or a text below the field."""
    found: dict[str, str] = {}
    doc = inspect.cleandoc(vars(cls).get("__doc__") or "")
    _, _, listed = doc.rpartition("Attributes:\n")
    listed = textwrap.dedent(listed)
    for name, text in re.findall(r"^(\w+(?:, \w+)*): ((?:.+)(?:\n[ \t]+.*)*)", listed, re.M):
        found |= dict.fromkeys(name.split(", "), " ".join(text.split()))
    try:
        source = inspect.getsource(sys.modules[cls.__module__])
    except (OSError, TypeError):
        return found
    return found | _texts_below_fields(source).get(cls.__qualname__, {})


@functools.lru_cache(maxsize=512)  # a listing names every class of a module
def _texts_below_fields(source: str) -> dict[str, dict[str, str]]:
    """The text below each field of every class of a module, by the qualified name of the class."""
    found: dict[str, dict[str, str]] = {}

    def visit(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                visit(node.body, f"{prefix}{node.name}.<locals>.")
            elif isinstance(node, ast.ClassDef):
                found[prefix + node.name] = dict(_texts(node.body))
                visit(node.body, f"{prefix}{node.name}.")
            else:
                for part in ("body", "orelse", "finalbody"):
                    visit(getattr(node, part, []), prefix)

    visit(ast.parse(source).body, "")
    return found


def _texts(body: list[ast.stmt]) -> Iterator[tuple[str, str]]:
    """The names of the fields in the body of a class that have a text below them, with that text."""
    for field, below in itertools.pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            assert isinstance(field.target, ast.Name)
            yield field.target.id, " ".join(str(below.value.value).split())


__all__ = ["Described", "attributes", "described", "described_within", "sections", "type_name"]
