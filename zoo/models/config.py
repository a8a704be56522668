"""The options of a model."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from zoo.backbone import NORM_EPS
from zoo.core.errors import UsageError
from zoo.core.options import Options
from zoo.pattern import Norm, Placement, StepOptions, from_data, mixer_of, parse
from zoo.protocol import MAX_WIDTH, MIN_WIDTH
from zoo.residual import ResidualKind


class Recursion(Options, label="model.recursion"):
    """How a recursive model is applied, see `zoo.models.recursive.RecursiveModel`.

    Attributes:
        cycles: T, of which only the last passes gradients.
        updates: n, of the latents in a cycle.
        latents: number of latents; 0 for one feature that is answer and latent at once. With more than one they
            take turns, and the network reads their sum.
        outer: pattern of a network of its own for the answer (HRM); by default the same network serves both.
        gradient: through all of the last cycle, or through the last update of either (HRM).
        max_steps: supervision steps that a puzzle gets in training, and by default in evaluation.
        prefix: P, places before the tokens for what is learned of each puzzle.
        n_puzzles: number of puzzles, each with an embedding of its own.
        puzzle_width: numbers learned of each, by default D.
        recompute: keep no activations within an application of the network: a fifth more time, memory for one layer.
    """

    cycles: int = Field(default=3, ge=1)
    updates: int = Field(default=6, ge=1)
    latents: int = Field(default=1, ge=0)
    outer: str | None = None
    gradient: Literal["cycle", "step"] = "cycle"
    max_steps: int = Field(default=16, ge=1)
    prefix: int = Field(default=0, ge=0)
    n_puzzles: int = Field(default=1, ge=1)
    puzzle_width: int | None = Field(default=None, ge=1)
    recompute: bool = False


class ModelConfig(Options, label="model"):
    """A token model.

    Attributes:
        pattern: the layer pattern; YAML lists become their text.
        d_model: width D, even, from 16.
        vocab_size: number of token ids.
        causal: read left to right only.
        norm: of every step and before the head, unless a word says otherwise.
        placement: of the norms, unless a word says otherwise.
        norm_eps: epsilon of the norms.
        norm_axis: what the norms of the steps run along, unless a word says otherwise.
        in_scale: factor on what the mixers read, unless a word says otherwise.
        out_scale: factor on what the mixers give, unless a word says otherwise.
        residual_scale: factor on the stream that a step adds to, unless a word says otherwise.
        residual: what carries the stream past the mixers: one sum, or several streams that mix, as hyper-connections or
            as manifold-constrained ones (mHC).
        residual_streams: how many there are then.
        residual_dynamic: whether each token has weights of its own for them.
        positions: added to the embedding; attention words bring rotary positions of their own.
        max_len: number of positions that `positions="learned"` has, and that words with weights for every
            step have weights for; the usual length of a recursive model, the places of its puzzles included.
        tie_embeddings: the head uses the embedding's weights.
        embedding_scale: factor on the embedding.
        embedding_norm: a norm right after the embedding (RWKV).
        time_feature: add a learned function of the time since the previous token, `context.timespans`, to the
            embedding: for mixers that do not read it themselves.
        decoder: an MLP that predicts every token of a row from the features of its last, for tasks of the layout
            `reconstruct`.
        dropout: probability, after the embedding.
        head_bias: a bias on the head.
        logit_scale: factor on the logits.
        logit_softcap: c in c * tanh(logits / c), after that factor.
        recursion: makes it a recursive model, taught by deep supervision; {} takes the defaults.
        published: the published config that a family's model was made from, in its own keys, which `zoo.to_hf` writes
            as long as the other options are still those of that config.
    """

    pattern: str
    d_model: int = Field(default=128, ge=MIN_WIDTH, le=MAX_WIDTH, multiple_of=2)
    vocab_size: int = Field(ge=1, le=2**31)
    causal: bool = True
    norm: Norm = "rmsnorm"
    placement: Placement = "pre"
    norm_eps: float = Field(default=NORM_EPS, gt=0)
    norm_axis: Literal["channels", "time"] = "channels"
    in_scale: float = 1.0
    out_scale: float = 1.0
    residual_scale: float = 1.0
    residual: ResidualKind = "plain"
    residual_streams: int = Field(default=4, ge=2)
    residual_dynamic: bool = True
    positions: Literal["none", "learned", "sinusoidal"] = "none"
    max_len: int | None = Field(default=None, ge=1)
    tie_embeddings: bool = False
    embedding_scale: float = 1.0
    embedding_norm: bool = False
    time_feature: bool = False
    decoder: bool = False
    dropout: float = Field(default=0.0, ge=0, lt=1)
    head_bias: bool = False
    logit_scale: float = 1.0
    logit_softcap: float | None = Field(default=None, gt=0)
    recursion: Recursion | None = None
    published: dict[str, Any] | None = None

    @field_validator("pattern", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> str:
        pattern = from_data(value)  # refuses unknown words and options before anything is built
        return value if isinstance(value, str) else str(pattern)

    @field_validator("recursion", mode="before")
    @classmethod
    def _as_recursion(cls, value: Any) -> Any:
        return Recursion.of(value)

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> ModelConfig:
        unused = [k for k in ("residual_streams", "residual_dynamic") if k in self.changed()]
        if self.residual == "plain" and unused:
            raise UsageError(
                f'{unused[0]} needs residual="hyper_connections" or "mhc"; a plain residual has one stream.'
            )
        if self.decoder and self.recursion is not None:
            raise UsageError("A recursive model takes no decoder.")
        if self.embedding_norm and self.norm == "none":
            raise UsageError('embedding_norm=True needs a norm, not norm="none".')
        if self.max_len is not None and not self.reads_max_len() and self.recursion is None:
            raise UsageError('max_len belongs to positions="learned", which is not set.')
        return self

    def reads_max_len(self) -> bool:
        """Whether there are weights for every position, whose number is `max_len`."""
        outer = self.recursion.outer if self.recursion else None
        words = [word.config for pattern in (self.pattern, outer) if pattern for word in parse(pattern).words()]
        return self.positions == "learned" or any(
            mixer_of(word).traits.takes_length and getattr(word, "length", None) is None for word in words
        )

    def step_options(self) -> StepOptions:
        """What holds for every word that does not say otherwise."""
        scales = {k: v for k in ("in_scale", "out_scale", "residual_scale") if (v := getattr(self, k)) != 1.0}
        options = {k: getattr(self, k) for k in ("placement", "norm", "norm_axis")}
        return StepOptions(**options, **scales)
