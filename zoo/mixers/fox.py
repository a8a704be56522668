"""Forgetting attention: softmax attention whose weights decay, head by head, by gates that depend on the input."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from zoo.mixers.attention_parts import RopeOptions, count_heads, turn
from zoo.mixers.parts import init_projections, precise, project
from zoo.norms import rms_norm
from zoo.ops import DecayingCache, attention, init_decaying_cache, rotary_width, token_shift
from zoo.protocol import Context, Mixer, Place, State, first_parameter_like, packing, recurrent_dtype, register


class ForgettingState(NamedTuple):
    cache: DecayingCache
    shift: Tensor  # (B, 1, n): the last k and v before they are mixed, n = 0 without k_shift and v_shift


@register("fox")
class ForgettingAttention(Mixer):
    """Forgetting attention: softmax attention with a forget gate (Lin et al. 2025, arXiv 2503.02130).

        q, k, v = W x ;  f_t = sigmoid(w_f x_t + b_f)                  one gate a head
        p_ts = softmax_{s <= t}(q_t . k_s / sqrt(K) + log f_{s+1} + ... + log f_t) ;  y = W_o concat_h sum_s p_ts v_s

    The authors' larger layer ("Pro") is `qk_norm=True, gate=True, out_norm=True, k_shift=True, v_shift=True`:

        k_t = RMSNorm(a_t k_{t-1} + (1 - a_t) k_t), a_t = sigmoid(w_a x_t) ;  v too, without a norm ;  q = RMSNorm(q)
        y = W_o (RMSNorm_head(o) * sigmoid(W_g x))

    Each norm has a weight for every channel of every head. A head needs no positions, since the gates show the order.
    Always causal. Inits: normal, std fan_in^-0.5, W_o as in `mha`; b_f zero as the authors', norms one.

    | state                  | cost per token at context T | parallel form            | cannot                         |
    |------------------------|-----------------------------|--------------------------|--------------------------------|
    | 2 G K T + H T + shifts | projections + 4 H K T       | attention, O(T^2) in all | keep a fixed state, look ahead |
    """

    class Config(RopeOptions):
        """The options; see `RopeOptions` for the rest.

        Attributes:
            n_heads: H, by default the most heads of at least 64 channels.
            n_kv_heads: G, by default H; the heads of a group share keys and values, but have gates of their own.
            head_dim: K, by default d_model / n_heads.
            window: each step sees itself and the window - 1 steps before it.
            rope: rotary positions; off by default, as published.
            qk_norm: RMSNorm of each head's query and key.
            gate: the output times sigmoid(W_g x).
            out_norm: RMSNorm of each head's output, before the gate.
            k_shift, v_shift: mix the key, the value, with that of the step before.
            norm_eps: added to the mean square in every norm.
            bias: biases of q, k and v.
            backend: form of the op, see `zoo.ops.attention`.
        """

        n_heads: int | None = Field(default=None, ge=1)
        n_kv_heads: int | None = Field(default=None, ge=1)
        head_dim: int | None = Field(default=None, ge=1)
        window: int | None = Field(default=None, ge=1)
        rope: bool = False
        qk_norm: bool = False
        gate: bool = False
        out_norm: bool = False
        k_shift: bool = False
        v_shift: bool = False
        norm_eps: float = Field(default=1e-6, gt=0)
        bias: bool = False
        backend: Literal["auto", "reference", "chunked"] = "auto"

    def __init__(self, d_model: int, config: Config, *, place: Place = Place()):
        super().__init__(d_model, config, place=place)
        c, D = config, d_model
        H, G = count_heads(self.name, D, c.n_heads, c.n_kv_heads, c.head_dim)
        self.n_heads, self.n_kv_heads = H, G
        self.head_dim = K = c.head_dim or D // H
        self.rotated = rotary_width(K, 1.0) if c.rope else 0
        self.scaling = c.scaling(self.name)
        self.shifted = G * K * (c.k_shift + c.v_shift)
        self.parts = [H * K, G * K, G * K, H, G * (c.k_shift + c.v_shift), H * K * c.gate]  # q, k, v, f, a, gate
        self.in_proj = nn.Linear(D, sum(self.parts), bias=False)
        self.out_proj = nn.Linear(H * K, D, bias=False)
        init_projections(self.in_proj, self.out_proj, place)
        self.forget_bias = nn.Parameter(torch.zeros(H))
        self.qkv_bias = nn.Parameter(torch.zeros((H + 2 * G) * K)) if c.bias else None
        self.q_norm, self.k_norm, self.out_norm = (
            nn.Parameter(torch.ones(heads, K)) if on else None
            for heads, on in ((H, c.qk_norm), (G, c.qk_norm), (H, c.out_norm))
        )

    def init_state(self, batch_size: int, *, capacity: int | None = None, device=None, dtype=None) -> ForgettingState:
        device, dtype = first_parameter_like(self, device, dtype)
        cache = init_decaying_cache(
            batch_size,
            self.n_kv_heads,
            self.head_dim,
            self.n_heads,
            capacity=capacity,
            window=self.config.window,
            device=device,
            dtype=dtype,
        )
        return ForgettingState(
            cache, torch.zeros(batch_size, 1, self.shifted, device=device, dtype=recurrent_dtype(dtype))
        )

    def forward(self, x: Tensor, state: State | None = None, context: Context | None = None) -> tuple[Tensor, State]:
        context, c = Context() if context is None else context, self.config
        H, G, K = self.n_heads, self.n_kv_heads, self.head_dim
        q, k, v, forget, share, gate = project(x, self.in_proj, self.parts)
        if self.qkv_bias is not None:
            q, k, v = (y + b for y, b in zip((q, k, v), self.qkv_bias.split(self.parts[:3]), strict=True))
        k, v, shift = self._shifted(k, v, share, state, context)
        q, k, v = q.unflatten(-1, (H, K)), k.unflatten(-1, (G, K)), v.unflatten(-1, (G, K))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = rms_norm(q, self.q_norm, c.norm_eps), rms_norm(k, self.k_norm, c.norm_eps)
        if self.rotated:
            length = None if state is None else state.cache.length
            q, k = turn([q, k], length, context, self.rotated, c.rope_base, self.scaling, c.rope_interleaved)
        o, cache = attention(
            q,
            k,
            v,
            None if state is None else state.cache,
            window=c.window,
            log_decay=F.logsigmoid(precise(forget) + self.forget_bias),
            lengths=context.lengths,
            resets=context.resets,
            backend=c.backend,
        )
        if self.out_norm is not None:
            o = rms_norm(o, self.out_norm, c.norm_eps)
        o = o.flatten(2)
        return self.out_proj(o * gate.sigmoid() if c.gate else o), ForgettingState(cache, shift)

    def _shifted(
        self, k: Tensor, v: Tensor, share: Tensor, state: Any, context: Context
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values (B, T, G K), mixed with those of the step before where so chosen, and the next shift."""
        c = self.config
        if not self.shifted:
            return k, v, _nothing(k) if state is None else state.shift
        now = torch.cat([k, v], -1) if c.k_shift and c.v_shift else k if c.k_shift else v
        before, shift = token_shift(now, None if state is None else state.shift, **packing(context))
        share = precise(share).sigmoid().to(now.dtype).repeat_interleave(self.head_dim, -1)
        parts = torch.lerp(now, before, share).split(self.parts[1], -1)
        return parts[0] if c.k_shift else k, parts[-1] if c.v_shift else v, shift

    def flops_per_token(self, context_length: int) -> int:
        seen = min(context_length, self.config.window or context_length)
        projections = self.d_model * (sum(self.parts) + self.n_heads * self.head_dim)
        return 2 * projections + 4 * self.n_heads * self.head_dim * seen

    @classmethod
    def law_cases(cls) -> list[dict[str, Any]]:
        return [
            {},
            {"n_heads": 4, "n_kv_heads": 2, "head_dim": 7, "window": 5, "bias": True, "k_shift": True}
            | {"rope": True, "rope_base": 500.0, "rope_interleaved": False, "backend": "chunked"},
            {"n_heads": 2, "qk_norm": True, "gate": True, "out_norm": True, "k_shift": True, "v_shift": True}
            | {"norm_eps": 1e-5, "backend": "reference", "rope": True, "rope_scaling": "yarn", "rope_factor": 4.0}
            | {"rope_context": 16, "rope_bands": (0.5, 4.0), "rope_truncate": False, "rope_amplitude": 1.1},
        ]


def _nothing(like: Tensor) -> Tensor:
    """The state of no shift, (B, 1, 0)."""
    return like.new_zeros(len(like), 1, 0, dtype=recurrent_dtype(like.dtype))
