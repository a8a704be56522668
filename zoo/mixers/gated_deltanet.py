"""Gated DeltaNet: the delta rule on a memory that also decays."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from zoo.core.options import Options
from zoo.mixers.delta_front import DeltaMixer, head_sizes
from zoo.mixers.parts import Backend, check_range, log_rates, precise, step_bias
from zoo.norms import l2_norm
from zoo.protocol import Context, Place, State, packing, register


@register("gated_deltanet")
class GatedDeltaNet(DeltaMixer):
    """Gated DeltaNet: the delta rule with a decay that depends on the input (Yang et al. 2025, arXiv 2412.06464,
    equation 10 and figure 1).

        q, k, v = silu(conv(W x)) ;  q, k = q / |q|, k / |k| ;  beta = sigmoid(w_b x)
        g = -exp(A_log) softplus(w_a x + dt_bias)
        S_t = (I - beta_t k_t k_t^T) exp(g_t) S_{t-1} + beta_t k_t v_t^T ;  o_t = S_t^T q_t / sqrt(K)
        y = W_out (RMSNorm_head(o) * silu(W_g x))

    Sizes as published: n_heads K = 0.75 D and V = 2 K, so that a layer has about 6 D^2 weights; heads of about 256
    channels. Qwen3-Next is `n_heads=16, n_v_heads=32, head_dim=128, expand_v=1.0`. Published inits: rates exp(A_log) ~
    U(0, 16), softplus(dt_bias) log-uniform in [1e-3, 1e-1]. A narrow layer has one head, so one random rate
    decides how long it remembers: `A_init_range=[0.0, 1.0]` starts it with a long memory.

    | state                         | cost per token        | parallel form (WY)           |
    |-------------------------------|-----------------------|------------------------------|
    | H K V + (W - 1) channels      | 12 D^2 + 4 H K V      | chunked matmuls, O(T) in all |

    Cannot store more than K associations a head without interference; with beta <= 1 it cannot solve parity, with
    `allow_neg_eigval` it can (Grazzi et al. 2025, arXiv 2411.12537).
    """

    class Config(Options):
        """The options.

        Attributes:
            n_heads: heads of q and k, by default 0.75 D / 256, rounded, at least 1.
            head_dim: K, by default 0.75 D / n_heads, rounded.
            n_v_heads: H, heads of v, beta and g; a multiple of n_heads, which is the default.
            expand_v: V / K.
            conv_size: W, steps in the window of the convolution; 0 for none.
            conv_bias: a bias of the convolution.
            gate: use an output gate.
            allow_neg_eigval: beta in (0, 2), so that a step can reflect.
            A_init_range: the decay rates start uniform between these.
            dt_init_range: the step sizes start log-uniform between these.
            norm_eps: added to the mean square in the norm (Qwen3-Next: 1e-6).
            backend: form of the ops.
        """

        n_heads: int | None = Field(default=None, ge=1)
        head_dim: int | None = Field(default=None, ge=1)
        n_v_heads: int | None = Field(default=None, ge=1)
        expand_v: float = Field(default=2.0, gt=0)
        conv_size: int = Field(default=4, ge=0)
        conv_bias: bool = False
        gate: bool = True
        allow_neg_eigval: bool = False
        A_init_range: tuple[float, float] = (0.0, 16.0)
        dt_init_range: tuple[float, float] = (0.001, 0.1)
        norm_eps: float = Field(default=1e-5, gt=0)
        backend: Backend = "auto"

    def __init__(self, d_model: int, config: Config, *, place: Place = Place()):
        super().__init__(d_model, config, place=place)
        c = config
        check_range(self.name, "A_init_range", c.A_init_range, zero=True)
        check_range(self.name, "dt_init_range", c.dt_init_range)
        sizes = head_sizes(self.name, c, 0.75 * d_model, 256)
        self.n_key_heads, self.d_key, self.n_heads, self.d_value = sizes
        keys, values = self.n_key_heads * self.d_key, self.n_heads * self.d_value
        self.make_front([keys, keys, values], [self.n_heads, *([values] if c.gate else [])])  # a, gate
        self.A_log = nn.Parameter(log_rates(self.n_heads, *c.A_init_range))
        self.dt_bias = nn.Parameter(step_bias(self.n_heads, *c.dt_init_range))
        self.make_back(place, c.norm_eps)
        dt_at = sum(self.parts[:2])
        self.make_cell({"dt_at": dt_at, **({"gate_at": dt_at + self.n_heads} if c.gate else {})})

    def forward(self, x: Tensor, state: State | None = None, context: Context | None = None) -> tuple[Tensor, State]:
        done, rows = self.one_step(x, state, context)
        if done is not None:
            return self.out_proj(done), state
        (q, k, v, beta, a, *gate), state = self.front(x, state, context, rows)
        q, k = (l2_norm(m.unflatten(-1, (self.n_key_heads, -1))) for m in (q, k))
        v = v.unflatten(-1, (self.n_heads, -1))
        log_decay = -precise(self.A_log).exp() * F.softplus(precise(a) + self.dt_bias)
        o, state = self.write(q, k, v, beta, log_decay, state, packing(context))
        return self.back(o, gate[0] if gate else None, x.dtype), state

    @classmethod
    def law_cases(cls) -> list[dict[str, Any]]:
        return [
            {},
            {"n_heads": 2, "n_v_heads": 4, "head_dim": 5, "expand_v": 1.0, "conv_bias": True, "allow_neg_eigval": True},
            {"gate": False, "conv_size": 3, "A_init_range": (1.0, 2.0), "dt_init_range": (0.01, 1.0)},
            {"n_heads": 3, "conv_size": 0, "norm_eps": 1e-4, "backend": "reference"},
            {"n_heads": 2, "conv_size": 1, "backend": "chunked"},
        ]
