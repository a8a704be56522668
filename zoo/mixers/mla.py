"""Multi-head latent attention: the keys and values of all heads are computed from one small vector a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from zoo.core.errors import UsageError
from zoo.mixers.attention_parts import AttentionWord, RopeOptions, angles
from zoo.norms import rms_norm
from zoo.ops import LatentCache, latent_attention, rotate, yarn_amplitude
from zoo.protocol import Context, Place, State, Traits, derive_heads, first_parameter_like, register


class Projected(NamedTuple):
    """The projections of T steps for latent attention.

    Attributes:
        q: (B, T, H, N + P), turned.
        latent, key: (B, T, r) and (B, T, P), what goes into the state.
        compressed: c_q (B, T, q_rank), or x (B, T, D) where queries are made in one step.
        cos, sin: of the positions, as from `angles`.
    """

    q: Tensor
    latent: Tensor
    key: Tensor
    compressed: Tensor
    cos: Tensor
    sin: Tensor


@register("mla")
class MultiHeadLatentAttention(AttentionWord):
    """Multi-head latent attention: all heads share one compressed latent (DeepSeek-AI 2024, arXiv 2405.04434).

    Section 2.1.2 of the paper, and equations 1 to 11 of arXiv 2412.19437:

        c_q = RMSNorm(W_dq x) ;  q_h = [W_uq,h c_q ; R_t W_qr,h c_q]             R_t turns by the position t
        c = RMSNorm(W_dkv x) ;  k_h = [W_uk,h c ; R_t W_kr x] ;  v_h = W_uv,h c    the rotary key is the same for all h
        y = W_o concat_h softmax(q_h K_h^T / sqrt(N + P)) V_h

    with widths r of c, N of a head's own key, P of the rotary key and V of a value. The state holds c and R_t W_kr x.
    Training forms the heads' keys and values; decoding moves W_uk to the query and W_uv to the result instead and reads
    the state as it lies, see `zoo.ops.latent_attention`. Heads may share keys and values in groups, as in `gqa`.

    Inits: normal, std fan_in^-0.5, W_o as in `mha`; norms one. DeepSeek-V3 is `n_heads=128, q_rank=1536, kv_rank=512,
    nope_dim=128, rope_dim=64, v_dim=128` at D = 7168, V2-Lite `n_heads=16, kv_rank=512, ...` without q_rank.

    | state     | cost per token at context T                  | parallel form        | cannot          |
    |-----------|----------------------------------------------|----------------------|-----------------|
    | (r + P) T | projections + 2 H (2 r + P) T, state unfolded never | attention, O(T^2) in all | forget, fixed state |
    """

    traits = Traits(cuts_in_ops=True)

    class Config(RopeOptions):
        """The options; see `RopeOptions` for the rest.

        Attributes:
            n_heads: H, by default the most heads of at least 64 channels.
            n_kv_heads: G, number of unfolded keys and values, each for H / G heads; by default H.
            q_rank: width of c_q; None goes from x to the queries at once, without a norm.
            kv_rank: r, by default D / 4 (V2-Lite).
            nope_dim: N, by default d_model / n_heads.
            rope_dim: P, even; by default half of nope_dim.
            v_dim: V, by default nope_dim.
            scale: factor on q . k instead of (N + P) ** -0.5.
            rope_mscale: m in the factor (0.1 m ln(rope_factor) + 1)^2 that yarn puts on the logits (V2 0.707, V3 1).
            scale_latents: multiply c_q by sqrt(D / q_rank) and c by sqrt(D / r) (LongCat-Flash).
            norm_eps: added to the mean square in both norms.
            bias: biases of W_dq, of W_dkv with W_kr, and of W_o.
            causal: whether steps see only the past; None: as in the model.
            absorb: order of the products; by default the cheaper one.
            backend: form of the op, see `zoo.ops.attention`.
        """

        n_heads: int | None = Field(default=None, ge=1)
        n_kv_heads: int | None = Field(default=None, ge=1)
        q_rank: int | None = Field(default=None, ge=1)
        kv_rank: int | None = Field(default=None, ge=1)
        nope_dim: int | None = Field(default=None, ge=1)
        rope_dim: int | None = Field(default=None, ge=2, multiple_of=2)
        v_dim: int | None = Field(default=None, ge=1)
        scale: float | None = Field(default=None, gt=0)
        rope_mscale: float | None = Field(default=None, gt=0)
        scale_latents: bool = False
        norm_eps: float = Field(default=1e-6, gt=0)
        bias: bool = False
        causal: bool | None = None
        absorb: bool | None = None
        backend: Literal["auto", "reference", "chunked", "sdpa"] = "auto"

    def __init__(self, d_model: int, config: Config, *, place: Place = Place()):
        super().__init__(d_model, config, place=place)
        c, D = config, d_model
        self.causal = place.causal if c.causal is None else c.causal
        self.scaling = c.scaling(self.name)
        groups = c.n_kv_heads or 1
        fewest = derive_heads(D)
        fits = (n for n in range(groups, D + 1, groups) if n >= fewest and D % n == 0)
        self.n_heads = H = c.n_heads or next(fits, groups)
        self.n_kv_heads = G = c.n_kv_heads or H
        if H % G:
            raise UsageError(f"{self.name}: n_heads={H} is not divisible by n_kv_heads={G}.")
        if c.nope_dim is None and D % H:
            raise UsageError(
                f"{self.name}: d_model={D} is not divisible by n_heads={H}: take another number, or set nope_dim."
            )
        if c.rope_mscale and c.rope_scaling != "yarn":
            raise UsageError('mla: rope_mscale belongs to rope_scaling="yarn".')
        self.nope_dim = N = c.nope_dim or D // H
        self.rope_dim = P = c.rope_dim or max(N // 4 * 2, 2)
        self.v_dim = V = c.v_dim or N
        self.kv_rank = r = c.kv_rank or D // 4
        self.scale = (N + P) ** -0.5 if c.scale is None else c.scale
        if c.rope_mscale:
            self.scale *= yarn_amplitude(c.rope_factor, c.rope_mscale) ** 2

        self.parts = [c.q_rank or H * (N + P), r, P]  # c_q (or the queries), c, the rotary key
        self.in_proj = nn.Linear(D, sum(self.parts), bias=c.bias)
        self.q_norm = nn.Parameter(torch.ones(c.q_rank)) if c.q_rank else None
        self.q_up = nn.Linear(c.q_rank, H * (N + P), bias=False) if c.q_rank else None
        self.kv_norm = nn.Parameter(torch.ones(r))
        self.kv_up = nn.Parameter(torch.empty(G, N + V, r))
        self.out_proj = nn.Linear(H * V, D, bias=c.bias)
        nn.init.normal_(self.in_proj.weight, std=D**-0.5)
        if self.q_up is not None:
            nn.init.normal_(self.q_up.weight, std=self.q_up.in_features**-0.5)
        nn.init.normal_(self.kv_up, std=r**-0.5)
        nn.init.normal_(self.out_proj.weight, std=(H * V * 2 * place.n_layers) ** -0.5)
        if c.bias:
            nn.init.zeros_(self.in_proj.bias)
            nn.init.zeros_(self.out_proj.bias)

    def init_state(self, batch_size: int, *, capacity: int | None = None, device=None, dtype=None) -> State:
        if not self.causal:
            return ()
        device, dtype = first_parameter_like(self, device, dtype)
        return LatentCache.empty(batch_size, self.kv_rank + self.rope_dim, capacity, device=device, dtype=dtype)

    def forward(
        self,
        x: Tensor,
        state: State | None = None,
        context: Context | None = None,
        *,
        attend: Callable[[Projected, Any, Context], tuple[Tensor, State]] | None = None,
    ) -> tuple[Tensor, State]:
        """As of every mixer; `attend` replaces attention to all steps if given; it returns (B, T, H, V)."""
        context = Context() if context is None else context
        state = state or None  # `()` is the state of attention that is not causal
        given = self.project(x, None if state is None else state.length, context)
        o, state = (self._attend if attend is None else attend)(given, state, context)
        return self.out_proj(o.flatten(2)), state

    def _attend(self, given: Projected, state: Any, context: Context) -> tuple[Tensor, State]:
        c = self.config
        return latent_attention(
            given.q,
            given.latent,
            given.key,
            self.kv_up,
            state,
            causal=self.causal,
            lengths=context.lengths,
            resets=context.resets,
            pieces=context.pieces,
            scale=self.scale,
            absorb=c.absorb,
            backend=c.backend,
        )

    def project(self, x: Tensor, length: Tensor | None, context: Context) -> Projected:
        """Queries of the steps x (B, T, D), and the latents and rotary keys that the state stores of them.

        Args:
            length: (B,) steps of the current document before these; None for none.
        """
        c = self.config
        q, latent, key = self.in_proj(x).split(self.parts, -1)
        compressed = x
        if self.q_up is not None and self.q_norm is not None:
            compressed = rms_norm(q, self._stretched(self.q_norm), c.norm_eps)
            q = self.q_up(compressed)
        latent = rms_norm(latent, self._stretched(self.kv_norm), c.norm_eps)
        q = q.unflatten(-1, (self.n_heads, -1))
        if not c.rope:
            still = x.new_ones(1, 1, self.rope_dim // 2), x.new_zeros(1, 1, self.rope_dim // 2)
            return Projected(q, latent, key, compressed, *still)
        cos, sin = angles(x, length, context, self.rope_dim, c.rope_base, self.scaling)
        own, turning = q.split([self.nope_dim, self.rope_dim], -1)
        turning = rotate(turning, cos, sin, interleaved=c.rope_interleaved)
        key = rotate(key.unsqueeze(2), cos, sin, interleaved=c.rope_interleaved).squeeze(2)
        return Projected(torch.cat([own, turning], -1), latent, key, compressed, cos, sin)

    def _stretched(self, weight: Tensor) -> Tensor:
        """The weight of a latent's norm, with the factor that `scale_latents` puts on it."""
        return weight * (self.d_model / len(weight)) ** 0.5 if self.config.scale_latents else weight

    def flops_per_token(self, context_length: int) -> int:
        H, G, N, P, V, r = self.n_heads, self.n_kv_heads, self.nope_dim, self.rope_dim, self.v_dim, self.kv_rank
        projections = self.d_model * (sum(self.parts) + H * V) + (self.config.q_rank or 0) * H * (N + P)
        if self.config.absorb is False:
            return 2 * (projections + context_length * (G * r * (N + V) + H * (N + P + V)))
        return 2 * (projections + H * r * (N + V) + context_length * H * (2 * r + P))

    @classmethod
    def law_cases(cls) -> list[dict[str, Any]]:
        return [
            {},
            {
                "n_heads": 4,
                "n_kv_heads": 2,
                "q_rank": 11,
                "kv_rank": 9,
                "nope_dim": 5,
                "rope_dim": 4,
                "v_dim": 7,
                "rope_base": 500.0,
                "rope_interleaved": False,
                "norm_eps": 1e-5,
                "bias": True,
                "backend": "reference",
            },
            {
                "n_heads": 2,
                "q_rank": 12,
                "kv_rank": 20,
                "rope_scaling": "yarn",
                "rope_factor": 4.0,
                "rope_context": 16,
                "rope_bands": (0.5, 4.0),
                "rope_truncate": False,
                "rope_amplitude": 1.1,
                "rope_mscale": 0.7,
                "scale_latents": True,
                "backend": "chunked",
            },
            {"n_heads": 4, "absorb": True, "scale": 0.2, "backend": "sdpa"},
            {"n_heads": 4, "absorb": False},
            {"n_heads": 2, "causal": False},
            {"n_heads": 2, "rope": False},
        ]
