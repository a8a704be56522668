"""Softmax attention with rotary positions: multi-head, multi-query, grouped-query, and over a sliding window.

`mha`: Vaswani et al. 2017. `mqa`: Shazeer 2019, arXiv 1911.02150. `gqa`: Ainslie et al. 2023, arXiv 2305.13245.
`swa`: Beltagy et al. 2020, arXiv 2004.05150, as in Mistral 7B (arXiv 2310.06825). They differ in how many heads share
their keys and values, and in how far back they look; everything else is one implementation.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Literal, NamedTuple, cast, final

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from zoo.canon import Canon, require_causal
from zoo.core.errors import UsageError
from zoo.mixers.attention_parts import AttentionWord, RopeOptions, turn
from zoo.mixers.parts import CausalConv
from zoo.norms import rms_norm
from zoo.ops import KVCache, attention, init_cache, rotary_width
from zoo.ops.cells import AttentionCell, attention_cell_step
from zoo.protocol import (
    Context,
    Place,
    State,
    Traits,
    derive_heads,
    first_parameter_like,
    recurrent_dtype,
    register,
    single,
)
from zoo.use_adapters import UseAdapters


class AttentionOptions(RopeOptions):
    """What every attention word can set; see `RopeOptions` for the rest.

    Attributes:
        n_heads: H, by default the most heads of at least 64 channels, or d_model / head_dim where that is given,
            brought to a multiple of n_kv_heads.
        head_dim: K, by default d_model / n_heads.
        window: each step sees itself and the window - 1 steps before it (and as many after it if not causal).
        rope_fraction: share of each head's channels that is rotated (NeoX: 0.25).
        qk_norm: RMSNorm on each head's query and key, before the rotation (Qwen3, Gemma 3).
        qk_norm_over: axis of this norm: the channels of each head, with weights that all heads share, or those of
            "all" queries and of all keys at once, with weights for each (OLMo 2).
        norm_zero_centred: the weights of this norm are 1 + w (Qwen3-Next, Gemma 3).
        norm_eps: added to its mean square.
        scale: factor on q . k instead of K ** -0.5 (Gemma: query_pre_attn_scalar ** -0.5).
        bias: biases of the projections.
        out_bias: bias of W_o, if it differs from `bias` (Qwen2: bias=True, out_bias=False).
        gate: the output of the heads times sigmoid(W_g x), by "channel" (Qwen3-Next) or by "head" (Qiu et al. 2025,
            arXiv 2505.06708, section 3.1).
        causal: whether steps see only the past; None: as in the model.
        softcap: c in c tanh(logits / c) (Gemma 2).
        sinks: one learned logit a head that takes attention without giving a value (GPT-OSS).
        canon_b: W, taps of a Canon layer on queries, keys and values together, after their norm and before the rotation
            (Canon-B); published: 4.
        conv_size: W, taps of a causal depthwise convolution with a bias in the same place, without the sum of a Canon
            layer (`mamba_ssm`'s attention, as in mamba2attn-2.7b, where it is 4).
        adapter_rank: r, rank of an adapter on each of the projections of queries, keys and values, one set of them for
            each use of the `shared` block that the word belongs to (Zamba2).
        backend: form of the op, see `zoo.ops.attention`.
    """

    n_heads: int | None = Field(default=None, ge=1)
    head_dim: int | None = Field(default=None, ge=1)
    window: int | None = Field(default=None, ge=1)
    rope_fraction: float = Field(default=1.0, gt=0, le=1)
    qk_norm: bool = False
    qk_norm_over: Literal["head", "all"] = "head"
    norm_zero_centred: bool = False
    norm_eps: float = Field(default=1e-6, gt=0)
    scale: float | None = Field(default=None, gt=0)
    bias: bool = False
    out_bias: bool | None = None
    gate: Literal["channel", "head"] | None = None
    causal: bool | None = None
    softcap: float | None = Field(default=None, gt=0)
    sinks: bool = False
    canon_b: int | None = Field(default=None, ge=2, le=1024)
    conv_size: int | None = Field(default=None, ge=2, le=1024)
    adapter_rank: int | None = Field(default=None, ge=1)
    backend: Literal["auto", "reference", "chunked", "sdpa"] = "auto"


class CanonAttentionState(NamedTuple):
    cache: Any  # that of attention without a Canon layer
    canon: Tensor  # (B, W - 1, (H + 2 G) K): the last q, k and v before the Canon layer, or other convolution


class Attention(AttentionWord):
    """y = W_o concat_h softmax(q_h K_g^T / sqrt(K)) V_g with q, k, v = W_qkv x; heads h share the keys of group g.

    With a gate, y = W_o (sigmoid(W_g x) * concat_h ...); its rows stand below those of q, k and v.

    Inits: W_qkv normal with std 1 / sqrt(D), so that logits have unit scale at any width (GPT-2's 0.02 does so near
    D = 2500 only, and starves narrow models); W_o normal with std 1 / sqrt(H K) / sqrt(2 n_layers), which keeps the
    residual stream's scale at any depth (Radford et al. 2019, section 2.3); biases and sinks zero, norms one.
    """

    traits = Traits(reads_prefix=True, cuts_in_ops=True, narrows=True)
    config: AttentionOptions

    def __init__(self, d_model: int, config: AttentionOptions, *, place: Place = Place()):
        super().__init__(d_model, config, place=place)
        self.causal = place.causal if config.causal is None else config.causal
        self.window = config.window
        self.n_heads, self.head_dim = self._head_shape()
        self.n_kv_heads = self._n_kv_heads()
        if self.n_heads % self.n_kv_heads:
            raise UsageError(
                f"{self.name}: n_heads={self.n_heads} is not divisible by n_kv_heads={self.n_kv_heads}; "
                f"allowed: {', '.join(str(n) for n in range(1, self.n_heads + 1) if self.n_heads % n == 0)}."
            )
        for option in ("softcap", "sinks"):
            if config.backend == "sdpa" and getattr(config, option):
                raise UsageError(f'{self.name}: backend="sdpa" does not know {option}: take "auto" or "chunked".')

        for option in ("norm_zero_centred", "norm_eps", "qk_norm_over"):
            if option in config.changed() and not config.qk_norm:
                raise UsageError(f"{self.name}: {option} belongs to qk_norm, which is not set.")

        H, G, K = self.n_heads, self.n_kv_heads, self.head_dim
        self.rotated = rotary_width(K, config.rope_fraction) if config.rope else 0
        self.scaling = config.scaling(self.name)
        out_bias = config.bias if config.out_bias is None else config.out_bias
        gates = {None: 0, "head": H, "channel": H * K}[config.gate]
        self.in_width = (H + 2 * G) * K + gates
        self.in_proj = nn.Linear(d_model, self.in_width, bias=config.bias)
        self.out_proj = nn.Linear(H * K, place.d_out or d_model, bias=out_bias)
        self.adapters = None
        if config.adapter_rank is not None:
            self.adapters = UseAdapters(d_model, [H * K, G * K, G * K], config.adapter_rank, place.uses)
        centre = 0.0 if config.norm_zero_centred else 1.0
        widths = (K, K) if config.qk_norm_over == "head" else (H * K, G * K)
        self.q_norm, self.k_norm = (
            nn.Parameter(torch.full((width,), centre)) if config.qk_norm else None for width in widths
        )
        self.sinks = nn.Parameter(torch.zeros(H)) if config.sinks else None
        self.canon = self.conv = None
        if config.canon_b is not None and config.conv_size is not None:
            raise UsageError(f"{self.name}: canon_b and conv_size are one convolution or the other: set one.")
        if config.canon_b is not None:
            require_causal("canon_b", config.canon_b, place._replace(causal=self.causal))
            self.canon = Canon((H + 2 * G) * K, config.canon_b)
        if config.conv_size is not None:
            require_causal("conv_size", config.conv_size, place._replace(causal=self.causal))
            self.conv = CausalConv((H + 2 * G) * K, config.conv_size, bias=True, activation=None, backend="auto")
        self.cell: AttentionCell | None = None
        if self.causal and self._mixes is None and config.backend == "auto" and config.qk_norm_over == "head":
            scale = K**-0.5 if config.scale is None else config.scale
            rope = self.rotated, config.rope_base, self.scaling, config.rope_interleaved
            self.cell = AttentionCell(H, G, K, config.window, *rope, gates // H, config.norm_eps, scale, config.softcap)
        nn.init.normal_(self.in_proj.weight, std=d_model**-0.5)
        nn.init.normal_(self.out_proj.weight, std=(H * K * 2 * place.n_layers) ** -0.5)
        for layer in (self.in_proj, self.out_proj):
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def _head_shape(self) -> tuple[int, int]:
        n_heads, head_dim = self.config.n_heads, self.config.head_dim
        groups = getattr(self.config, "n_kv_heads", None) or 1  # heads come in equal groups where a number is given
        if n_heads is None and head_dim is not None:
            n_heads = groups * max(1, self.d_model // (head_dim * groups))
        elif n_heads is None:
            fewest = derive_heads(self.d_model)
            fits = (n for n in range(groups, self.d_model + 1, groups) if n >= fewest and self.d_model % n == 0)
            n_heads = next(fits, groups)
        if head_dim is None:
            if self.d_model % n_heads:
                raise UsageError(
                    f"{self.name}: d_model={self.d_model} is not divisible by n_heads={n_heads}: "
                    f"take another number of heads, or set head_dim."
                )
            head_dim = self.d_model // n_heads
        return n_heads, head_dim

    @abstractmethod
    def _n_kv_heads(self) -> int:
        """G."""

    def init_state(self, batch_size: int, *, capacity: int | None = None, device=None, dtype=None) -> State:
        if not self.causal:
            return ()
        device, dtype = first_parameter_like(self, device, dtype)
        G, K = self.n_kv_heads, self.head_dim
        cache = init_cache(batch_size, G, K, K, capacity=capacity, window=self.window, device=device, dtype=dtype)
        if self._mixes is None:
            return cache
        last = (batch_size, self._mixes.weight.shape[1] - 1, len(self._mixes.weight))
        return CanonAttentionState(cache, torch.zeros(last, device=device, dtype=recurrent_dtype(dtype)))

    @property
    def _mixes(self) -> Canon | CausalConv | None:
        """The convolution of queries, keys and values."""
        return self.conv if self.canon is None else self.canon

    def forward(self, x: Tensor, state: State | None = None, context: Context | None = None) -> tuple[Tensor, State]:
        context, c = Context() if context is None else context, self.config
        state = state or None  # `()` is the state of attention that is not causal
        H, G, K = self.n_heads, self.n_kv_heads, self.head_dim
        heads = (H + 2 * G) * K
        rows = self.in_proj(x)
        if self.adapters is not None:  # not on the gate
            rows = rows + F.pad(self.adapters(x, context), (0, self.in_width - heads))
        if self.cell is not None and single(x, state, context):
            done = attention_cell_step(self.cell, rows, *self._norm_weights(), self.sinks, cast(KVCache, state))
            if done is not None:
                return self.out_proj(done[0]), done[1]
        qkv, gate = rows.split([heads, self.in_width - heads], -1)
        qk, v = qkv.unflatten(-1, (-1, K)).split([H + G, G], 2)
        if self.q_norm is not None and self.k_norm is not None:
            qk = self._normed(qk, self.q_norm, self.k_norm)
        last: Tensor | None = None
        if self._mixes is not None:
            state, last = (None, None) if state is None else state
            mixed, last = self._mixes(torch.cat([qk, v], 2).flatten(2), last, context)
            qk, v = mixed.unflatten(-1, (-1, K)).split([H + G, G], 2)
        if self.rotated:
            length = None if state is None else state.length
            (qk,) = turn([qk], length, context, self.rotated, c.rope_base, self.scaling, c.rope_interleaved)
        q, k = qk.split([H, G], 2)
        o, state = attention(
            q,
            k,
            v,
            state,
            causal=self.causal,
            window=self.window,
            sinks=self.sinks,
            softcap=c.softcap,
            lengths=context.lengths,
            resets=context.resets,
            pieces=context.pieces,
            prefix=context.prefix if self.causal else None,
            scale=c.scale,
            backend=c.backend,
        )
        if c.gate:
            o = o * torch.sigmoid(gate).unflatten(-1, (H, -1))
        return self.out_proj(o.flatten(2)), state if last is None else CanonAttentionState(state, last)

    def _norm_weights(self) -> tuple[Tensor | None, Tensor | None]:
        """The factors of the norms of queries and keys."""
        if self.q_norm is None or self.k_norm is None or not self.config.norm_zero_centred:
            return self.q_norm, self.k_norm
        return self.q_norm + 1, self.k_norm + 1

    def _normed(self, qk: Tensor, q_weight: Tensor, k_weight: Tensor) -> Tensor:
        """Queries and keys (B, T, H + G, K) normed."""
        H, G, c = self.n_heads, self.n_kv_heads, self.config
        if c.qk_norm_over == "head":
            weight = torch.cat([q_weight.expand(H, -1), k_weight.expand(G, -1)])
            return rms_norm(qk, weight + 1 if c.norm_zero_centred else weight, c.norm_eps)
        normed = (
            rms_norm(part.flatten(2), weight + 1 if c.norm_zero_centred else weight, c.norm_eps)
            for part, weight in zip(qk.split([H, G], 2), (q_weight, k_weight), strict=True)
        )
        return torch.cat(tuple(normed), -1).unflatten(-1, (H + G, -1))

    def flops_per_token(self, context_length: int) -> int:
        seen = min(context_length, self.window or context_length)
        out = self.n_heads * self.head_dim * (self.place.d_out or self.d_model)
        adapted = 0 if self.adapters is None else self.adapters.flops_per_token()
        return 2 * (self.d_model * self.in_width + out) + adapted + 4 * self.n_heads * self.head_dim * seen

    @classmethod
    def law_cases(cls) -> list[dict[str, Any]]:
        cases: list[dict[str, Any]] = [
            {},
            {
                "n_heads": 4,
                "head_dim": 7,
                "window": 5,
                "rope_base": 500.0,
                "rope_fraction": 0.6,
                "rope_interleaved": False,
                "bias": True,
                "out_bias": False,
                "gate": "head",
                "backend": "reference",
            },
            {
                "n_heads": 2,
                "rope": False,
                "qk_norm": True,
                "norm_eps": 1e-4,
                "softcap": 2.0,
                "sinks": True,
                "conv_size": 4,
                "backend": "chunked",
            },
            {
                "n_heads": 2,
                "window": 9,
                "qk_norm": True,
                "norm_zero_centred": True,
                "gate": "channel",
                "adapter_rank": 3,
                "backend": "sdpa",
            },
            {"n_heads": 2, "causal": False, "scale": 0.2},
            {"n_heads": 4, "qk_norm": True, "qk_norm_over": "all", "canon_b": 3},
            {
                "rope_scaling": "yarn",
                "rope_factor": 4.0,
                "rope_context": 16,
                "rope_bands": (0.5, 4.0),
                "rope_truncate": False,
                "rope_amplitude": 1.1,
            },
        ]
        if "n_kv_heads" in cls.Config.model_fields:
            cases[1]["n_kv_heads"] = 2
        return cases


@final
@register("mha")
class MultiHeadAttention(Attention):
    """Multi-head attention: every head has its own keys and values (G = H)."""

    class Config(AttentionOptions):
        """See `AttentionOptions`."""

    def _n_kv_heads(self) -> int:
        return self.n_heads


@final
@register("mqa")
class MultiQueryAttention(Attention):
    """Multi-query attention: all heads share one key and one value (G = 1)."""

    class Config(AttentionOptions):
        """See `AttentionOptions`."""

    def _n_kv_heads(self) -> int:
        return 1


@final
@register("gqa")
class GroupedQueryAttention(Attention):
    """Grouped-query attention: the heads of a group share keys and values."""

    class Config(AttentionOptions):
        """n_kv_heads: G, by default the divisor of n_heads nearest to n_heads / 4 (Llama 3 8B: 32 and 8)."""

        n_kv_heads: int | None = Field(default=None, ge=1)

    config: Config

    def _n_kv_heads(self) -> int:
        H = self.n_heads
        return self.config.n_kv_heads or min((n for n in range(1, H + 1) if H % n == 0), key=lambda n: abs(n - H / 4))


@final
@register("swa")
class SlidingWindowAttention(Attention):
    """Sliding-window attention: attention over the last `window` steps, with a state of that size."""

    class Config(AttentionOptions):
        """See `AttentionOptions`.

        Attributes:
            n_kv_heads: G, by default n_heads.
            window: number of visible steps, 64 by default (Gemma 3: 1024).
        """

        n_kv_heads: int | None = Field(default=None, ge=1)
        window: int = Field(default=64, ge=1)

    config: Config

    def _n_kv_heads(self) -> int:
        return self.config.n_kv_heads or self.n_heads
