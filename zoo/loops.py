"""A loop of a pattern: some steps applied again and again, with one set of weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from zoo.core.errors import UsageError
from zoo.norms import make_norm
from zoo.ops.choices import fixed
from zoo.ops.derivatives import once_only, traced
from zoo.ops.modules import widely
from zoo.parameters import set_rule
from zoo.pattern import Loop
from zoo.pattern.literals import literal_text
from zoo.protocol import Context, State
from zoo.states import fork

TRUNCATED = "loop: second derivatives do not exist where gradient= lets gradients through the last passes only."


class Held(NamedTuple):
    """Steps of a pass whose stream stays as it is; mixers read them, and write what later steps see of them.

    Attributes:
        steps: (B, T) bool.
        all: whether it is known that these are all steps.
    """

    steps: Tensor
    all: bool


class Carried(NamedTuple):
    """What a loop gave before, from which it goes on: in the pass before of the loop around it, or in another call.

    Attributes:
        runs: passes of the loop around in which it has run.
        h: (B, T, D), or with the residual streams.
        begun: (B,) bool, the rows that go on; the others start anew. By default all go on.
    """

    runs: int
    h: Tensor
    begun: Tensor | None = None


class Inject(nn.Module):
    """What a pass reads of h, the stream, and of e, what the loop reads, both (..., D): see `LoopOptions.inject`."""

    def __init__(self, kind: str, d_model: int, rank: int, norm_eps: float):
        super().__init__()
        self.kind, self.d_model = kind, d_model
        gated = kind == "gated"
        self.norm = make_norm("rmsnorm_plain" if gated else "none", d_model, norm_eps)
        self.proj = None
        if kind in ("concat", "gated"):
            self.proj = nn.Linear(2 * d_model, rank if gated else d_model, bias=False)
            nn.init.normal_(self.proj.weight, std=(2 * d_model) ** -0.5)
        self.forget = nn.Linear(rank, d_model, bias=False) if gated else None
        self.message = nn.Linear(rank, d_model, bias=False) if gated else None
        for gate in (self.forget, self.message):
            if gate is not None:  # near e alone at first
                nn.init.normal_(gate.weight, std=0.1 * rank**-0.5)

    def forward(self, h: Tensor, e: Tensor) -> Tensor:
        if self.proj is None:
            return h + e if self.kind == "add" else h
        if self.forget is None or self.message is None:
            return self.proj(torch.cat([h, e], -1)).to(h.dtype)  # autocast leaves half precision
        u = self.proj(torch.cat([self.norm(e), self.norm(h)], -1))
        y = (1 - torch.tanh(self.forget(u))) * e + torch.tanh(self.message(u)) * h
        return y.to(h.dtype)

    def flops_per_token(self) -> int:
        """Matmul FLOPs of one vector, multiply-add = 2."""
        layers = (self.proj, self.forget, self.message)
        return sum(2 * m.in_features * m.out_features for m in layers if m is not None)


class LoopStep(nn.Module):
    """n passes of a body with one set of weights, h_i = f(h_{i-1}) from h_0 = e, the stream that the loop reads.

    Universal Transformers (Dehghani et al. 2019, arXiv 1807.03819), Huginn (Geiping et al. 2025, arXiv 2502.05171),
    Ouro (Zhu et al. 2025, arXiv 2510.25741), HRM-Text (arXiv 2605.20613). What a pass reads of e, and what it does
    besides, is said by `LoopOptions`. The state is a tuple of the body's, one for each pass.

    A loop in the body of another one may continue from what it gave in the pass before of that one. Two levels are

        loop(H, loop(L, low, inject="add", start="carried", norm=..., residual=True) high, norm=...)

    which is z <- norm(low(z + h)) L times, then h <- norm(high(h + z)), all of it H times from h = e and z = 0.

    With a halting head, lambda_i = sigmoid(w h_i + b) and a token leaves after pass i with the probability
    p_i = lambda_i prod_{j<i} (1 - lambda_j), after the last one with what remains (Ouro, section 3.2). In training

        y = sum_i p_i h_i;  losses: -entropy_loss * mean_t H(p_t) + depth_loss * mean_t sum_i i p_ti

    which gives, under a head that is linear, the mean of the passes' logits. In evaluation y = h_i for the first i at
    which p_1 + ... + p_i is at least `exit`. From then on the token's stream stays as it is: the mixers of later
    passes read it, so that their states hold every token and later tokens attend to it, as CALM copies states (Schuster
    et al. 2022, arXiv 2207.07061, section 3.2). Where all tokens of a call have left, words without a state do not run.
    `context.metrics` gets the mean number of passes of a valid token, expected or run.

    Args:
        node: the loop, with its options.
        body: reads (x, state, context), `recompute` and `held`; gives the next stream and state.
        d_model: D.
        norm_eps: epsilon of the norms.
        streams: number of residual streams.
        narrow: the residual streams as one (B, T, D).
        name: for the metrics.
        around: number of passes of the loop that this one is in the body of, or None.

    Raises:
        UsageError: options that speak of a loop around, where there is none, or one of another number of passes.
    """

    def __init__(
        self,
        node: Loop,
        body: Any,
        d_model: int,
        *,
        norm_eps: float,
        streams: int,
        narrow: Callable[[Tensor], Tensor],
        name: str,
        around: int | None = None,
    ):
        super().__init__()
        o = self.options = node.options
        self.around = around
        _check_around(node, around)
        self.count, self.streams, self.narrow, self.name = node.count, streams, narrow, name
        self.d_model, self.body = d_model, body
        self.inject = Inject(o.inject, d_model, o.inject_rank, norm_eps)
        self.gates = nn.Parameter(torch.full((node.count, d_model), 2.0)) if o.gate else None
        set_rule(self, "gates", weight_decay=False)
        self.norm = make_norm(o.norm or "none", d_model, norm_eps)
        self.register_buffer("initial", torch.zeros(d_model) if o.start == "carried" else None)
        self.inner = [m.key for m in body.modules() if isinstance(m, LoopStep) and m.remembers]
        self.halting = None
        if o.exit is not None:
            self.halting = nn.Linear(d_model, 1)
            nn.init.normal_(self.halting.weight, std=0.02)
            nn.init.zeros_(self.halting.bias)

    initial: Tensor | None

    @property
    def truncated(self) -> bool:
        """Whether some passes pass no gradients."""
        return min(self.options.gradients(), default=self.count) < self.count

    @property
    def remembers(self) -> bool:
        """Whether a run depends on the one in the pass before of the loop around."""
        return self.options.start == "carried" or isinstance(self.options.gradient, tuple)

    @property
    def key(self) -> str:
        """The name of what a run leaves in `Context.shared` for the next one."""
        return f"loop_{self.name}_carried"

    def forward(
        self, x: Tensor, states: tuple[State, ...] | None, context: Context, *, recompute: bool = False
    ) -> tuple[Tensor, tuple[State, ...]]:
        carried: Carried | None = context.shared.get(self.key)
        for key in self.inner:  # of another call, or of another run of this loop
            if carried is None or self.around is not None:
                context.shared.pop(key, None)
        own = replace(context, losses=[])  # which the passes leave
        exits = None if self.halting is None else (_Mean if self.training else _First)(self, x, context)
        learning = self.options.gradients() or (self.count,)
        n_cut = self.count - learning[0 if carried is None or len(learning) == 1 else carried.runs]
        h, first = self._start(x, carried)
        after = []
        for i in range(self.count):
            before = None if states is None else states[i]
            held = None if exits is None else exits.held()
            if i < n_cut and torch.is_grad_enabled():
                aside = replace(own, losses=[])
                with torch.no_grad():
                    before = None if before is None else fork(before)  # without gradients it would be written to
                    h, state = self._pass(i, h, x, before, aside, held, False, first)
            else:
                h, state = self._pass(i, h, x, before, own, held, recompute, first)
            after.append(state)
            if exits is not None:
                exits.see(i, h)
        y = h if exits is None else exits.leave(h)
        context.losses.extend(loss / (self.count - n_cut) for loss in own.losses)
        if self.remembers or carried is not None:
            context.shared[self.key] = Carried(1 if carried is None else carried.runs + 1, y)
        y = x + y if self.options.residual else y
        return (once_only(y, TRUNCATED) if n_cut else y), tuple(after)

    def _start(self, x: Tensor, carried: Carried | None) -> tuple[Tensor, Tensor | None]:
        """h_0, and what the first pass reads where that is not h_0 injected into e."""
        first = None
        if self.initial is not None:
            h = self.initial.to(x.dtype).expand_as(x)
        elif self.options.start == "zeros":
            h = torch.zeros_like(x)
        else:
            h = first = x
        if carried is None or (self.initial is None and self.around is not None):
            return h, first
        before = carried.h.to(x.dtype)
        if carried.begun is None:
            return before, None
        start = _where(carried.begun[:, None], before, h)
        return start, None if first is None else _where(carried.begun[:, None], self.inject(before, x), x)

    def _pass(
        self,
        i: int,
        h: Tensor,
        e: Tensor,
        state: State | None,
        context: Context,
        held: Held | None,
        recompute: bool,
        first: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        """h_i and the state of pass i, from h_{i-1}; `first` is read by the first pass where it is given."""
        u = self.inject(h, e) if i or first is None else first
        y, state = self.body(u, state, context, recompute=recompute, held=held)
        y = self.norm(y)
        if self.gates is not None:
            y = h + torch.sigmoid(self.gates[i]).to(y.dtype) * (y - h)
        return (y if held is None else _where(held.steps, h, y)), state

    def init_state(self, batch_size: int, **options: Any) -> tuple[State, ...]:
        return tuple(self.body.init_state(batch_size, **options) for _ in range(self.count))

    def state_bytes(self, batch_size: int, context_length: int, dtype: torch.dtype) -> int:
        """Bytes of the states of all passes after `context_length` steps."""
        return self.count * self.body.state_bytes(batch_size, context_length, dtype)

    def flops_per_token(self, context_length: int) -> int:
        """Matmul FLOPs of one token whose passes are all run."""
        injections = self.count - (self.options.start == "input")
        heads = 0 if self.halting is None else 2 * self.d_model * (self.count - 1)
        injected = injections * self.streams * self.inject.flops_per_token()
        return self.count * self.body.flops_per_token(context_length) + injected + heads


def _check_around(node: Loop, around: int | None) -> None:
    """Refuse options that speak of a loop around where there is none, or one of another number of passes."""
    o = node.options
    if around is None and o.start == "carried":
        told = "continues from the pass before of the loop around it, and no loop is around"
        raise UsageError(f'loop: start="carried" {told}: write loop(n, loop(m, ..., start="carried") ...).')
    if isinstance(o.gradient, tuple) and len(o.gradient) != around:
        told = "and no loop is around" if around is None else f"which makes {around}"
        given = f"gradient={literal_text(o.gradient)} is one number for each pass of the loop around it"
        raise UsageError(f"loop: {given}, {told}.")


class _Mean:
    """The passes of a loop weighed by the probabilities to leave after each, for training."""

    def __init__(self, loop: LoopStep, x: Tensor, context: Context):
        self.loop, self.context = loop, context
        self.parts: list[Tensor] = []
        self.log_p: list[Tensor] = []
        self.stays: Tensor | None = None  # the logarithm of the probability not to have left

    def held(self) -> None:
        return None

    def see(self, i: int, h: Tensor) -> None:
        """Takes notice of h_i."""
        self.parts.append(h)
        if i == self.loop.count - 1:
            assert self.stays is not None  # there are at least two passes
            self.log_p.append(self.stays)
            return
        logit = _logit(self.loop, h)
        leaves, goes_on = F.logsigmoid(logit), F.logsigmoid(-logit)
        self.log_p.append(leaves if self.stays is None else self.stays + leaves)
        self.stays = goes_on if self.stays is None else self.stays + goes_on

    def leave(self, h: Tensor) -> Tensor:
        """The output; losses and metrics go to the context."""
        log_p = torch.stack(self.log_p, -1)
        p = log_p.exp()
        o, context = self.loop.options, self.context
        passes = torch.arange(1, self.loop.count + 1, device=p.device, dtype=p.dtype)
        depth = _mean((p * passes).sum(-1), context)
        loss = o.depth_loss * depth
        if o.entropy_loss:
            loss = loss + o.entropy_loss * _mean((p * log_p).sum(-1), context)
        if o.entropy_loss or o.depth_loss:
            context.losses.append(loss)
        context.metrics[f"loop_{self.loop.name}_depth"] = depth.detach()
        weights = p.to(h.dtype)[(..., *[None] * (h.ndim - 2))].movedim(2, 0)  # (n, B, T, ..., 1)
        return sum(w * part for w, part in zip(weights[1:], self.parts[1:], strict=True)) + weights[0] * self.parts[0]


class _First:
    """Tokens that leave a loop after the first pass at which it is probable enough, for evaluation."""

    def __init__(self, loop: LoopStep, x: Tensor, context: Context):
        self.loop, self.context = loop, context
        self.left = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
        if context.lengths is not None:
            self.left = torch.arange(x.shape[1], device=x.device) >= context.lengths[:, None]
        self.depth: Tensor | None = None
        self.stays: Tensor | None = None

    def held(self) -> Held:
        """The tokens that have left, padding among them."""
        runs = (~self.left).to(torch.float32)
        self.depth = runs if self.depth is None else self.depth + runs
        return Held(self.left, not traced() and bool(self.left.all()))

    def see(self, i: int, h: Tensor) -> None:
        """Takes notice of h_i."""
        if i == self.loop.count - 1:
            return
        goes_on = F.logsigmoid(-_logit(self.loop, h))
        self.stays = goes_on if self.stays is None else self.stays + goes_on
        if fixed():  # rounding may not decide
            self.left = torch.ones_like(self.left)
        else:
            exit = self.loop.options.exit
            assert exit is not None
            self.left = self.left | (1 - self.stays.exp() >= exit)

    def leave(self, h: Tensor) -> Tensor:
        """The output; the metric goes to the context."""
        assert self.depth is not None
        self.context.metrics[f"loop_{self.loop.name}_depth"] = _mean(self.depth, self.context)
        return h


def _logit(loop: LoopStep, h: Tensor) -> Tensor:
    """(B, T) logit of leaving after the pass that gave h, in float32 at least."""
    return widely(loop.halting, loop.narrow(h)).squeeze(-1)


def _mean(values: Tensor, context: Context) -> Tensor:
    """The mean of (B, T) values over valid steps."""
    if context.lengths is None:
        return values.mean()
    valid = torch.arange(values.shape[1], device=values.device) < context.lengths[:, None]
    return values.masked_fill(~valid, 0).sum() / valid.sum().clamp(min=1)


def _where(steps: Tensor, kept: Tensor, new: Tensor) -> Tensor:
    """`kept` at some steps (B, T) and `new` at the others, both (B, T, ..., D)."""
    return torch.where(steps[(..., *[None] * (new.ndim - 2))], kept, new)


def hold(held: Held, kept: Tensor, new: Tensor) -> Tensor:
    """The stream after a step of the body, `kept` where the tokens' stream stays as it is."""
    return _where(held.steps, kept, new)


def stateless(step: Any) -> bool:
    """Whether a step writes nothing that later tokens see."""
    return not tree_leaves(step.init_state(1, capacity=1, device="meta"))
