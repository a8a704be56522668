"""The contract of all mixers, and the laws that every one is tested for.

Shape legend: B batch, T time, D model width, H heads, G groups of keys (G divides H), K key width of a head, V value
width of a head, W convolution width.

A mixer maps (B, T, D) to (B, T, D) and takes its past as an explicit state, so that the same code serves training,
chunked prefill and step-by-step decoding. Checked for every mixer (`zoo/laws`):

0. Contract: `forward`, `step` and `init_state` return what the contract says; `law_cases` changes every option.
1. Chunk consistency: cutting a sequence anywhere and carrying the state changes neither outputs nor final state.
2. Causality: no output of a causal mixer depends on a later input.
3. Batch independence: no output depends on another row.
4. Forms: reference, chunked and fused forms agree in value and in gradient.
5. Purity: inputs are never changed (a consumed state aside) and uninitialised memory is never read.
6. Cost: `state_bytes` and `flops_per_token` equal what is measured.
7. Training: gradients reach every parameter and pass through the state; compilation and autocast work.
8. Any size: odd head widths, lengths that no chunk divides, batch 1, T = 1.
9. Packing: with `resets`, a packed row equals its documents run alone.
10. Raggedness: with `lengths`, each row equals that row run alone.
11. Refusal: a state, resets, timespans or lengths of another shape, type or range are refused in one line; whole
   numbers may be of any integer type.
12. Openness: hooks fire, adapters and pruning take effect on every layer; checkpointing changes no gradient.
13. Second derivatives, forward mode and `torch.func` are right, or refused by name.
14. Batch-mates: loss and answers of a row depend neither on the batch size of an evaluation nor on the other rows.
15. Pieces: a sequence that is cut over processes gives the outputs and gradients of one process.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from zoo.core.errors import UsageError
from zoo.core.options import Options, unfrozen
from zoo.core.registry import Registry
from zoo.door import check_features, check_resets, fits, form_of, misfit, read_lengths, read_places, read_timespans
from zoo.pieces import Pieces
from zoo.states import State, tree_bytes


class Place(NamedTuple):
    """The place of a mixer in its model, for inits that depend on depth and for words that inherit causality.

    Attributes:
        layer: number of sequence mixers that the stream passes before this one's block (a channel mixer belongs to the
            block before it); in a loop, before its first pass, and in a shared block, at its first use.
        n_layers: number of sequence mixers that the stream passes in the model, those of a loop as often as it runs,
            and those of a shared block at every use.
        causal: whether the model reads left to right only.
        length: number of steps that the model is made for, or None: for words with weights for every step.
        uses: number of places that use the mixer's weights, as part of a shared block.
        d_out: number of channels that the mixer gives, where it reads more: see `Traits.narrows`.
    """

    layer: int = 0
    n_layers: int = 1
    causal: bool = True
    length: int | None = None
    uses: int = 1
    d_out: int | None = None


class Traits(NamedTuple):
    """What a mixer cannot do, and what it needs beyond its inputs. By default it keeps every law and needs nothing.

    Attributes:
        not_compilable: why `torch.compile(fullgraph=True)` does not work, or None if it does.
        not_compilable_packed: why it does not work with packed documents (`context.resets`), or None if it does.
        couples_rows: why the results of a row depend on the other rows of its batch, within a tolerance. Then law 3 and
            the laws that need it (9, 10, selected rows of a state) are not checked, and `flops_per_token` is the
            least number of FLOPs.
        work_varies: why the work of a step depends on the values of its input. Then `flops_per_token` is the largest
            number of FLOPs.
        reads_timespans: whether the mixer works in continuous time and reads `context.timespans`.
        reads_tokens: whether the mixer needs `context.tokens`. Without them it is refused.
        takes_length: whether the mixer has weights for every step. The number of steps is its option `length`, or
            `place.length`.
        cuts_in_ops: how a sequence is cut over processes. The mixer passes `context.pieces` to its ops, which exchange
            what they need, and all processes compute at the same time. Otherwise the processes take turns: each waits
            for the whole state of the one before.
        reads_prefix: whether the mixer reads a prompt in both directions (`context.prefix`). Another sequence mixer is
            refused there.
        not_cuttable: why a sequence cannot be cut over processes, or None if it can.
        narrows: whether the mixer can give `place.d_out` channels, as the first word of a shared block that reads the
            embedding beside the stream.
    """

    not_compilable: str | None = None
    not_compilable_packed: str | None = None
    couples_rows: str | None = None
    work_varies: str | None = None
    reads_timespans: bool = False
    reads_tokens: bool = False
    takes_length: bool = False
    cuts_in_ops: bool = False
    not_cuttable: str | None = None
    reads_prefix: bool = False
    narrows: bool = False


_OLD_TRAITS = {"compiles": "not_compilable"}  # what a trait was called as an attribute of its own


@dataclass(eq=False)
class Context:
    """What all layers of a model share in one pass. The model makes a new one for every forward.

    Attributes:
        lengths: (B,) whole numbers, number of valid steps of each row of a right-padded batch; all of them by default.
        resets: (B, T) bool, true where a packed document starts: from this step on, no earlier step is visible.
        timespans: (B, T) time since the previous step, for continuous-time mixers; 1 by default.
        pieces: of a sequence that is cut over processes, of which the pass reads one piece; None where it is not cut.
        tokens: (B, T) whole numbers, the tokens that the pass reads, for words that look them up; negative where a
            place has none. A model of tokens sets them.
        prefix: (B,) whole numbers, the first steps of each row that see each other, as the prompt of a prefix-LM does;
            the steps behind them read left to right. It counts the steps of this pass, so a prompt is not cut.
        shared: named tensors, or tuples of them, that one layer stores for later ones.
        losses: auxiliary losses, each a scalar tensor, which are added to the loss of the objective.
        metrics: figures to log, each a scalar tensor.
        use: number of the use, of all uses of the shared block that the layer belongs to, for what each has of its own.
    """

    lengths: Tensor | None = None
    resets: Tensor | None = None
    timespans: Tensor | None = None
    shared: dict[str, Any] = field(default_factory=dict)
    losses: list[Tensor] = field(default_factory=list)
    metrics: dict[str, Tensor] = field(default_factory=dict)
    pieces: Pieces | None = None
    tokens: Tensor | None = None
    use: int = 0
    prefix: Tensor | None = None


def packing(context: Context | None) -> dict[str, Any]:
    """The arguments of every op for rows of unequal length, packed documents, and sequences that are cut."""
    if context is None:
        return {}
    pieces = {} if context.pieces is None else {"pieces": context.pieces}
    return {"lengths": context.lengths, "resets": context.resets, **pieces}


def single(x: Tensor, state: State | None, context: Context | None) -> bool:
    """Whether a pass over x (B, T, D) is a decoder's step: one step from a state, without gradients, rows complete."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or state is None or x.shape[1] != 1:
        return False
    if torch.is_autocast_enabled(x.device.type):
        return False
    return context is None or (context.lengths is context.resets is context.pieces is None)


class Admitted(Context):
    """A context whose fields have been checked; inner layers do not check them again."""


def admit(who: str, context: Context | None, batch_size: int, n_steps: int, device: torch.device) -> Admitted:
    """The checked context of a pass over (B, T) steps, whole numbers as int64; it shares losses, metrics and tensors.

    Raises:
        UsageError: a field that does not fit the pass.
    """
    if context is None:
        return Admitted()
    if not isinstance(context, Context):
        raise UsageError(f"{who}: the context is {context!r:.60}, expected a zoo.protocol.Context.")
    lengths, resets, timespans = context.lengths, context.resets, context.timespans
    if lengths is not None:
        lengths = read_lengths(who, lengths, batch_size, n_steps, device)
    if resets is not None:
        check_resets(who, resets, batch_size, n_steps, device)
    if timespans is not None:
        timespans = read_timespans(who, timespans, lengths, batch_size, n_steps, device)
    tokens = context.tokens
    if tokens is not None:
        tokens = read_places(who, tokens, batch_size, n_steps, device)
    pieces = context.pieces
    if pieces is not None:
        if lengths is not None:
            raise UsageError(
                f"{who}: a sequence that is cut over processes takes no lengths: give rows of equal length."
            )
        if n_steps != pieces.sizes[pieces.rank]:
            told = f"{n_steps} steps, and piece {pieces.rank} has {pieces.sizes[pieces.rank]}"
            raise UsageError(f"{who}: {told} of the {sum(pieces.sizes)} steps that are cut into {pieces.n} pieces.")
    prefix = context.prefix
    if prefix is not None:
        prefix = read_lengths(who, prefix, batch_size, n_steps, device, "prefix")
        if resets is not None or pieces is not None:
            given = "packed documents" if resets is not None else "sequences that are cut over processes"
            raise UsageError(f"{who}: a prefix is the prompt of a whole row: it does not go with {given}.")
    own = context.shared, context.losses, context.metrics
    return Admitted(lengths, resets, timespans, *own, pieces, tokens, context.use, prefix)


def check_state(who: str, module: Any, state: State, batch_size: int, dtype: torch.dtype) -> None:
    """Raises a `UsageError` unless `state` has the form of those of `module.init_state`, for this batch."""
    form = module.__dict__.get("_state_form")
    if form is None or not fits(form, state, batch_size, dtype):
        form = module.__dict__["_state_form"] = form_of(module.init_state)  # anew: parts may have been exchanged
        if not fits(form, state, batch_size, dtype):
            raise misfit(who, form, state, batch_size, dtype)


def not_cuttable(mixer: Mixer) -> str | None:
    """Why a sequence that a mixer reads cannot be cut over processes, or None if it can."""
    if mixer.traits.not_cuttable is None and not mixer.causal and not mixer.traits.cuts_in_ops:
        return "every step reads all others"
    return mixer.traits.not_cuttable


def _piece(
    mixer: Mixer, forward: Callable[..., Any], x: Tensor, state: State | None, context: Context, **more: Any
) -> tuple[Tensor, State]:
    """`forward` over one piece of a sequence that is cut over processes; no state is returned.

    Raises:
        UsageError: a mixer that cannot be cut, or a state: that of a piece is with the process before.
    """
    pieces = context.pieces
    assert pieces is not None
    if state is not None and tree_leaves(state):
        raise UsageError(f"{mixer.name}: a sequence that is cut over processes starts from rest: give no state.")
    if (why := not_cuttable(mixer)) is not None:
        raise UsageError(f"{mixer.name}: a sequence cannot be cut over processes: {why}.")
    if mixer.traits.cuts_in_ops:
        return forward(mixer, x, None, context, **more)[0], ()
    alone = replace(context, pieces=None)
    rest = mixer.init_state(len(x), capacity=1, device=x.device, dtype=x.dtype)
    if not tree_leaves(rest):
        return forward(mixer, x, None, alone, **more)[0], ()
    y, after = forward(mixer, x, pieces.receive_tree(rest), alone, **more)
    return pieces.send_tree(y, after), ()


def _through_the_door(forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward`, its inputs checked where no model has done so."""

    @functools.wraps(forward)
    def checked(self: Mixer, x: Tensor, state: State | None = None, context: Context | None = None, **more: Any) -> Any:
        if type(context) is not Admitted:
            if not torch.compiler.is_compiling():
                check_features(self.name, x, self.d_model)
                if state is not None:
                    check_state(self.name, self, state, len(x), x.dtype)
            context = admit(self.name, context, len(x), x.shape[1], x.device)
        if context.tokens is None and self.traits.reads_tokens:
            raise UsageError(
                f"{self.name} looks up tokens, and the pass has none: give Context(tokens=...), (B, T) whole "
                "numbers, as a model of tokens does."
            )
        if context.prefix is not None and self.kind == "sequence" and self.causal and not self.traits.reads_prefix:
            raise UsageError(
                f"{self.name} reads left to right only, and the pass has a prefix that is read in both directions: "
                "leave Context(prefix=...) out, or write mha, mqa, gqa or swa."
            )
        if context.pieces is not None:
            return _piece(self, forward, x, state, context, **more)
        return forward(self, x, state, context, **more)

    return checked


class Mixer(nn.Module, ABC):
    """Mixes a sequence over time (`kind` "sequence") or over channels (`kind` "channel").

    A subclass declares its options once, in a nested frozen `Config(Options)`, and enters the registry with
    `@register("name")`. A concrete mixer is final. The arguments of `forward` have been checked: x (B, T, D) with B and
    T at least 1, a state of the form of `init_state`, and a context that fits them.
    """

    name: ClassVar[str]
    kind: ClassVar[Literal["sequence", "channel"]] = "sequence"
    Config: ClassVar[type[Options]]
    traits: Traits = Traits()
    """What it cannot do, and what it needs beyond its inputs. An instance may replace that of its class."""

    d_model: int
    place: Place
    length: int
    """Number of steps that the mixer has weights for, if its traits say `takes_length`."""
    causal: bool = True
    """Whether the outputs depend on no later input. A mixer that is not causal has no state."""
    step_sums: tuple[str, ...] = ()
    """Names of buffers in which training passes add up, over all rows, what `after_step` reads."""
    expert_weights: tuple[str, ...] = ()
    """Names of parameters whose first axis is experts, which processes may share out (`zoo.experts`)."""

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        for name in Traits._fields + tuple(_OLD_TRAITS):
            if name in vars(cls):
                trait = _OLD_TRAITS.get(name, name)
                raise UsageError(
                    f"{cls.__name__}.{name} is a trait: write `traits = Traits({trait}=...)` in its class."
                )
        if "forward" in vars(cls):
            cls.forward = _through_the_door(cls.forward)  # type: ignore[method-assign]

    def __init__(self, d_model: int, config: Options, *, place: Place = Place()):
        super().__init__()
        self.d_model = d_model
        self.place = place
        self.config: Any = config  # of the subclass's own Config

    @abstractmethod
    def init_state(
        self,
        batch_size: int,
        *,
        capacity: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> State:
        """The state at rest.

        Args:
            batch_size: B.
            capacity: number of steps that a growing state (a key-value cache) sets aside; fixed-size states ignore it.
            device: that of the parameters by default.
            dtype: compute dtype, that of the parameters by default; recurrent states take
                `promote_types(float32, dtype)`.
        """

    @abstractmethod
    def forward(self, x: Tensor, state: State | None = None, context: Context | None = None) -> tuple[Tensor, State]:
        """Mix x (B, T, D), T >= 1, from `state` (by default at rest; consumed). Returns ((B, T, D), next state)."""

    def step(self, x_t: Tensor, state: State, context: Context | None = None) -> tuple[Tensor, State]:
        """`forward` at T = 1: x_t (B, D) to ((B, D), next state). Fields of `context` keep their T axis (of 1)."""
        if x_t.ndim != 2:
            raise UsageError(f"{self.name}: step takes x (B, {self.d_model}), not {tuple(x_t.shape)}.")
        y, state = self(x_t.unsqueeze(1), state, context)
        return y.squeeze(1), state

    def init_projections(self, init: Callable[[Tensor], Any]) -> None:
        """Initialise the weights of the projections anew, for models that start all of them alike (TRM).

        `init(weight)` is called for a weight (out, in) of every `nn.Linear`, where those are all the matrices that the
        mixer has. One that has others, or whose projections start in a way of their own, keeps its inits.
        """
        projections = [module.weight for module in self.modules() if isinstance(module, nn.Linear)]
        if len(projections) == sum(p.ndim > 1 for p in self.parameters()):
            for weight in projections:
                init(weight)

    def after_step(self) -> None:
        """Called after every optimizer step, for what a mixer learns by a rule instead of a gradient.

        It may change buffers (checkpoints store them if they are persistent), from values that training passes stored.
        Where several processes train on parts of a batch, the buffers named in `step_sums` have been added up before.
        """

    @abstractmethod
    def flops_per_token(self, context_length: int) -> int:
        """Matmul FLOPs (multiply-add = 2) of one step of the reference form, for one row whose context has
        `context_length` tokens with the new one."""

    def state_bytes(self, batch_size: int, context_length: int, dtype: torch.dtype) -> int:
        """Bytes of `init_state(batch_size, capacity=context_length, dtype=dtype)`, computed without allocating it."""
        return tree_bytes(self.init_state(batch_size, capacity=context_length, device="meta", dtype=dtype))

    @classmethod
    def law_cases(cls) -> list[dict[str, Any]]:
        """Sets of options for the laws: the defaults, and every option with another value at least once."""
        return [{}]


def _wrong_mixer(cls: type[Mixer]) -> str | None:
    if not isinstance(cls.traits, Traits):
        return f"its traits are {cls.traits!r:.60}; write Traits(...)"
    return unfrozen(cls.Config)


NODES = {
    "loop": "a node of patterns, loop(n, body)",
    "shared": "a node of patterns, shared(name, body)",
    "shortcut": "a node of patterns, shortcut(branch, body)",
}
"""Names that no mixer may have: those of the nodes of patterns."""
mixers: Registry[type[Mixer]] = Registry(
    "mixer",
    "zoo.mixers",
    "zoo.channel_mixers",
    base=Mixer,
    settings={"kind": ("sequence", "channel")},
    reserved=NODES,
    check=_wrong_mixer,
)
register = mixers.register
"""Class decorator `@register("name")`."""


class Norm(nn.Module, ABC):
    """Normalises the residual stream (B, T, ..., D): at a step, before the head, or after the embedding.

    A subclass declares its options, where it has any, in a nested frozen `Config(Options)`, and enters the registry
    with `@norms.register("name")`.

    Args:
        d_model: D.
        config: its options.
        eps: `norm_eps` of the model.
        axis: what it runs along, one of `axes`: the "channels" of a step, or the steps of a channel, "time".
    """

    class Config(Options):
        """None."""

    name: ClassVar[str]
    axes: ClassVar[tuple[str, ...]] = ("channels",)

    @classmethod
    def law_cases(cls) -> list[dict[str, Any]]:
        """Sets of options for the laws: the defaults, and every option with another value at least once."""
        return [{}]

    def __init__(self, d_model: int, config: Options, *, eps: float, axis: str = "channels"):
        super().__init__()
        self.d_model, self.eps, self.axis = d_model, eps, axis
        self.config: Any = config  # of the subclass's own Config

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """x, normed, in its dtype."""


def _wrong_norm(cls: type[Norm]) -> str | None:
    if isinstance(cls.axes, tuple) and cls.axes and all(axis in AXES for axis in cls.axes):
        return unfrozen(cls.Config)
    return f"its axes are {cls.axes!r:.60}; they should be a tuple of {' or '.join(map(repr, AXES))}"


AXES = ("channels", "time")
"""What a norm can run along."""
norms: Registry[type[Norm]] = Registry("norm", "zoo.norms", base=Norm, check=_wrong_norm)

MIN_WIDTH, MAX_WIDTH = 16, 2**20
"""The range of D, which is even."""


def derive_heads(d_model: int, head_dim: int = 64) -> int:
    """The largest number of heads of at least `head_dim` channels that divides `d_model`, the default of configs."""
    return next(n for n in range(max(1, d_model // head_dim), 0, -1) if d_model % n == 0)


def first_parameter_like(module: nn.Module, device: Any, dtype: torch.dtype | None) -> tuple[Any, torch.dtype]:
    """(device, dtype), by default those of the module's first floating-point parameter."""
    parameter = next((p for p in module.parameters() if p.is_floating_point()), None)
    if parameter is None:
        return device, dtype or torch.get_default_dtype()
    return (parameter.device if device is None else device), dtype or parameter.dtype


def recurrent_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a recurrent state at a compute dtype: at least float32."""
    return torch.promote_types(torch.float32, dtype)
