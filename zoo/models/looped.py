"""A token model with a loop, which thinks in steps: each step runs the loop again from where it ended."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from zoo.core.errors import UsageError
from zoo.loops import Carried, LoopStep
from zoo.models.config import ModelConfig
from zoo.models.recursive import Thought
from zoo.models.token import TokenModel
from zoo.ops.modules import widely
from zoo.pattern import Loop, Pattern, Shortcut, parse
from zoo.protocol import Context
from zoo.residual import Residual


class LoopedState(NamedTuple):
    """The state between supervision steps.

    Attributes:
        answer: (B, T, D), what the loop gave.
        latents: (B, n, T, D), what the loops within it gave that have start="carried".
        begun: (B,) bool, whether a row has been thought about; if not, its loop starts as in any pass of the model.
    """

    answer: Tensor
    latents: Tensor
    begun: Tensor


class LoopedModel:
    """One pass of a token model as one supervision step, with the interface of `RecursiveModel`.

    The loop of a later step continues from what it gave in the step before: h_0 is that h_n, detached, and its first
    pass reads h_0 injected into e as every later pass does. S steps of a `loop(n, ...)` give the logits of one pass of
    `loop(S * n, ...)`, and gradients pass through the n passes of one step.

    Args:
        model: with a config that `require_loop` takes, and a halting head.

    Raises:
        UsageError: a model that cannot think in steps, with the fix.
    """

    def __init__(self, model: TokenModel):
        require_loop(model.config)
        if model.halting is None:
            raise UsageError("Deep supervision of a loop needs a halting head: set model.halting=true.")
        self.model, self.config, self.logits, self.modules = model, model.config, model.logits, model.modules
        # the steps come before the shared blocks, in which there may be more loops
        self.loop, *self.within = (m for m in model.backbone.modules() if isinstance(m, LoopStep))
        self.inner = [m for m in self.loop.modules() if isinstance(m, LoopStep) and m.initial is not None]

    def parameters(self) -> Iterator[nn.Parameter]:
        return self.model.parameters()

    def init_state(self, batch_size: int, length: int, *, generator: None = None, start: Literal[0] = 0) -> LoopedState:
        """The state before any thinking; nothing of it is drawn, and no other `start` is possible."""
        device, dtype = next(self.model.parameters()).device, self.model.compute_dtype()
        answer = torch.zeros(batch_size, length, self.config.d_model, device=device, dtype=dtype)
        latents = answer.new_zeros(batch_size, len(self.inner), *answer.shape[1:])
        return LoopedState(answer, latents, torch.zeros(batch_size, dtype=torch.bool, device=device))

    def think(
        self,
        tokens: Tensor,
        state: LoopedState | None = None,
        context: Context | None = None,
        *,
        puzzles: Tensor | None = None,
    ) -> Thought:
        """One supervision step of tokens (B, T); `puzzles` are not read."""
        context = Context() if context is None else context
        state = self.init_state(*tokens.shape) if state is None else state
        begun = state.begun
        context.shared[self.loop.key] = Carried(0, state.answer, begun)
        for loop in self.within:
            context.shared.pop(loop.key, None)
        for i, inner in enumerate(self.inner):
            assert inner.initial is not None
            z = torch.where(begun[:, None, None], state.latents[:, i], inner.initial.to(state.latents.dtype))
            context.shared[inner.key] = Carried(0, z)
        hidden, _ = self.model.features(tokens, None, context)
        answer, *latents = (context.shared.pop(loop.key).h.detach() for loop in (self.loop, *self.inner))
        q = widely(self.model.halting, hidden[:, -1 if self.config.causal else 0])
        q = q.to(torch.promote_types(q.dtype, torch.float32))
        z = torch.stack(latents, 1) if latents else state.latents
        after = LoopedState(answer, z, torch.ones_like(begun))
        return Thought(hidden, q[:, 0], q[:, 1], after)  # type: ignore[arg-type]

    def flops_per_token(self, context_length: int) -> int:
        """Matmul FLOPs (multiply-add = 2) of one supervision step by token."""
        return self.model.flops_per_token(context_length)


def require_loop(config: ModelConfig) -> Loop:
    """The loop of a model that thinks in steps.

    Raises:
        UsageError: none, or several; one of which tokens leave early; or several residual streams.
    """
    loops = list(_outermost(parse(config.pattern)))
    if len(loops) != 1:
        told = "there is none" if not loops else f"there are {len(loops)}"
        raise UsageError(
            f"deep_supervision goes on with one loop of the pattern, and {told}: write one loop(n, ...) in "
            "model.pattern, with loops within it if need be, or set model.recursion={}."
        )
    steps = (loops[0], *loops[0].body.unrolled())
    if any(isinstance(step, Loop) and step.options.exit is not None for step in steps):
        raise UsageError(
            "deep_supervision has a halting head for whole answers, and exit= of a loop one for each token: leave out "
            "exit, or set objective=next_token."
        )
    if Residual.of(config.residual).streams(config.d_model) > 1:
        raise UsageError('Deep supervision of a loop has one residual stream: set model.residual="plain".')
    return loops[0]


def _outermost(pattern: Pattern) -> Iterator[Loop]:
    for node in pattern.steps():
        if isinstance(node, Loop):
            yield node
        elif isinstance(node, Shortcut):
            yield from _outermost(node.body)


def thinker(model: Any) -> Any:
    """A recursive model as it is, and a token model as a `LoopedModel`."""
    return LoopedModel(model) if isinstance(model, TokenModel) else model


__all__ = ["LoopedModel", "LoopedState", "require_loop", "thinker"]
