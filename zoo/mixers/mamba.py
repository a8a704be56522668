"""Mamba: a selective state space, with several decaying states for every channel."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from zoo.core.errors import UsageError
from zoo.core.options import Options
from zoo.mixers.parts import (
    Backend,
    CausalConv,
    check_range,
    conv_backend,
    main_backend,
    precise,
    project,
    step_bias,
    whole,
)
from zoo.norms import GatedRMSNorm, rms_norm
from zoo.ops import selective_scan
from zoo.ops.modules import bare
from zoo.parameters import set_rule
from zoo.protocol import Context, Mixer, Place, State, Traits, first_parameter_like, packing, recurrent_dtype, register


class MambaState(NamedTuple):
    conv: Tensor  # (B, W - 1, d_inner): the last inputs of the convolution
    ssm: Tensor  # (B, d_inner, N)


@register("mamba")
class Mamba(Mixer):
    """Mamba, a block with the selective scan S6 (Gu and Dao 2023, arXiv 2312.00752, sections 3.2 to 3.4).

        u, z = W_in x ;  u = silu(conv(u)) ;  r, B, C = W_x u ;  dt = softplus(W_dt r + b_dt)
        h_t = exp(-exp(A_log) dt_t) h_{t-1} + (dt_t u_t) B_t^T ;  o_t = h_t C_t + D * u_t
        y = W_out (o * silu(z))

    Each of the d_inner = expand D channels has N = d_state states of its own; B and C (N wide) are shared by all of
    them, dt is the channel's own, through a bottleneck of width R = dt_rank. Published inits: A_log = log(1 .. N) in
    every channel (S4D-real), dt log-uniform in [1e-3, 1e-1], W_dt uniform within R^-0.5, D = 1, W_out divided by the
    root of the number of layers, all else as torch's own linear layers.

    | state                      | cost per token                      | parallel form                               |
    |----------------------------|-------------------------------------|---------------------------------------------|
    | d_inner N + (W - 1) d_inner | 6 expand D^2 + d_inner (4 R + 6 N) | a scan, no matmuls; states kept by chunks   |

    Cannot overwrite what it has stored under a key (it only fades), nor track states such as parity: its decays are
    positive and do not depend on the state (Grazzi et al. 2025, arXiv 2411.12537). A state of 16 numbers a channel
    holds less than the 64 to 256 of Mamba-2, whose matmuls make them affordable.
    """

    traits = Traits(cuts_in_ops=True)

    class Config(Options):
        """The options.

        Attributes:
            d_state: N, states of a channel.
            expand: d_inner / D.
            dt_rank: R, by default D / 16, rounded up.
            conv_size: W, steps in the window of the convolution.
            dt_init_range: the step sizes start log-uniform between these.
            inner_norm: RMS norms of r, B and C, as in Jamba (Lieber et al. 2024, arXiv 2403.19887, section 6.4).
            norm_weights: these norms have weights (Falcon Mamba's have none).
            norm_eps: added to the mean square in these norms.
            bias: biases of W_in and W_out.
            conv_bias: a bias of the convolution.
            backend: form of the ops.
        """

        d_state: int = Field(default=16, ge=1)
        expand: float = Field(default=2.0, gt=0)
        dt_rank: int | None = Field(default=None, ge=1)
        conv_size: int = Field(default=4, ge=1)
        dt_init_range: tuple[float, float] = (0.001, 0.1)
        inner_norm: bool = False
        norm_weights: bool = True
        norm_eps: float = Field(default=1e-6, gt=0)
        bias: bool = False
        conv_bias: bool = True
        backend: Backend = "auto"

    def __init__(self, d_model: int, config: Config, *, place: Place = Place()):
        super().__init__(d_model, config, place=place)
        c = config
        check_range(self.name, "dt_init_range", c.dt_init_range)
        self.d_inner = whole(self.name, f"expand * d_model = {c.expand:g} * {d_model}", c.expand * d_model)
        rank = c.dt_rank or math.ceil(d_model / 16)
        self.parts = [rank, c.d_state, c.d_state]  # r, B, C

        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=c.bias)
        self.conv = CausalConv(
            self.d_inner, c.conv_size, bias=c.conv_bias, activation="silu", backend=conv_backend(c.backend)
        )
        self.x_proj = nn.Linear(self.d_inner, sum(self.parts), bias=False)
        if not c.norm_weights and not c.inner_norm:
            raise UsageError(f"{self.name}: norm_weights belongs to inner_norm, which is not set.")
        learned = c.inner_norm and c.norm_weights
        self.norms = nn.ModuleList([GatedRMSNorm(n, eps=c.norm_eps) for n in self.parts]) if learned else None
        self.dt_proj = nn.Linear(rank, self.d_inner)
        self.A_log = nn.Parameter(torch.arange(1.0, c.d_state + 1).log().repeat(self.d_inner, 1))
        set_rule(self, "A_log", weight_decay=False)
        self.D = nn.Parameter(torch.ones(self.d_inner))
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=c.bias)
        with torch.no_grad():
            self.dt_proj.weight.uniform_(-(rank**-0.5), rank**-0.5)
            self.dt_proj.bias.copy_(step_bias(self.d_inner, *c.dt_init_range))
            self.out_proj.weight /= math.sqrt(place.n_layers)
            if c.bias:
                self.in_proj.bias.zero_()
                self.out_proj.bias.zero_()

    def init_state(self, batch_size: int, *, capacity: int | None = None, device=None, dtype=None) -> MambaState:
        device, dtype = first_parameter_like(self, device, dtype)
        shapes = self._state_shapes(batch_size)
        return MambaState(*(torch.zeros(s, device=device, dtype=recurrent_dtype(dtype)) for s in shapes))

    def _state_shapes(self, batch_size: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return self.conv.state_shape(batch_size), (batch_size, self.d_inner, self.config.d_state)

    def forward(self, x: Tensor, state: State | None = None, context: Context | None = None) -> tuple[Tensor, State]:
        conv_state, ssm_state = (None, None) if state is None else state
        u, z = project(x, self.in_proj, [self.d_inner, self.d_inner])
        u, conv_state = self.conv(u, conv_state, context)
        r, b, c = self.x_proj(u).split(self.parts, -1)
        if self.norms is not None:
            r, b, c = (norm(part) for norm, part in zip(self.norms, (r, b, c), strict=True))
        elif self.config.inner_norm:
            r, b, c = (rms_norm(part, None, self.config.norm_eps) for part in (r, b, c))
        r = r.to(x.dtype)
        if bare(self.dt_proj):  # the bias is added in the precision of the state
            delta, bias = F.linear(r, self.dt_proj.weight), self.dt_proj.bias
        else:
            delta, bias = self.dt_proj(r), None
        o, ssm_state = selective_scan(
            u,
            delta,
            -precise(self.A_log).exp(),
            b,
            c,
            self.D,
            z,
            bias,
            ssm_state,
            delta_softplus=True,
            backend=main_backend(self.config.backend),
            **packing(context),
        )
        return self.out_proj(o.to(x.dtype)), MambaState(conv_state, ssm_state)

    def flops_per_token(self, context_length: int) -> int:
        rank, n, _ = self.parts
        inner = sum(self.parts) + rank + n  # W_x, W_dt, and the read h C; the outer product is no matmul
        return 2 * self.d_inner * (3 * self.d_model + inner)

    @classmethod
    def law_cases(cls) -> list[dict[str, Any]]:
        return [
            {},
            {
                "d_state": 5,
                "expand": 1.5,
                "dt_rank": 6,
                "conv_size": 3,
                "bias": True,
                "backend": "reference",
                "inner_norm": True,
                "norm_weights": False,
            },
            {"d_state": 16, "inner_norm": True, "norm_eps": 1e-5, "conv_bias": False, "backend": "chunked"},
            {"d_state": 1, "dt_init_range": (0.01, 1.0), "conv_size": 1},
        ]
