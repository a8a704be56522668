"""YAML as recipes, overrides and run folders use it: plain data only, and little of it.

Plain texts are read by the core schema of YAML 1.2: `0100` is 100 and `3e-4` is a number, while `1:30`, `no`, `on` and
`2024-02-30` are texts. As in Python, `100_000` is a number too. Every key is a text, so that variants may have numbers
for names.

Files come from strangers. Aliases, which can unfold without end, tags, keys given twice, and more nesting, values or
digits than any experiment has are refused before anything is built of them.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from zoo.core.errors import UsageError
from zoo.core.readers import read_text

MAX_LENGTH, MAX_DEPTH, MAX_VALUES, MAX_DIGITS = 2**20, 50, 20_000, 40

_DIGITS = "[0-9]+(?:_[0-9]+)*"
_NULL = re.compile(r"~|null|Null|NULL|")
_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
_INT = re.compile(rf"[-+]?{_DIGITS}")
_BASED = re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(rf"[-+]?(?:\.{_DIGITS}|{_DIGITS}(?:\.(?:{_DIGITS})?)?)(?:[eE][-+]?[0-9]+)?")
_INFINITE = re.compile(r"([-+]?)\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)")
_OTHER_LINE_ENDS = re.compile("[\x85\u2028\u2029]")
_CORE = "tag:yaml.org,2002:"


def load(text: str, source: str) -> Any:
    """The plain data in a YAML text.

    Args:
        text: one document.
        source: where it is from, for errors.

    Raises:
        UsageError: what this reads none of.
        yaml.YAMLError: no YAML.
    """
    if len(text) > MAX_LENGTH:
        raise _refused(source, f"it has {len(text):,} characters; at most {MAX_LENGTH:,} are read")
    return _Builder(source).build(yaml.parse(text, yaml.SafeLoader))


def read(path: Path) -> Any:
    """The plain data in a YAML file.

    Raises:
        UsageError: it cannot be read, or holds something else.
    """
    try:
        return load(read_text(path, most=4 * MAX_LENGTH), str(path))
    except yaml.YAMLError as error:
        raise UsageError(f"{path} is not valid YAML: {describe(error)}.") from None


def dump(data: Any, **options: Any) -> str:
    """Plain data as YAML that this module reads back to the same values, as does any reader of YAML 1.1 or 1.2."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, **options)


def describe(error: yaml.YAMLError) -> str:
    """What is not YAML about a text, and where, in one line."""
    mark = getattr(error, "problem_mark", None)
    where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
    return f"{getattr(error, 'problem', None) or ' '.join(str(error).split())}{where}"


def _refused(source: str, why: str, event: yaml.Event | None = None) -> UsageError:
    mark = None if event is None else event.start_mark
    where = f" in line {mark.line + 1}" if mark else ""
    return UsageError(f"{source} cannot be read{where}: {why}.")


class _Builder:
    """Makes data of a parser's events, without recursion."""

    def __init__(self, source: str):
        self.source = source
        self.open: list[dict[str, Any] | list[Any]] = []
        self.keys: list[str | None] = []  # of each open collection, the key that waits for its value
        self.values = 0
        self.done: list[Any] = []

    def build(self, events: Any) -> Any:
        for event in events:
            if isinstance(event, yaml.AliasEvent):
                raise _refused(self.source, f"aliases such as *{event.anchor} are not supported: write it out", event)
            if isinstance(event, yaml.ScalarEvent):
                self.scalar(event)
            elif isinstance(event, yaml.CollectionStartEvent):
                self.start(event)
            elif isinstance(event, yaml.CollectionEndEvent):
                self.keys.pop()
                self.place(self.open.pop(), event)
            elif isinstance(event, yaml.DocumentStartEvent) and self.done:
                raise _refused(self.source, "it holds more than one document", event)
            elif isinstance(event, yaml.DocumentEndEvent) and not self.done:
                self.done.append(None)
        return self.done[0] if self.done else None

    def start(self, event: yaml.CollectionStartEvent) -> None:
        self.count(event)
        is_list = isinstance(event, yaml.SequenceStartEvent)
        if event.tag not in (None, "!", _CORE + ("seq" if is_list else "map")):
            raise self.tagged(event)
        if self.waits_for_key():
            raise _refused(self.source, "a key is a text, not a list or a mapping", event)
        if len(self.open) == MAX_DEPTH:
            raise _refused(self.source, f"it is nested deeper than {MAX_DEPTH}", event)
        self.open.append([] if is_list else {})
        self.keys.append(None)

    def scalar(self, event: yaml.ScalarEvent) -> None:
        self.count(event)
        if "\0" in event.value:
            raise _refused(self.source, "a text holds the character NUL", event)
        if self.waits_for_key():
            mapping = self.open[-1]
            if event.value in mapping:
                raise _refused(self.source, f"the key {event.value!r:.60} is given twice", event)
            self.keys[-1] = event.value
            return
        kind = None if event.tag in (None, "!") else event.tag.removeprefix(_CORE)
        is_text = event.style is not None or event.tag == "!"
        value = event.value if kind == "str" or (kind is None and is_text) else self.plain(event)
        if kind not in (None, "str", _kind(value)):
            raise self.tagged(event)
        self.place(value, event)

    def plain(self, event: yaml.ScalarEvent) -> Any:
        text = event.value
        if _NULL.fullmatch(text):
            return None
        if _BOOL.fullmatch(text):
            return text[0] in "tT"
        if (based := _BASED.fullmatch(text)) or _INT.fullmatch(text):
            if len(text) > MAX_DIGITS:
                raise _refused(self.source, f"a number of {len(text):,} digits is beyond all that is counted", event)
            return int(text, 0) if based else int(text)
        if _FLOAT.fullmatch(text):
            return float(text)
        if match := _INFINITE.fullmatch(text):
            return float((match[1] or "") + text.lstrip("+-.").lower())
        return text

    def place(self, value: Any, event: yaml.Event) -> None:
        if not self.open:
            self.done.append(value)
            return
        inside = self.open[-1]
        if isinstance(inside, list):
            inside.append(value)
        else:
            key, self.keys[-1] = self.keys[-1], None
            assert key is not None
            inside[key] = value

    def waits_for_key(self) -> bool:
        return bool(self.open) and isinstance(self.open[-1], dict) and self.keys[-1] is None

    def count(self, event: yaml.Event) -> None:
        self.values += 1
        if self.values > MAX_VALUES:
            raise _refused(self.source, f"it holds more than {MAX_VALUES:,} values", event)

    def tagged(self, event: Any) -> UsageError:
        return _refused(self.source, f"the tag {event.tag!r:.60} is not supported", event)


def _kind(value: Any) -> str:
    return {type(None): "null", bool: "bool", int: "int", float: "float", str: "str"}[type(value)]


class _Dumper(yaml.SafeDumper):
    """Quotes what either version of YAML would take for more than a text, and names nothing to point back at it."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def text(self, data: str) -> yaml.ScalarNode:
        """A text; escaped where it holds a line end that quotes alone would fold into a space."""
        return self.represent_scalar(_CORE + "str", data, style='"' if _OTHER_LINE_ENDS.search(data) else None)


_Dumper.add_representer(str, _Dumper.text)

for _pattern, _tag in ((_INT, "int"), (_BASED, "int"), (_FLOAT, "float"), (_INFINITE, "float")):
    _Dumper.add_implicit_resolver(_CORE + _tag, re.compile(f"^(?:{_pattern.pattern})$"), list("-+.0123456789"))


__all__ = ["describe", "dump", "load", "read"]
