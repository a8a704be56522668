"""DeltaProduct: several steps of the delta rule for every token."""

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


@register("deltaproduct")
class DeltaProduct(DeltaMixer):
    """DeltaProduct: N steps of the delta rule for every token (Siems et al. 2025, arXiv 2502.10297, section 3).

        q, k_1..k_N, v_1..v_N = silu(conv(W x)), q and keys of length 1 ;  beta_1..beta_N = 2 sigmoid(W_b x)
        g = -exp(A_log) softplus(w_a x + dt_bias), with `forget_gate`, else 0
        S_{t,0} = exp(g_t) S_{t-1} ;  S_{t,j} = (I - beta_j k_j k_j^T) S_{t,j-1} + beta_j k_j v_j^T ;  S_t = S_{t,N}
        o_t = S_t^T q_t / sqrt(K) ;  y = W_out (RMSNorm_head(o) * silu(W_g x))

    It is computed as the delta rule over N T steps. The memory decays at the first step of a token and is read at its
    last step. Sizes and inits are those of `gated_deltanet`, which is N = 1 with beta in (0, 1).

    | state                    | cost per token                    | parallel form (WY)             |
    |--------------------------|-----------------------------------|--------------------------------|
    | H K V + (W - 1) channels | (7.5 + 4.5 N) D^2 + 4 N H K V     | chunked matmuls, O(N T) in all |

    A product of N reflections turns the memory by any permutation of N + 1 entries, so one layer tracks such a group
    (N = 2: S_3). Cannot track groups that need more than N reflections a token in one layer.
    """

    class Config(Options):
        """The options.

        Attributes:
            n_householders: N, steps of the delta rule a token.
            n_heads: heads of q and k, by default 0.75 D / 256, rounded, at least 1.
            head_dim: K, by default 0.75 D / n_heads, rounded.
            n_v_heads: H, heads of v, beta and g; a multiple of n_heads, which is the default.
            expand_v: V / K.
            conv_size: W, steps in the window of the convolution; 0 for none.
            conv_bias: a bias of the convolution.
            forget_gate: the memory decays (Gated DeltaProduct); without it, this is DeltaProduct.
            gate: use an output gate.
            allow_neg_eigval: beta in (0, 2), so that a step can reflect; else in (0, 1).
            A_init_range: the decay rates start uniform between these.
            dt_init_range: the step sizes start log-uniform between these.
            norm_eps: added to the mean square in the norm.
            backend: form of the ops.
        """

        n_householders: int = Field(default=2, ge=1)
        n_heads: int | None = Field(default=None, ge=1)
        head_dim: int | None = Field(default=None, ge=1)
        n_v_heads: int | None = Field(default=None, ge=1)
        expand_v: float = Field(default=2.0, gt=0)
        conv_size: int = Field(default=4, ge=0)
        conv_bias: bool = False
        forget_gate: bool = True
        gate: bool = True
        allow_neg_eigval: bool = True
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
        self.n_writes = N = c.n_householders
        keys, values = self.n_key_heads * self.d_key, self.n_heads * self.d_value
        rates = self.n_heads if c.forget_gate else 0
        self.make_front([keys, N * keys, N * values], [rates, values if c.gate else 0])  # a, gate
        if c.forget_gate:
            self.A_log = nn.Parameter(log_rates(self.n_heads, *c.A_init_range))
            self.dt_bias = nn.Parameter(step_bias(self.n_heads, *c.dt_init_range))
        self.make_back(place, c.norm_eps)

    def forward(self, x: Tensor, state: State | None = None, context: Context | None = None) -> tuple[Tensor, State]:
        c, N = self.config, self.n_writes
        (q, k, v, beta, a, gate), state = self.front(x, state, context)
        q = l2_norm(q.unflatten(-1, (1, self.n_key_heads, -1)))
        k = l2_norm(k.unflatten(-1, (N, self.n_key_heads, -1)).flatten(1, 2))
        v = v.unflatten(-1, (N, self.n_heads, -1)).flatten(1, 2)
        beta = beta.unflatten(-1, (N, -1)).flatten(1, 2)
        log_decay = None
        if c.forget_gate:
            steps = F.softplus(precise(a) + self.dt_bias)
            log_decay = _at_first(-precise(self.A_log).exp() * steps, N)
        q = F.pad(q, (0, 0, 0, 0, N - 1, 0)).flatten(1, 2)  # read at a token's last step, nothing before
        o, state = self.write(q, k, v, beta, log_decay, state, _packing(context, N))
        return self.back(o[:, N - 1 :: N], gate if c.gate else None, x.dtype), state

    @classmethod
    def law_cases(cls) -> list[dict[str, Any]]:
        return [
            {},
            {"n_householders": 3, "n_heads": 2, "n_v_heads": 4, "head_dim": 5, "expand_v": 1.0, "conv_bias": True},
            {"forget_gate": False, "gate": False, "conv_size": 3, "norm_eps": 1e-4},
            {"n_householders": 1, "n_heads": 3, "conv_size": 0, "allow_neg_eigval": False, "backend": "reference"},
            {"A_init_range": (1.0, 2.0), "dt_init_range": (0.01, 1.0), "conv_size": 1, "backend": "chunked"},
        ]


def _at_first(x: Tensor, n: int) -> Tensor:
    """x (B, T, ...) -> (B, n T, ...): at the first of every n steps, zero at the others."""
    return F.pad(x.unsqueeze(2), (0, 0) * (x.ndim - 2) + (0, n - 1)).flatten(1, 2)


def _packing(context: Context | None, n: int) -> dict[str, Any]:
    """The op's arguments for lengths and documents, over n T steps."""
    packed = packing(context)
    if packed.get("lengths") is not None:
        packed["lengths"] = packed["lengths"] * n
    if packed.get("resets") is not None:
        packed["resets"] = _at_first(packed["resets"], n)
    return packed
