"""Softmax attention with rotary positions: multi-head, multi-query, grouped-query, and over a sliding window.

`mha`: Vaswani et al. 2017. `mqa`: Shazeer 2019, arXiv 1911.02150. `gqa`: Ainslie et al. 2023, arXiv 2305.13245.
`swa`: Beltagy et al. 2020, arXiv 2004.05150, as in Mistral 7B (arXiv 2310.06825). They differ in how many heads share
their keys and values, and in how far back they look; everything else is one implementation.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Literal, final

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from tasks.registry import Options, UsageError
from zoo.ops.attention import attention, init_cache
from zoo.ops.rotary import rotary_table, rotary_width, rotate
from zoo.protocol import Context, Mixer, Place, State, document_positions, first_parameter_like
from zoo.registry import derive_heads, register


class AttentionOptions(Options):
    """What every attention word can set.

    Attributes:
        n_heads: H, by default the most heads of at least 64 channels, or d_model / head_dim where that is given,
            brought to a multiple of n_kv_heads.
        head_dim: K, by default d_model / n_heads.
        window: each step sees itself and the window - 1 steps before it (and as many after it if not causal).
        rope: rotary positions; without them order shows through the causal mask alone.
        rope_base: the slowest rotation takes about 2 pi base steps.
        rope_fraction: share of each head's channels that is rotated (NeoX: 0.25).
        rope_interleaved: rotate neighbouring channels (the paper) or the two halves of a head (Llama, NeoX): the same
            model with its channels in another order, so this matters for given weights only.
        qk_norm: RMSNorm on each head's query and key, before the rotation (Qwen3, Gemma 3).
        bias: on the projections.
        causal: whether steps see the past only; None is as the model says.
        softcap: c in c tanh(logits / c) (Gemma 2).
        sinks: one learned logit a head that takes attention without giving a value (GPT-OSS).
        backend: form of the op, see `zoo.ops.attention`.
    """

    n_heads: int | None = Field(default=None, ge=1)
    head_dim: int | None = Field(default=None, ge=1)
    window: int | None = Field(default=None, ge=1)
    rope: bool = True
    rope_base: float = Field(default=10000.0, gt=0)
    rope_fraction: float = Field(default=1.0, gt=0, le=1)
    rope_interleaved: bool = True
    qk_norm: bool = False
    bias: bool = False
    causal: bool | None = None
    softcap: float | None = Field(default=None, gt=0)
    sinks: bool = False
    backend: Literal["auto", "reference", "chunked", "sdpa"] = "auto"


class Attention(Mixer):
    """y = W_o concat_h softmax(q_h K_g^T / sqrt(K)) V_g with q, k, v = W_qkv x; heads h share the keys of group g.

    Inits: W_qkv normal with std 1 / sqrt(D), so that logits have unit scale at any width (GPT-2's 0.02 does so near
    D = 2500 only, and starves narrow models); W_o normal with std 1 / sqrt(H K) / sqrt(2 n_layers), which keeps the
    residual stream's scale at any depth (Radford et al. 2019, section 2.3); biases and sinks zero.
    """

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

        H, G, K = self.n_heads, self.n_kv_heads, self.head_dim
        self.rotated = rotary_width(K, config.rope_fraction) if config.rope else 0
        self.in_proj = nn.Linear(d_model, (H + 2 * G) * K, bias=config.bias)
        self.out_proj = nn.Linear(H * K, d_model, bias=config.bias)
        self.q_norm = nn.Parameter(torch.ones(K)) if config.qk_norm else None
        self.k_norm = nn.Parameter(torch.ones(K)) if config.qk_norm else None
        self.sinks = nn.Parameter(torch.zeros(H)) if config.sinks else None
        nn.init.normal_(self.in_proj.weight, std=d_model**-0.5)
        nn.init.normal_(self.out_proj.weight, std=(H * K * 2 * place.n_layers) ** -0.5)
        if config.bias:
            nn.init.zeros_(self.in_proj.bias)
            nn.init.zeros_(self.out_proj.bias)

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
        return init_cache(batch_size, G, K, K, capacity=capacity, window=self.window, device=device, dtype=dtype)

    def forward(self, x: Tensor, state: State | None = None, context: Context | None = None) -> tuple[Tensor, State]:
        context = Context() if context is None else context
        state = state or None  # `()` is the state of attention that is not causal
        H, G = self.n_heads, self.n_kv_heads
        qk, v = self.in_proj(x).unflatten(-1, (-1, self.head_dim)).split([H + G, G], 2)
        if self.q_norm is not None and self.k_norm is not None:
            weight = torch.cat([self.q_norm.expand(H, -1), self.k_norm.expand(G, -1)])
            qk = _rms_norm(qk, weight)
        if self.rotated:
            cos, sin = self._angles(x, state, context)
            qk = rotate(qk, cos, sin, interleaved=self.config.rope_interleaved)
        q, k = qk.split([H, G], 2)
        o, state = attention(
            q,
            k,
            v,
            state,
            causal=self.causal,
            window=self.window,
            sinks=self.sinks,
            softcap=self.config.softcap,
            lengths=context.lengths,
            resets=context.resets,
            backend=self.config.backend,
        )
        return self.out_proj(o.flatten(2)), state

    def step(self, x_t: Tensor, state: State, context: Context | None = None) -> tuple[Tensor, State]:
        if not self.causal:
            raise UsageError(f"{self.name} with causal=False looks ahead, so it cannot go step by step: use forward.")
        return super().step(x_t, state, context)

    def _angles(self, x: Tensor, state: State | None, context: Context) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the T new steps, each at its position in its document."""
        if state is not None:
            positions = document_positions(state.length, x.shape[1], context.resets)
            return rotary_table(positions, self.rotated, base=self.config.rope_base)
        table = rotary_table(torch.arange(x.shape[1], device=x.device)[None], self.rotated, base=self.config.rope_base)
        if context.resets is None:
            return table
        start = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        positions = document_positions(start, x.shape[1], context.resets)
        return table[0][0, positions], table[1][0, positions]

    def flops_per_token(self, context_length: int) -> int:
        seen = min(context_length, self.window or context_length)
        projections = self.in_proj.weight.numel() + self.out_proj.weight.numel()
        return 2 * projections + 4 * self.n_heads * self.head_dim * seen

    def state_bytes(self, batch_size: int, context_length: int, dtype: torch.dtype) -> int:
        if not self.causal:
            return 0
        rows = min(context_length, self.window or context_length)
        keys_and_values = 2 * rows * self.n_kv_heads * self.head_dim * dtype.itemsize
        return batch_size * (keys_and_values + torch.int64.itemsize)

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
                "backend": "reference",
            },
            {"n_heads": 2, "rope": False, "qk_norm": True, "softcap": 2.0, "sinks": True, "backend": "chunked"},
            {"n_heads": 2, "window": 9, "backend": "sdpa"},
            {"n_heads": 2, "causal": False},
        ]
        if "n_kv_heads" in cls.Config.model_fields:
            cases[1]["n_kv_heads"] = 2
        return cases


def _rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """x (B, T, heads, K) normed along K, in float32 at least, times weight (heads, K)."""
    dtype = torch.promote_types(torch.float32, x.dtype)
    return (F.rms_norm(x.to(dtype), x.shape[-1:], eps=eps) * weight.to(dtype)).to(x.dtype)


@final
@register("mha")
class MultiHeadAttention(Attention):
    """Every head has keys and values of its own: G = H."""

    class Config(AttentionOptions):
        """See `AttentionOptions`."""

    def _n_kv_heads(self) -> int:
        return self.n_heads


@final
@register("mqa")
class MultiQueryAttention(Attention):
    """All heads share one key and one value: G = 1."""

    class Config(AttentionOptions):
        """See `AttentionOptions`."""

    def _n_kv_heads(self) -> int:
        return 1


@final
@register("gqa")
class GroupedQueryAttention(Attention):
    """Groups of heads share keys and values."""

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
    """Attention over the last `window` steps, whose state stops growing there."""

    class Config(AttentionOptions):
        """n_kv_heads: G, by default n_heads; window: steps seen, 64 by default (Gemma 3: 1024)."""

        n_kv_heads: int | None = Field(default=None, ge=1)
        window: int = Field(default=64, ge=1)

    config: Config

    def _n_kv_heads(self) -> int:
        return self.config.n_kv_heads or self.n_heads
