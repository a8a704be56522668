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

from zoo.core.errors import UsageError, quoted
from zoo.door import check_features
from zoo.loops import Held, LoopStep, hold, stateless
from zoo.norms import NORM_EPS
from zoo.pattern import Loop, Parallel, Pattern, Shared, Shortcut, StepOptions, Word, mixer_of
from zoo.protocol import Admitted, Context, Mixer, Place, State, admit, check_state
from zoo.residual import Connection, Residual
from zoo.shared import EMBEDDING, Block, Blocks, SharedStep, modules_used
from zoo.steps import ShortcutStep, Step

R = TypeVar("R")

NODES = (LoopStep, SharedStep)  # their bodies recompute by themselves


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
