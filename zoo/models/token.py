"""The token model: embedding, backbone, head; and the one way to create it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from zoo.backbone import NORM_EPS, Backbone, make_norm
from zoo.core.errors import UsageError, closest, quoted, refuse_oversize
from zoo.core.options import Options
from zoo.door import read_ids
from zoo.models import generation
from zoo.models.budget import largest_width
from zoo.models.families import families
from zoo.models.uninitialised import Uninitialised
from zoo.ops.modules import bare
from zoo.pattern import Norm, Pattern, Placement, StepOptions, from_data, list_mixers, mixer_of, parse
from zoo.pattern import swap as swap_words
from zoo.protocol import (
    MAX_WIDTH,
    MIN_WIDTH,
    Context,
    Mixer,
    State,
    admit,
    check_state,
    document_positions,
    first_parameter_like,
    next_position,
    tree_bytes,
)
from zoo.residual import Residual, ResidualKind

MOST_PARAMETERS = 2**40


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


class ModelState(NamedTuple):
    """position: (B,) int64, steps of the current document already seen; layers: the backbone's state."""

    position: Tensor
    layers: State


def make_backbone(config: ModelConfig, pattern: str) -> Backbone:
    """The layers of a pattern, with the options of a model."""
    return Backbone(
        parse(pattern),
        config.d_model,
        causal=config.causal,
        defaults=config.step_options(),
        norm_eps=config.norm_eps,
        residual=Residual(config.residual, config.residual_streams, config.residual_dynamic),
        length=config.max_len,
    )


class TokenModel(nn.Module):
    """Token ids (B, T) to logits (B, T, vocab_size), with a state to go on from."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.causal = config.causal
        if config.positions == "learned" and config.max_len is None:
            raise UsageError('positions="learned" needs max_len, the number of positions to learn.')
        d = config.d_model
        self.embedding = nn.Embedding(config.vocab_size, d)
        self.positions = nn.Embedding(config.max_len, d) if config.positions == "learned" and config.max_len else None
        self.time_feature = TimeFeature(d) if config.time_feature else None
        self.embedding_norm = make_norm(config.norm if config.embedding_norm else "none", d, config.norm_eps)
        self.backbone = make_backbone(config, config.pattern)
        self.norm = make_norm(config.norm if config.placement != "post" else "none", d, config.norm_eps)
        self.decoder = Decoder(config) if config.decoder else None
        self.head = None if config.tie_embeddings else nn.Linear(d, config.vocab_size, bias=False)
        self.head_bias = nn.Parameter(torch.zeros(config.vocab_size)) if config.head_bias else None
        self._init_own()

    def _init_own(self) -> None:
        std = 0.02 if self.head is None else 1.0  # a tied head wants small weights
        nn.init.normal_(self.embedding.weight, std=std)
        if self.positions is not None:
            nn.init.normal_(self.positions.weight, std=std / 2)
        if self.head is not None:
            nn.init.normal_(self.head.weight, std=self.config.d_model**-0.5)

    def forward(
        self, tokens: Tensor, state: ModelState | tuple[()] | None = None, context: Context | None = None
    ) -> tuple[Tensor, ModelState | tuple[()]]:
        """tokens (B, T) int64, from `state` (rest by default; consumed) to logits (B, T, vocab_size) and next state.

        A model that is not causal takes no state and returns `()`.
        """
        hidden, state = self.features(tokens, state, context)
        return self.logits(hidden), state

    def features(
        self, tokens: Tensor, state: ModelState | tuple[()] | None = None, context: Context | None = None
    ) -> tuple[Tensor, ModelState | tuple[()]]:
        """As `forward`, up to the normed hidden states (B, T, D) that `logits` reads."""
        tokens, context = self._enter(tokens, state, context)
        carried = state if isinstance(state, ModelState) else None
        start = carried.position if carried else torch.zeros(len(tokens), dtype=torch.int64, device=tokens.device)
        positions = document_positions(start, tokens.shape[1], context.resets)
        seen = positions
        if context.lengths is not None:  # padding stands nowhere, and so never beyond max_len
            padding = torch.arange(tokens.shape[1], device=tokens.device) >= context.lengths[:, None]
            seen = positions.masked_fill(padding, 0)
        x = self.embed(tokens, seen, context.timespans)
        x, layers = self.backbone(x, carried.layers if carried else None, context)
        x = self.norm(x)
        return x, ModelState(next_position(positions, start, context.lengths), layers) if self.causal else ()

    def _enter(self, tokens: Tensor, state: Any, context: Context | None) -> tuple[Tensor, Context]:
        """What `features` is given, checked for all layers at once."""
        if not self.causal and isinstance(state, ModelState):
            raise UsageError("A model with causal=False reads whole sequences and takes no state.")
        tokens = read_ids("model", "tokens", tokens, "BT", self.config.vocab_size, "vocab_size")
        if state is not None and not torch.compiler.is_compiling():
            check_state("model", self, state, len(tokens), self._dtype())
        return tokens, admit("model", context, len(tokens), tokens.shape[1], tokens.device)

    def _dtype(self) -> torch.dtype:
        weight = getattr(self.embedding, "weight", None)  # an adapter around the embedding need not have it
        return first_parameter_like(self, None, None)[1] if weight is None else weight.dtype

    def embed(self, tokens: Tensor, positions: Tensor, timespans: Tensor | None = None) -> Tensor:
        """tokens, positions and timespans (B, T; 1 by default) to (B, T, D)."""
        x = self.embedding(tokens)
        x = x if self.config.embedding_scale == 1.0 else x * self.config.embedding_scale
        if self.time_feature is not None:
            timespans = x.new_ones(tokens.shape) if timespans is None else timespans
            x = x + self.time_feature(timespans.to(x.dtype))
        if self.positions is not None:
            on_hand = (
                positions.device.type == "cpu" and not torch.compiler.is_compiling()
            )  # else it would be waited for
            longest = self.config.max_len or 0
            if on_hand and (n := int(positions.max()) + 1) > longest:
                raise UsageError(f"{n} tokens are more than max_len={longest}.")
            x = x + self.positions(positions)
        elif self.config.positions == "sinusoidal":
            x = x + sinusoidal(positions, self.config.d_model).to(x.dtype)
        x = self.embedding_norm(x)
        return F.dropout(x, self.config.dropout, self.training)

    def logits(self, hidden: Tensor) -> Tensor:
        """Normed hidden states (..., D) to logits (..., vocab_size)."""
        if self.head is None or bare(self.head):
            logits = F.linear(hidden, self._tied() if self.head is None else self.head.weight, self.head_bias)
        else:
            logits = self.head(hidden) if self.head_bias is None else self.head(hidden) + self.head_bias
        logits = logits if self.config.logit_scale == 1.0 else logits * self.config.logit_scale
        cap = self.config.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def _tied(self) -> Tensor:
        """(vocab_size, D), the embeddings of all tokens, those of an adapter in its place too."""
        if isinstance(self.embedding, nn.Embedding):
            return self.embedding.weight
        device = next(self.embedding.parameters()).device
        return self.embedding(torch.arange(self.config.vocab_size, device=device))

    def init_state(
        self,
        batch_size: int,
        *,
        capacity: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> ModelState | tuple[()]:
        """The state at rest, as `Mixer.init_state`; `()` for a model that is not causal."""
        if not self.causal:
            return ()
        device, dtype = first_parameter_like(self, device, dtype)
        layers = self.backbone.init_state(batch_size, capacity=capacity, device=device, dtype=dtype)
        return ModelState(torch.zeros(batch_size, dtype=torch.int64, device=device), layers)

    def step(
        self, tokens: Tensor, state: ModelState, context: Context | None = None
    ) -> tuple[Tensor, ModelState | tuple[()]]:
        """`forward` at T = 1: tokens (B,) to (logits (B, vocab_size), next state)."""
        if tokens.ndim != 1:
            raise UsageError(f"model: step takes tokens (B,), not {tuple(tokens.shape)}.")
        logits, state = self(tokens[:, None], state, context)
        return logits.squeeze(1), state

    def mixers(self) -> list[Mixer]:
        """All mixers, in order."""
        return self.backbone.mixers()

    def n_parameters(self) -> int:
        """Number of parameters, shared ones once."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, context_length: int) -> int:
        """Matmul FLOPs (multiply-add = 2) to read one token at a context of `context_length`, head included.

        With a decoder, to tell it again too.
        """
        head = 2 * self.config.d_model * self.config.vocab_size
        time = 0 if self.time_feature is None else self.time_feature.flops_per_token()
        decoder = 0 if self.decoder is None else 4 * self.config.d_model**2
        return head + time + decoder + self.backbone.flops_per_token(context_length)

    def state_bytes(self, batch_size: int, context_length: int, dtype: torch.dtype = torch.float32) -> int:
        """Bytes of the state after `context_length` tokens; 0 for a model that is not causal."""
        if not self.causal:
            return 0
        position = tree_bytes(torch.empty(batch_size, dtype=torch.int64, device="meta"))
        return position + sum(m.state_bytes(batch_size, context_length, dtype) for m in self.mixers())

    generate = generation.generate
    stream = generation.stream


class TimeFeature(nn.Module):
    """Timespans (B, T), not negative, to (B, T, D): W_2 silu(W_1 [dt, log(1 + dt)] + b)."""

    def __init__(self, d_model: int):
        super().__init__()
        self.d_model = d_model
        self.up = nn.Linear(2, d_model)
        self.down = nn.Linear(d_model, d_model, bias=False)
        nn.init.normal_(self.up.weight)
        nn.init.normal_(self.up.bias)
        nn.init.normal_(self.down.weight, std=d_model**-0.5)

    def forward(self, timespans: Tensor) -> Tensor:
        return self.down(F.silu(self.up(torch.stack([timespans, torch.log1p(timespans)], -1))))

    def flops_per_token(self) -> int:
        """Matmul FLOPs, multiply-add = 2."""
        return 2 * self.d_model * (2 + self.d_model)


class Decoder(nn.Module):
    """Features (B, D) of a row's last token to those (B, T, D) of each of its tokens, for the head.

    norm(gelu(W_2 norm(gelu(W_1 norm(h + p_t))))) with the sines and cosines p_t of place t, as in the auto-encoder of
    MAD (Poli et al. 2024, arXiv 2403.17844; `mad/model/auto_encoder.py`), where h is not normed before.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        d = config.d_model
        self.norms = nn.ModuleList(make_norm(config.norm, d, config.norm_eps) for _ in range(3))
        self.layers = nn.ModuleList(nn.Linear(d, d) for _ in range(2))

    def forward(self, last: Tensor, length: int) -> Tensor:
        """last (B, D) to (B, length, D)."""
        place = sinusoidal(torch.arange(length, device=last.device), last.shape[-1])
        x = self.norms[0](last[:, None] + place.to(last.dtype))
        for layer, norm in zip(self.layers, self.norms[1:], strict=True):
            x = norm(F.gelu(layer(x)))
        return x


def sinusoidal(positions: Tensor, d_model: int) -> Tensor:
    """Sines and cosines of (B, T) positions, (B, T, D) float32 (Vaswani et al. 2017, section 3.5)."""
    frequency = torch.exp(torch.arange(0, d_model, 2, device=positions.device) * (-math.log(10000.0) / d_model))
    angle = positions[..., None].float() * frequency
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(-2)


def list_models(pattern: str = "*") -> list[str]:
    """Names of the families' sizes, such as `mamba2-tiny`."""
    return families.names(pattern)


def create_model(spec: str | Pattern | Mapping[str, Any] | ModelConfig | Sequence[Any], **options: Any) -> TokenModel:
    """A model from a pattern, a family-size name, or a config.

    Args:
        spec: `"4*(mamba2 swiglu)"`, `"mamba2-tiny"`, a mapping of model options, or a `ModelConfig`.
        **options: model options, over those of `spec`; `n_parameters` in place of `d_model` takes the largest width at
            which the model has no more parameters than that.

    Raises:
        UsageError: unknown word, option or family, a wrong type, or sizes that do not fit together.
    """
    config = model_config(spec, **options)
    with refuse_oversize("model"):
        if config.recursion is not None:
            from zoo.models.recursive import RecursiveModel

            return RecursiveModel(config)
        return TokenModel(config)


def model_config(spec: str | Pattern | Mapping[str, Any] | ModelConfig | Sequence[Any], **options: Any) -> ModelConfig:
    """The config that `spec` and keyword `options` stand for, with `d_model` where they give `n_parameters`."""
    budget = None
    for source in (spec, options):
        budget = _budget(source, budget) if isinstance(source, Mapping) else budget
    config = _config(_without_budget(spec), _without_budget(options))
    if budget is None:
        return config

    def count(width: int) -> int:
        with torch.device("meta"), Uninitialised():
            return create_model(config.model_copy(update={"d_model": width})).n_parameters()

    return ModelConfig(**{**config.changed(), "d_model": largest_width(count, budget)})


def _budget(source: Mapping[str, Any], before: int | None) -> int | None:
    """The `n_parameters` of `source`, else those `before`, unless `source` gives the width."""
    width, budget = source.get("d_model"), source.get("n_parameters")
    if budget is None:
        return before if width is None else None
    if width is not None:
        raise UsageError(f"d_model={width!r} and n_parameters={budget!r} are both given: one follows from the other.")
    if isinstance(budget, bool) or not isinstance(budget, int) or not 1 <= budget <= MOST_PARAMETERS:
        allowed = f"a whole number from 1 to {MOST_PARAMETERS:,}"
        raise UsageError(f"model: n_parameters={quoted(budget)} is not allowed: it should be {allowed}.")
    return budget


def _without_budget(source: Any) -> Any:
    return {k: v for k, v in source.items() if k != "n_parameters"} if isinstance(source, Mapping) else source


def _config(spec: Any, options: dict[str, Any]) -> ModelConfig:
    if isinstance(spec, ModelConfig):
        return ModelConfig(**{**spec.changed(), **options}) if options else spec
    if isinstance(spec, Mapping):
        data = {**spec, **options}
        family = data.pop("family", None)
        return ModelConfig(**(families.options(family, data) if family else data))
    if isinstance(spec, str) and (spec in families or _looks_like_family(spec)):
        return ModelConfig(**families.options(spec, options))
    return ModelConfig(**{"pattern": spec if isinstance(spec, str) else str(from_data(spec)), **options})


def _looks_like_family(spec: str) -> bool:
    if spec in {family.name for family in families.all()}:
        return spec not in list_mixers()  # as `mamba2` is, which is a pattern
    return "-" in spec and bool(closest(spec, families.names())) and not set(spec) & set("()*|= ")


def swap(spec: Any, words: Mapping[str, str]) -> Any:
    """A pattern or a config with words replaced: `swap("gqa mlp", {"gqa": "mla"})`.

    Args:
        spec: a pattern as text or data, which gives text, or as a `Pattern`, which gives one; a `ModelConfig`, a
            mapping of model options, or a family-size (`"llama3-tiny"`), which give a `ModelConfig`. That of a family
            keeps `published`, which says where it came from; `zoo.to_hf` no longer writes such a model, and names what
            differs. `n_parameters` in the mapping takes the width at which the new model has no more.
        words: names of words, and the word that each gives way to, with its options. Step options stay.

    Raises:
        UsageError: a name that the pattern does not hold, or an unknown replacement.
    """
    if isinstance(spec, str) and (spec in families or _looks_like_family(spec)):
        spec = model_config(spec)
    if isinstance(spec, Mapping) and {"pattern", "family"} & spec.keys():
        swapped, budget = swap(_config(_without_budget(spec), {}), words), _budget(spec, None)
        return swapped if budget is None else model_config(swapped, n_parameters=budget)
    if isinstance(spec, ModelConfig):
        changed = {**spec.changed(), "pattern": swap(spec.pattern, words)}
        if spec.recursion is not None and spec.recursion.outer is not None:
            outer = from_data(spec.recursion.outer)
            there = {k: v for k, v in words.items() if k in outer.names()}
            changed["recursion"] = {**spec.recursion.changed(), "outer": swap(spec.recursion.outer, there)}
        return ModelConfig(**changed)
    if isinstance(spec, Pattern):
        return swap_words(spec, words)
    return str(swap_words(from_data(spec), words))
