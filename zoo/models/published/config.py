"""Reading published configs: every key is either understood or refused by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from zoo.core.errors import UsageError
from zoo.models.published.keys import ACTIVATIONS, refused
from zoo.ops import yarn_amplitude
from zoo.pattern import make_word, to_text

REQUIRED: Any = object()

LARGEST = float(torch.finfo(torch.float32).max)
LONGEST_PERIOD = 256  # of layers that repeat: the time to find it grows with the square


class Published:
    """A published config, read key by key.

    Args:
        config: keys and values, such as `config.json` holds.
        architecture: what messages call it.
        defaults: what stands for keys that are missing, but not for those that are null.
    """

    def __init__(self, config: Mapping[str, Any], architecture: str, defaults: Mapping[str, Any] = {}):
        self.config, self.architecture, self.defaults = config, architecture, defaults
        self._read: set[str] = set()

    def with_defaults(self, **defaults: Any) -> Published:
        """The same config with other values for keys that are missing; what is read of either counts as read."""
        other = Published(self.config, self.architecture, {**self.defaults, **defaults})
        other._read = self._read
        return other

    def __call__(self, key: str, default: Any = REQUIRED) -> Any:
        """The value of `key`; a default stands for one that is null, or missing here and in `defaults`.

        Raises:
            UsageError: there is none, and no default.
        """
        self._read.add(key)
        value = self.config.get(key, self.defaults.get(key))
        if value is None:
            if default is REQUIRED:
                raise UsageError(f"The config of {self.architecture} lacks {key!r}.")
            return default
        return value

    def number(self, key: str, default: Any = REQUIRED) -> float:
        """The value of `key` as a float: JSON has 10000 and 10000.0 alike."""
        return float(self(key, default))

    def whole(self, key: str, default: Any = REQUIRED) -> int:
        """The value of `key` as a count: a whole number from 1."""
        value = self(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{key} is no whole number from 1")
        return value

    def only(self, key: str, *allowed: Any, default: Any = None) -> Any:
        """The value of `key`, which has to be one of `allowed`; the first stands for one that is missing.

        Raises:
            UsageError: it is another.
        """
        value = self(key, allowed[0] if default is None else default)
        if value not in allowed:
            listing = " or ".join(map(repr, allowed))
            raise UsageError(f"{self.architecture} with {key}={value!r} is not supported, only {listing}.")
        return value

    def choice(self, key: str, table: Mapping[Any, Any], default: Any) -> Any:
        """What `table` says for the value of `key`.

        Raises:
            UsageError: nothing.
        """
        return table[self.only(key, *table, default=default)]

    def ignore(self, *keys: str) -> None:
        """Take note of keys that do not change the result."""
        self._read.update(keys)

    def limit(self, key: str, default: Any = None) -> float | None:
        """The value of `key`, a bound from above; None for none, which all are that float32 cannot reach."""
        value = self(key, default)
        return None if value is None or float(value) >= LARGEST else float(value)

    def refuse_unread(self, options: Mapping[str, Any] | None = None) -> None:
        """Raise if the config sets keys that were never read and that may change the result.

        Args:
            options: of the model that was read, by which it settles some of them itself.

        Raises:
            UsageError: naming them.
        """
        if wrong := list(refused(self.config, self._read, options)):
            told = ", ".join(key for key, _ in wrong[:10]) + (f" and {len(wrong) - 10} more" if wrong[10:] else "")
            why = " and ".join(dict.fromkeys(why for _, why in wrong[:10] if why))
            reason = f", and may change {why}" if why else ""
            raise UsageError(f"{self.architecture} with {told} is not supported: unknown to this loader{reason}.")

    # ---- what many configs share

    def heads(self) -> tuple[int, int, int]:
        """Numbers of heads and of heads of keys and values, and the width of a head."""
        n_heads = self("num_attention_heads")
        return n_heads, self("num_key_value_heads", n_heads), self("head_dim", self("hidden_size") // n_heads)

    def windows(self, window: int | None, sliding: Callable[[int], bool]) -> list[int | None]:
        """The window of every layer, None where it sees all, after `layer_types`.

        Args:
            window: of the layers that are called sliding.
            sliding: whether layer i is one, where the config does not say.

        Raises:
            UsageError: another number of layers, another kind of them, or sliding ones without a window.
        """
        names = {True: "sliding_attention", False: "full_attention"}
        kinds = self.kinds(lambda i: names[sliding(i)], *names.values())
        if names[True] in kinds and window is None:
            raise UsageError(f"{self.architecture} with {names[True]!r} layers needs a sliding_window.")
        return [window if kind == names[True] else None for kind in kinds]

    def kinds(self, default: Callable[[int], str], *allowed: str, key: str = "layer_types") -> list[str]:
        """The kind of every layer.

        Args:
            default: that of layer i, where the config does not say.
            allowed: all kinds.
            key: that tells them.

        Raises:
            UsageError: another number of layers, or another kind of them.
        """
        n_layers = self("num_hidden_layers")
        kinds = list(self(key, None) or map(default, range(n_layers)))
        if len(kinds) != n_layers:
            raise UsageError(f"{self.architecture} has {n_layers} layers, but {key} tells of {len(kinds)}.")
        if strange := set(kinds) - set(allowed):
            listing = " or ".join(map(repr, allowed))
            raise UsageError(f"{self.architecture} with a layer of type {min(strange)!r} is not supported: {listing}.")
        return kinds

    def rope(
        self,
        *,
        base: float = 10000.0,
        context: int | None = None,
        kind: str | None = None,
        theta: str = "rope_theta",
        scaling: str | None = "rope_scaling",
    ) -> dict[str, Any]:
        """The options of `RopeOptions` that the keys about rotary positions stand for, with the halves rotated.

        Reads `rope_parameters` (transformers 5; with `kind`, the entry for that kind of layer), or `rope_theta` and
        `rope_scaling` (before), but not `partial_rotary_factor` outside of them: see `rope_fraction`.

        Args:
            base: rope_theta where none is given.
            context: max_position_embeddings where none is given.
            theta, scaling: the keys before transformers 5; None for layers whose rotations are not scaled.

        Raises:
            UsageError: a scaling that is not supported, or one without its factors.
        """
        given = dict(self("rope_parameters", {}))
        before = dict(self(scaling, {})) if scaling else {}
        base = self(theta, base)
        given = (before or given) if kind is None else {**dict(given.get(kind) or {}), **before}
        rope = Published(given, self.architecture)
        rope.ignore("partial_rotary_factor", "original_max_position_embeddings")
        name = rope("rope_type", rope("type", "default"))
        options: dict[str, Any] = {"rope_base": rope.number("rope_theta", base), "rope_interleaved": False}
        if name == "default":
            return options
        if name not in ("linear", "yarn", "llama3"):
            raise UsageError(
                f"{self.architecture} with rope_type={name!r} is not supported, only default, linear, yarn or llama3."
            )
        factor = rope.number("factor")
        options |= {"rope_scaling": name, "rope_factor": factor}
        if name in ("yarn", "llama3"):
            longest = self("max_position_embeddings", REQUIRED if context is None else context)
            options["rope_context"] = int(rope("original_max_position_embeddings", longest))
        if name == "llama3":
            options["rope_bands"] = (rope.number("low_freq_factor"), rope.number("high_freq_factor"))
        if name == "yarn":
            options["rope_bands"] = (rope.number("beta_slow", 1.0), rope.number("beta_fast", 32.0))
            options["rope_truncate"] = bool(rope("truncate", True))
            amplitude = rope("attention_factor", None)
            weights = rope("mscale", None), rope("mscale_all_dim", None)
            if amplitude is None and all(weights):
                amplitude = yarn_amplitude(factor, weights[0]) / yarn_amplitude(factor, weights[1])
            if amplitude is not None:
                options["rope_amplitude"] = float(amplitude)
        unread = [k for k, v in given.items() if v is not None and k not in rope._read]
        if unread:
            raise UsageError(f"{self.architecture}: {unread[0]} of rope_type={name!r} is not supported.")
        return options

    def rope_fraction(self, head_dim: int, *, default: float = 1.0) -> float:
        """The share of a head's channels that is rotated, `partial_rotary_factor`, wherever it stands.

        Raises:
            UsageError: the channels that it makes are odd, so that they have no pairs.
        """
        outside = self("partial_rotary_factor", default)
        share = float(dict(self("rope_parameters", {})).get("partial_rotary_factor") or outside)
        if int(head_dim * share) % 2:
            raise UsageError(
                f"{self.architecture} with partial_rotary_factor={share} of {head_dim} channels is not supported: "
                f"it rotates {int(head_dim * share)}, an odd number."
            )
        return share


def word(name: str, **options: Any) -> str:
    """The text of a word, options at their defaults left out."""
    made = make_word(name, {k: v for k, v in options.items() if v is not None})
    return to_text(make_word(name, {**made.config.changed(), **made.step.changed()}))


def attention_word(p: Published, window: int | None = None, **options: Any) -> str:
    """The text of grouped attention with the config's heads, over a window where one is given."""
    n_heads, n_kv_heads, head_dim = p.heads()
    heads = {"n_heads": n_heads, "n_kv_heads": n_kv_heads, "head_dim": head_dim}
    return word("gqa" if window is None else "swa", **heads, window=window, **options)


def stack(layers: list[str]) -> str:
    """The pattern of layers, given each as text, with runs and periods written as repeats."""
    if not layers:
        raise ValueError("it has no layers")
    parts: list[str] = []
    at = 0
    while at < len(layers):
        best_period, best_count = 1, 1
        for period in range(1, min((len(layers) - at) // 2, LONGEST_PERIOD) + 1):
            body, count = layers[at : at + period], 1
            while layers[at + count * period : at + (count + 1) * period] == body:
                count += 1
            if count > 1 and count * period > best_count * best_period:
                best_period, best_count = period, count
        body = layers[at : at + best_period]
        text = stack(body) if best_period > 1 else body[0]
        parts.append(f"{best_count}*({text})" if best_count > 1 else text)
        at += best_period * best_count
    return " ".join(parts)


__all__ = ["ACTIVATIONS", "LARGEST", "REQUIRED", "Published", "stack", "word"]
