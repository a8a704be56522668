"""Mixers by name: register, list, create. Imports no mixer; every file of the mixer packages registers itself."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from zoo.core.errors import UsageError, quoted
from zoo.core.options import Options
from zoo.core.registry import Registry, split_spec
from zoo.protocol import Mixer, Place

mixers: Registry[type[Mixer]] = Registry(
    "mixer", "zoo.mixers", "zoo.channel_mixers", base=Mixer, settings={"kind": ("sequence", "channel")}
)
register = mixers.register
"""Class decorator `@register("name")`."""

MIN_WIDTH, MAX_WIDTH = 16, 2**20


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
    """A mixer from one word (`"gqa(n_kv_heads=2)"`), a mapping with the key `name`, or its config.

    Raises:
        UsageError: unknown mixer or option, wrong type, or a width the options cannot hold.
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
    with sizes_of(cls.name):
        return cls(d_model, config, place=place)


@contextlib.contextmanager
def sizes_of(what: str) -> Iterator[None]:
    """Turns what torch and Python say of sizes beyond 64 bits into a UsageError."""
    try:
        yield
    except (RuntimeError, TypeError, OverflowError) as error:
        if isinstance(error, OverflowError) or "overflow" in str(error).lower():
            raise UsageError(f"{what}: a size is beyond what any tensor can hold.") from None
        raise


def mixer_config(spec: str | Mapping[str, Any] | Options, **options: Any) -> Options:
    """The config that `spec` and keyword `options` stand for."""
    if isinstance(spec, str) and spec.strip() not in mixers:
        from zoo.pattern import parse_word

        word = parse_word(spec)
        if word.step.changed():
            raise UsageError(f"{spec!r} sets step options, which belong to a word of a model's pattern.")
        spec = word.config
    if isinstance(spec, Options):
        return type(spec)(**{**spec.changed(), **options}) if options else spec
    name, options = split_spec(spec.strip() if isinstance(spec, str) else spec, options, "mixer")
    return mixers[name].Config(**{k: tuple(v) if isinstance(v, list) else v for k, v in options.items()})


def mixer_of(config: Options) -> type[Mixer]:
    """The mixer class whose Config `config` is."""
    for name in mixers.names():
        if mixers[name].Config is type(config):
            return mixers[name]
    raise UsageError(f"{type(config).__qualname__} is the config of no registered mixer.")


def derive_heads(d_model: int, head_dim: int = 64) -> int:
    """The most heads of at least `head_dim` channels that divide `d_model`, for configs that name no number."""
    return next(n for n in range(max(1, d_model // head_dim), 0, -1) if d_model % n == 0)
