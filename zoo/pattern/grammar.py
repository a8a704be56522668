"""The layer pattern: an architecture as text, `3*(3*(gated_deltanet swiglu) gqa(n_kv_heads=2) swiglu)`.

Grammar (a space is a residual step):

    pattern  = item+
    item     = [N "*"] "(" pattern ")" | N "*" word | step
    step     = word { "|" word } | "(" word { "|" word } ")" | "shortcut" "(" word "," pattern ")"
    word     = NAME [ "(" [ argument { "," argument } ] ")" ]      (no space after NAME: `a (b | c)` is two steps)
    argument = word (wrappers only) | NAME "=" literal
    literal  = number | "text" | True | False | None | [ literal, ... ]

`parse` and `to_text` are exact inverses: `parse(to_text(p)) == p`, and `to_text(parse(s)) == s` for a text in canonical
form (options in order of declaration). `to_data` and `from_data` do the same for YAML.
"""

from __future__ import annotations

import itertools
import json
import re
from typing import Any

from zoo.core.errors import UsageError
from zoo.pattern.tree import Node, Parallel, Pattern, Repeat, Shortcut, Word, make_word
from zoo.protocol import mixers

_TOKEN = re.compile(
    r"""\s*(?:(?P<number>[-+]?(?:\d+\.\d*|\.\d+|\d+)(?:[eE][-+]?\d+)?)|(?P<name>[A-Za-z_]\w*)"""
    r"""|(?P<text>"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')|(?P<mark>[*()|,=\[\]]))"""
)
_CONSTANTS = {"True": True, "False": False, "None": None}
MAX_STEPS = 10_000
MAX_DEPTH = 100


class _Parser:
    def __init__(self, text: str):
        self.text = text
        self.tokens: list[tuple[str, str, int]] = []
        at, end = 0, len(text.rstrip())
        while at < end:
            match = _TOKEN.match(text, at)
            if match is None:
                raise UsageError(f"Pattern {text!r}: {text[at:].lstrip()[0]!r} is not part of a pattern.")
            kind = str(match.lastgroup)
            self.tokens.append((kind, match[kind], match.start(kind)))
            at = match.end()
        self.at = 0
        if (depth := self.depth()) > MAX_DEPTH:
            raise UsageError(f"Pattern {text[:40]!r}... is nested {depth:,} deep; at most {MAX_DEPTH} is allowed.")

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
        return UsageError(f"Pattern {self.text!r}: {what}, {where}.")

    def pattern(self) -> Pattern:
        nodes: list[Node] = []
        while self.peek()[0] != "end" and self.peek() not in (("mark", ")"), ("mark", ",")):
            nodes.extend(self.item())
        if not nodes:
            raise self.error("a mixer's name is missing")
        return Pattern(tuple(nodes))

    def item(self) -> tuple[Node, ...]:
        if self.peek()[0] == "number":
            count = self.literal()
            if not isinstance(count, int) or count < 1:
                raise self.error(f"a pattern repeats a whole number of times from 1, not {count!r}")
            self.expect("*", f"after the count {count}")
            if self.accept("("):
                body = self.pattern()
                self.expect(")", f"to close {count}*(")
            else:
                body = Pattern((self.word(),))
            return (Repeat(count, body),)
        if self.accept("("):
            if self.peek()[0] == "name" and self.peek(1) == ("mark", "="):
                raise self.error("options follow their word without a space")
            inner = self.pattern()
            self.expect(")", "to close (")
            if self.peek() == ("mark", "|"):
                raise self.error("'|' joins single words, not groups")
            return inner.nodes
        return (self.step(),)

    def step(self) -> Node:
        if self.peek() == ("name", "shortcut"):
            self.at += 1
            self.expect("(", "after shortcut")
            branch = self.word()
            self.expect(",", "between the branch and the body of shortcut(branch, body)")
            body = self.pattern()
            self.expect(")", "to close shortcut(")
            return Shortcut(branch, body)
        words = [self.word()]
        while self.accept("|"):
            words.append(self.word())
        return words[0] if len(words) == 1 else Parallel(tuple(words))

    def word(self) -> Word:
        kind, name = self.peek()
        if kind != "name":
            raise self.error("a mixer's name is missing")
        self.at += 1
        config_class = mixers[name].Config
        options: dict[str, Any] = {}
        positional = list(getattr(config_class, "positional", ()))
        if self.adjacent() and self.accept("("):
            while not self.accept(")"):
                if self.peek()[0] == "name" and self.peek(1) != ("mark", "="):
                    if not positional:
                        raise self.error(f"{name} takes options as name=value only")
                    options[positional.pop(0)] = self.word()
                else:
                    key, value = self.option(name)
                    if key in options:
                        raise self.error(f"option {key!r} of {name} is given twice")
                    options[key] = value
                if not self.accept(","):
                    self.expect(")", f"to close {name}(")
                    break
        if positional:
            raise self.error(f"{name} wraps a word: {name}({', '.join(positional)})")
        return make_word(name, options)

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


def parse(text: str) -> Pattern:
    """The tree that a pattern text stands for.

    Raises:
        UsageError: what is wrong and where, in one line.
    """
    parser = _Parser(text)
    pattern = parser.pattern()
    if parser.peek()[0] != "end":
        raise parser.error("nothing is open that this could close")
    return limited(pattern, text)


def limited(pattern: Pattern, given: Any) -> Pattern:
    if (n := _count(pattern)) > MAX_STEPS:
        raise UsageError(f"Pattern {given!r} has {n:,} steps; at most {MAX_STEPS:,} are allowed.")
    return pattern


def _count(pattern: Pattern) -> int:
    def steps(node: Node) -> int:
        if isinstance(node, Repeat):
            return node.count * _count(node.body)
        return 1 + _count(node.body) if isinstance(node, Shortcut) else 1

    return sum(map(steps, pattern.nodes))


def parse_word(text: str) -> Word:
    """The one word that `text` is."""
    nodes = parse(text).nodes
    if len(nodes) != 1 or not isinstance(nodes[0], Word):
        raise UsageError(f"{text!r} is a pattern of several steps where one mixer is asked for.")
    return nodes[0]
