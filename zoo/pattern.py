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
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from zoo.core.errors import UsageError, unknown
from zoo.core.options import Options
from zoo.registry import mixer_of, mixers

Placement = Literal["pre", "post", "sandwich", "output"]
Norm = Literal["rmsnorm", "rmsnorm_zero_centred", "rmsnorm_plain", "layernorm", "none"]


class StepOptions(Options, label="a step"):
    """How a word stands in the residual stream; what is None is the model's default.

    Attributes:
        placement: where the norm stands: "pre", before the mixer; "post", after the sum; "sandwich", on both sides of
            the mixer; "output", after the mixer only (OLMo 2).
        norm: the normalisation; the weights of "rmsnorm_zero_centred" are 1 + w (Gemma), "rmsnorm_plain" has none.
        norm_axis: what it runs along: the channels of a step, or the steps of a channel (non-causal models).
        in_scale: factor on the mixer's input.
        out_scale: factor on the mixer's output.
        residual_scale: factor on the stream that the output is added to (DeepNorm).
    """

    placement: Placement | None = None
    norm: Norm | None = None
    norm_axis: Literal["channels", "time"] | None = None
    in_scale: float | None = None
    out_scale: float | None = None
    residual_scale: float | None = None


@dataclass(frozen=True)
class Word:
    """One mixer with its options."""

    config: Options
    step: StepOptions = field(default_factory=StepOptions)

    @property
    def name(self) -> str:
        return mixer_of(self.config).name

    def held(self) -> dict[str, Word]:
        """The words among its options: what a wrapper such as `bidirectional` wraps."""
        return {k: v for k, v in self.config if isinstance(v, Word)}


@dataclass(frozen=True)
class Parallel:
    """Words that read the same input and are summed."""

    words: tuple[Word, ...]


@dataclass(frozen=True)
class Repeat:
    """`count` copies of a pattern, each with parameters of its own."""

    count: int
    body: Pattern


@dataclass(frozen=True)
class Shortcut:
    """`branch` reads the stream before `body` and is added after it."""

    branch: Word
    body: Pattern


Node = Word | Parallel | Repeat | Shortcut


@dataclass(frozen=True)
class Pattern:
    """Residual steps in order."""

    nodes: tuple[Node, ...]

    def __str__(self) -> str:
        return to_text(self)

    def steps(self) -> Iterator[Word | Parallel | Shortcut]:
        """The steps with repeats unrolled."""
        for node in self.nodes:
            if isinstance(node, Repeat):
                for _ in range(node.count):
                    yield from node.body.steps()
            else:
                yield node

    def names(self) -> set[str]:
        """The names of all words, those that others wrap too."""
        words = list(self.words())
        return {w.name for w in words} | {held.name for w in words for held in w.held().values()}

    def words(self) -> Iterator[Word]:
        """Every word with repeats unrolled, in reading order."""
        for step in self.steps():
            if isinstance(step, Word):
                yield step
            elif isinstance(step, Parallel):
                yield from step.words
            else:
                yield step.branch
                yield from step.body.words()


def make_word(name: str, options: Mapping[str, Any]) -> Word:
    """A word from its name and options, step options included.

    Raises:
        UsageError: unknown mixer or option, or a wrong type.
    """
    config_class = mixers[name].Config
    if taken := set(config_class.model_fields) & set(StepOptions.model_fields):
        raise UsageError(f"{name}: its Config declares {', '.join(sorted(taken))}, which a step of any word has.")
    for option in options:
        if option not in config_class.model_fields and option not in StepOptions.model_fields:
            raise unknown(f"option of {name}", option, [*config_class.model_fields, *StepOptions.model_fields])
    step = {k: v for k, v in options.items() if k in StepOptions.model_fields}
    return Word(config_class(**{k: v for k, v in options.items() if k not in step}), StepOptions(**step))


# ---- text -> tree

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
    return _limited(pattern, text)


def _limited(pattern: Pattern, given: Any) -> Pattern:
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


# ---- tree -> text


def _literal(value: Any) -> str:
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, tuple | list):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return repr(value)


def _word_text(word: Word) -> str:
    positional = getattr(type(word.config), "positional", ())
    options = {**word.config.given(), **word.step.given()}
    arguments = [_word_text(getattr(word.config, name)) for name in positional]
    arguments += [f"{k}={_literal(v)}" for k, v in options.items() if k not in positional]
    return word.name + (f"({', '.join(arguments)})" if arguments else "")


def to_text(pattern: Pattern | Node) -> str:
    """The canonical text of a pattern."""
    if isinstance(pattern, Pattern):
        return " ".join(map(to_text, pattern.nodes))
    if isinstance(pattern, Repeat):
        return f"{pattern.count}*({to_text(pattern.body)})"
    if isinstance(pattern, Parallel):
        return "(" + " | ".join(map(_word_text, pattern.words)) + ")"
    if isinstance(pattern, Shortcut):
        return f"shortcut({_word_text(pattern.branch)}, {to_text(pattern.body)})"
    return _word_text(pattern)


# ---- tree <-> plain data (YAML)


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
        return _word_data(node)

    return [data(node) for node in pattern.nodes]


def from_data(data: Any) -> Pattern:
    """The pattern that a text, a word, or a list of steps (as `to_data` gives) stands for.

    Raises:
        UsageError: as `parse`, or a mapping that is none of the known forms.
    """
    if isinstance(data, str):
        return parse(data)
    if isinstance(data, Pattern):
        return data
    if isinstance(data, Mapping):
        return _limited(Pattern((_node(data),)), data)
    if not isinstance(data, list | tuple) or not data:
        raise UsageError(f"A pattern is a text or a list of steps, not {data!r}.")
    nodes: list[Node] = []
    for item in data:
        nodes.extend(parse(item).nodes if isinstance(item, str) else (_node(item),))
    return _limited(Pattern(tuple(nodes)), data)


def _node(item: Any) -> Node:
    forms: dict[frozenset[str], Callable[[], Node]] = {
        frozenset({"repeat", "body"}): lambda: Repeat(_positive(item["repeat"]), from_data(item["body"])),
        frozenset({"parallel"}): lambda: _parallel(item["parallel"]),
        frozenset({"shortcut", "body"}): lambda: Shortcut(_word(item["shortcut"]), from_data(item["body"])),
    }
    if not isinstance(item, Mapping):
        raise UsageError(f"A step is a word or a mapping, not {item!r}.")
    if "name" in item:
        return _word(item)
    if make := forms.get(frozenset(item)):
        return make()
    allowed = "{name, options...}, {repeat, body}, {parallel} or {shortcut, body}"
    raise UsageError(
        f"A step given as a mapping is {allowed}, not one with the keys {', '.join(map(str, item)) or 'none'}."
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


# ---- changing a pattern


def swap(pattern: Pattern, words: Mapping[str, str]) -> Pattern:
    """`pattern` with every word named in `words` replaced by the word given for it; step options are kept.

    Raises:
        UsageError: a name that is not in the pattern, or a replacement that is not one word.
    """
    if not isinstance(words, Mapping) or not all(isinstance(text, str) for text in words.values()):
        raise UsageError(f'swap takes a mapping of names to words, such as {{"gqa": "mla"}}, not {words!r:.60}.')
    present = pattern.names()
    for name in words:
        if name not in present:
            raise unknown("word of the pattern", name, sorted(present))
    new = {name: parse_word(text) for name, text in words.items()}

    def change(old: Word) -> Word:
        if old.name not in new:
            return old
        fresh = new[old.name]
        return Word(fresh.config, StepOptions(**{**old.step.changed(), **fresh.step.changed()}))

    return replaced(pattern, change)


def replaced(pattern: Pattern, change: Callable[[Word], Word]) -> Pattern:
    """`pattern` with what `change` gives in place of every word; those that a word wraps are changed before it."""

    def word(old: Word) -> Word:
        held = {k: word(v) for k, v in old.held().items()}
        return change(replace(old, config=type(old.config)(**{**old.config.changed(), **held})) if held else old)

    def walk(node: Any) -> Any:
        if isinstance(node, Pattern):
            return Pattern(tuple(map(walk, node.nodes)))
        if isinstance(node, Repeat):
            return replace(node, body=walk(node.body))
        if isinstance(node, Parallel):
            return Parallel(tuple(map(word, node.words)))
        if isinstance(node, Shortcut):
            return Shortcut(word(node.branch), walk(node.body))
        return word(node)

    return walk(pattern)
