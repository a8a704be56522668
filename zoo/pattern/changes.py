"""Patterns with other words in place of some."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from zoo.core.errors import UsageError, unknown
from zoo.pattern.grammar import parse_word
from zoo.pattern.tree import Parallel, Pattern, Repeat, Shortcut, StepOptions, Word


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
