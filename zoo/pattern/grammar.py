"""The layer pattern: an architecture as text, `3*(3*(gated_deltanet swiglu) gqa(n_kv_heads=2) swiglu)`.

Grammar (a space is a residual step):

    pattern  = item+
    item     = [N "*"] "(" pattern ")" | N "*" word | N "*" node | step
    step     = word { "|" word } | "(" word { "|" word } ")" | node
    node     = "shortcut" "(" word "," pattern ")" | "loop" "(" N "," pattern { "," NAME "=" literal } ")"
             | "shared" "(" TEXT [ "," pattern { "," NAME "=" literal } ] ")"
    word     = NAME [ "(" [ argument { "," argument } ] ")" ]      (no space after NAME: `a (b | c)` is two steps)
    argument = word (wrappers only) | NAME "=" literal
    literal  = number | "text" | True | False | None | [ literal, ... ]

`parse` and `to_text` are exact inverses: `parse(to_text(p)) == p`, and `to_text(parse(s)) == s` for a text in canonical
form (options in order of declaration). `to_data` and `from_data` do the same for YAML.
"""

from __future__ import annotations

from typing import Any

from zoo.core.errors import UsageError
from zoo.pattern.literals import Reader
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
from zoo.protocol import NODES, mixers

MAX_STEPS = 10_000


class _Parser(Reader):
    def __init__(self, text: str, known: dict[str, Shared]):
        super().__init__(text, "Pattern")
        self.known = known

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
                body = Pattern((self.node() or self.word(),))
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
        if node := self.node():
            if self.peek() == ("mark", "|"):
                raise self.error("'|' joins single words, not nodes")
            return node
        words = [self.word()]
        while self.accept("|"):
            words.append(self.word())
        return words[0] if len(words) == 1 else Parallel(tuple(words))

    def node(self) -> Shortcut | Loop | Shared | None:
        """The shortcut, the loop or the shared block that begins here, if one does."""
        if self.peek() == ("name", "shortcut"):
            self.at += 1
            self.expect("(", "after shortcut")
            branch = self.word()
            self.expect(",", "between the branch and the body of shortcut(branch, body)")
            body = self.pattern()
            self.expect(")", "to close shortcut(")
            return Shortcut(branch, body)
        if self.peek() == ("name", "loop"):
            self.at += 1
            self.expect("(", "after loop")
            if self.peek()[0] != "number":
                raise self.error("the number of passes is missing: loop(n, body)")
            count = self.literal()
            self.expect(",", "between the number of passes and the body of loop(n, body)")
            body = self.pattern()
            return make_loop(count, body, self.rest("loop"))
        if self.peek() == ("name", "shared"):
            self.at += 1
            self.expect("(", "after shared")
            if self.peek()[0] != "text":
                raise self.error('the name of the block is missing: shared("a", body)')
            label = self.literal()
            steps = self.pattern() if self.accept(",") else None
            return make_shared(label, steps, self.rest("shared"), self.known)
        return None

    def rest(self, node: str) -> dict[str, Any]:
        """The options of a node after its body, up to the bracket that closes it."""
        options: dict[str, Any] = {}
        while self.accept(","):
            key, value = self.option(node)
            if key in options:
                raise self.error(f"option {key!r} of {node} is given twice")
            options[key] = value
        self.expect(")", f"to close {node}(")
        return options

    def word(self) -> Word:
        kind, name = self.peek()
        if kind != "name":
            raise self.error("a mixer's name is missing")
        if name in NODES:
            raise self.error(f"{name}(...) is a step of its own, and stands where no single word is meant")
        self.at += 1
        positional = list(getattr(mixers[name].Config, "positional", ()))

        def take(options: dict[str, Any]) -> bool:
            if self.peek()[0] != "name" or self.peek(1) == ("mark", "="):
                return False
            if not positional:
                raise self.error(f"{name} takes options as name=value only")
            options[positional.pop(0)] = self.word()
            return True

        options = self.options(name, take)
        if positional:
            raise self.error(f"{name} wraps a word: {name}({', '.join(positional)})")
        return make_word(name, options)


def parse(text: str) -> Pattern:
    """The tree that a pattern text stands for.

    Raises:
        UsageError: what is wrong and where, in one line.
    """
    return parse_part(text, {})


def parse_part(text: str, known: dict[str, Shared]) -> Pattern:
    """As `parse`, for a text that comes after others.

    Args:
        text: the text.
        known: the shared blocks of those, by name; new ones are added.
    """
    parser = _Parser(text, known)
    pattern = parser.pattern()
    if parser.peek()[0] != "end":
        raise parser.error("nothing is open that this could close")
    return limited(pattern, text)


def limited(pattern: Pattern, given: Any) -> Pattern:
    if (n := _count(pattern)) > MAX_STEPS:  # those of a loop too, as often as it runs
        raise UsageError(f"Pattern {given!r} has {n:,} steps; at most {MAX_STEPS:,} are allowed.")
    return pattern


def _count(pattern: Pattern, blocks: dict[str, int] | None = None) -> int:
    """Number of steps; `blocks` has those of the shared blocks, each counted once, since they may nest."""
    blocks = {} if blocks is None else blocks

    def steps(node: Node) -> int:
        if isinstance(node, Repeat | Loop):
            return node.count * _count(node.body, blocks)
        if isinstance(node, Shared):
            if node.label not in blocks:
                blocks[node.label] = _count(node.body, blocks)
            return 1 + blocks[node.label]
        return 1 + _count(node.body, blocks) if isinstance(node, Shortcut) else 1

    return sum(map(steps, pattern.nodes))


def parse_word(text: str) -> Word:
    """The one word that `text` is."""
    nodes = parse(text).nodes
    if len(nodes) != 1 or not isinstance(nodes[0], Word):
        raise UsageError(f"{text!r} is a pattern of several steps where one mixer is asked for.")
    return nodes[0]
