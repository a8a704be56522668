"""Random small programs. All of them end: loops count, lists that are looped over keep their length, calls go back."""

from __future__ import annotations

import builtins
import hashlib
import keyword
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from zoo.tasks.code_trace.tracer import ENTRY, FILE, MARK, Frame, Tracer

_NAMES = "abcdeijkmnopqrstuvwxyz"
_STRIDES = (1, 3, 5, 7, 9, 13, 15, 17, 19, 21)  # with no factor in common with the number of names
_COMPARISONS = ("<", ">", "==", "!=", "<=", ">=")
_BUILTINS: dict[str, Any] = {
    "range": range,
    "len": len,
    "sum": sum,
    "IndexError": IndexError,
    "ZeroDivisionError": ZeroDivisionError,
}
SHAPE = 3
"""Random words that settle the shape of a program."""

_LOOKS = {"branch": re.compile(r"\bif\b"), "loop": re.compile(r"\b(for|while)\b"), "list": re.compile(r"\[")}
_IDENTIFIER = re.compile(r"[A-Za-z_]\w*")
_KEPT = {word: word for word in (*keyword.kwlist, *dir(builtins))}


class Grammar(NamedTuple):
    """What programs are made of: the options of the task of the same names."""

    max_statements: int
    max_depth: int
    max_value: int
    branches: bool
    loops: bool
    lists: bool
    calls: bool
    exceptions: bool


def normal_form(source: str) -> str:
    """The source with its own names replaced by numbers in order of appearance, and the entry's mark left out."""
    names = dict(_KEPT)
    source = source.replace(MARK, "")
    return _IDENTIFIER.sub(lambda found: names.setdefault(found[0], f"n{len(names)}"), source)


def fingerprint(source: str) -> int:
    """A 64-bit hash of the normal form."""
    return int.from_bytes(hashlib.blake2b(normal_form(source).encode(), digest_size=8).digest(), "little")


def has(construct: str, source: str, frames: list[Frame]) -> bool:
    """Whether a program has a branch, a loop or a list, or its trace a second call or an exception."""
    if construct in _LOOKS:
        return _LOOKS[construct].search(source) is not None
    return sum(frame.kind == construct for frame in frames) > (construct == "call")


def words_for(grammar: Grammar) -> int:
    """How many random words are enough for nearly any program."""
    return 24 + 14 * grammar.max_statements


def write(words: list[int], grammar: Grammar, fewer: int = 0) -> str | None:
    """A program from random 32-bit words, or None where they run out.

    Args:
        words: the first `SHAPE` say how many statements, whether there is a second function and whether a loop.
        grammar: what it is made of.
        fewer: number of statements less than the first word says, down to one.
    """
    try:
        return _Writer(words, grammar).program(fewer)
    except StopIteration:
        return None


def run(source: str, grammar: Grammar, room: int) -> list[Frame] | None:
    """The trace of a program of ours; None where it is longer than `room`, a value is out of range, or it raises though
    the grammar has no exceptions."""
    names: dict[str, Any] = {"__builtins__": _BUILTINS}
    exec(compile(source, FILE, "exec", dont_inherit=True), names)
    limit = grammar.max_value

    def render(value: Any) -> str | None:
        small = all(-limit <= v <= limit for v in (value if type(value) is list else (value,)))
        return repr(value) if small else None

    tracer = Tracer(source, room, render)
    tracer.run(names[ENTRY])
    if tracer.stopped or (not grammar.exceptions and any(frame.kind == "exception" for frame in tracer.frames)):
        return None
    return tracer.frames


class _Scope:
    """The names that a function may read, in order of definition, and those that it must not change."""

    def __init__(self) -> None:
        self.numbers: list[str] = []
        self.lists: list[str] = []
        self.kept: list[str] = []
        self.loops = 0

    def changeable(self, names: list[str]) -> list[str]:
        return [name for name in names if name not in self.kept]


class _Writer:
    """Writes one program, choice by choice."""

    def __init__(self, words: list[int], grammar: Grammar):
        self._word = iter(words).__next__
        self._grammar = g = grammar
        self._lines: list[str] = []
        self._helper: tuple[str, str] | None = None  # its name, and the kinds of its parameters
        self._called = self._loop_wanted = False
        self._simple = ["assign"] * 3 + ["augment"] * 2 + ["list"] * 2 * g.lists + ["risk"] * 2 * g.exceptions
        self._any = self._simple + ["branch"] * 2 * g.branches + ["loop"] * 2 * g.loops

    def _below(self, n: int) -> int:
        return self._word() * n >> 32

    def _pick(self, options: Sequence[str] | Sequence[int]) -> Any:
        return options[self._below(len(options))]

    def program(self, fewer: int) -> str:
        statements = max(1 + self._below(self._grammar.max_statements) - fewer, 1)
        with_helper, self._loop_wanted = self._below(2), bool(self._below(2)) and self._grammar.loops
        start, stride = self._below(len(_NAMES)), self._pick(_STRIDES)
        self._names = iter([_NAMES[(start + stride * i) % len(_NAMES)] for i in range(len(_NAMES))])
        if self._grammar.calls and statements > 1 and with_helper:
            inside = 1 + self._below(statements // 2)
            statements -= inside
            self._write_helper(inside)
        self._put(0, f"def {ENTRY}():{MARK}")
        self._function(_Scope(), statements, entry=True)
        return "\n".join(self._lines) + "\n"

    def _write_helper(self, statements: int) -> None:
        scope, kinds, names = _Scope(), "", []
        for _ in range(1 + self._below(2)):
            kind = "l" if self._grammar.lists and self._below(3) == 0 else "n"
            kinds += kind
            names.append(self._fresh(scope.lists if kind == "l" else scope.numbers))
        name = self._pick("fgh")
        self._put(0, f"def {name}({', '.join(names)}):")
        self._function(scope, statements, entry=False)
        self._helper = name, kinds

    def _put(self, depth: int, text: str) -> None:
        self._lines.append(" " * depth + text)

    def _fresh(self, known: list[str]) -> str:
        """A new name, entered among those that are known."""
        known.append(next(self._names))
        return known[-1]

    def _function(self, scope: _Scope, statements: int, *, entry: bool) -> None:
        if not scope.numbers:
            self._put(1, f"{self._fresh(scope.numbers)} = {self._constant()}")
        self._block(scope, 1, statements)
        if self._helper and not self._called:
            result = self._call(scope)
        elif entry and scope.lists and self._below(4) == 0:
            result = self._pick(scope.lists)
        else:
            result = self._expression(scope) if self._below(2) else scope.numbers[-1]
        self._put(1, f"return {result}")

    def _block(self, scope: _Scope, depth: int, statements: int) -> None:
        """So many statements. What a nested block defines is forgotten after it, since it may not have run."""
        numbers, lists = len(scope.numbers), len(scope.lists)
        while statements > 0:
            nested = statements > 1 and depth <= self._grammar.max_depth
            kind = self._pick(self._any if nested else self._simple)
            if nested and self._loop_wanted and (statements == 2 or self._below(2)):
                kind, self._loop_wanted = "loop", False
            statements -= 1
            if kind in ("branch", "loop"):
                inside = 1 + self._below(min(statements, 3))
                statements -= inside
                (self._branch if kind == "branch" else self._loop)(scope, depth, inside)
            else:
                self._statement(scope, depth, kind)
        if depth > 1:
            del scope.numbers[numbers:], scope.lists[lists:]

    def _statement(self, scope: _Scope, depth: int, kind: str) -> None:
        old = scope.changeable(scope.numbers)
        if kind == "list":
            self._list(scope, depth)
        elif kind == "risk":
            self._risk(scope, depth)
        elif kind == "augment" and old:
            target = self._pick(old)
            self._put(depth, f"{target} {self._pick('+-*')}= {self._atom(scope, target)}")
        else:
            value = self._call(scope) if self._helper and self._below(3) == 0 else self._expression(scope)
            self._put(depth, f"{self._target(scope)} = {value}")

    def _target(self, scope: _Scope) -> str:
        """A number to be set, old or new."""
        old = scope.changeable(scope.numbers)
        return self._pick(old) if old and self._below(2) else self._fresh(scope.numbers)

    def _list(self, scope: _Scope, depth: int) -> None:
        lists = scope.changeable(scope.lists)
        if not lists or self._below(4) == 0:
            literal = self._literal()
            self._put(depth, f"{self._fresh(scope.lists)} = {literal}")
        elif self._below(2):
            self._put(depth, f"{self._pick(lists)}.append({self._atom(scope)})")
        else:
            self._put(depth, f"{self._pick(lists)}[{self._below(2)}] = {self._expression(scope)}")

    def _risk(self, scope: _Scope, depth: int) -> None:
        """What may raise; two times in three within `try`."""
        number = self._pick(scope.numbers)
        if scope.lists and self._below(2):
            name = self._pick(scope.lists)
            value = self._pick((f"{name}[{number}]", f"{name}.pop()", f"{name}[{2 + self._below(2)}]"))
            error = "IndexError"
            if value.endswith("pop()") and name in scope.kept:
                value = f"{name}[{number}]"
        else:
            value, error = f"{self._atom(scope, number)} {self._pick(('//', '%'))} {number}", "ZeroDivisionError"
        target = self._target(scope)
        if not self._below(3):
            self._put(depth, f"{target} = {value}")
            return
        self._put(depth, "try:")
        self._put(depth + 1, f"{target} = {value}")
        self._put(depth, f"except {error}:")
        self._put(depth + 1, f"{target} = {self._constant()}")

    def _branch(self, scope: _Scope, depth: int, statements: int) -> None:
        self._put(depth, f"if {self._condition(scope)}:")
        leave = scope.loops and self._below(3) == 0
        otherwise = self._below(statements) if self._below(2) and not leave else 0
        self._block(scope, depth + 1, statements - otherwise - bool(leave))
        if leave:
            self._put(depth + 1, "break")
        if otherwise:
            self._put(depth, "else:")
            self._block(scope, depth + 1, otherwise)

    def _loop(self, scope: _Scope, depth: int, statements: int) -> None:
        form = self._below(3)
        numbers, kept = len(scope.numbers), len(scope.kept)
        closing = None
        if form == 0:
            counter = self._fresh(scope.numbers)
            scope.kept.append(counter)
            self._put(depth, f"{counter} = {2 + self._below(2)}")
            self._put(depth, f"while {counter} > 0:")
            closing = f"{counter} -= 1"
        elif form == 1 and scope.lists:
            over = self._pick(scope.lists)
            scope.kept.append(over)  # a list that grows would be looped over for ever
            self._put(depth, f"for {self._fresh(scope.numbers)} in {over}:")
        else:
            self._put(depth, f"for {self._fresh(scope.numbers)} in range({2 + self._below(2)}):")
        scope.loops += 1
        self._block(scope, depth + 1, statements)
        scope.loops -= 1
        if closing:
            self._put(depth + 1, closing)
        del scope.numbers[numbers + (form == 0) :], scope.kept[kept:]

    def _call(self, scope: _Scope) -> str:
        assert self._helper
        name, kinds = self._helper
        self._called = True
        lists = scope.changeable(scope.lists)  # the helper may change what it is given
        arguments = []
        for kind in kinds:
            if kind == "n":
                arguments.append(self._atom(scope))
            elif lists and self._below(2):
                arguments.append(lists.pop(self._below(len(lists))))  # never the same list twice
            else:
                arguments.append(self._literal())
        return f"{name}({', '.join(arguments)})"

    def _literal(self) -> str:
        return f"[{', '.join([self._constant() for _ in range(2 + self._below(2))])}]"

    def _constant(self) -> str:
        return str(self._below(min(10, self._grammar.max_value + 1)))

    def _atom(self, scope: _Scope, beside: str = "") -> str:
        """A number or a constant; never the name that it stands beside, which would tell the result."""
        name = self._pick(scope.numbers) if self._below(3) else beside
        return self._constant() if name == beside else name

    def _expression(self, scope: _Scope) -> str:
        if scope.lists and self._below(2):
            name = self._pick(scope.lists)
            form = self._below(4)
            first = f"{name}[{self._below(2)}]" if form < 2 else f"len({name})" if form == 2 else f"sum({name})"
        else:
            first = self._pick(scope.numbers)
        form = self._below(6)
        if form < 3:
            return f"{first} {'+-*'[form]} {self._atom(scope, first)}"
        if form == 3:
            return f"{first} {self._pick(('//', '%'))} {2 + self._below(4)}"
        return first

    def _condition(self, scope: _Scope) -> str:
        number = self._pick(scope.numbers)
        if self._below(4) == 0:
            return f"{number} % {2 + self._below(2)} == {self._below(2)}"
        return f"{number} {self._pick(_COMPARISONS)} {self._atom(scope, number)}"
