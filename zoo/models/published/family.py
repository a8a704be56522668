"""What a family is, and the list of them."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

from zoo.core.errors import UsageError
from zoo.core.readers import shown
from zoo.core.registry import Registry
from zoo.models.published.config import Published
from zoo.models.published.maps import Map
from zoo.models.published.quantised import KEYS, Quantised, check_readable, quantised
from zoo.pattern import parse

# an untrusted config could ask for more than can be listed, or computed
PARTS = re.compile(r"(layers?|blocks|experts|heads|cycles|steps)$")  # keys that count what a model is made of
MOST_PARTS = 10_000
MOST_EXPERTS = 1_000_000
MOST_PASSES = 100_000
WRONG_TYPES = (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError)
HEADS = re.compile(r"(ForCausalLM|LMHeadModel)$")


@dataclass(frozen=True)
class Family:
    """A published architecture.

    Attributes:
        name: as in `name-size`.
        architecture: the class that published configs name under `architectures`.
        model_type: what they give as `model_type`.
        sizes: published configs by size, in their own keys, as far as they differ from the defaults that `options`
            reads. "tiny" is ours, for trials.
        options: the options of `ModelConfig` that a published config stands for.
        weights: how the weights of such a model lie in published checkpoints.
        defaults: the values that transformers gives to keys which a published config leaves out.
        ignored: regular expressions for names in checkpoints that hold nothing of their own (tables of positions).
        bare: the class of the stack without its head; by default after `architecture`, which follows the usage.
        marker: a key that identifies its configs if they have neither `architectures` nor `model_type`.
        surplus: which of a checkpoint's names belong to parts beyond the model, such as layers that predict further
            tokens; they are left aside.
        seeing: the class of models that see too, whose `text_config` is a config of this family; they are read as the
            text model within.
        sizes_of: the family whose class, options and weights it has, if it only adds sizes under another name; configs
            are then read as of that one.
        quantised: methods of `quantization_config` whose weights are read, dequantised: "fp8" in blocks, "mxfp4".
    """

    name: str
    architecture: str
    model_type: str
    sizes: Mapping[str, Mapping[str, Any]]
    options: Callable[[Published], dict[str, Any]]
    weights: Callable[[Published], Iterable[Map]]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    bare: str | None = None
    marker: str | None = None
    surplus: Callable[[Published, Collection[str]], Iterable[str]] = lambda p, names: ()
    seeing: str | None = None
    sizes_of: str | None = None
    quantised: tuple[str, ...] = ("fp8",)

    def published(self, size: str) -> dict[str, Any]:
        """The published config of a size."""
        return {"architectures": [self.architecture], "model_type": self.model_type, **self.sizes[size]}

    def read(self, config: Mapping[str, Any]) -> Published:
        """A config of this family, to be read key by key."""
        return Published(config, self.architecture, self.defaults)

    def model_options(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The model options that a published config stands for, itself among them.

        Raises:
            UsageError: an option of the config, or a value of it, that is not supported.
        """
        config = self._text_of(config)
        self._understood(check_readable, config, self.quantised, self.architecture)
        if how := self.quantisation(config):  # its weights are dequantised when they are read
            config = {key: value for key, value in config.items() if key != how.key}
        for key, value in config.items():
            if isinstance(value, int) and value > MOST_PARTS and PARTS.search(str(key)):
                raise UsageError(f"{self.architecture} with {key}={value} is not supported, only up to {MOST_PARTS}.")
            if isinstance(value, list | str) and len(value) > MOST_PARTS:
                told = f"{shown(key)} of {len(value)} parts"
                raise UsageError(f"{self.architecture} with {told} is not supported, only up to {MOST_PARTS}.")
        published = self.read(config)
        options = self._understood(self.options, published)
        self._understood(self._check_counts, options)
        self._understood(published.refuse_unread, options)
        named = {"architectures": [self.architecture]} if self.bare_name in _architectures(config) else {}
        return {**options, "published": {**config, **named}}

    def quantisation(self, config: Mapping[str, Any]) -> Quantised | None:
        """How a config, or that of the text model within it, says that its weights are quantised; None if it does not.

        Raises:
            UsageError: a value of the config that cannot be understood.
        """
        return self._understood(quantised, self._text_of(config))

    def _text_of(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """The config of the text model within one that sees too; any other as it is."""
        if self.seeing is None or self.seeing not in _architectures(config):
            return config
        text = config.get("text_config")
        if not isinstance(text, Mapping):
            raise UsageError(f"The config of {self.seeing} lacks 'text_config'.")
        shared = {key: config[key] for key in ("tie_word_embeddings", *KEYS) if config.get(key) is not None}
        return {"model_type": self.model_type, **text, **shared, "architectures": [self.architecture]}

    def maps(self, config: Mapping[str, Any]) -> list[Map]:
        """How the weights of a model of a published config lie in checkpoints.

        Raises:
            UsageError: a value of the config that is not supported.
        """
        return self._understood(lambda: list(self.weights(self.read(config))))

    def beyond(self, config: Mapping[str, Any], names: Collection[str]) -> set[str]:
        """Which of a checkpoint's names are left aside: of parts beyond the model, and those that hold nothing.

        Raises:
            UsageError: a value of the config that is not supported.
        """
        ignored = [re.compile(pattern) for pattern in self.ignored]
        unused = {name for name in names if any(pattern.search(name) for pattern in ignored)}
        return unused.union(self._understood(lambda: list(self.surplus(self.read(config), names))))

    @property
    def bare_name(self) -> str:
        """The class of the stack without its head; the same as `architecture` where there is none."""
        return self.bare or HEADS.sub("Model", self.architecture)

    def _understood(self, read: Callable[..., Any], *given: Any) -> Any:
        """The result of `read` for a config whose values may have any type."""
        try:
            return read(*given)
        except UsageError:
            raise
        except WRONG_TYPES as error:
            reason = (str(error).splitlines() or [""])[0]
            raise UsageError(
                f"The config of {self.architecture} cannot be understood: {type(error).__name__}: {shown(reason[:200])}"
            ) from error

    def _check_counts(self, options: Mapping[str, Any]) -> None:
        """Refuse more experts, or applications of a recursive model, than can be listed or computed."""
        words = list(parse(options["pattern"]).words())
        recursion = options.get("recursion") or {}
        for count, most, what in (
            (sum(getattr(w.config, "n_experts", 0) for w in words), MOST_EXPERTS, "experts"),
            (prod(recursion.get(k, 1) for k in ("cycles", "updates", "max_steps")), MOST_PASSES, "passes"),
        ):
            if count > most:
                raise UsageError(f"{self.architecture} with {count:,} {what} is not supported, only up to {most:,}.")


def _architectures(config: Mapping[str, Any]) -> list[str]:
    """The classes that a config names."""
    given = config.get("architectures") or []
    return [str(name) for name in (given if isinstance(given, list | tuple) else [given])]


class Families:
    """Presets by name, `family-size`; every file of `zoo.models.families`, or one of `ZOO_IMPORT`, enters its own with
    `families.add`."""

    def __init__(self) -> None:
        self.registry: Registry[Family] = Registry("family", "zoo.models.families")
        self._forms: dict[tuple[str, str], str] = {}  # names, by what published configs are known by

    def add(self, *found: Family) -> None:
        """Enter families, each with all its sizes."""
        for family in found:
            name, module = getattr(family, "name", ""), getattr(getattr(family, "options", None), "__module__", "")
            self.registry.enter(name, family, str(module), lambda family: _lacks(family) or self._clash(family))
            if isinstance(family, Family) and family.sizes_of is None:
                self._forms.setdefault((family.architecture, family.model_type), name)

    def _clash(self, family: Family) -> str | None:
        """Why a published config could be of another family too."""
        other = self._forms.get((family.architecture, family.model_type), family.name)
        if other == family.name or family.sizes_of is not None:
            return None
        what = f"architecture {family.architecture!r} with model_type {family.model_type!r}"
        return f"its {what} is that of {other!r}{self.registry.place(other)}"

    def all(self) -> list[Family]:
        """The families by name."""
        return [self.registry[name] for name in self.registry.names()]

    def names(self, pattern: str = "*") -> list[str]:
        """Names `family-size` that match a shell pattern, sorted."""
        found = [f"{family.name}-{size}" for family in self.all() for size in family.sizes]
        return sorted(fnmatch.filter(found, pattern))

    def __contains__(self, name: object) -> bool:
        return name in self.names()

    def of(self, name: str) -> tuple[Family, str]:
        """The family and the size that `family-size` names.

        Raises:
            UsageError: there is none of that name.
        """
        if name not in self:
            raise self.registry.unknown(name, self.names(), "model")
        family, size = next((f, s) for f in self.all() for s in f.sizes if f"{f.name}-{s}" == name)
        return family, size

    def options(self, name: str, given: Mapping[str, Any] = {}) -> dict[str, Any]:
        """The model options of `family-size`, with those `given` over them."""
        family, size = self.of(name)
        published = family.published(size)
        if "vocab_size" in given:  # a published config may have another vocabulary and be the same architecture
            published["vocab_size"] = given["vocab_size"]
        return {**family.model_options(published), **given}

    def of_config(self, config: Mapping[str, Any]) -> Family:
        """The family of a published config.

        Raises:
            UsageError: its architecture is not known.
        """
        given = _architectures(config)
        named = given[0] if given else str(config.get("model_type"))
        known = [family for family in self.all() if family.sizes_of is None]
        found = [f for f in known if named in ((f.architecture, f.bare_name, f.seeing) if given else (f.model_type,))]
        if not given and "model_type" not in config:
            found = [f for f in known if f.marker in config]
        if not found:
            available = ", ".join(sorted({f.architecture for f in self.all()}))  # nobody mistyped it: none is meant
            raise UsageError(f"Unknown architecture {named[:80]!r}. Available: {available}. {self.registry.hint()}")
        return min(found, key=lambda family: family.model_type != config.get("model_type"))  # or any of the same form


def _lacks(family: Family) -> str | None:
    """What is wrong with a family, in a few words."""
    if not isinstance(family, Family):
        return "it is no Family"
    for part in ("options", "weights", "surplus"):
        if not callable(getattr(family, part)):
            return f"its {part} is no function"
    sizes = family.sizes
    if not isinstance(sizes, Mapping) or not all(isinstance(size, Mapping) for size in sizes.values()):
        return "its sizes are no mapping of names to configs"
    return None


families = Families()
