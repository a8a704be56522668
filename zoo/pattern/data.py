"""The layer pattern as plain data for YAML: lists, mappings and names, or text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from zoo.core.errors import UsageError
from zoo.pattern.grammar import limited, parse_part, parse_word
from zoo.pattern.tree import (
    Loop,
    Node,
    Parallel,
    Pattern,
    Repeat,
    Shared,
    Shortcut,
    Word,
    make_loop,
    make_shared,
    make_word,
)
from zoo.protocol import mixers


def _word_data(word: Word) -> str | dict[str, Any]:
    positional = getattr(type(word.config), "positional", ())
    options = {**word.config.given(), **word.step.given()}
    options = {
        k: _word_data(v) if k in positional else list(v) if isinstance(v, tuple) else v for k, v in options.items()
    }
    return {"name": word.name, **options} if options else word.name


def to_data(pattern: Pattern) -> list[Any]:
    """A pattern as lists, mappings and names, fit for YAML."""

    def data(node: Node) -> Any:
        if isinstance(node, Repeat):
            return {"repeat": node.count, "body": to_data(node.body)}
        if isinstance(node, Parallel):
            return {"parallel": [_word_data(w) for w in node.words]}
        if isinstance(node, Shortcut):
            return {"shortcut": _word_data(node.branch), "body": to_data(node.body)}
        if isinstance(node, Loop):
            options = {k: list(v) if isinstance(v, tuple) else v for k, v in node.options.given().items()}
            return {"loop": node.count, "body": to_data(node.body), **options}
        if isinstance(node, Shared):
            rest = {} if node.short else {"body": to_data(node.body), **node.options.given()}
            return {"shared": node.label, **rest}
        return _word_data(node)

    return [data(node) for node in pattern.nodes]


def from_data(data: Any) -> Pattern:
    """The pattern that a text, a word, or a list of steps (as `to_data` gives) stands for.

    Raises:
        UsageError: as `parse`, or a mapping that is none of the known forms.
    """
    return _part(data, {})


def _part(data: Any, known: dict[str, Shared]) -> Pattern:
    """As `from_data`, after parts that have the shared blocks `known`."""
    if isinstance(data, str):
        return parse_part(data, known)
    if isinstance(data, Pattern):
        return data
    if isinstance(data, Mapping):
        return limited(Pattern((_node(data, known),)), data)
    if not isinstance(data, list | tuple) or not data:
        raise UsageError(f"A pattern is a text or a list of steps, not {data!r}.")
    nodes: list[Node] = []
    for item in data:
        nodes.extend(parse_part(item, known).nodes if isinstance(item, str) else (_node(item, known),))
    return limited(Pattern(tuple(nodes)), data)


def _node(item: Any, known: dict[str, Shared]) -> Node:
    def body() -> Pattern:
        return _part(item["body"], known)

    forms: dict[frozenset[str], Callable[[], Node]] = {
        frozenset({"repeat", "body"}): lambda: Repeat(_positive(item["repeat"]), body()),
        frozenset({"parallel"}): lambda: _parallel(item["parallel"]),
        frozenset({"shortcut", "body"}): lambda: Shortcut(_word(item["shortcut"]), body()),
    }
    if not isinstance(item, Mapping):
        raise UsageError(f"A step is a word or a mapping, not {item!r}.")
    if "name" in item:
        return _word(item)
    if {"loop", "body"} <= item.keys():
        return make_loop(item["loop"], body(), {str(k): v for k, v in item.items() if k not in ("loop", "body")})
    if "shared" in item:
        options = {str(k): v for k, v in item.items() if k not in ("shared", "body")}
        return make_shared(item["shared"], body() if "body" in item else None, options, known)
    if make := forms.get(frozenset(item)):
        return make()
    allowed = "{name, options...}, {repeat, body}, {parallel}, {shortcut, body}, {loop, body, options...}"
    raise UsageError(
        f"A step given as a mapping is {allowed} or {{shared, body, options...}}, not one with the keys "
        f"{', '.join(map(str, item)) or 'none'}."
    )


def _parallel(words: Any) -> Word | Parallel:
    if not isinstance(words, list | tuple) or not words:
        raise UsageError(f"parallel is a list of words, not {words!r}.")
    found = tuple(map(_word, words))
    return found[0] if len(found) == 1 else Parallel(found)


def _positive(count: Any) -> int:
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise UsageError(f"repeat={count!r} is not allowed: it should be a whole number from 1.")
    return count


def _word(data: Any) -> Word:
    if isinstance(data, str):
        return parse_word(data)
    if not isinstance(data, Mapping) or "name" not in data:
        raise UsageError(f"A word is a text or a mapping with the key 'name', not {data!r}.")
    name = str(data["name"])
    options = {str(k): tuple(v) if isinstance(v, list) else v for k, v in data.items() if k != "name"}
    for key in getattr(mixers[name].Config, "positional", ()):
        if key in options:
            options[key] = _word(options[key])
    return make_word(name, options)
