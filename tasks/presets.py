"""Published names of benchmarks' tasks: each a task of this package with the options that it stands for."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any, NamedTuple

_NUMBER = {"value_length": 7, "value_vocab": 10}
_UUID = {"value_length": 32, "value_vocab": 16}
_UUID_KEY = {"key_length": 32, "key_vocab": 16}


class Preset(NamedTuple):
    """What a published name stands for.

    Attributes:
        task: the name of a registered task.
        options: its options, which may be overridden one by one.
        about: what it is, in a line.
    """

    task: str
    options: dict[str, Any]
    about: str


PRESETS = MappingProxyType(
    {
        "niah_single_1": Preset("niah", {"haystack": "repeated", **_NUMBER}, "a word's number in noise"),
        "niah_single_2": Preset("niah", _NUMBER, "a word's number in a text"),
        "niah_single_3": Preset("niah", _UUID, "a word's UUID in a text"),
        "niah_multikey_1": Preset("niah", {"n_keys": 4, **_NUMBER}, "the number of one of four words in a text"),
        "niah_multikey_2": Preset("niah", {"haystack": "needles", **_NUMBER}, "a word's number among others' numbers"),
        "niah_multikey_3": Preset(
            "niah", {"haystack": "needles", **_UUID_KEY, **_UUID}, "a UUID's UUID among others' UUIDs"
        ),
        "niah_multivalue": Preset("niah", {"n_values": 4, **_NUMBER}, "the four numbers of a word in a text"),
        "niah_multiquery": Preset("niah", {"n_queries": 4, **_NUMBER}, "the numbers of four words in a text"),
        "vt": Preset(
            "variable_tracking", {"haystack": "repeated", "n_chains": 1, "n_hops": 4}, "five variables of one value"
        ),
        "qa_1": Preset("niah", {"references": "any"}, "SQuAD's questions about documents, from path=dev-v2.0.json"),
        "qa_2": Preset("niah", {"references": "any"}, "HotpotQA's questions, from path=hotpot_dev_distractor_v1.json"),
    }
)
"""The names of RULER (Hsieh et al., COLM 2024; `scripts/synthetic.yaml`), with its numbers of keys, values, queries and
hops. Its numbers have 7 digits and its UUIDs 32 hexadecimal ones, a token each; its words are tokens, and its essays
are random fillers. Its questions about documents (qa_1, qa_2) are not generated: they need the public file."""
