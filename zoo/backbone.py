"""The residual stack: any mixers, in the order of a pattern."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from zoo.canon import Canon, require_causal
from zoo.core.errors import UsageError, quoted
from zoo.door import check_features
from zoo.loops import Held, LoopStep, hold, stateless
from zoo.norms import NORM_EPS, make_norm
from zoo.pattern import Loop, Parallel, Pattern, Shared, Shortcut, StepOptions, Word, create_mixer, mixer_of
from zoo.protocol import Admitted, Context, Mixer, Place, State, admit, check_state, mixers
from zoo.residual import Connection, Residual
from zoo.shared import EMBEDDING, Block, Blocks, SharedStep, modules_used
from zoo.states import tree_bytes

R = TypeVar("R")

NODES = (LoopStep, SharedStep)  # their bodies recompute by themselves
OF_THE_STEP = ("placement", "norm", "norm_axis", "residual_scale", "canon")  # the others are a word's own


class Step(nn.Module):
    """One residual step over the sum of one or more mixers.

    pre: x + f(norm(x)); post: norm(x + f(x)); sandwich: x + norm(f(norm(x))); output: x + norm(f(x)). With several
    residual streams, f reads what the connection gives, each stream is one x, and "post" norms them one by one.

    With `canon` the mixers read u + conv(u), where u is what they would read without; the state of that convolution
    then follows those of the mixers. With `place.d_out` the step reads d_model channels and gives d_out, and so has no
    stream to add to: norm(f(norm(x))).
    """

    def __init__(
        self,
        words: tuple[Word, ...],
        d_model: int,
        defaults: StepOptions,
        place: Place,
        norm_eps: float,
        connection: Connection,
    ):
        super().__init__()
        self.connection, self.narrows = connection, place.d_out is not None
        for word in words:
            if self.narrows and not mixer_of(word.config).traits.narrows:
                able = ", ".join(name for name in mixers.names() if mixers[name].traits.narrows)
                raise UsageError(
                    f'{word.name} cannot be the first word of a shared block with inject="wide": write one of {able}, '
                    f'or inject="concat".'
                )
        options = [StepOptions(**{**defaults.changed(), **word.step.changed()}) for word in words]
        if len({tuple(getattr(o, name) for name in OF_THE_STEP) for o in options}) > 1:
            names = " | ".join(w.name for w in words)
            raise UsageError(f"({names}) are one step: {', '.join(OF_THE_STEP)} must be the same for all of them.")
        self.placement = options[0].placement or "pre"
        self.residual_scale = options[0].residual_scale
        kind, axis = options[0].norm or "rmsnorm", options[0].norm_axis or "channels"
        if axis == "time" and place.causal:
            raise UsageError('norm_axis="time" looks ahead: it needs a model with causal=False.')
        self.scales = [(o.in_scale, o.out_scale) for o in options]
        self.mixers = nn.ModuleList(create_mixer(w.config, d_model, place=place) for w in words)
        for mixer, word in zip(self.mixers, words, strict=True):
            _check_causality(mixer, word, place)
        self.canon = None
        if (size := options[0].canon) is not None:
            require_causal("canon", size, place)
            self.canon = Canon(d_model, size)
        self.norms_time = axis == "time" and kind != "none"
        before, after = self.placement in ("pre", "sandwich"), self.placement != "pre"
        self.norm_in = make_norm(kind if before else "none", d_model, norm_eps, axis)
        self.norm_out = make_norm(kind if after else "none", place.d_out or d_model, norm_eps, axis)

    def forward(
        self, x: Tensor, states: tuple[State, ...] | None, context: Context, *, beside: Tensor | None = None
    ) -> tuple[Tensor, tuple[State, ...]]:
        """The next stream and the states of the mixers, which read what is `beside` (B, T, D) the stream too."""
        if self.norms_time and (context.lengths is not None or context.resets is not None):
            raise UsageError('norm_axis="time" norms whole rows: give neither lengths nor resets.')
        if self.norms_time and context.pieces is not None:
            raise UsageError('norm_axis="time" norms whole rows: they cannot be cut over processes.')
        if self.narrows:
            y, new_states = self.mix(self.norm_in(x), states, context)
            return self.norm_out(y), new_states
        h, x, weights = self.connection(x)
        y, new_states = self.mix(self.norm_in(h if beside is None else h + beside), states, context)
        x = x if self.residual_scale is None else x * self.residual_scale
        if self.placement == "post":
            return self.norm_out(self.connection.write(x, y, weights)), new_states
        return self.connection.write(x, self.norm_out(y), weights), new_states

    def mix(self, h: Tensor, states: tuple[State, ...] | None, context: Context) -> tuple[Tensor, tuple[State, ...]]:
        """The sum of the mixers' outputs, each with its scales, for a normed stream h (B, T, D)."""
        if len(self.mixers) == 1 and self.canon is None and self.scales[0] == (None, None):
            y, state = self.mixers[0](h, None if states is None else states[0], context)
            return y, (state,)
        outputs, new_states = [], []
        canon_state: tuple[State, ...] = ()
        if self.canon is not None:
            h, after = self.canon(h, None if states is None else states[-1], context)
            canon_state = (after,)
        for i, mixer in enumerate(self.mixers):
            in_scale, out_scale = self.scales[i]
            y, state = mixer(h if in_scale is None else h * in_scale, None if states is None else states[i], context)
            outputs.append(y if out_scale is None else y * out_scale)
            new_states.append(state)
        return functools.reduce(torch.add, outputs), (*new_states, *canon_state)

    def init_state(self, batch_size: int, **options: Any) -> tuple[State, ...]:
        states = tuple(_init_state(mixer, batch_size, options) for mixer in self.mixers)
        if self.canon is None:
            return states
        return (*states, self.canon.init_state(batch_size, options.get("device"), options.get("dtype")))

    def state_bytes(self, batch_size: int, context_length: int, dtype: torch.dtype) -> int:
        mixing = sum(mixer.state_bytes(batch_size, context_length, dtype) for mixer in self._mixers())
        return mixing + (0 if self.canon is None else tree_bytes(self.canon.init_state(batch_size, "meta", dtype)))

    def flops_per_token(self, context_length: int) -> int:
        mixing = sum(mixer.flops_per_token(context_length) for mixer in self._mixers())
        return self.connection.flops_per_token() + mixing

    def _mixers(self) -> Iterator[Any]:
        return iter(self.mixers)


class ShortcutStep(nn.Module):
    """x_0 -> body(x_0) + branch(norm(x_0)): the branch reads the stream early and is added late.

    Where the body's first step norms the stream before its mixer, the branch reads what that norm gives, as in
    LongCat-Flash (arXiv 2509.01322, section 2.2), unless its word sets a norm of its own.

    With several residual streams the branch has a connection of its own: it reads and mixes the streams before the
    body does, with the weights of the body's first norm where it shares that, and writes to those that the body gives.
    """

    def __init__(self, branch: Step, body: Backbone, d_model: int, own_norm: bool):
        super().__init__()
        if branch.placement == "post":
            raise UsageError('The branch of a shortcut takes placement="pre", "sandwich" or "output", not "post".')
        self.branch, self.body = branch, body
        first, before = body.steps[0], ("pre", "sandwich")
        shares = not own_norm and branch.placement in before
        self.shares_norm = shares and isinstance(first, Step) and first.placement in before
        if self.shares_norm:
            branch.norm_in = make_norm("none", d_model)

    def forward(self, x: Tensor, states: Any, context: Context) -> tuple[Tensor, tuple[State, State]]:
        branch_state, body_state = (None, None) if states is None else states
        norm: Any = self.body.steps[0].norm_in if self.shares_norm else self.branch.norm_in
        h, x, weights = self.branch.connection(x)
        y, branch_state = self.branch.mix(norm(h), branch_state, context)
        x, body_state = self.body(x, body_state, context)
        return self.branch.connection.write(x, self.branch.norm_out(y), weights), (branch_state, body_state)

    def init_state(self, batch_size: int, **options: Any) -> tuple[State, State]:
        return self.branch.init_state(batch_size, **options), self.body.init_state(batch_size, **options)

    def state_bytes(self, batch_size: int, context_length: int, dtype: torch.dtype) -> int:
        return sum(part.state_bytes(batch_size, context_length, dtype) for part in (self.branch, self.body))

    def flops_per_token(self, context_length: int) -> int:
        return self.branch.flops_per_token(context_length) + self.body.flops_per_token(context_length)


class Backbone(nn.Module):
    """x (B, T, D) through every step of a pattern; its state is the tuple of theirs.

    Args:
        pattern: the layer pattern.
        d_model: D.
        causal: whether outputs may depend on earlier inputs only.
        defaults: step options for words that do not set them.
        norm_eps: epsilon of the norms.
        residual: the residual kind, with its options.
        length: number of steps that the model is made for, or None.
        place: of the first mixer, where this is the body of a node.
        connections: of the steps, where this is the body of a node.
        stream: the residual kind of the stream, where this is the body of a node.
        within: the numbers of the steps that this is within, where it is the body of a node.
        around: number of passes of the innermost loop around, where this is in the body of one.
        blocks: the shared blocks of the network, where this is the body of a node.
        wide: the first step reads 2 D channels and gives D.

    Raises:
        UsageError: a mixer that cannot keep `causal`, with the word that can.

    Attributes:
        config: of a backbone that `zoo.create_backbone` made, the options that make it again.
        shared: the shared blocks, which the outermost backbone owns, in the order of their first uses; None where there
            are none.
    """

    config: Any = None

    def __init__(
        self,
        pattern: Pattern,
        d_model: int,
        *,
        causal: bool = True,
        defaults: StepOptions = StepOptions(),
        norm_eps: float = NORM_EPS,
        residual: str | Mapping[str, Any] = "plain",
        length: int | None = None,
        place: Place | None = None,
        connections: Iterator[Connection] | None = None,
        stream: Residual | None = None,
        within: tuple[int, ...] = (),
        around: int | None = None,
        blocks: Blocks | None = None,
        wide: bool = False,
    ):
        super().__init__()
        self.d_model, self.causal, self.residual = d_model, causal, Residual.of(residual)
        stream = self.residual if stream is None else stream
        connecting = self.residual.connections(d_model, norm_eps) if connections is None else connections
        layer = place.layer if place else 0
        here = place or Place(0, max(pattern.depth(), 1), causal, length)
        shared = Blocks.of(pattern) if blocks is None else blocks

        def step(words: tuple[Word, ...], layer: int) -> Step:
            first = wide and not self.steps
            at = here._replace(layer=layer, d_out=d_model if first else None)
            return Step(words, 2 * d_model if first else d_model, defaults, at, norm_eps, next(connecting))

        def inside(pattern: Pattern, layer: int, uses: int = here.uses, alone: bool = False, **more: Any) -> Backbone:
            plain = Residual.of("plain")
            return Backbone(
                pattern,
                d_model,
                causal=causal,
                defaults=defaults,
                norm_eps=norm_eps,
                length=length,
                place=here._replace(layer=layer, uses=uses),
                connections=plain.connections(d_model, norm_eps) if alone else connecting,  # it is widened outside
                stream=plain if alone else stream,
                within=(*within, len(self.steps)),
                blocks=shared,
                **more,
            )

        def block(node: Shared, layer: int) -> Block:
            if node.label not in shared.made:
                apart, broad = node.options.enters == "next", node.options.inject == "wide"
                body = inside(node.body, layer, shared.uses[node.label], apart, wide=broad)
                shared.made[node.label] = Block(node, body, d_model, norm_eps)
            return shared.made[node.label]

        seen = 0  # sequence mixers so far; a channel mixer belongs to the block before it
        self.steps = nn.ModuleList()
        nodes = list(pattern.steps())
        if wide and not isinstance(nodes[0], Word | Parallel):
            raise UsageError('The body of a shared block with inject="wide" begins with a word, such as gqa.')
        for node, following in zip(nodes, [*nodes[1:], None], strict=True):
            if isinstance(node, Shared):
                if node.options.enters == "next" and not isinstance(following, Word | Parallel):
                    name = quoted(node.label)
                    raise UsageError(
                        f'shared({name}) with enters="next" needs a word after it, which reads its result.'
                    )
                made, use = block(node, layer + seen), shared.used[node.label]
                shared.used[node.label] += 1
                uses = shared.uses[node.label]
                self.steps.append(SharedStep(node, made, use, uses, d_model, widen=stream.widen, narrow=stream.narrow))
                seen += node.body.depth()
                continue
            if isinstance(node, Loop):
                # Inits that depend on depth take that of the passes written out, and words of the body the place of
                # the first pass, as Huginn's (arXiv 2502.05171; `recpre/raven_modeling_minimal.py`).
                self.steps.append(
                    LoopStep(
                        node,
                        inside(node.body, layer + seen, around=node.count),
                        d_model,
                        norm_eps=norm_eps,
                        streams=stream.streams(d_model),
                        narrow=stream.narrow,
                        name="_".join(map(str, (*within, len(self.steps)))),
                        around=around,
                    )
                )
                seen += node.count * node.body.depth()
                continue
            if isinstance(node, Shortcut):
                branch = step((node.branch,), max(layer + seen - (not _is_sequence(node.branch)), 0))
                body = inside(node.body, layer + seen, around=around)
                given = set(node.branch.step.changed())
                if "residual_scale" in given:
                    raise UsageError(
                        "The branch of a shortcut takes no residual_scale: it is added to the body's stream."
                    )
                own_norm = bool({"norm", "norm_axis"} & given)
                self.steps.append(ShortcutStep(branch, body, d_model, own_norm))
                seen += _is_sequence(node.branch) + node.body.depth()
                continue
            words = node.words if isinstance(node, Parallel) else (node,)
            n_sequence = sum(map(_is_sequence, words))
            self.steps.append(step(words, layer + seen if n_sequence else max(layer + seen - 1, 0)))
            seen += n_sequence
        own = blocks is None and shared.made
        self.shared = nn.ModuleList(shared.made.values()) if own else None

    def forward(
        self,
        x: Tensor,
        state: tuple[State, ...] | None = None,
        context: Context | None = None,
        *,
        recompute: bool = False,
        held: Held | None = None,
    ) -> tuple[Tensor, tuple[State, ...]]:
        """x (B, T, D), T >= 1, from `state` (by default at rest; consumed) to ((B, T, D), next state).

        With `recompute` no activations within the steps are stored for the backward pass, which computes them again.
        The stream of tokens that are `held` stays as it is, and mixers read it.
        """
        if type(context) is not Admitted:  # no model has checked what is given
            if not torch.compiler.is_compiling():
                check_features("backbone", x, self.d_model)
                if state is not None:
                    check_state("backbone", self, state, len(x), x.dtype)
            context = admit("backbone", context, len(x), x.shape[1], x.device)
        new_states = []
        if self.shared is not None:
            context.shared[EMBEDDING] = x
        x = kept = self.residual.widen(x)
        beside: Tensor | None = None
        for i, step in enumerate(self.steps):
            before = None if state is None else state[i]
            enters = isinstance(step, SharedStep) and step.enters_next  # the next one may have a state
            if held is not None and held.all and stateless(step) and not enters:
                new_states.append(_init_state(step, len(x), {}))
                beside = None
                continue
            more: dict[str, Any] = {} if beside is None else {"beside": beside}
            beside = None
            if isinstance(step, NODES):
                y, new_state = step(x, before, context, recompute=recompute)
                x, beside = (x, y) if enters else (y, None)
            elif recompute and torch.is_grad_enabled():
                (x, new_state), own = recomputed(functools.partial(step, **more), step, x, before, context=context)
                context.losses.extend(own.losses)
                context.metrics.update(own.metrics)
                context.shared.update(own.shared)
            else:
                x, new_state = step(x, before, context, **more)
            new_states.append(new_state)
            x = x if held is None else hold(held, kept, x)
        return self.residual.narrow(x), tuple(new_states)

    def step(
        self, x_t: Tensor, state: tuple[State, ...], context: Context | None = None
    ) -> tuple[Tensor, tuple[State, ...]]:
        """`forward` at T = 1: x_t (B, D) to ((B, D), next state). Fields of `context` keep their T axis (of 1)."""
        if x_t.ndim != 2:
            raise UsageError(f"backbone: step takes x (B, {self.d_model}), not {tuple(x_t.shape)}.")
        y, state = self(x_t[:, None], state, context)
        return y.squeeze(1), state

    def init_state(self, batch_size: int, **options: Any) -> tuple[State, ...]:
        """The state at rest, as `Mixer.init_state`."""
        return tuple(_init_state(step, batch_size, options) for step in self.steps)

    def mixers(self) -> list[Mixer]:
        """All mixers, in reading order; those of a shared block at its first use."""
        return list(dict.fromkeys(_mixers_in(self)))

    def n_parameters(self) -> int:
        """Number of parameters, shared ones once."""
        return sum(p.numel() for p in self.parameters())

    def state_bytes(self, batch_size: int, context_length: int, dtype: torch.dtype = torch.float32) -> int:
        """Bytes of the state after `context_length` steps."""
        return sum(step.state_bytes(batch_size, context_length, dtype) for step in self._steps())

    def flops_per_token(self, context_length: int) -> int:
        """Matmul FLOPs (multiply-add = 2) of one token at a context of `context_length`."""
        return sum(step.flops_per_token(context_length) for step in self._steps())

    def recomputed_parts(self) -> list[nn.Module]:
        """The modules that `recompute` computes again, one by one: steps, those of a loop's body, and those of a shared
        block, at every use."""
        parts: list[nn.Module] = []
        for step in self.steps:
            parts += step.body.recomputed_parts() if isinstance(step, NODES) else [step]
        return parts

    def _steps(self) -> Iterator[Any]:
        return iter(self.steps)


def recomputed(function: Callable[..., R], network: nn.Module, *inputs: Any, context: Context) -> tuple[R, Context]:
    """`function(*inputs, context)`, of which no activation is stored: the backward pass calls it again.

    Every call gets a context of its own, which begins like the one given, and the buffers of the network as they were:
    nothing is counted or added twice.

    Args:
        function: computes with the network.
        network: whose buffers the function may change.
        *inputs: of the function.
        context: of the pass; left as it is.

    Returns:
        What the function gives, and the context of its first call.
    """

    shared, metrics = dict(context.shared), dict(context.metrics)  # as they are now, in the second call too

    def call(*inputs: Any) -> tuple[R, Context]:
        own = replace(context, shared=dict(shared), losses=[], metrics=dict(metrics))
        return function(*inputs, own), own

    again = lambda: (contextlib.nullcontext(), _buffers_kept(network))  # noqa: E731
    # every process sends what it sent in the forward pass, behind what its own backward pass needs too
    stop = context.pieces is None
    return checkpoint(call, *inputs, use_reentrant=False, context_fn=again, early_stop=stop)


@contextlib.contextmanager
def _buffers_kept(network: nn.Module) -> Iterator[None]:
    """Restore all buffers afterwards."""
    before = [(module, dict(module._buffers)) for module in modules_used(network) if module._buffers]
    try:
        yield
    finally:
        for module, buffers in before:
            module._buffers.update(buffers)


def _init_state(module: Any, batch_size: int, options: dict[str, Any]) -> Any:
    return module.init_state(batch_size, **options)


def _mixers_in(module: nn.Module) -> Iterator[Mixer]:
    """The mixers of a network, those within others left out; those of a shared block at every use."""
    if isinstance(module, Mixer):
        yield module
        return
    for child in module.children():
        yield from _mixers_in(child)
    if isinstance(module, SharedStep):
        yield from _mixers_in(module.block)


def _is_sequence(word: Word) -> bool:
    return mixer_of(word.config).kind == "sequence"


def _check_causality(mixer: Any, word: Word, place: Place) -> None:
    if place.causal and not mixer.causal:
        raise UsageError(f"{word.name} looks ahead here, but the model is causal: set causal=False on the model.")
    if not place.causal and mixer.causal and mixer.kind == "sequence":
        raise UsageError(
            f"{word.name} reads left to right only, but the model has causal=False: write bidirectional({word.name})."
        )
