"""The options of a model."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, Literal

from pydantic import Field, field_validator, model_serializer, model_validator

from zoo.core.errors import UsageError
from zoo.core.options import Options
from zoo.norms import NORM_EPS
from zoo.pattern import NormText, Placement, StepOptions, from_data, mixer_of, parse, read_named
from zoo.protocol import MAX_WIDTH, MIN_WIDTH
from zoo.residual import ResidualText, residuals


class Recursion(Options, label="model.recursion"):
    """How a recursive model is applied, see `zoo.models.recursive.RecursiveModel`.

    Attributes:
        cycles: T; only the last cycle passes gradients.
        updates: n, updates of the latents in a cycle.
        latents: number of latents; 0 for one feature that is both answer and latent. Several latents are updated in
            turn, and the network reads their sum.
        outer: pattern of a second network for the answer (HRM); by default one network updates both.
        gradient: through all of the last cycle, or only through the last update of latent and answer (HRM).
        max_steps: largest number of supervision steps for a puzzle in training, and by default in evaluation.
        prefix: P, places before the tokens for the puzzle embedding.
        n_puzzles: number of puzzles; each has an embedding.
        puzzle_width: numbers of a puzzle embedding, by default D.
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


def _pattern_text(value: Any) -> str:
    """A pattern as text; unknown words and options are refused before anything is built."""
    pattern = from_data(value)
    return value if isinstance(value, str) else str(pattern)


class UnmaskingPolicy(Options, label="model.unmasking_policy"):
    """A small network that says which masked cell is unmasked next, see `zoo.models.policy.Policy`.

    Attributes:
        pattern: its layers, which read the model's features of all cells.
        probabilities: of the most probable tokens of a cell, how many it reads.
        reference: what it begins as and is kept near: the cells in the order of `confidence`, `margin` or `entropy`, as
            the sampler has them.
        temperature: of the softmax over the reference's figures of the masked cells; 0.05 in the authors' code. At a
            high one the answers that are tried in training are mostly wrong.
    """

    pattern: str = "mha swiglu"
    probabilities: int = Field(default=8, ge=1)
    reference: Literal["confidence", "margin", "entropy"] = "confidence"
    temperature: float = Field(default=0.01, gt=0)

    @field_validator("pattern", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> str:
        return _pattern_text(value)


class ModelConfig(Options, label="model"):
    """A model of tokens, or of real vectors between a linear layer in and one out.

    Attributes:
        pattern: the layer pattern; YAML lists are converted to text.
        d_model: width D, even, at least 16.
        vocab_size: number of token ids; 0 for a model of real vectors.
        inputs: numbers of a real vector that the model reads at each step, in place of tokens.
        outputs: numbers that the head gives for each step, where the model reads real vectors.
        causal: read only from left to right.
        shifted_logits: in a model with causal=False, the logits of a step are those of the token after it, as in Dream,
            whose weights are those of a causal model; the objective masked_diffusion then reads them one step earlier.
        norm: the norm of every step and before the head; a word may set another.
        placement: placement of the norms; a word may set another.
        norm_eps: epsilon of the norms.
        norm_axis: axis of the norms of the steps; a word may set another.
        in_scale: factor on the inputs of the mixers; a word may set another.
        out_scale: factor on the outputs of the mixers; a word may set another.
        residual_scale: factor on the stream that a step adds to; a word may set another.
        residual: the residual stream: one sum, or several mixed streams, as hyper-connections or manifold-constrained
            hyper-connections (mHC). Its own options follow in brackets, `residual="mhc(streams=2, dynamic=False)"`; a
            key of each, `residual_streams=2`, means the same.
        positions: positions added to the embedding; attention words also have rotary positions.
        max_len: number of positions of `positions="learned"` and of words with weights for every step; for a recursive
            model its usual length, with the places of the puzzle embedding.
        tie_embeddings: the head shares the weights of the embedding.
        embedding_scale: factor on the embedding, or on what the linear layer makes of a real vector.
        embedding_norm: a norm directly after the embedding (RWKV).
        time_feature: add a learned function of the time since the previous token, `context.timespans`, to the
            embedding, for mixers that do not read the timespans.
        decoder: an MLP that predicts every token of a row from the features of the last token, for tasks of the layout
            `reconstruct`.
        dropout: probability of dropout after the embedding.
        head_bias: a bias on the head; a model of real vectors always has one.
        logit_scale: factor on the logits, or on the outputs.
        logit_softcap: c in c * tanh(logits / c), after `logit_scale`.
        halting: a halting head, which says whether a whole answer is right, of a token model whose loop is trained by
            deep supervision; filled in there. A recursive model always has one.
        recursion: options of a recursive model, which is trained by deep supervision; {} takes the defaults.
        unmasking_policy: options of a learned order in which masked cells are unmasked, which is trained by the option
            `unmasking_order` of the objective masked_diffusion; {} takes the defaults.
        published: the published config of a family's model, with its own keys. `zoo.to_hf` writes this config if the
            other options still agree with it.
    """

    pattern: str
    d_model: int = Field(default=128, ge=MIN_WIDTH, le=MAX_WIDTH, multiple_of=2)
    vocab_size: int = Field(default=0, ge=0, le=2**31)
    inputs: int | None = Field(default=None, ge=1)
    outputs: int | None = Field(default=None, ge=1)
    causal: bool = True
    shifted_logits: bool = False
    norm: NormText = "rmsnorm"
    placement: Placement = "pre"
    norm_eps: float = Field(default=NORM_EPS, gt=0)
    norm_axis: Literal["channels", "time"] = "channels"
    in_scale: float = 1.0
    out_scale: float = 1.0
    residual_scale: float = 1.0
    residual: ResidualText = "plain"
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
    halting: bool = False
    recursion: Recursion | None = None
    unmasking_policy: UnmaskingPolicy | None = None
    published: dict[str, Any] | None = None

    @field_validator("pattern", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> str:
        return _pattern_text(value)

    @field_validator("unmasking_policy", mode="before")
    @classmethod
    def _as_policy(cls, value: Any) -> Any:
        return UnmaskingPolicy.of(value)

    @field_validator("recursion", mode="before")
    @classmethod
    def _as_recursion(cls, value: Any) -> Any:
        return Recursion.of(value)

    @model_validator(mode="before")
    @classmethod
    def _with_residual_options(cls, data: dict[str, Any]) -> dict[str, Any]:
        """The options of a residual kind, written as `residual_streams=3`, as those of `residual`."""
        written = {
            k: k.removeprefix("residual_") for k in data if k.startswith("residual_") and k not in cls.model_fields
        }
        kinds = {n: residuals[n].Config.model_fields for n in residuals.names()} if written else {}
        written = {k: option for k, option in written.items() if any(option in fields for fields in kinds.values())}
        if not written:
            return data
        name, config = read_named(residuals, data.get("residual", "plain"))
        options = config.changed()
        for key, option in written.items():
            owners = [n for n, fields in kinds.items() if option in fields]
            if name in owners:
                options[option] = data[key]
            elif any(data[key] != kinds[n][option].default for n in owners):  # written in full, it has no effect
                needed = " or ".join(f'"{n}"' for n in owners)
                raise UsageError(f'{key} needs residual={needed}; "{name}" has no such option.')
        return {k: v for k, v in data.items() if k not in written} | {"residual": {"name": name, **options}}

    @model_serializer(mode="wrap")
    def _with_residual_options_spelt_out(self, dump: Callable[[ModelConfig], dict[str, Any]]) -> dict[str, Any]:
        name, config = read_named(residuals, self.residual)
        spelt = {"residual": name, **{f"residual_{k}": v for k, v in config.model_dump(mode="json").items()}}
        pairs = (spelt.items() if key == "residual" else [(key, value)] for key, value in dump(self).items())
        return dict(itertools.chain.from_iterable(pairs))

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> ModelConfig:
        self._has_ends()
        if self.decoder and self.recursion is not None:
            raise UsageError("A recursive model takes no decoder.")
        if self.halting and (self.recursion is not None or self.inputs is not None):
            raise UsageError("halting=true is for a model of tokens without recursion: leave model.halting out.")
        if self.shifted_logits and (self.causal or self.recursion is not None or self.inputs is not None):
            raise UsageError("shifted_logits=True is for a model of tokens with causal=False and no recursion.")
        if self.unmasking_policy is not None and (self.causal or self.recursion is not None or self.inputs is not None):
            raise UsageError("unmasking_policy is for a model of tokens with causal=False and no recursion.")
        if self.embedding_norm and self.norm == "none":
            raise UsageError('embedding_norm=True needs a norm, not norm="none".')
        if self.max_len is not None and not self.reads_max_len() and self.recursion is None:
            raise UsageError('max_len belongs to positions="learned", which is not set.')
        return self

    def _has_ends(self) -> None:
        """Refuses what is neither a model of tokens nor one of real vectors."""
        if self.inputs is None and self.outputs is None:
            if "vocab_size" not in self.model_fields_set:
                raise UsageError("model needs 'vocab_size', which was not given.")
            if self.vocab_size == 0:
                raise UsageError("model: vocab_size=0 is not allowed: it should be greater than or equal to 1.")
            return
        if self.inputs is None or self.outputs is None:
            given, other = ("inputs", "outputs") if self.outputs is None else ("outputs", "inputs")
            raise UsageError(f"model: {given}={getattr(self, given)} needs {other} too, the numbers at the other end.")
        if self.vocab_size:
            told = "inputs and outputs are those of a model of real vectors"
            raise UsageError(f"model: vocab_size={self.vocab_size} is that of a model of tokens, and {told}.")
        for name in ("tie_embeddings", "decoder", "recursion"):
            if getattr(self, name) not in (False, None):
                raise UsageError(f"A model of real vectors takes no {name}: leave model.{name} out.")

    @property
    def n_outputs(self) -> int:
        """Numbers that the head gives for each step: a logit for every token, or `outputs`."""
        return self.outputs or self.vocab_size

    def reads_max_len(self) -> bool:
        """Whether there are weights for every position, whose number is `max_len`."""
        outer = self.recursion.outer if self.recursion else None
        policy = self.unmasking_policy.pattern if self.unmasking_policy else None
        words = [word.config for pattern in (self.pattern, outer, policy) if pattern for word in parse(pattern).words()]
        return self.positions == "learned" or any(
            mixer_of(word).traits.takes_length and getattr(word, "length", None) is None for word in words
        )

    def step_options(self) -> StepOptions:
        """What holds for every word that does not say otherwise."""
        scales = {k: v for k in ("in_scale", "out_scale", "residual_scale") if (v := getattr(self, k)) != 1.0}
        options = {k: getattr(self, k) for k in ("placement", "norm", "norm_axis")}
        return StepOptions(**options, **scales)
