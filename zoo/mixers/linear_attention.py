"""Linear attention: the sum over the past of features of keys, times values."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import Field
from torch import Tensor, nn

from zoo.core.errors import UsageError
from zoo.core.options import Options
from zoo.mixers.parts import Backend, init_projections, packing, precise, project
from zoo.norms import GatedRMSNorm
from zoo.ops import linear_attention
from zoo.ops.common import owned
from zoo.protocol import Context, Mixer, Place, State, derive_heads, first_parameter_like, recurrent_dtype, register

TAYLOR_DIM = 16
EPS = 1e-6


class LinearAttentionState(NamedTuple):
    memory: Tensor  # (B, G, features, V), and one more column with the normaliser


@register("linear_attention")
class LinearAttention(Mixer):
    """Linear attention: features of keys and queries replace the softmax (Katharopoulos et al. 2020, arXiv 2006.16236,
    equations 7 and 16 to 20).

        q, k, v = W x ;  S_t = S_{t-1} + phi(k_t) v_t^T ;  z_t = z_{t-1} + phi(k_t)
        y = W_out (S_t^T phi(q_t) / (z_t^T phi(q_t) + eps)), with `output_norm`: W_out RMSNorm_head(...)

    phi is elu + 1 (the paper), relu, the identity, or the second-order Taylor features of Based (Arora et al. 2024,
    arXiv 2402.18668), whose products are 1 + s + s^2 / 2 with s = q^T k / sqrt(d). z is one more column of
    S, with values 1. Without normaliser, sums grow with time, and RMSNorm takes its place (Qin et al. 2022, arXiv
    2210.10340): the default where products of features may be negative. Based is `feature_map="taylor"`.

    | state       | cost per token        | parallel form         | cannot                                         |
    |-------------|-----------------------|-----------------------|------------------------------------------------|
    | G K (V + 1) | 8 D^2 + 2 H K (V + 1) | chunked matmuls, O(T) | forget, tell positions, or look one key up     |
    |             | for G = H, d = V      |                       | sharply (all weights are positive)             |

    K is the number of features: V for the plain maps, 1 + d + d (d + 1) / 2 (153 for d = 16) for Taylor.
    """

    class Config(Options):
        """The options.

        Attributes:
            n_heads: H, heads of q, by default the most of at least 64 channels that divide D.
            n_kv_heads: G, heads of k and v, each shared by H / G heads of q; H by default.
            feature_map: phi.
            feature_dim: d, channels of a head's q and k before phi; by default V, and 16 for "taylor" (as published).
            normalize: divide by z^T phi(q); by default for all maps but the identity, which does not allow it.
            output_norm: RMS norm of each head's output; by default where there is no normaliser.
            backend: form of the op.
        """

        n_heads: int | None = Field(default=None, ge=1)
        n_kv_heads: int | None = Field(default=None, ge=1)
        feature_map: Literal["elu", "relu", "identity", "taylor"] = "elu"
        feature_dim: int | None = Field(default=None, ge=1)
        normalize: bool | None = None
        output_norm: bool | None = None
        backend: Backend = "auto"

    def __init__(self, d_model: int, config: Config, *, place: Place = Place()):
        super().__init__(d_model, config, place=place)
        c = config
        self.n_heads = c.n_heads or derive_heads(d_model)
        self.n_kv_heads = c.n_kv_heads or self.n_heads
        if d_model % self.n_heads:
            raise UsageError(f"linear_attention: n_heads={self.n_heads} does not divide d_model={d_model}.")
        if self.n_heads % self.n_kv_heads:
            raise UsageError(f"linear_attention: n_kv_heads={self.n_kv_heads} does not divide n_heads={self.n_heads}.")
        if c.normalize and c.feature_map == "identity":
            raise UsageError(
                'linear_attention: normalize=True needs a feature_map whose products are positive, "elu", "relu" or '
                '"taylor", not "identity".'
            )
        self.normalize = c.feature_map != "identity" if c.normalize is None else c.normalize
        self.d_value = d_model // self.n_heads
        self.d_feature = c.feature_dim or (TAYLOR_DIM if c.feature_map == "taylor" else self.d_value)
        self.d_key = taylor_width(self.d_feature) if c.feature_map == "taylor" else self.d_feature
        self.scale = 1.0 if self.normalize or c.feature_map == "taylor" else self.d_key**-0.5
        H, G = self.n_heads, self.n_kv_heads
        self.parts = [H * self.d_feature, G * self.d_feature, G * self.d_value]
        self.in_proj = nn.Linear(d_model, sum(self.parts), bias=False)
        output_norm = not self.normalize if c.output_norm is None else c.output_norm
        self.norm = GatedRMSNorm(self.d_value) if output_norm else None
        self.out_proj = nn.Linear(d_model, d_model, bias=False)
        init_projections(self.in_proj, self.out_proj, place)

    def init_state(
        self, batch_size: int, *, capacity: int | None = None, device=None, dtype=None
    ) -> LinearAttentionState:
        device, dtype = first_parameter_like(self, device, dtype)
        shape = self._state_shape(batch_size)
        return LinearAttentionState(torch.zeros(shape, device=device, dtype=recurrent_dtype(dtype)))

    def _state_shape(self, batch_size: int) -> tuple[int, ...]:
        return batch_size, self.n_kv_heads, self.d_key, self.d_value + self.normalize

    def forward(self, x: Tensor, state: State | None = None, context: Context | None = None) -> tuple[Tensor, State]:
        q, k, v = project(x, self.in_proj, self.parts)
        phi = _FEATURES[self.config.feature_map]
        q = phi(precise(rearrange(q, "b t (h d) -> b t h d", h=self.n_heads)))
        k = phi(precise(rearrange(k, "b t (g d) -> b t g d", g=self.n_kv_heads)))
        v = precise(rearrange(v, "b t (g v) -> b t g v", g=self.n_kv_heads))
        if self.normalize:
            v = F.pad(v, (0, 1), value=1.0)
        shared = self.n_heads // self.n_kv_heads
        memory = None if state is None else state.memory
        if shared > 1:  # the op has one memory a head of q: equal ones, of which one is kept
            k, v = k.repeat_interleave(shared, 2), v.repeat_interleave(shared, 2)
            memory = None if memory is None else memory.repeat_interleave(shared, 1)
        o, memory = linear_attention(
            q, k, v, None, memory, scale=self.scale, backend=self.config.backend, **packing(context)
        )
        if self.normalize:
            o = o[..., :-1] / (o[..., -1:] + EPS)
        o = self.norm(o) if self.norm else o
        return self.out_proj(o.flatten(-2).to(x.dtype)), LinearAttentionState(
            memory if shared == 1 else owned(memory[:, ::shared])
        )

    def flops_per_token(self, context_length: int) -> int:
        projections = self.d_model * (sum(self.parts) + self.d_model)
        return 2 * projections + 2 * self.n_heads * self.d_key * (self.d_value + self.normalize)  # the read S^T phi(q)

    @classmethod
    def law_cases(cls) -> list[dict[str, Any]]:
        return [
            {},
            {"feature_map": "taylor", "feature_dim": 5, "n_heads": 4, "n_kv_heads": 2, "backend": "chunked"},
            {"feature_map": "identity", "n_heads": 2, "feature_dim": 7},
            {"feature_map": "relu", "output_norm": True, "backend": "reference"},
            {"n_heads": 2, "normalize": False, "n_kv_heads": 1},
            {"feature_map": "taylor", "normalize": False, "output_norm": False},
        ]


def taylor_width(dim: int) -> int:
    """Number of the second-order Taylor features of `dim` channels."""
    return 1 + dim + dim * (dim + 1) // 2


def taylor_features(x: Tensor) -> Tensor:
    """phi with phi(q)^T phi(k) = 1 + s + s^2 / 2 for s = q^T k / sqrt(d): (..., d) -> (..., 1 + d + d (d + 1) / 2).

    A product of two different channels stands once for its two places in s^2, which cancels the half.
    """
    d = x.shape[-1]
    x = x / d**0.25
    products = [x[..., i : i + 1] * x[..., i + 1 :] for i in range(d - 1)]
    return torch.cat([torch.ones_like(x[..., :1]), x, x.square() / math.sqrt(2), *products], -1)


_FEATURES: dict[str, Callable[[Tensor], Tensor]] = {
    "elu": lambda x: F.elu(x) + 1,
    "relu": F.relu,
    "identity": lambda x: x,
    "taylor": taylor_features,
}
