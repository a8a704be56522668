"""The residual steps of a stack: of one or more mixers, and with a branch beside other steps."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from zoo.canon import Canon, require_causal
from zoo.core.errors import UsageError
from zoo.norms import make_norm
from zoo.pattern import StepOptions, Word, create_mixer, mixer_of
from zoo.protocol import Context, Place, State, mixers
from zoo.residual import Connection
from zoo.states import tree_bytes

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
        states = tuple(mixer.init_state(batch_size, **options) for mixer in self._mixers())
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

    def __init__(self, branch: Step, body: Any, d_model: int, own_norm: bool):
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


def _check_causality(mixer: Any, word: Word, place: Place) -> None:
    if place.causal and not mixer.causal:
        raise UsageError(f"{word.name} looks ahead here, but the model is causal: set causal=False on the model.")
    if not place.causal and mixer.causal and mixer.kind == "sequence":
        raise UsageError(
            f"{word.name} reads left to right only, but the model has causal=False: write bidirectional({word.name})."
        )


__all__ = ["ShortcutStep", "Step"]
