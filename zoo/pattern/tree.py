"""The layer pattern as a tree: words in order, side by side, repeated, or along a shortcut; and its canonical text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from zoo.core.errors import UsageError, unknown
from zoo.core.options import Options
from zoo.pattern.literals import literal_text
from zoo.pattern.named import read_named
from zoo.protocol import Mixer, mixers, norms

Placement = Literal["pre", "post", "sandwich", "output"]
NormText = Annotated[str, BeforeValidator(lambda value: read_named(norms, value).text)]
"""A norm, with its options if it has any."""


class StepOptions(Options, label="a step"):
    """The residual step of a word; None means the model's default.

    Attributes:
        placement: place of the norm: "pre", before the mixer; "post", after the sum; "sandwich", on both sides of
            the mixer; "output", after the mixer only (OLMo 2).
        norm: the normalisation; the weights of "rmsnorm_zero_centred" are 1 + w (Gemma), "rmsnorm_plain" has none.
            Options of a norm follow in brackets: `norm="my_norm(scale=2.0)"`.
        norm_axis: axis of the norm: the channels of a step, or the steps of a channel (non-causal models).
        in_scale: factor on the mixer's input.
        out_scale: factor on the mixer's output.
        residual_scale: factor on the stream that the output is added to (DeepNorm).
    """

    placement: Placement | None = None
    norm: NormText | None = None
    norm_axis: Literal["channels", "time"] | None = None
    in_scale: float | None = None
    out_scale: float | None = None
    residual_scale: float | None = None


@dataclass(frozen=True)
class Word:
    """One mixer with its options."""

    config: Options
    step: StepOptions = field(default_factory=StepOptions)

    @property
    def name(self) -> str:
        return mixer_of(self.config).name

    def held(self) -> dict[str, Word]:
        """The words among its options: what a wrapper such as `bidirectional` wraps."""
        return {k: v for k, v in self.config if isinstance(v, Word)}


@dataclass(frozen=True)
class Parallel:
    """Words that read the same input and are summed."""

    words: tuple[Word, ...]


@dataclass(frozen=True)
class Repeat:
    """`count` copies of a pattern, each with parameters of its own."""

    count: int
    body: Pattern


@dataclass(frozen=True)
class Shortcut:
    """`branch` reads the stream before `body` and is added after it."""

    branch: Word
    body: Pattern


Node = Word | Parallel | Repeat | Shortcut


@dataclass(frozen=True)
class Pattern:
    """Residual steps in order."""

    nodes: tuple[Node, ...]

    def __str__(self) -> str:
        return to_text(self)

    def steps(self) -> Iterator[Word | Parallel | Shortcut]:
        """The steps with repeats unrolled."""
        for node in self.nodes:
            if isinstance(node, Repeat):
                for _ in range(node.count):
                    yield from node.body.steps()
            else:
                yield node

    def names(self) -> set[str]:
        """The names of all words, those that others wrap too."""
        words = list(self.words())
        return {w.name for w in words} | {held.name for w in words for held in w.held().values()}

    def words(self) -> Iterator[Word]:
        """Every word with repeats unrolled, in reading order."""
        for step in self.steps():
            if isinstance(step, Word):
                yield step
            elif isinstance(step, Parallel):
                yield from step.words
            else:
                yield step.branch
                yield from step.body.words()


def make_word(name: str, options: Mapping[str, Any]) -> Word:
    """A word from its name and options, step options included.

    Raises:
        UsageError: unknown mixer or option, or a wrong type.
    """
    config_class = mixers[name].Config
    if taken := set(config_class.model_fields) & set(StepOptions.model_fields):
        raise UsageError(f"{name}: its Config declares {', '.join(sorted(taken))}, which a step of any word has.")
    for option in options:
        if option not in config_class.model_fields and option not in StepOptions.model_fields:
            raise unknown(f"option of {name}", option, [*config_class.model_fields, *StepOptions.model_fields])
    step = {k: v for k, v in options.items() if k in StepOptions.model_fields}
    return Word(config_class(**{k: v for k, v in options.items() if k not in step}), StepOptions(**step))


def mixer_of(config: Options) -> type[Mixer]:
    """The mixer class whose Config `config` is."""
    name = type(config)._label  # that of the registry
    if name is not None and name in mixers and mixers[name].Config is type(config):
        return mixers[name]
    raise UsageError(f"{type(config).__qualname__} is the config of no registered mixer.")


def _word_text(word: Word) -> str:
    positional = getattr(type(word.config), "positional", ())
    options = {**word.config.given(), **word.step.given()}
    arguments = [_word_text(getattr(word.config, name)) for name in positional]
    arguments += [f"{k}={literal_text(v)}" for k, v in options.items() if k not in positional]
    return word.name + (f"({', '.join(arguments)})" if arguments else "")


def to_text(pattern: Pattern | Node) -> str:
    """The canonical text of a pattern."""
    if isinstance(pattern, Pattern):
        return " ".join(map(to_text, pattern.nodes))
    if isinstance(pattern, Repeat):
        return f"{pattern.count}*({to_text(pattern.body)})"
    if isinstance(pattern, Parallel):
        return "(" + " | ".join(map(_word_text, pattern.words)) + ")"
    if isinstance(pattern, Shortcut):
        return f"shortcut({_word_text(pattern.branch)}, {to_text(pattern.body)})"
    return _word_text(pattern)
