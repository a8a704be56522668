"""The layer pattern: text <-> tree of mixer configs, and mixers created from its words."""

from zoo.pattern.changes import replaced, swap, swap_each
from zoo.pattern.data import from_data, to_data
from zoo.pattern.grammar import parse, parse_word
from zoo.pattern.named import Named, read_named
from zoo.pattern.tree import (
    Loop,
    LoopOptions,
    Node,
    NormText,
    Parallel,
    Pattern,
    Placement,
    Repeat,
    Shared,
    SharedOptions,
    Shortcut,
    StepOptions,
    Word,
    make_loop,
    make_shared,
    make_word,
    mixer_of,
    to_text,
)
from zoo.pattern.words import create_mixer, list_mixers, mixer_config

__all__ = [
    "Loop",
    "LoopOptions",
    "Named",
    "Node",
    "NormText",
    "Parallel",
    "Pattern",
    "Placement",
    "Repeat",
    "Shared",
    "SharedOptions",
    "Shortcut",
    "StepOptions",
    "Word",
    "create_mixer",
    "from_data",
    "list_mixers",
    "make_loop",
    "make_shared",
    "make_word",
    "mixer_config",
    "mixer_of",
    "parse",
    "parse_word",
    "read_named",
    "replaced",
    "swap",
    "swap_each",
    "to_data",
    "to_text",
]
