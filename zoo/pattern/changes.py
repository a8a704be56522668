"""Patterns with other words in place of some."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from zoo.core.errors import UsageError, quoted, unknown
from zoo.pattern.grammar import parse_word
from zoo.pattern.tree import Loop, Parallel, Pattern, Repeat, Shared, Shortcut, StepOptions, Word, mixer_of


def swap(pattern: Pattern, words: Mapping[str, str], layers: Iterable[int] | None = None) -> Pattern:
    """`pattern` with every word named in `words` replaced by the word given for it; step options are kept.

    Args:
        pattern: the pattern.
        words: names of words, and for each its replacement.
        layers: numbers of the layers to change, by default all. A layer is a residual step with a sequence mixer and
            the channel mixers that follow it; layers are numbered from 0 in reading order with repeats written out,
            and -1 is the last, as in Python. Those of a shared block have the numbers of its first use, and later uses
            none.

    Raises:
        UsageError: a name that is not in the pattern or not in these layers, a layer that is not there or has none of
            the names, or a replacement that is not one word.
    """
    return swap_each([pattern], words, layers)[0]


def swap_each(
    patterns: Sequence[Pattern], words: Mapping[str, str], layers: Iterable[int] | None = None
) -> list[Pattern]:
    """As `swap`, for the patterns of a model's networks, whose layers are numbered from the first network on."""
    if not isinstance(words, Mapping) or not all(isinstance(text, str) for text in words.values()):
        raise UsageError(f'swap takes a mapping of names to words, such as {{"gqa": "mla"}}, not {words!r:.60}.')
    present = {name for pattern in patterns for name in pattern.names()}
    for name in words:
        if name not in present:
            raise unknown("word of the pattern", name, sorted(present))
    new = {name: parse_word(text) for name, text in words.items()}
    starts = [0, *itertools.accumulate(map(n_layers, patterns))]
    chosen = None if layers is None else _chosen(layers, starts[-1])
    changed: set[int] = set()
    used: set[str] = set()

    def change(old: Word, layer: int) -> Word:
        if old.name not in new or (chosen is not None and layer not in chosen):
            return old
        changed.add(layer)
        used.add(old.name)
        fresh = new[old.name]
        return Word(fresh.config, StepOptions(**{**old.step.changed(), **fresh.step.changed()}))

    result = [replaced(p, change, first) for p, first in zip(patterns, starts, strict=False)]
    if chosen is not None:
        names = " or ".join(repr(name) for name in words)
        if without := sorted(chosen - changed):
            raise UsageError(f"layers={sorted(chosen)} is not allowed: layer {without[0]} has no {names}.")
        if unused := sorted(words.keys() - used):
            raise UsageError(f"layers={sorted(chosen)} is not allowed: none of these layers has {unused[0]!r}.")
    return result


def n_layers(pattern: Pattern) -> int:
    """Number of layers, as `swap` numbers them; at least 1."""
    last = 0

    def look(word: Word, layer: int) -> Word:
        nonlocal last
        last = max(last, layer)
        return word

    replaced(pattern, look)
    return last + 1


def replaced(pattern: Pattern, change: Callable[[Word, int], Word], first: int = 0) -> Pattern:
    """`pattern` with what `change` gives in place of every word and its layer; words that a word wraps come before it.

    The first layer has the number `first`.

    Repeats are kept where their copies stay the same, and cut into runs of equal copies elsewhere.
    """
    seen = 0  # sequence mixers so far; those side by side are one
    blocks: dict[str, Pattern] = {}  # the bodies of shared blocks, changed at their first use

    def word(old: Word, layer: int) -> Word:
        held = {k: word(v, layer) for k, v in old.held().items()}
        new = replace(old, config=type(old.config)(**{**old.config.changed(), **held})) if held else old
        return change(new, layer)

    def step(words: tuple[Word, ...]) -> tuple[Word, ...]:
        nonlocal seen
        seen += any(mixer_of(w.config).kind == "sequence" for w in words)
        layer = first + max(seen - 1, 0)
        return tuple(word(w, layer) for w in words)

    def walk(node: Any) -> list[Any]:
        if isinstance(node, Repeat):
            copies = [body(node.body) for _ in range(node.count)]
            runs = [(len(list(run)), copy) for copy, run in itertools.groupby(copies)]
            if len(runs) == 1:
                return [replace(node, body=copies[0])]
            return [n for count, copy in runs for n in ([Repeat(count, copy)] if count > 1 else copy.nodes)]
        if isinstance(node, Parallel):
            return [Parallel(step(node.words))]
        if isinstance(node, Shortcut):
            return [Shortcut(step((node.branch,))[0], body(node.body))]
        if isinstance(node, Loop):
            return [replace(node, body=body(node.body))]
        if isinstance(node, Shared):
            if node.label not in blocks:
                blocks[node.label] = body(node.body)
            return [replace(node, body=blocks[node.label])]
        return [step((node,))[0]]

    def body(part: Pattern) -> Pattern:
        return Pattern(tuple(n for node in part.nodes for n in walk(node)))

    return body(pattern)


def _chosen(layers: Any, n: int) -> set[int]:
    """Numbers of layers, from 0, of those that a person chose of `n`."""
    numbers = [layers] if isinstance(layers, int) else layers
    if isinstance(numbers, str) or not isinstance(numbers, Iterable):
        raise UsageError(f"layers={quoted(layers)} is not allowed: it should be a list of numbers of layers.")
    numbers = list(numbers)
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, int):
            raise UsageError(f"layers={quoted(numbers)} is not allowed: it should be a list of numbers of layers.")
        if not -n <= number < n:
            last = f"0 to {n - 1} (or {-n} to -1, from the end)" if n > 1 else "0"
            raise UsageError(f"There is no layer {number}: the pattern has the layers {last}.")
    if not numbers:
        raise UsageError("layers=[] names no layer: leave it out to change all of them.")
    return {number % n for number in numbers}
