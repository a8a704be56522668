"""Recursive models: one small network applied again and again to an answer and a latent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.backbone import Backbone, recomputed
from zoo.core.errors import UsageError
from zoo.door import fits, form_of, misfit, read_ids
from zoo.models.config import ModelConfig
from zoo.models.ends import Ends, make_backbone
from zoo.ops import constant_weights
from zoo.ops.derivatives import once_only
from zoo.ops.modules import widely
from zoo.parameters import set_rule
from zoo.protocol import Context, Mixer, admit
from zoo.states import tree_bytes

TRUNCATED = (
    "A recursive model has no second derivatives: its gradients pass through the last cycle only. Take "
    "recursion.cycles=1, and recursion.gradient='cycle'."
)


class RecursiveState(NamedTuple):
    """The state between supervision steps.

    Attributes:
        answer: (B, P + T, D), y, which the head reads.
        latents: (B, n, P + T, D), the z's.
    """

    answer: Tensor
    latents: Tensor


class Thought(NamedTuple):
    """What one supervision step gives.

    Attributes:
        hidden: (B, T, D), the answer at the places of the tokens, which `logits` reads.
        halt: (B,) logit of "the answer is right", in float32 at least.
        go_on: (B,) logit of the value of continuing, for halting by Q-learning.
        state: the state to continue from; no gradient passes through it.
    """

    hidden: Tensor
    halt: Tensor
    go_on: Tensor
    state: RecursiveState


@final
class RecursiveModel(Ends):
    """The tiny recursive model (Jolicoeur-Martineau 2025, arXiv 2510.04871, figure 3) around any non-causal pattern f.

    With x the embedded tokens behind P places of a puzzle's own embedding, one supervision step is

        T times:  n times  z <- f(z + y + x);  then  y <- f(y + z)

    with gradients in the last of the T cycles only; the head reads y, and a halting head reads y at the first place.
    Where a network does not end in a norm (`placement` other than "post"), f ends in the one of the head.

    One call of the model is one supervision step and its state is (y, z), so the steps can be interrupted anywhere.
    With a network of its own for y and the gradient of one step it is HRM (Wang et al. 2025, arXiv 2506.21734).

    Options: `ModelConfig.recursion`.
    """

    def __init__(self, config: ModelConfig):
        if config.recursion is None:
            raise UsageError("A recursive model needs `recursion`, its options; {} takes the defaults.")
        if config.causal:
            raise UsageError("A recursive model reads whole puzzles: set model.causal=false.")
        if config.positions == "sinusoidal":
            raise UsageError('A recursive model takes positions="learned", or those of its attention words.')
        for name in ("embedding_norm", "time_feature", "dropout"):
            if getattr(config, name):
                raise UsageError(f"A recursive model takes no {name}: leave model.{name} out.")
        super().__init__(config)
        self.recursion = r = config.recursion
        d = config.d_model
        self.outer = None if r.outer is None else make_backbone(config, r.outer)
        self.puzzles = nn.Embedding(r.n_puzzles, r.puzzle_width or d) if r.prefix else None
        if self.puzzles is not None and self.puzzles.embedding_dim > r.prefix * d:
            raise UsageError(f"puzzle_width={r.puzzle_width} is more than prefix * d_model = {r.prefix * d}.")
        if self.puzzles is not None:
            set_rule(self.puzzles, "weight", by_row=True)
        self.halting = nn.Linear(d, 2)
        self.register_buffer("answer_init", _truncated(torch.empty(d), 1.0))
        self.register_buffer("latent_init", _truncated(torch.empty(max(r.latents, 1), d), 1.0))
        self._init_recursive()

    answer_init: Tensor
    latent_init: Tensor

    def _init_recursive(self) -> None:
        """LeCun's truncated normals and a halting head that says no, as the authors have it; words that are more than
        projections keep their own inits."""
        d = self.config.d_model
        for mixer in self.mixers():
            mixer.init_projections(lambda weight: _truncated(weight.data, weight.shape[1] ** -0.5))
        _truncated(self.embedding.weight.data, d**-0.5)
        if self.head is not None:
            _truncated(self.head.weight.data, d**-0.5)
        if self.positions is not None:
            _truncated(self.positions.weight.data, d**-0.5)
        nn.init.zeros_(self.halting.weight)
        nn.init.constant_(self.halting.bias, -5.0)
        if self.puzzles is not None:
            nn.init.zeros_(self.puzzles.weight)

    # ---- one supervision step

    def init_state(
        self,
        batch_size: int,
        length: int | None = None,
        *,
        generator: torch.Generator | None = None,
        start: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        capacity: int | None = None,
    ) -> RecursiveState:
        """The state before any thinking.

        Args:
            batch_size: B.
            length: T, by default what `max_len` leaves for the tokens.
            generator: draws y and z from a standard normal instead, each row and place for itself: other starts for
                other answers (EqR, arXiv 2605.21488).
            start: which z to start from: 0 is the model's own, any other number has one of its own, the same in every
                model of these sizes.
            device: that of the parameters by default.
            dtype: that of the parameters by default.
            capacity: as for other models; this state does not grow.
        """
        if length is None:
            if self.config.max_len is None:
                raise UsageError("The state of a recursive model is as long as its input: give init_state a length.")
            length = self.config.max_len - self.recursion.prefix
        dtype = self.answer_init.dtype if dtype is None else dtype
        device = self.answer_init.device if device is None else device
        steps, d = self.recursion.prefix + length, self.config.d_model
        n = self.recursion.latents
        answer = self.answer_init.expand(batch_size, steps, d)
        own = self.latent_init if start == 0 else _numbered(start, self.latent_init)
        latents = own[:n, None].expand(batch_size, n, steps, d)
        if generator is not None:
            answer, latents = (torch.randn(t.shape, generator=generator) for t in (answer, latents))
        return RecursiveState(*(t.to(device, dtype, copy=True) for t in (answer, latents)))

    def think(
        self,
        tokens: Tensor,
        state: RecursiveState | None = None,
        context: Context | None = None,
        *,
        puzzles: Tensor | None = None,
        depth: tuple[int, int] | None = None,
        damping: float = 0.0,
        noise: Callable[[Tensor], Tensor] | None = None,
    ) -> Thought:
        """One supervision step.

        Args:
            tokens: (B, T) int64.
            state: the state to continue from; by default `init_state`.
            context: of the pass; its `lengths` count tokens. The losses it gets are means over the applications of f
                that learn.
            puzzles: (B,) int64 numbers of the puzzles, 0 by default; not read where there is no puzzle embedding, as
                a task that numbers its puzzles gives them to every model.
            depth: cycles and updates of this step, in place of the model's own.
            damping: share of the old y or z that stays at each application of f (EqR's 1 - lambda).
            noise: what is done to the new y or z (B, P + T, D) after each application of f, in their order.
        """
        r, c = self.recursion, self.config
        cycles, updates = depth or (r.cycles, r.updates)
        tokens = read_ids("model", "tokens", tokens, "BT", c.vocab_size, "vocab_size")
        context = self._over_places(admit("model", context, len(tokens), tokens.shape[1], tokens.device), tokens)
        x = self._inputs(tokens, puzzles)
        if state is None:
            state = self.init_state(*tokens.shape, dtype=x.dtype)
        elif not torch.compiler.is_compiling():
            form = form_of(lambda n, **options: self.init_state(n, tokens.shape[1], **options))
            if not fits(form, state, len(tokens), x.dtype):
                raise misfit("model", form, state, len(tokens), x.dtype)
        y, z = state.answer.to(x.dtype), list(state.latents.to(x.dtype).unbind(1))
        if torch.is_autocast_enabled(x.device.type):  # the stream too, not the products alone
            dtype = torch.get_autocast_dtype(x.device.type)
            x, y, z = x.to(dtype), y.to(dtype), [latent.to(dtype) for latent in z]
        with constant_weights():
            y, z = self._cycles(x, y, z, context, (cycles, updates), partial(_moved, damping, noise))
        if cycles > 1 or r.gradient == "step":
            y = once_only(y, TRUNCATED)
        q = widely(self.halting, y[:, 0])
        q = q.to(torch.promote_types(q.dtype, torch.float32))
        n = y.new_empty(*y.shape[:1], 0, *y.shape[1:]) if not z else torch.stack(z, 1)
        return Thought(y[:, r.prefix :], q[:, 0], q[:, 1], RecursiveState(y.detach(), n.detach()))

    def _cycles(
        self,
        x: Tensor,
        y: Tensor,
        z: list[Tensor],
        context: Context,
        depth: tuple[int, int],
        moved: Callable[[Tensor, Tensor], Tensor],
    ) -> tuple[Tensor, list[Tensor]]:
        """All cycles of one supervision step, the last with gradients.

        Args:
            moved: from an old y or z and what f gives to the new one.
        """
        cycles, updates = depth
        one_step = self.recursion.gradient == "step"
        n_learning = 2 if one_step else updates + 1
        for cycle in range(cycles):
            last = cycle == cycles - 1
            question = y + x  # the same for all updates of the latents
            for i in range(updates):
                learning = torch.is_grad_enabled() and last and (not one_step or i == updates - 1)
                with torch.set_grad_enabled(learning):
                    if not z:  # one feature is answer and latent at once
                        y = moved(y, self._through(self.backbone, y + x, context, learning * n_learning))
                    else:
                        h = sum(z[1:], z[0]) + question
                        k = i % len(z)
                        z[k] = moved(z[k], self._through(self.backbone, h, context, learning * n_learning))
            learning = torch.is_grad_enabled() and last
            with torch.set_grad_enabled(learning):
                network = self.outer or self.backbone
                y = moved(y, self._through(network, sum(z, y), context, learning * n_learning))
        return y, z

    def _over_places(self, context: Context, tokens: Tensor) -> Context:
        """The context of the puzzle's places and the tokens."""
        if context.pieces is not None:
            raise UsageError("A recursive model reads whole rows: they cannot be cut over processes.")
        if context.resets is not None:
            raise UsageError("A recursive model thinks about one puzzle a row: give no resets.")
        n = self.recursion.prefix
        lengths = None if context.lengths is None else context.lengths + n
        timespans = None if context.timespans is None else F.pad(context.timespans, (n, 0), value=1.0)
        return replace(context, lengths=lengths, timespans=timespans, tokens=F.pad(tokens, (n, 0), value=-1))

    def _inputs(self, tokens: Tensor, puzzles: Tensor | None) -> Tensor:
        """x (B, P + T, D): the puzzle's places, then the tokens, with positions over all of them."""
        c, r = self.config, self.recursion
        x = self.embedding(tokens)
        if self.puzzles is not None:
            numbers = tokens.new_zeros(len(tokens)) if puzzles is None else puzzles
            numbers = read_ids("model", "puzzles", numbers, "B", r.n_puzzles, "n_puzzles")
            if len(numbers) != len(tokens):
                raise UsageError(f"model: {len(numbers)} numbers of puzzles for {len(tokens)} rows.")
            own = self.puzzles(numbers)
            own = F.pad(own, (0, r.prefix * c.d_model - own.shape[-1]))
            x = torch.cat([own.view(len(tokens), r.prefix, c.d_model).to(x.dtype), x], 1)
        if self.positions is not None:
            if (n := x.shape[1]) > (longest := c.max_len or 0):
                raise UsageError(f"{n} places and tokens are more than max_len={longest}.")
            x = 0.5**0.5 * (x + self.positions(torch.arange(n, device=x.device)))
        return x * c.embedding_scale

    def _through(self, network: Backbone, h: Tensor, context: Context, n_learning: int) -> Tensor:
        """f(h), with its share of the losses of the `n_learning` applications that learn; 0 where this one does not."""

        def f(h: Tensor, own: Context) -> Tensor:
            return self.norm(network(h, None, own)[0])

        own = type(context)(context.lengths, context.resets, context.timespans, tokens=context.tokens)
        if not n_learning:
            return f(h, own)
        if self.recompute:
            y, own = recomputed(f, network, h, context=own)
        else:
            y = f(h, own)
        context.losses.extend(loss / n_learning for loss in own.losses)
        context.metrics.update(own.metrics)
        return y

    # ---- as any model

    def features(
        self, inputs: Tensor, state: RecursiveState | None = None, context: Context | None = None
    ) -> tuple[Tensor, RecursiveState]:
        """As `forward`, up to the hidden states (B, T, D) that `logits` reads; inputs are tokens (B, T)."""
        thought = self.think(inputs, state, context)
        return thought.hidden, thought.state

    def mixers(self) -> list[Mixer]:
        """All mixers, in order, those of the answer's own network last."""
        return self.backbone.mixers() + ([] if self.outer is None else self.outer.mixers())

    def flops_per_token(self, context_length: int) -> int:
        """Matmul FLOPs (multiply-add = 2) of one supervision step by token, head and places of the puzzle included."""
        r = self.recursion
        n = r.prefix + context_length
        inner, outer = (network.flops_per_token(n) for network in (self.backbone, self.outer or self.backbone))
        thinking = r.cycles * (r.updates * inner + outer) * n // max(context_length, 1)
        return thinking + 2 * self.config.d_model * self.config.vocab_size

    def state_bytes(self, batch_size: int, context_length: int, dtype: torch.dtype = torch.float32) -> int:
        """Bytes of answer and latents."""
        with torch.device("meta"):
            shape = batch_size, 1 + self.recursion.latents, self.recursion.prefix + context_length, self.config.d_model
            return tree_bytes(torch.empty(shape, dtype=dtype))


def _moved(damping: float, noise: Callable[[Tensor], Tensor] | None, old: Tensor, new: Tensor) -> Tensor:
    """The next y or z, from the old one and what f gives."""
    moved = old * damping + new * (1 - damping) if damping else new
    return moved if noise is None else noise(moved)


def _numbered(start: int, like: Tensor) -> Tensor:
    """The z's (n, D) of a start with a number."""
    new = torch.empty(like.shape, dtype=torch.float32, device="cpu")
    return _truncated(new, 1.0, torch.Generator().manual_seed(start)).to(like)


def _truncated(tensor: Tensor, std: float, generator: torch.Generator | None = None) -> Tensor:
    """A normal cut at two deviations, widened so that its deviation is `std` (as JAX has it)."""
    nn.init.trunc_normal_(tensor, std=1.0, a=-2.0, b=2.0, generator=generator)
    return tensor.mul_(std / 0.8796256610342398)
