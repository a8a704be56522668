"""M2RNN: a nonlinear RNN whose state is a matrix for each head."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from zoo.core.errors import UsageError
from zoo.core.options import Options
from zoo.mixers.parts import (
    CausalConv,
    check_range,
    conv_backend,
    init_projections,
    log_rates,
    precise,
    project,
    step_bias,
)
from zoo.norms import GatedRMSNorm
from zoo.ops import m2rnn
from zoo.parameters import set_rule
from zoo.protocol import Context, Mixer, Place, State, first_parameter_like, packing, recurrent_dtype, register


class M2RNNState(NamedTuple):
    conv: Tensor  # (B, W - 1, channels of q, k and v): the last inputs of the convolution
    memory: Tensor  # (B, H, K, V)


@register("m2rnn")
class M2RNN(Mixer):
    """M2RNN, a nonlinear RNN with a matrix as its state (Mishra et al. 2026, arXiv 2603.14360), as in `lm-engine`.

        q, k, v = silu(conv(W_qkv x)) ;  f = exp(-exp(A_log) softplus(W_f x + dt_bias))        one f a head
        H_t = f_t H_{t-1} + (1 - f_t) tanh(H_{t-1} W + k_t v_t^T) ;  o_t = H_t^T q_t + D * v_t
        y = W_out RMSNorm(o * silu(W_g x))

    W is a V x V matrix of each head. q and k are shared by the heads of a group; the authors' models have one group.
    The norm is over all heads together. Inits: W the identity, D 1, rates exp(A_log) ~ U(0, 16), step sizes log-uniform
    in [1e-3, 1e-1], all as published; projections and convolution as in `gated_deltanet`.

    | state                                  | cost per token                       | parallel form                |
    |----------------------------------------|--------------------------------------|------------------------------|
    | H K V + (W - 1)(2 G K + H V)           | 6 H V D + 4 G K D + 2 H K V (V + 1)  | none: one step after another |

    The transition reads the state through tanh: one layer learns parity, which positive decays cannot. The state is
    bounded, so it cannot count far. It cannot replace exactly what is stored under one key: all rows move at once.
    """

    class Config(Options):
        """The options.

        Attributes:
            n_heads: H, by default 4 D / (3 V), rounded (published: 84 at D = 1,024, 132 at D = 1,536).
            d_key: K, width of q and k, rows of a state.
            d_value: V, columns of a state.
            n_groups: G, number of q's and k's; each serves H / G heads.
            conv_size: W, steps in the window of the convolution; 0 for none, and then no silu after it.
            bias: biases of the projection of the input and of the convolution.
            residual: the term D * v.
            gradient_clipping: in the backward pass the gradient of each number of every H_t is cut to +- this
                (published: 1). Where it cuts, gradients are not those of the loss.
            A_init_range: the decay rates start uniform between these.
            dt_init_range: the step sizes start log-uniform between these.
            norm_eps: added to the mean square in the norm.
            backend: "reference" is one step at a time, "compiled" the same loop in C++, forward and backward.
        """

        n_heads: int | None = Field(default=None, ge=1)
        d_key: int = Field(default=64, ge=1)
        d_value: int = Field(default=16, ge=1)
        n_groups: int = Field(default=1, ge=1)
        conv_size: int = Field(default=4, ge=0)
        bias: bool = False
        residual: bool = True
        gradient_clipping: float | None = Field(default=None, gt=0)
        A_init_range: tuple[float, float] = (0.0, 16.0)
        dt_init_range: tuple[float, float] = (0.001, 0.1)
        norm_eps: float = Field(default=1e-5, gt=0)
        backend: Literal["auto", "reference", "compiled"] = "auto"

    def __init__(self, d_model: int, config: Config, *, place: Place = Place()):
        super().__init__(d_model, config, place=place)
        c = config
        check_range(self.name, "A_init_range", c.A_init_range, zero=True)
        check_range(self.name, "dt_init_range", c.dt_init_range)
        if c.n_heads and c.n_heads % c.n_groups:
            raise UsageError(f"{self.name}: n_groups={c.n_groups} does not divide n_heads={c.n_heads}.")
        share = 4 * d_model / (3 * c.d_value * c.n_groups)
        self.n_heads = H = c.n_heads or max(1, round(share)) * c.n_groups
        keys, values = c.n_groups * c.d_key, H * c.d_value
        self.qkv_parts = [keys, keys, values]
        self.parts = [sum(self.qkv_parts), H, values]  # what is convolved, f, g

        self.in_proj = nn.Linear(d_model, sum(self.parts), bias=c.bias)
        self.conv = None
        if c.conv_size:
            self.conv = CausalConv(
                self.parts[0], c.conv_size, bias=c.bias, activation="silu", backend=conv_backend(c.backend)
            )
        self.A_log = nn.Parameter(log_rates(H, *c.A_init_range))
        self.dt_bias = nn.Parameter(step_bias(H, *c.dt_init_range))
        self.state_weight = nn.Parameter(torch.eye(c.d_value).repeat(H, 1, 1))
        if c.residual:
            self.D = nn.Parameter(torch.ones(H, c.d_value))
            set_rule(self, "D", weight_decay=False)
        self.norm = GatedRMSNorm(values, eps=c.norm_eps, norm_before_gate=False)
        self.out_proj = nn.Linear(values, d_model, bias=False)
        init_projections(self.in_proj, self.out_proj, place)

    def init_state(self, batch_size: int, *, capacity: int | None = None, device=None, dtype=None) -> M2RNNState:
        device, dtype = first_parameter_like(self, device, dtype)
        conv = (batch_size, max(self.config.conv_size - 1, 0), self.parts[0])
        memory = (batch_size, self.n_heads, self.config.d_key, self.config.d_value)
        return M2RNNState(*(torch.zeros(s, device=device, dtype=recurrent_dtype(dtype)) for s in (conv, memory)))

    def forward(self, x: Tensor, state: State | None = None, context: Context | None = None) -> tuple[Tensor, State]:
        c = self.config
        state = self.init_state(len(x), device=x.device, dtype=x.dtype) if state is None else state
        qkv, f, gate = project(x, self.in_proj, self.parts)
        conv = state.conv
        if self.conv:
            qkv, conv = self.conv(qkv, conv, context)
        q, k, v = qkv.split(self.qkv_parts, -1)
        q, k = (m.unflatten(-1, (c.n_groups, -1)) for m in (q, k))
        v = v.unflatten(-1, (self.n_heads, -1))
        log_decay = -precise(self.A_log).exp() * F.softplus(precise(f) + self.dt_bias)
        o, memory = m2rnn(
            precise(q),
            precise(k),
            precise(v),
            self.state_weight,
            log_decay,
            state.memory,
            gradient_clipping=c.gradient_clipping,
            backend=c.backend,
            **packing(context),
        )
        if c.residual:
            o = torch.addcmul(o, self.D.to(o.dtype), v.to(o.dtype))
        return self.out_proj(self.norm(o.flatten(-2), gate).to(x.dtype)), M2RNNState(conv, memory)

    def flops_per_token(self, context_length: int) -> int:
        projections = 2 * self.d_model * (sum(self.parts) + self.parts[2])
        return projections + 2 * self.n_heads * self.config.d_key * self.config.d_value * (self.config.d_value + 1)

    @classmethod
    def law_cases(cls) -> list[dict[str, Any]]:
        return [  # narrow heads first: 16 columns of W, moved off its init, amplify rounding over 1,000 steps
            {"n_heads": 3, "d_key": 8, "d_value": 4},
            {
                "n_heads": 4,
                "n_groups": 2,
                "d_key": 5,
                "d_value": 7,
                "conv_size": 3,
                "bias": True,
                "backend": "reference",
            },
            {"n_heads": 2, "d_key": 8, "d_value": 3, "conv_size": 0, "residual": False, "norm_eps": 1e-4}
            | {"gradient_clipping": 0.1, "A_init_range": (0.5, 2.0), "dt_init_range": (0.01, 1.0)},
            {},
        ]
