"""Linear attention: the sum over the past of features of keys, times values."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from zoo.core.errors import UsageError
from zoo.core.options import Options
from zoo.mixers.parts import Backend, init_projections, precise, project
from zoo.norms import GatedRMSNorm
from zoo.ops import linear_attention
from zoo.ops.common import owned
from zoo.ops.modules import widely
from zoo.protocol import (
    Context,
    Mixer,
    Place,
    State,
    Traits,
    derive_heads,
    first_parameter_like,
    packing,
    recurrent_dtype,
    register,
)

TAYLOR_DIM = 16
EPS, REBASED_EPS = 1e-6, 1e-5  # added to normalisers


class LinearAttentionState(NamedTuple):
    memory: Tensor  # (B, G, features, V), and one more column with the normaliser


@register("linear_attention")
class LinearAttention(Mixer):
    """Linear attention: features of keys and queries replace the softmax (Katharopoulos et al. 2020, arXiv 2006.16236,
    equations 7 and 16 to 20).

        q, k, v = W x ;  S_t = S_{t-1} + phi(k_t) v_t^T ;  z_t = z_{t-1} + phi(k_t)
        y = W_out (S_t^T phi(q_t) / (z_t^T phi(q_t) + eps)), with `output_norm`: W_out RMSNorm_head(...)

    phi is elu + 1 (the paper), relu, silu, the identity, the second-order Taylor features of Based (Arora et al. 2024,
    arXiv 2402.18668), whose products are 1 + s + s^2 / 2 with s = q^T k / sqrt(d), or those of ReBased (Aksenov et al.
    2024, arXiv 2402.10644), whose products are (q'^T k' / sqrt(d))^2 with x' = gamma * LayerNorm(x) + beta, where q, k
    and all heads share gamma and beta. z is one more column of S, with values 1. Without normaliser, sums grow with
    time, and RMSNorm takes its place (Qin et al. 2022, arXiv 2210.10340): the default where products of features may be
    negative. Based is `feature_map="taylor"`, ReBased `feature_map="rebased"`.

    With `decay="lightning"`, head h = 1 .. H of layer l = 0 .. L - 1 multiplies S by exp(-2^(-8 h / H) (1 - l / (L - 1)
    + 1e-5)) before it writes: the slopes of ALiBi, smaller in later layers, and almost 0 in the last one (Qin et al.
    2024, arXiv 2401.04658). MiniMax-01's lightning attention (arXiv 2501.08313), with its 64 heads, is
    `linear_attention(n_heads=64, feature_dim=128, value_dim=128, feature_map="silu", value_silu=True,
    decay="lightning", norm_heads=False, norm_eps=1e-6, gate=True)`.

    | state       | cost per token        | parallel form         | cannot                                         |
    |-------------|-----------------------|-----------------------|------------------------------------------------|
    | G K (V + 1) | 8 D^2 + 2 H K (V + 1) | chunked matmuls, O(T) | choose what to forget, or look one key up      |
    |             | for G = H, d = V      |                       | sharply (the weights of most maps are positive)|

    K is the number of features: V for the plain maps, 1 + d + d (d + 1) / 2 (153 for d = 16) for Taylor,
    d (d + 1) / 2 (136) for ReBased. The weights of a ReBased query that is almost orthogonal to all earlier keys are
    differences of larger products, and its output is inexact in float32.
    """

    traits = Traits(cuts_in_ops=True)

    class Config(Options):
        """The options.

        Attributes:
            n_heads: H, heads of q, by default the most of at least 64 channels that divide D.
            n_kv_heads: G, heads of k and v, each shared by H / G heads of q; H by default.
            feature_map: phi.
            feature_dim: d, channels of a head's q and k before phi; by default V, and 16 for "taylor" and "rebased" (as
                published).
            value_dim: V, channels of a head's v; by default D / H.
            value_silu: v = silu(W_v x).
            normalize: divide by z^T phi(q); by default for all maps but silu and the identity, which do not allow it.
            decay: "none", or "lightning", fixed for each head and layer.
            output_norm: RMS norm of the output; by default where there is no normaliser.
            norm_heads: whether that norm runs over the channels of each head, or over those of all heads.
            norm_eps: added to the mean square in that norm.
            gate: multiply the output by sigmoid(W_g x).
            backend: form of the op.
        """

        n_heads: int | None = Field(default=None, ge=1)
        n_kv_heads: int | None = Field(default=None, ge=1)
        feature_map: Literal["elu", "relu", "silu", "identity", "taylor", "rebased"] = "elu"
        feature_dim: int | None = Field(default=None, ge=1)
        value_dim: int | None = Field(default=None, ge=1)
        value_silu: bool = False
        normalize: bool | None = None
        decay: Literal["none", "lightning"] = "none"
        output_norm: bool | None = None
        norm_heads: bool = True
        norm_eps: float = Field(default=1e-5, gt=0)
        gate: bool = False
        backend: Backend = "auto"

    def __init__(self, d_model: int, config: Config, *, place: Place = Place()):
        super().__init__(d_model, config, place=place)
        c = config
        self.n_heads = c.n_heads or derive_heads(d_model)
        self.n_kv_heads = c.n_kv_heads or self.n_heads
        if not c.value_dim and d_model % self.n_heads:
            raise UsageError(f"linear_attention: n_heads={self.n_heads} does not divide d_model={d_model}.")
        if self.n_heads % self.n_kv_heads:
            raise UsageError(f"linear_attention: n_kv_heads={self.n_kv_heads} does not divide n_heads={self.n_heads}.")
        signed = c.feature_map in ("identity", "silu")
        if c.normalize and signed:
            raise UsageError(
                "linear_attention: normalize=True needs a feature_map whose products are positive, "
                f'"elu", "relu", "taylor" or "rebased", not "{c.feature_map}".'
            )
        self.normalize = not signed if c.normalize is None else c.normalize
        self.d_value = c.value_dim or d_model // self.n_heads
        self.d_feature = c.feature_dim or (TAYLOR_DIM if c.feature_map in WIDTHS else self.d_value)
        self.d_key = WIDTHS[c.feature_map](self.d_feature) if c.feature_map in WIDTHS else self.d_feature
        scaled = not self.normalize and c.feature_map in ("elu", "relu", "identity")
        self.scale = self.d_key**-0.5 if scaled else 1.0
        H, G, values = self.n_heads, self.n_kv_heads, self.n_heads * self.d_value
        self.parts = [H * self.d_feature, G * self.d_feature, G * self.d_value, values if c.gate else 0]
        self.in_proj = nn.Linear(d_model, sum(self.parts), bias=False)
        self.affine = nn.LayerNorm(self.d_feature) if c.feature_map == "rebased" else None
        self.norm = None
        if not self.normalize if c.output_norm is None else c.output_norm:
            self.norm = GatedRMSNorm(self.d_value if c.norm_heads else values, eps=c.norm_eps)
        self.out_proj = nn.Linear(values, d_model, bias=False)
        init_projections(self.in_proj, self.out_proj, place)

    def init_state(
        self, batch_size: int, *, capacity: int | None = None, device=None, dtype=None
    ) -> LinearAttentionState:
        device, dtype = first_parameter_like(self, device, dtype)
        shape = self._state_shape(batch_size)
        return LinearAttentionState(torch.zeros(shape, device=device, dtype=recurrent_dtype(dtype)))

    def _state_shape(self, batch_size: int) -> tuple[int, ...]:
        return batch_size, self.n_heads // self._sharing(), self.d_key, self.d_value + self.normalize

    def _sharing(self) -> int:
        """How many heads of q have the same memory; with decays, which differ, one."""
        return self.n_heads // self.n_kv_heads if self.config.decay == "none" else 1

    def forward(self, x: Tensor, state: State | None = None, context: Context | None = None) -> tuple[Tensor, State]:
        c = self.config
        q, k, v, gate = project(x, self.in_proj, self.parts)
        q = self._features(q.unflatten(-1, (self.n_heads, -1)))
        k = self._features(k.unflatten(-1, (self.n_kv_heads, -1)))
        v = precise((F.silu(v) if c.value_silu else v).unflatten(-1, (self.n_kv_heads, -1)))
        if self.normalize:
            v = F.pad(v, (0, 1), value=1.0)
        shared, memory = self._sharing(), None if state is None else state.memory
        if self.n_heads > self.n_kv_heads:
            k, v = (m.repeat_interleave(self.n_heads // self.n_kv_heads, 2) for m in (k, v))
        if shared > 1:  # the op has one memory a head of q: equal ones, of which one is kept
            memory = None if memory is None else memory.repeat_interleave(shared, 1)
        log_decay = None if c.decay == "none" else self.log_decay(x.device, v.dtype).expand(*x.shape[:2], -1)
        o, memory = linear_attention(
            q, k, v, log_decay, memory, scale=self.scale, backend=c.backend, **packing(context)
        )
        if self.normalize:
            o = o[..., :-1] / (o[..., -1:] + (REBASED_EPS if c.feature_map == "rebased" else EPS))
        o = self.norm(o).flatten(-2) if self.norm and c.norm_heads else o.flatten(-2)
        o = self.norm(o) if self.norm and not c.norm_heads else o
        o = o * torch.sigmoid(precise(gate)) if c.gate else o
        return self.out_proj(o.to(x.dtype)), LinearAttentionState(memory if shared == 1 else owned(memory[:, ::shared]))

    def _features(self, x: Tensor) -> Tensor:
        """phi(x), (B, T, heads, d) -> (B, T, heads, K)."""
        return _FEATURES[self.config.feature_map](precise(x) if self.affine is None else widely(self.affine, x))

    def log_decay(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Lightning's log decay of every head of this layer, (H,)."""
        layer, last = self.place.layer, self.place.n_layers - 1
        slopes = torch.exp2(-8 / self.n_heads * torch.arange(1, self.n_heads + 1, device=device, dtype=dtype))
        return -slopes * (1 - layer / (last + 1e-5) + 1e-5)  # 1e-5 below, too, as in transformers: one layer is no case

    def flops_per_token(self, context_length: int) -> int:
        projections = self.d_model * (sum(self.parts) + self.n_heads * self.d_value)
        return 2 * projections + 2 * self.n_heads * self.d_key * (self.d_value + self.normalize)  # the read S^T phi(q)

    @classmethod
    def law_cases(cls) -> list[dict[str, Any]]:
        return [
            {},
            {"feature_map": "taylor", "feature_dim": 5, "n_heads": 4, "n_kv_heads": 2, "backend": "chunked"},
            {"feature_map": "identity", "n_heads": 2, "feature_dim": 7, "value_dim": 5, "norm_eps": 1e-4},
            {"feature_map": "relu", "output_norm": True, "backend": "reference"},
            {"n_heads": 2, "normalize": False, "n_kv_heads": 1, "decay": "lightning"},
            {"feature_map": "taylor", "normalize": False, "output_norm": False},
            {"feature_map": "rebased", "n_heads": 2, "feature_dim": 5, "normalize": False, "output_norm": False},
            {"feature_map": "silu", "n_heads": 4, "value_silu": True, "decay": "lightning", "norm_heads": False}
            | {"gate": True},
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


def squared_features(x: Tensor) -> Tensor:
    """phi with phi(q)^T phi(k) = (q^T k / sqrt(d))^2: (..., d) -> (..., d (d + 1) / 2)."""
    d = x.shape[-1]
    x = x / d**0.25
    products = [x[..., i : i + 1] * x[..., i + 1 :] * math.sqrt(2) for i in range(d - 1)]
    return torch.cat([x.square(), *products], -1)


WIDTHS: dict[str, Callable[[int], int]] = {"taylor": taylor_width, "rebased": lambda d: d * (d + 1) // 2}
_FEATURES: dict[str, Callable[[Tensor], Tensor]] = {
    "elu": lambda x: F.elu(x) + 1,
    "relu": F.relu,
    "silu": F.silu,
    "identity": lambda x: x,
    "taylor": taylor_features,
    "rebased": squared_features,
}
