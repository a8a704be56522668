"""Gated DeltaNet-2: the delta rule whose erasing and writing each have a gate for every channel."""

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


@register("gated_deltanet2")
class GatedDeltaNet2(DeltaMixer):
    """Gated DeltaNet-2: the delta rule with separate gates for what it erases and what it writes (arXiv 2605.22791).

        q, k, v = silu(conv(W x)) ;  q, k = q / |q|, k / |k| ;  b = sigmoid(W_b x) ;  w = sigmoid(W_w x)
        g = -exp(A_log) softplus(F_up F_down x + dt_bias)        one for each channel of each head of q and k
        S_t = (I - k_t (b_t * k_t)^T) diag(exp g_t) S_{t-1} + k_t (w_t * v_t)^T ;  o_t = S_t^T q_t / sqrt(K)
        y = W_out (RMSNorm_head(o) * sigmoid(G_up G_down x))

    The layer is that of flash-linear-attention 0.6. b has a number for each key channel, w one for each value channel;
    b = w = beta is `kda`. Sizes and inits are those of `kda`.

    | state                    | cost per token, r = rank     | parallel form (WY)           |
    |--------------------------|------------------------------|------------------------------|
    | H K V + (W - 1) channels | 12 D^2 + 8 r D + 4 H K V     | chunked matmuls, O(T) in all |

    Cannot store more than K associations a head without interference; with b <= 1 it cannot solve parity, with
    `allow_neg_eigval` it can (Grazzi et al. 2025, arXiv 2411.12537).
    """

    class Config(Options):
        """The options.

        Attributes:
            n_heads: heads of q, k, b and g, by default D / 128, rounded, at least 1.
            head_dim: K, by default D / n_heads, rounded.
            n_v_heads: H, heads of v, w and the gate; a multiple of n_heads, which is the default.
            expand_v: V / K.
            conv_size: W, steps in the window of the convolution; 0 for none.
            conv_bias: a bias of the convolution.
            rank: width between the two halves of the decay's and of the gate's projection; V by default.
            gate_bias: bias of the second half of the gate's projection.
            allow_neg_eigval: b in (0, 2), so that a step can reflect.
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
        gate_bias: bool = True
        allow_neg_eigval: bool = False
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
        self.make_front([keys, keys, values], [values, rank, rank], betas=keys)  # w, F_down, G_down
        self.decay_up = nn.Linear(rank, keys, bias=False)
        self.A_log = nn.Parameter(log_rates(self.n_key_heads, *c.A_init_range))
        self.dt_bias = nn.Parameter(step_bias(keys, *c.dt_init_range))
        self.gate_up = nn.Linear(rank, values, bias=c.gate_bias)
        self.make_back(place, c.norm_eps)
        self.init_up(self.decay_up, self.gate_up)

    def forward(self, x: Tensor, state: State | None = None, context: Context | None = None) -> tuple[Tensor, State]:
        (q, k, v, erase, write, decay, gate), state = self.front(x, state, context)
        v = v * precise(write).sigmoid()
        steps = F.softplus(precise(self.decay_up(decay)) + self.dt_bias)
        q, k, erase, steps = (m.unflatten(-1, (self.n_key_heads, -1)) for m in (q, k, erase, steps))
        q, k = l2_norm(q), l2_norm(k)
        log_decay = -precise(self.A_log).exp()[:, None] * steps
        read, share = -log_decay.exp() * erase * k, self.n_heads // self.n_key_heads
        read, log_decay = (m.repeat_interleave(share, 2) for m in (read, log_decay))
        v = v.unflatten(-1, (self.n_heads, -1))
        o, state = self.write_dplr(q, k, v, read, log_decay, state, packing(context))
        o = self.norm(o).flatten(-2) * precise(self.gate_up(gate)).sigmoid()
        return self.out_proj(o.to(x.dtype)), state

    def flops_per_token(self, context_length: int) -> int:
        up = self.parts[-1] * (self.n_key_heads * self.d_key + self.n_heads * self.d_value)  # of decay and gate
        return super().flops_per_token(context_length) + 2 * up

    @classmethod
    def law_cases(cls) -> list[dict[str, Any]]:
        return [
            {},
            {"n_heads": 2, "n_v_heads": 4, "head_dim": 5, "expand_v": 2.0, "conv_bias": True, "allow_neg_eigval": True},
            {"rank": 6, "gate_bias": False, "conv_size": 3, "A_init_range": (0.0, 1.0), "dt_init_range": (0.01, 1.0)}
            | {"backend": "chunked"},
            {"n_heads": 2, "conv_size": 0, "norm_eps": 1e-4, "backend": "reference"},
        ]
