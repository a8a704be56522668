"""Mixers by name: listed, and created from a word of a pattern."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from zoo.core.errors import UsageError, quoted, refuse_oversize
from zoo.core.options import Options
from zoo.core.registry import split_spec
from zoo.pattern.grammar import parse_word
from zoo.pattern.tree import mixer_of
from zoo.protocol import MAX_WIDTH, MIN_WIDTH, Mixer, Place, mixers


def list_mixers(pattern: str = "*", kind: Literal["sequence", "channel"] | None = None) -> list[str]:
    """Names of the registered mixers that match a shell pattern; wrappers are not listed.

    Raises:
        UsageError: an unknown kind.
    """
    if kind not in (None, "sequence", "channel"):
        raise UsageError(f"Unknown kind {kind!r}. Available: sequence, channel.")
    found = [n for n in mixers.names(pattern) if not wraps(mixers[n])]
    return [n for n in found if kind in (None, mixers[n].kind)]


def wraps(cls: type[Mixer]) -> bool:
    """Whether a mixer class wraps another word: its Config names that option in `positional`."""
    return bool(getattr(cls.Config, "positional", ()))


def create_mixer(
    spec: str | Mapping[str, Any] | Options, d_model: int, *, place: Place = Place(), **options: Any
) -> Mixer:
    """Create a mixer from one word (`"gqa(n_kv_heads=2)"`), a mapping with the key `name`, or its config.

    Raises:
        UsageError: unknown mixer or option, wrong type, or a width that does not fit the options.
    """
    config = mixer_config(spec, **options)
    if (
        isinstance(d_model, bool)
        or not isinstance(d_model, int)
        or not MIN_WIDTH <= d_model <= MAX_WIDTH
        or d_model % 2
    ):
        allowed = f"an even whole number from {MIN_WIDTH} to {MAX_WIDTH:,}"
        raise UsageError(f"d_model={quoted(d_model)} is not allowed: it should be {allowed}.")
    cls = mixer_of(config)
    with refuse_oversize(cls.name):
        return cls(d_model, config, place=place)


def mixer_config(spec: str | Mapping[str, Any] | Options, **options: Any) -> Options:
    """The config that `spec` and keyword `options` stand for."""
    if isinstance(spec, str) and spec.strip() not in mixers:
        word = parse_word(spec)
        if word.step.changed():
            raise UsageError(f"{spec!r} sets step options, which belong to a word of a model's pattern.")
        spec = word.config
    if isinstance(spec, Options):
        return type(spec)(**{**spec.changed(), **options}) if options else spec
    name, options = split_spec(spec.strip() if isinstance(spec, str) else spec, options, "mixer")
    return mixers[name].Config(**{k: tuple(v) if isinstance(v, list) else v for k, v in options.items()})
