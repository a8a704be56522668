"""A causal word run in both directions, for models that may look ahead."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import ConfigDict, field_validator
from torch import Tensor, nn

from zoo.core.errors import UsageError
from zoo.core.options import Options
from zoo.pattern import Word, create_mixer, make_word, mixer_of, parse_word
from zoo.pieces import Pieces
from zoo.protocol import Context, Mixer, Place, State, register

MIRRORED = "mirrored."  # prefix of what the mirrored copy leaves in the context


@register("bidirectional")
class Bidirectional(Mixer):
    """y = f(x) + flip(f'(flip(x))): one copy of a causal mixer reads forward, a second one backward.

    Bidirectional recurrent networks (Schuster and Paliwal 1997); sums as in Caduceus (Schiff et al. 2024, arXiv
    2403.03234, section 3.1), `combine="concat"` as bidirectional LSTMs have it, with a projection back to D. With
    `tie_weights` both directions share one copy.

    Padding stays where it is, valid steps are reversed before it; packed documents are reversed each for itself, as
    if run alone; the timespan of a step becomes that to the step after it.

    | state | cost per token        | parallel form    | cannot                        |
    |-------|-----------------------|------------------|-------------------------------|
    | none  | twice the inner word's | the inner word's | generate left to right        |
    """

    class Config(Options):
        """The options.

        Attributes:
            inner: the word to run in both directions.
            combine: sum or mean of both, or a projection of both from 2 D to D.
            tie_weights: one set of weights for both directions.
        """

        model_config = ConfigDict(arbitrary_types_allowed=True)
        positional: ClassVar[tuple[str, ...]] = ("inner",)

        inner: Word
        combine: Literal["sum", "mean", "concat"] = "sum"
        tie_weights: bool = False

        @field_validator("inner", mode="before")
        @classmethod
        def _read(cls, value: Any) -> Any:
            if isinstance(value, str):
                return parse_word(value)
            if isinstance(value, Mapping) and "name" in value:
                return make_word(str(value["name"]), {k: v for k, v in value.items() if k != "name"})
            return value

    def __init__(self, d_model: int, config: Config, *, place: Place = Place()):
        super().__init__(d_model, config, place=place)
        self.causal = False
        word = config.inner
        if mixer_of(word.config).kind != "sequence":
            raise UsageError(
                f"bidirectional({word.name}): {word.name} does not mix along time: write {word.name} alone."
            )
        if word.step.changed():
            options = ", ".join(word.step.changed())
            raise UsageError(
                f"bidirectional({word.name}): {options} belongs to the whole step: give it to bidirectional."
            )
        place = place._replace(causal=True)
        self.inner = create_mixer(word.config, d_model, place=place)
        if not self.inner.causal:
            raise UsageError(
                f"bidirectional({word.name}): {word.name} sees both sides already: write {word.name} alone."
            )
        self.mirrored = self.inner if config.tie_weights else create_mixer(word.config, d_model, place=place)
        self.traits = self.inner.traits._replace(cuts_in_ops=True)
        if config.combine == "concat":
            self.out_proj = nn.Linear(2 * d_model, d_model, bias=False)
            nn.init.normal_(self.out_proj.weight, std=(2 * d_model) ** -0.5)

    def init_projections(self, init: Callable[[Tensor], Any]) -> None:
        """Keeps the inits of the word that it wraps, which is recurrent."""

    def init_state(self, batch_size: int, *, capacity: int | None = None, device=None, dtype=None) -> State:
        return ()

    def forward(self, x: Tensor, state: State | None = None, context: Context | None = None) -> tuple[Tensor, State]:
        context = Context() if context is None else context
        flip = _mirror(x, context.lengths)
        mirrored = _mirrored_context(context, flip)
        forward, _ = self.inner(x, None, context)
        backward, _ = self.mirrored(flip(x), None, mirrored)
        backward = flip(backward)
        context.shared.update({MIRRORED + name: value for name, value in mirrored.shared.items()})
        context.metrics.update({MIRRORED + name: value for name, value in mirrored.metrics.items()})
        if self.config.combine == "concat":
            return self.out_proj(torch.cat([forward, backward], -1)), ()
        y = forward + backward
        return y / 2 if self.config.combine == "mean" else y, ()

    def step(self, x_t: Tensor, state: State, context: Context | None = None) -> tuple[Tensor, State]:
        raise UsageError(
            f"bidirectional({self.config.inner.name}) cannot run step by step: each output depends on all later inputs."
        )

    def flops_per_token(self, context_length: int) -> int:
        both = 2 * self.inner.flops_per_token(context_length)
        return both + (4 * self.d_model**2 if self.config.combine == "concat" else 0)

    @classmethod
    def law_cases(cls) -> list[dict[str, Any]]:
        return [
            {"inner": parse_word("mamba2(d_state=8)")},
            {"inner": parse_word("lstm"), "combine": "mean"},
            {"inner": parse_word("gated_deltanet"), "combine": "concat"},
            {"inner": parse_word("short_conv"), "tie_weights": True},
        ]


def _mirror(x: Tensor, lengths: Tensor | None):
    """A function that reverses (B, T, ...) along time, each row within its valid steps. It is its own inverse."""
    if lengths is None:
        return lambda z: z.flip(1)
    t = torch.arange(x.shape[1], device=x.device)
    index = torch.where(t < lengths[:, None], lengths[:, None] - 1 - t, t)
    rows = torch.arange(len(x), device=x.device)[:, None]
    return lambda z: z[rows, index]


def _mirrored_context(context: Context, flip) -> Context:
    """The context as the mirrored copy sees it; losses go into the same list."""
    resets, timespans = context.resets, context.timespans
    if timespans is not None:
        following = _following(timespans, context.pieces)
        if context.lengths is not None:  # nor has the first one of a mirrored row
            last = torch.arange(timespans.shape[1], device=timespans.device) == context.lengths[:, None] - 1
            following = following.masked_fill(last, 1)
        if resets is not None:  # the first step of a mirrored document has no step before it
            following = torch.where(_following(resets, context.pieces), 1, following)
        timespans = flip(following)
    if resets is not None:  # a document's last step is where its mirror image starts
        resets = flip(_following(resets, context.pieces))
    shared = {k.removeprefix(MIRRORED): v for k, v in context.shared.items() if k.startswith(MIRRORED)}
    pieces = None if context.pieces is None else context.pieces.mirrored()
    tokens = None if context.tokens is None else flip(context.tokens)
    return type(context)(context.lengths, resets, timespans, shared, context.losses, pieces=pieces, tokens=tokens)


def _following(x: Tensor, pieces: Pieces | None) -> Tensor:
    """x (B, T) of the step after each one; 1 after the last one of the sequence."""
    after = torch.ones_like(x[:, :1])
    if pieces is not None:
        after = pieces.mirrored().shift(x[:, :1], after)
    return torch.cat([x[:, 1:], after], 1)
