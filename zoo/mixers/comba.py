"""Comba: a delta rule that reads and writes with different strengths, and corrects its queries."""

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


@register("comba")
class Comba(DeltaMixer):
    """Comba: a delta rule with feedback from the state and from the output (Hu et al. 2025, arXiv 2506.02475).

        q, k, v = silu(conv(W x)) ;  beta = sigmoid(w_b x) ;  g = -exp(A_log) softplus(w_a x + dt_bias)
        p = sigmoid(decay) k ;  q = q - D p ;  q, k, p = q / |q|, k / |k|, p / |p|
        S_t = (exp(g_t) I - beta_t k_t p_t^T) S_{t-1} + beta_t k_t v_t^T ;  o_t = S_t^T q_t / sqrt(K)
        y = W_out (RMSNorm_head(o) * sigmoid(W_g x))

    This is the authors' layer in flash-linear-attention 0.6. p is the key that reads the memory, before its decay; k is
    the key that writes. The query is corrected by a part D of the key that reads, so the output contains an error
    signal. Since p is scaled to length 1, as in that layer, `decay` changes the correction alone. Sizes and inits are
    those of `gated_deltanet`, decay = 1, D = `correction`.

    | state                         | cost per token        | parallel form (WY)           |
    |-------------------------------|-----------------------|------------------------------|
    | H K V + (W - 1) (2 H K + H V) | 12 D^2 + 4 H K V      | chunked matmuls, O(T) in all |

    An eigenvalue of a step is exp(g) - beta, so it can be negative: near -1 with a strong decay, which clears all that
    other keys have stored. Cannot store more than K associations a head without interference.
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
            inner_decay: p is k times sigmoid(decay), with a weight a head; without it, p is k.
            output_correction: subtract D p from the query.
            correction: D at the start (the authors: 1, in small models sometimes 0.02).
            A_init_range: the decay rates start uniform between these.
            dt_init_range: the step sizes start log-uniform between these.
            norm_eps: added to the mean square in the norm.
            backend: form of the ops.
        """

        n_heads: int | None = Field(default=None, ge=1)
        head_dim: int | None = Field(default=None, ge=1)
        n_v_heads: int | None = Field(default=None, ge=1)
        expand_v: float = Field(default=2.0, gt=0)
        conv_size: int = Field(default=4, ge=0)
        conv_bias: bool = False
        gate: bool = True
        inner_decay: bool = True
        output_correction: bool = True
        correction: float = 1.0
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
        if c.inner_decay and c.output_correction:
            self.decay = nn.Parameter(torch.ones(self.n_key_heads))
        if c.output_correction:
            self.D = nn.Parameter(torch.full((self.n_key_heads,), c.correction))
        self.A_log = nn.Parameter(log_rates(self.n_heads, *c.A_init_range))
        self.dt_bias = nn.Parameter(step_bias(self.n_heads, *c.dt_init_range))
        self.make_back(place, c.norm_eps)

    def forward(self, x: Tensor, state: State | None = None, context: Context | None = None) -> tuple[Tensor, State]:
        c = self.config
        (q, k, v, beta, a, *gate), state = self.front(x, state, context)
        q, k = (m.unflatten(-1, (self.n_key_heads, -1)) for m in (q, k))
        v = v.unflatten(-1, (self.n_heads, -1))
        if c.output_correction:
            share = precise(self.D) * precise(self.decay).sigmoid() if c.inner_decay else precise(self.D)
            q = precise(q) - share[:, None] * precise(k)
        q, k = l2_norm(q), l2_norm(k)
        log_decay = -precise(self.A_log).exp() * F.softplus(precise(a) + self.dt_bias)
        read = k.repeat_interleave(self.n_heads // self.n_key_heads, 2) * -beta[..., None]
        o, state = self.write_dplr(q, k, v * beta[..., None], read, log_decay, state, packing(context))
        o = self.norm(o).flatten(-2)
        o = o * precise(gate[0]).sigmoid() if gate else o
        return self.out_proj(o.to(x.dtype)), state

    @classmethod
    def law_cases(cls) -> list[dict[str, Any]]:
        return [
            {},
            {"n_heads": 2, "n_v_heads": 4, "head_dim": 5, "expand_v": 1.0, "conv_bias": True, "correction": 0.02},
            {"gate": False, "conv_size": 3, "A_init_range": (1.0, 2.0), "inner_decay": False, "backend": "chunked"},
            {"n_heads": 2, "conv_size": 0, "norm_eps": 1e-4, "output_correction": False, "backend": "reference"}
            | {"dt_init_range": (0.01, 1.0)},
        ]
