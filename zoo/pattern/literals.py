"""Names, options and values in a text: what patterns, norms and residual kinds are written in."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from typing import Any

from zoo.core.errors import UsageError

_TOKEN = re.compile(
    r"""\s*(?:(?P<number>[-+]?(?:\d+\.\d*|\.\d+|\d+)(?:[eE][-+]?\d+)?)|(?P<name>[A-Za-z_]\w*)"""
    r"""|(?P<text>"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')|(?P<mark>[*()|,=\[\]]))"""
)
_CONSTANTS = {"True": True, "False": False, "None": None}
MAX_DEPTH = 100


class Reader:
    """A text read mark by mark, name by name; errors say where.

    Args:
        text: the text.
        what: what it is, for errors, capitalised.
    """

    def __init__(self, text: str, what: str):
        self.text, self.what = text, what
        self.tokens: list[tuple[str, str, int]] = []
        at, end = 0, len(text.rstrip())
        while at < end:
            match = _TOKEN.match(text, at)
            if match is None:
                raise UsageError(f"{what} {text!r}: {text[at:].lstrip()[0]!r} is not part of a {what.lower()}.")
            kind = str(match.lastgroup)
            self.tokens.append((kind, match[kind], match.start(kind)))
            at = match.end()
        self.at = 0
        if (depth := self.depth()) > MAX_DEPTH:
            raise UsageError(f"{what} {text[:40]!r}... is nested {depth:,} deep; at most {MAX_DEPTH} is allowed.")

    def depth(self) -> int:
        marks = (token for kind, token, _ in self.tokens if kind == "mark")
        return max(itertools.accumulate((token in "([") - (token in ")]") for token in marks), default=0)

    def peek(self, offset: int = 0) -> tuple[str, str]:
        i = self.at + offset
        return self.tokens[i][:2] if i < len(self.tokens) else ("end", "")

    def adjacent(self) -> bool:
        """Whether the next token follows the last one without a space: `word(` opens options, `word (` a group."""
        _, last, start = self.tokens[self.at - 1]
        return self.at < len(self.tokens) and self.tokens[self.at][2] == start + len(last)

    def accept(self, mark: str) -> bool:
        if self.peek() == ("mark", mark):
            self.at += 1
            return True
        return False

    def expect(self, mark: str, after: str) -> None:
        if not self.accept(mark):
            raise self.error(f"{mark!r} is missing {after}")

    def error(self, what: str) -> UsageError:
        if self.at < len(self.tokens):
            _, token, position = self.tokens[self.at]
            where = f"at {token!r} (character {position + 1})"
        else:
            where = "at its end"
        return UsageError(f"{self.what} {self.text!r}: {what}, {where}.")

    def options(self, name: str, take: Callable[[dict[str, Any]], bool] = lambda options: False) -> dict[str, Any]:
        """The options in the brackets that follow a name without a space.

        Args:
            name: whose they are.
            take: reads what is no `name=value` into the options, and says whether it was such a one.
        """
        options: dict[str, Any] = {}
        if self.adjacent() and self.accept("("):
            while not self.accept(")"):
                if not take(options):
                    key, value = self.option(name)
                    if key in options:
                        raise self.error(f"option {key!r} of {name} is given twice")
                    options[key] = value
                if not self.accept(","):
                    self.expect(")", f"to close {name}(")
                    break
        return options

    def option(self, word: str) -> tuple[str, Any]:
        kind, key = self.peek()
        if kind != "name":
            raise self.error(f"the name of an option of {word} is missing")
        self.at += 1
        self.expect("=", f"after the option {key}")
        return key, self.literal()

    def literal(self) -> Any:
        kind, token = self.peek()
        if self.accept("["):
            items = []
            while not self.accept("]"):
                items.append(self.literal())
                if not self.accept(","):
                    self.expect("]", "to close [")
                    break
            return tuple(items)
        if kind == "name" and token not in _CONSTANTS:
            raise self.error(f'{token!r} is not a value (text is quoted: "{token}")')
        if kind not in ("number", "text", "name"):
            raise self.error("a value is missing")
        self.at += 1
        if kind == "name":
            return _CONSTANTS[token]
        if kind == "number":
            return int(token) if re.fullmatch(r"[-+]?\d+", token) else float(token)
        if token[0] == "'":
            token = '"' + token[1:-1].replace("\\'", "'").replace('"', '\\"') + '"'
        try:
            return json.loads(token)
        except ValueError:
            raise self.error(f"{token} is not a text") from None


def literal_text(value: Any) -> str:
    """The text of a value, which reads back as it."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, tuple | list):
        return "[" + ", ".join(map(literal_text, value)) + "]"
    return repr(value)
