"""Kimi Delta Attention: the delta rule on a memory in which each channel has its own decay."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from zoo.core.options import Options
from zoo.mixers.delta_front import DeltaMixer, head_sizes
from zoo.mixers.parts import Backend, check_range, log_rates, precise, step_bias
from zoo.norms import l2_norm
from zoo.protocol import Context, Place, State, packing, register


@register("kda")
class KimiDeltaAttention(DeltaMixer):
    """Kimi Delta Attention: the delta rule with a decay for each channel (Kimi Team 2025, arXiv 2510.26692,
    equation 1).

        q, k, v = silu(conv(W x)) ;  q, k = q / |q|, k / |k| ;  beta = sigmoid(w_b x)
        g = -exp(A_log) softplus(F_up F_down x + dt_bias)        one for each channel of each head
        S_t = (I - beta_t k_t k_t^T) diag(exp g_t) S_{t-1} + beta_t k_t v_t^T ;  o_t = S_t^T q_t / sqrt(K)
        y = W_out (RMSNorm_head(o) * sigmoid(G_up G_down x))

    Published inits: rates exp(A_log) ~ U(1, 16) a head, softplus(dt_bias) log-uniform in [1e-3, 1e-1] a channel.
    Kimi Linear 48B-A3B is `n_heads=32, head_dim=128` at D = 2304.

    | state                    | cost per token, r = rank     | parallel form (WY)           |
    |--------------------------|------------------------------|------------------------------|
    | H K V + (W - 1) channels | 8 D^2 + 8 r D + 4 H K V      | chunked matmuls, O(T) in all |

    Cannot store more than K associations a head without interference; with beta <= 1 it cannot solve parity, with
    `allow_neg_eigval` it can (Grazzi et al. 2025, arXiv 2411.12537).
    """

    class Config(Options):
        """The options.

        Attributes:
            n_heads: heads of q and k, by default D / 128, rounded, at least 1.
            head_dim: K, by default D / n_heads, rounded.
            n_v_heads: H, heads of v, beta, g and the gate; a multiple of n_heads, which is the default.
            expand_v: V / K.
            conv_size: W, steps in the window of the convolution; 0 for none.
            conv_bias: a bias of the convolution.
            rank: width between the two halves of the decay's and of the gate's projection; V by default.
            gate_bias: bias of the second half of the gate's projection.
            allow_neg_eigval: beta in (0, 2), so that a step can reflect.
            lower_bound: L < 0 of the bounded gate, g = L sigmoid(exp(A_log) (F_up F_down x + dt_bias)), whose A_log
                starts at 0 (flash-linear-attention's `safe_gate`; -5 there and in published models); none by default.
            A_init_range: the decay rates start uniform between these.
            dt_init_range: the step sizes start log-uniform between these.
            norm_eps: added to the mean square in the norm.
            backend: form of the ops.
        """

        n_heads: int | None = Field(default=None, ge=1)
        head_dim: int | None = Field(default=None, ge=1)
        n_v_heads: int | None = Field(default=None, ge=1)
        expand_v: float = Field(default=1.0, gt=0)
        conv_size: int = Field(default=4, ge=0)
        conv_bias: bool = False
        rank: int | None = Field(default=None, ge=1)
        gate_bias: bool = False
        allow_neg_eigval: bool = False
        lower_bound: float | None = Field(default=None, lt=0)
        A_init_range: tuple[float, float] = (1.0, 16.0)
        dt_init_range: tuple[float, float] = (0.001, 0.1)
        norm_eps: float = Field(default=1e-5, gt=0)
        backend: Backend = "auto"

    def __init__(self, d_model: int, config: Config, *, place: Place = Place()):
        super().__init__(d_model, config, place=place)
        c = config
        check_range(self.name, "A_init_range", c.A_init_range, zero=True)
        check_range(self.name, "dt_init_range", c.dt_init_range)
        self.n_key_heads, self.d_key, self.n_heads, self.d_value = head_sizes(self.name, c, d_model, 128)
        keys, values = self.n_key_heads * self.d_key, self.n_heads * self.d_value
        rank = c.rank or self.d_value
        self.make_front([keys, keys, values], [rank, rank])  # F_down, G_down
        self.decay_up = nn.Linear(rank, self.n_heads * self.d_key, bias=False)
        rates = torch.zeros(self.n_heads) if c.lower_bound else log_rates(self.n_heads, *c.A_init_range)
        self.A_log = nn.Parameter(rates)
        self.dt_bias = nn.Parameter(step_bias(self.n_heads * self.d_key, *c.dt_init_range))
        self.gate_up = nn.Linear(rank, values, bias=c.gate_bias)
        self.make_back(place, c.norm_eps)
        self.init_up(self.decay_up, self.gate_up)

    def forward(self, x: Tensor, state: State | None = None, context: Context | None = None) -> tuple[Tensor, State]:
        (q, k, v, beta, decay, gate), state = self.front(x, state, context)
        q, k = (l2_norm(m.unflatten(-1, (self.n_key_heads, -1))) for m in (q, k))
        v = v.unflatten(-1, (self.n_heads, -1))
        steps = precise(self.decay_up(decay)) + self.dt_bias
        steps = steps.unflatten(-1, (self.n_heads, -1))
        rates, bound = precise(self.A_log).exp()[:, None], self.config.lower_bound
        log_decay = -rates * F.softplus(steps) if bound is None else bound * torch.sigmoid(rates * steps)
        o, state = self.write(q, k, v, beta, log_decay, state, packing(context))
        o = self.norm(o).flatten(-2) * precise(self.gate_up(gate)).sigmoid()
        return self.out_proj(o.to(x.dtype)), state

    def flops_per_token(self, context_length: int) -> int:
        up = self.parts[-1] * self.n_heads * (self.d_key + self.d_value)  # from the bottlenecks of decay and gate
        return super().flops_per_token(context_length) + 2 * up

    @classmethod
    def law_cases(cls) -> list[dict[str, Any]]:
        return [
            {},
            {"n_heads": 2, "n_v_heads": 4, "head_dim": 5, "expand_v": 2.0, "conv_bias": True, "allow_neg_eigval": True},
            {"rank": 6, "gate_bias": True, "conv_size": 3, "A_init_range": (0.0, 1.0), "dt_init_range": (0.01, 1.0)},
            {"n_heads": 3, "conv_size": 0, "norm_eps": 1e-4, "backend": "reference"},
            {"n_heads": 2, "conv_size": 1, "lower_bound": -5.0, "backend": "chunked"},
        ]
