"""Models with other words in their pattern."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zoo.models.config import ModelConfig
from zoo.models.create import is_family, model_config, read_spec
from zoo.pattern import Pattern, from_data
from zoo.pattern import swap as swap_words


def swap(spec: Any, words: Mapping[str, str]) -> Any:
    """Replace words in a pattern or a config: `swap("gqa mlp", {"gqa": "mla"})`.

    Args:
        spec: a pattern as text or data, which gives text, or as a `Pattern`, which gives one; a `ModelConfig`, a
            mapping of model options, or a family-size (`"llama3-tiny"`), which give a `ModelConfig`. That of a family
            keeps `published`, which says where it came from; `zoo.to_hf` no longer writes such a model, and names what
            differs. `n_parameters` in the mapping takes the width at which the new model has no more.
        words: names of words, and for each the word that replaces it, with options. Step options are kept.

    Raises:
        UsageError: a name that is not in the pattern, or an unknown replacement.
    """
    if is_family(spec) or (isinstance(spec, Mapping) and {"pattern", "family"} & spec.keys()):
        config, budget = read_spec(spec)
        swapped = swap(config, words)
        return swapped if budget is None else model_config(swapped, n_parameters=budget)
    if isinstance(spec, ModelConfig):
        changed = {**spec.changed(), "pattern": swap(spec.pattern, words)}
        if spec.recursion is not None and spec.recursion.outer is not None:
            outer = from_data(spec.recursion.outer)
            there = {k: v for k, v in words.items() if k in outer.names()}
            changed["recursion"] = {**spec.recursion.changed(), "outer": swap(spec.recursion.outer, there)}
        return ModelConfig(**changed)
    if isinstance(spec, Pattern):
        return swap_words(spec, words)
    return str(swap_words(from_data(spec), words))
