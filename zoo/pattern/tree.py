"""The layer pattern as a tree: words in order, side by side, repeated, looped, shared or along a shortcut; and its
text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from zoo.core.errors import UsageError, quoted, unknown
from zoo.core.options import Options, tuples
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
        canon: W, taps of a Canon layer between the norm and the mixers, u + conv(u) (Canon-A, Canon-C).
            The published W is 4.
    """

    placement: Placement | None = None
    norm: NormText | None = None
    norm_axis: Literal["channels", "time"] | None = None
    in_scale: float | None = None
    out_scale: float | None = None
    residual_scale: float | None = None
    canon: int | None = Field(default=None, ge=2, le=1024)


class LoopOptions(Options, label="loop"):
    """What a loop does between its passes; e is the stream that it reads, and h what a pass gives to the next one.

    Attributes:
        inject: what a pass reads of e beside h. "none": h alone. "add": h + e (HRM). "concat": W [h, e], with W from
            2 D to D (Huginn). "gated": (1 - tanh(F u)) * e + tanh(M u) * h with u = W [norm(e), norm(h)] of
            `inject_rank` numbers (Inkling 2).
        inject_rank: numbers of u, for inject="gated".
        start: "input": the first pass reads e itself. "zeros": it reads e injected into zeros. "carried": it reads e
            injected into what this loop gave in the pass before of the loop around it, in the first pass into zeros
            (HRM-Text, whose low level goes on in the next cycle of the high level).
        gate: a pass moves the stream by sigmoid(g_i) of the way to what its body gives, with D numbers g_i for each
            pass i.
        norm: a norm at the end of every pass, with one set of weights, as in Ouro and HRM.
        residual: the loop gives e + h, as a residual step does.
        gradient: number of the last passes that pass gradients, by default all; the stream before the loop then gets
            its gradient through e alone, so that `inject` is needed. Several numbers are one for each pass of the loop
            around it; with `residual` some of them may be 0.
        exit: adds a halting head, which gives each token a probability to leave after each pass. In training the output
            is the mean of all passes under these probabilities. In evaluation a token leaves after the first pass at
            which the sum of its probabilities is at least this number: 1.0 runs every pass, None has no head.
        entropy_loss: weight of the entropy of these probabilities, which training increases (Ouro).
        depth_loss: weight of the mean number of passes, which training decreases.
    """

    inject: Literal["none", "add", "concat", "gated"] = "none"
    inject_rank: int = Field(default=64, ge=1)
    start: Literal["input", "zeros", "carried"] = "input"
    gate: bool = False
    norm: NormText | None = None
    residual: bool = False
    gradient: int | tuple[int, ...] | None = None
    exit: float | None = Field(default=None, gt=0, le=1)
    entropy_loss: float = Field(default=0.05, ge=0)
    depth_loss: float = Field(default=0.0, ge=0)

    @field_validator("gradient", mode="before")
    @classmethod
    def _from_lists(cls, value: Any) -> Any:
        return tuples(value)

    def gradients(self) -> tuple[int, ...]:
        """The numbers of `gradient`."""
        if self.gradient is None:
            return ()
        return self.gradient if isinstance(self.gradient, tuple) else (self.gradient,)

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> LoopOptions:
        if self.inject == "none" and self.start != "input":
            raise UsageError(f'loop: start="{self.start}" without an inject never reads its input: set inject.')
        if self.inject == "none" and self.gradient is not None:
            told = "lets no gradient through to the layers before the loop: set inject"
            raise UsageError(f"loop: gradient={literal_text(self.gradient)} without an inject {told}.")
        least = 1 if isinstance(self.gradient, int) else 0
        if min(self.gradients(), default=least) < least:
            given = f"loop: gradient={literal_text(self.gradient)} is not allowed"
            raise UsageError(f"{given}: it should be greater than or equal to {least}.")
        if 0 in self.gradients() and not self.residual:
            told = "lets no gradient through in a pass of the loop around: set residual=True"
            raise UsageError(f"loop: gradient={literal_text(self.gradient)} {told}.")
        if self.gradient == ():
            raise UsageError("loop: gradient=[] has no number: give one for each pass of the loop around.")
        if self.inject != "gated" and "inject_rank" in self.changed():
            raise UsageError(f'loop: inject_rank={self.inject_rank} belongs to inject="gated", which is not set.')
        for name in ("entropy_loss", "depth_loss"):
            if self.exit is None and name in self.changed():
                raise UsageError(f"loop: {name}={getattr(self, name)} belongs to a halting head: set exit.")
        return self


class SharedOptions(Options, label="shared"):
    """What a shared block reads and where its result goes; h is the stream at a use, and e the embedding, which is what
    the first layer of the network reads.

    Attributes:
        inject: what the block reads of e beside h. "none": h alone. "add": h + e. "concat": W [h, e], with W from 2 D
            to D. "wide": [h, e] itself: the first word of the body norms and reads these 2 D numbers and gives D, to
            which no stream is added (Zamba).
        enters: where the result goes. "stream": what the body gives is the stream from there on, as in a loop. "next":
            it is added to what the next word reads, before its norm, and the stream stays h (Zamba).
        out_proj: a linear layer of each use on the result, for enters="next" (Zamba).
    """

    inject: Literal["none", "add", "concat", "wide"] = "none"
    enters: Literal["stream", "next"] = "stream"
    out_proj: bool = False

    @model_validator(mode="after")
    def _fit_together(self) -> SharedOptions:
        if self.enters == "stream" and self.inject == "wide":
            raise UsageError('shared: inject="wide" gives no stream of its own to go on with: set enters="next".')
        if self.enters == "stream" and self.out_proj:
            raise UsageError('shared: out_proj=True belongs to enters="next", which is not set.')
        return self


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
    """N copies of a pattern, each with weights of its own."""

    count: int
    body: Pattern


@dataclass(frozen=True)
class Shortcut:
    """A word that reads the stream before the body, and whose output is added after the body."""

    branch: Word
    body: Pattern


@dataclass(frozen=True)
class Loop:
    """The body applied n times, one pass after the other, with one set of weights and a state for each pass."""

    count: int
    body: Pattern
    options: LoopOptions = field(default_factory=LoopOptions)


@dataclass(frozen=True)
class Shared:
    """A block with a name: all its uses have one set of weights, and each a state of its own.

    The body and the options stand at the first use, or at all of them; a use that is `short` has the name alone.
    """

    label: str
    body: Pattern
    options: SharedOptions = field(default_factory=SharedOptions)
    short: bool = False


Node = Word | Parallel | Repeat | Shortcut | Loop | Shared


@dataclass(frozen=True)
class Pattern:
    """Residual steps in order."""

    nodes: tuple[Node, ...]

    def __str__(self) -> str:
        return to_text(self)

    def steps(self) -> Iterator[Word | Parallel | Shortcut | Loop | Shared]:
        """The steps with repeats unrolled; a loop is one, and so is each use of a shared block."""
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
        """Every word with repeats unrolled, in reading order; those of a loop once, and those of a shared block."""
        for step in self.unrolled():
            if isinstance(step, Word):
                yield step
            elif isinstance(step, Parallel):
                yield from step.words
            elif isinstance(step, Shortcut):
                yield step.branch

    def unrolled(self, read: set[str] | None = None) -> Iterator[Word | Parallel | Shortcut | Loop | Shared]:
        """Every step in reading order, those within nodes after the nodes; the body of a shared block once.

        Args:
            read: names of the shared blocks that have been read; those read here are added.
        """
        read = set() if read is None else read
        for step in self.steps():
            yield step
            if isinstance(step, Shared):
                if step.label in read:
                    continue
                read.add(step.label)
            if isinstance(step, Shortcut | Loop | Shared):
                yield from step.body.unrolled(read)

    def depth(self) -> int:
        """Number of sequence mixers that the stream passes, those of a loop as often as it runs, and those of a shared
        block at every use."""
        return sum(map(_depth, self.nodes))


def _depth(node: Node) -> int:
    if isinstance(node, Repeat | Loop):
        return node.count * node.body.depth()
    if isinstance(node, Shortcut):
        return _depth(node.branch) + node.body.depth()
    if isinstance(node, Shared):
        return node.body.depth()
    words = node.words if isinstance(node, Parallel) else (node,)
    return sum(mixer_of(word.config).kind == "sequence" for word in words)


def make_loop(count: Any, body: Pattern, options: Mapping[str, Any]) -> Loop:
    """A loop from its number of passes, its body and its options.

    Raises:
        UsageError: no number of passes, an unknown option, a wrong type, or options that ask for more passes.
    """
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise UsageError(f"loop runs a whole number of times from 1, as in loop(4, gqa swiglu), not {quoted(count)}.")
    found = LoopOptions(**options)
    if max(found.gradients(), default=0) > count:
        raise UsageError(f"loop: gradient={literal_text(found.gradient)} is more than its passes, which are {count}.")
    for name in ("exit", "inject"):
        if count == 1 and name in found.changed() and (name == "exit" or found.start == "input"):
            raise UsageError(f"loop: {name}={quoted(getattr(found, name))} needs at least 2 passes, and there is 1.")
    return Loop(count, body, found)


def make_shared(label: Any, body: Pattern | None, options: Mapping[str, Any], known: dict[str, Shared]) -> Shared:
    """A use of a shared block.

    Args:
        label: its name.
        body: its steps; None where the name stands alone.
        options: as of `SharedOptions`.
        known: the blocks that have been read, by name; a new one is added.

    Raises:
        UsageError: no name, a name alone that stands for nothing yet, an unknown option, or the name of another block.
    """
    if not isinstance(label, str) or not label.strip():
        raise UsageError(f'shared takes a name and steps, as in shared("a", gqa swiglu), not {quoted(label)}.')
    first = known.get(label)
    if body is None:
        if options:
            raise UsageError(f"shared({quoted(label)}) without steps takes no options: they stand beside the steps.")
        if first is None:
            of = f" There are: {', '.join(map(quoted, known))}." if known else ""
            raise UsageError(f"shared({quoted(label)}) comes before its steps: write them at its first use.{of}")
        return Shared(label, first.body, first.options, short=True)
    found = Shared(label, body, SharedOptions(**options))
    if any(isinstance(step, Shared) and step.label == label for step in body.unrolled()):
        raise UsageError(f"shared({quoted(label)}) stands within itself: a loop applies the same steps again.")
    if first is not None and (first.body, first.options) != (found.body, found.options):
        one, other = to_text(first), to_text(found)
        raise UsageError(f"{one} and {other} are two blocks of one name: use two, or the same steps and options.")
    known.setdefault(label, found)
    return found


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
    if isinstance(pattern, Loop):
        options = [f"{k}={literal_text(v)}" for k, v in pattern.options.given().items()]
        return f"loop({', '.join([str(pattern.count), to_text(pattern.body), *options])})"
    if isinstance(pattern, Shared):
        options = [f"{k}={literal_text(v)}" for k, v in pattern.options.given().items()]
        rest = [] if pattern.short else [to_text(pattern.body), *options]
        return f"shared({', '.join([literal_text(pattern.label), *rest])})"
    return _word_text(pattern)
