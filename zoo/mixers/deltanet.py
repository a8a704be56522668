"""DeltaNet: a fast-weight memory that overwrites what it holds under a key."""

from __future__ import annotations

from typing import Any, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from zoo.core.errors import UsageError
from zoo.core.options import Options
from zoo.mixers.delta_front import DeltaMixer
from zoo.mixers.parts import Backend, precise, whole
from zoo.norms import l2_norm
from zoo.protocol import Context, Place, State, derive_heads, packing, register


@register("deltanet")
class DeltaNet(DeltaMixer):
    """DeltaNet: each step overwrites the value stored under its key (Yang et al. 2024, arXiv 2406.06484).

        q, k, v = silu(conv(W x)) ;  q, k = q / |q|, k / |k| ;  beta = sigmoid(w_b x)
        S_t = (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T ;  o_t = S_t^T q_t / sqrt(K)
        y = W_out RMSNorm_head(o), with `gate`: W_out (RMSNorm_head(o) * silu(W_g x))

    Options are those of flash-linear-attention. Schlag et al. 2021 (arXiv 2102.11174), with their feature map elu + 1,
    is `qk_activation="elu", qk_norm="sum", conv_size=0`; their DPFP map is not offered.

    | state                     | cost per token          | parallel form (WY)           |
    |---------------------------|-------------------------|------------------------------|
    | H K V + (W - 1) channels | 8 D^2 + 4 H K V         | chunked matmuls, O(T) in all |

    Cannot forget everything at once (there is no decay), and stores at most K associations a head without interference;
    with beta <= 1 it cannot solve parity, with `allow_neg_eigval` it can (Grazzi et al. 2025, arXiv 2411.12537).
    """

    class Config(Options):
        """The options.

        Attributes:
            n_heads: H, by default such that a head has at least 128 channels (as published) and H divides D.
            expand_k: channels of q and of k, as a multiple of D.
            expand_v: channels of v, as a multiple of D.
            conv_size: W, steps in the window of the convolution; 0 for none.
            conv_bias: a bias of the convolution.
            qk_activation: activation of q and k; v has silu.
            qk_norm: divide q and k by their length, or by their sum (with an activation that is positive).
            gate: use an output gate.
            allow_neg_eigval: beta in (0, 2), so that a step can reflect.
            norm_eps: added to the mean square in the norm.
            backend: form of the ops.
        """

        n_heads: int | None = Field(default=None, ge=1)
        expand_k: float = Field(default=1.0, gt=0)
        expand_v: float = Field(default=1.0, gt=0)
        conv_size: int = Field(default=4, ge=0)
        conv_bias: bool = False
        qk_activation: Literal["silu", "relu", "elu", "identity"] = "silu"
        qk_norm: Literal["l2", "sum"] = "l2"
        gate: bool = False
        allow_neg_eigval: bool = False
        norm_eps: float = Field(default=1e-5, gt=0)
        backend: Backend = "auto"

    def __init__(self, d_model: int, config: Config, *, place: Place = Place()):
        super().__init__(d_model, config, place=place)
        c = config
        self.n_heads = self.n_key_heads = c.n_heads or derive_heads(d_model, 128)
        head = f" * {d_model} / {self.n_heads} heads"
        self.d_key = whole(self.name, f"expand_k{head}", c.expand_k * d_model / self.n_heads)
        self.d_value = whole(self.name, f"expand_v{head}", c.expand_v * d_model / self.n_heads)
        if c.qk_norm == "sum" and c.qk_activation != "elu":
            raise UsageError(
                f'deltanet: qk_norm="sum" needs qk_activation="elu", not {c.qk_activation!r}: sums must be positive.'
            )
        keys, values = self.n_heads * self.d_key, self.n_heads * self.d_value
        activation: Literal["silu"] | None = "silu" if c.conv_size and c.qk_activation == "silu" else None
        self.make_front([keys, keys, values], [values] if c.gate else [], activation)
        self.make_back(place, c.norm_eps)
        if c.qk_activation == "silu" and c.qk_norm == "l2":
            self.make_cell({"gate_at": sum(self.parts[:2])} if c.gate else {})

    def forward(self, x: Tensor, state: State | None = None, context: Context | None = None) -> tuple[Tensor, State]:
        c = self.config
        done, rows = self.one_step(x, state, context)
        if done is not None:
            return self.out_proj(done), state
        (q, k, v, beta, *gate), state = self.front(x, state, context, rows)
        q, k, v = (m.unflatten(-1, (self.n_heads, -1)) for m in (q, k, v))
        if not self.activation:
            q, k, v = _ACTIVATIONS[c.qk_activation](q), _ACTIVATIONS[c.qk_activation](k), F.silu(v)
        q, k = _NORMS[c.qk_norm](q), _NORMS[c.qk_norm](k)
        o, state = self.write(q, k, v, beta, None, state, packing(context))
        return self.back(o, gate[0] if gate else None, x.dtype), state

    @classmethod
    def law_cases(cls) -> list[dict[str, Any]]:
        return [
            {},
            {"n_heads": 2, "expand_k": 0.5, "expand_v": 2.0, "gate": True, "allow_neg_eigval": True},
            {"conv_size": 3, "conv_bias": True, "qk_activation": "relu", "norm_eps": 1e-4, "backend": "reference"},
            {"conv_size": 0, "qk_activation": "elu", "qk_norm": "sum"},
            {"qk_activation": "identity", "conv_size": 1, "backend": "chunked"},
        ]


def _sum_norm(x: Tensor) -> Tensor:
    x = precise(x)
    return x / x.sum(-1, keepdim=True)


_ACTIVATIONS = {"silu": F.silu, "relu": F.relu, "elu": lambda x: F.elu(x) + 1, "identity": lambda x: x}
_NORMS = {"l2": l2_norm, "sum": _sum_norm}
