"""Mamba-2: state-space duality with one decay per head."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, cast

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
    log_rates,
    main_backend,
    precise,
    project,
    step_bias,
    whole,
)
from zoo.norms import GatedRMSNorm
from zoo.ops import linear_attention
from zoo.ops.cells import HeadsCell, heads_cell_step
from zoo.ops.modules import bare
from zoo.ops.single_step import STEPPING
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
    single,
)

OPS = ("causal_conv1d", "linear_attention")


class Mamba2State(NamedTuple):
    conv: Tensor  # (B, W - 1, d_inner + 2 G N): the last inputs of the convolution
    ssm: Tensor  # (B, H, N, V)


@register("mamba2")
class Mamba2(Mixer):
    """Mamba-2, a state space with one decay a head (Dao and Gu 2024, arXiv 2405.21060, sections 6 and 7.1),
    as in `mamba_ssm` 2.

        z, u, B, C, dt = W_in x ;  u, B, C = silu(conv(u, B, C)) ;  dt = softplus(dt + dt_bias)
        S_t = exp(-exp(A_log) dt_t) S_{t-1} + B_t (dt_t u_t)^T ;  o_t = S_t^T C_t + D u_t
        y = W_out RMSNorm(o * silu(z))

    which is linear attention with q = C, k = B (shared by the heads of a group), v = dt u. Sizes: d_inner = expand D,
    H = d_inner / head_dim, N = d_state, V = head_dim. Published inits: rates exp(A_log) ~ U(1, 16), dt log-uniform in
    [1e-3, 1e-1], D = 1, W_out divided by the root of the number of layers.

    | state                               | cost per token                | parallel form              |
    |-------------------------------------|-------------------------------|----------------------------|
    | d_inner N + (W - 1)(d_inner + 2 G N) | 6 expand D^2 + 2 d_inner N | chunked matmuls, O(T) in all |

    Weights, and W_out before its division, start as torch's own linear layers do, as published. With rates up to 16 a
    head may forget within ten steps; where a task asks for longer memory from the start, lower `A_init_range`.

    Cannot overwrite what it has stored under a key (it only fades), nor track states such as parity: its decays are
    positive and do not depend on the state (Grazzi et al. 2025, arXiv 2411.12537).
    """

    traits = Traits(cuts_in_ops=True)

    class Config(Options):
        """The options.

        Attributes:
            d_state: N, width of keys and queries.
            expand: d_inner / D.
            head_dim: V, by default the smallest width of at least 64 that cuts d_inner into equal heads.
            n_groups: G, number of B's and C's; each serves H / G heads and is normalised apart.
            conv_size: W, steps in the window of the convolution.
            A_init_range: the decay rates start uniform between these.
            dt_init_range: the step sizes start log-uniform between these.
            dt_limit: bounds of the step sizes, the upper one None for none; no bounds by default.
            part_scales: factors on z, u, B, C and dt as W_in gives them (Falcon-H1).
            rms_norm: the gated norm before W_out; without it there is only the gate.
            norm_before_gate: norm(o) * silu(z) in place of norm(o * silu(z)).
            norm_eps: added to the mean square in the norm.
            bias: biases of both projections.
            out_bias: bias of W_out, if it differs from `bias`.
            conv_bias: a bias of the convolution.
            backend: form of the ops.
        """

        d_state: int = Field(default=128, ge=1)
        expand: float = Field(default=2.0, gt=0)
        head_dim: int | None = Field(default=None, ge=1)
        n_groups: int = Field(default=1, ge=1)
        conv_size: int = Field(default=4, ge=1)
        A_init_range: tuple[float, float] = (1.0, 16.0)
        dt_init_range: tuple[float, float] = (0.001, 0.1)
        dt_limit: tuple[float, float | None] | None = None
        part_scales: tuple[float, float, float, float, float] | None = None
        rms_norm: bool = True
        norm_before_gate: bool = False
        norm_eps: float = Field(default=1e-5, gt=0)
        bias: bool = False
        out_bias: bool | None = None
        conv_bias: bool = True
        backend: Backend = "auto"

    def __init__(self, d_model: int, config: Config, *, place: Place = Place()):
        super().__init__(d_model, config, place=place)
        c = config
        check_range(self.name, "A_init_range", c.A_init_range)
        check_range(self.name, "dt_init_range", c.dt_init_range)
        if c.dt_limit:
            low, high = c.dt_limit
            check_range(self.name, "dt_limit", (low, low if high is None else high), zero=True)
        self.d_inner = whole(self.name, f"expand * d_model = {c.expand:g} * {d_model}", c.expand * d_model)
        if c.head_dim and self.d_inner % c.head_dim:
            raise UsageError(f"{self.name}: head_dim={c.head_dim} does not divide expand * d_model = {self.d_inner}.")
        self.n_heads = self.d_inner // c.head_dim if c.head_dim else derive_heads(self.d_inner, 64)
        if self.n_heads % c.n_groups:
            raise UsageError(f"{self.name}: n_groups={c.n_groups} does not divide the number of heads, {self.n_heads}.")
        keys = c.n_groups * c.d_state
        self.conv_parts = [self.d_inner, keys, keys]  # u, B, C
        self.parts = [self.d_inner, sum(self.conv_parts), self.n_heads]  # z, what is convolved, dt

        self.in_proj = nn.Linear(d_model, sum(self.parts), bias=c.bias)
        self.conv = CausalConv(
            sum(self.conv_parts), c.conv_size, bias=c.conv_bias, activation="silu", backend=conv_backend(c.backend)
        )
        self.dt_bias = nn.Parameter(step_bias(self.n_heads, *c.dt_init_range))
        self.A_log = nn.Parameter(log_rates(self.n_heads, *c.A_init_range))
        self.D = nn.Parameter(torch.ones(self.n_heads))
        if c.rms_norm:
            self.norm = GatedRMSNorm(
                self.d_inner, n_groups=c.n_groups, eps=c.norm_eps, norm_before_gate=c.norm_before_gate
            )
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=c.bias if c.out_bias is None else c.out_bias)
        self.cell = self._cell()
        with torch.no_grad():
            self.out_proj.weight /= math.sqrt(place.n_layers)
            for layer in (self.in_proj, self.out_proj):
                if layer.bias is not None:
                    layer.bias.zero_()

    def init_state(self, batch_size: int, *, capacity: int | None = None, device=None, dtype=None) -> Mamba2State:
        device, dtype = first_parameter_like(self, device, dtype)
        shapes = self._state_shapes(batch_size)
        return Mamba2State(*(torch.zeros(s, device=device, dtype=recurrent_dtype(dtype)) for s in shapes))

    def _state_shapes(self, batch_size: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        ssm = (batch_size, self.n_heads, self.config.d_state, self.d_inner // self.n_heads)
        return self.conv.state_shape(batch_size), ssm

    def forward(self, x: Tensor, state: State | None = None, context: Context | None = None) -> tuple[Tensor, State]:
        conv_state, ssm_state = (None, None) if state is None else state
        rows: Tensor | None = None
        if self.cell is not None and single(x, state, context):
            norm = self.norm if self.config.rms_norm else None
            if bare(self.conv, cls=CausalConv) and (norm is None or bare(norm, cls=GatedRMSNorm)):
                rows = self.in_proj(x)
                scales = self.conv.weight, self.conv.bias, self.A_log, self.dt_bias, self.D
                weight = None if norm is None else norm.weight
                done = heads_cell_step(self.cell, rows, *scales, weight, cast(Mamba2State, state), OPS)
                if done is not None:
                    return self.out_proj(done), state
        z, u, dt = project(x, self.in_proj, self.parts) if rows is None else rows.split(self.parts, -1)
        if self.config.part_scales:
            z, u, dt = self._scaled(z, u, dt, *self.config.part_scales)
        u, conv_state = self.conv(u, conv_state, context)
        u, b, c = u.split(self.conv_parts, -1)
        u = u.unflatten(-1, (self.n_heads, -1))
        b, c = (m.unflatten(-1, (self.config.n_groups, -1)) for m in (b, c))

        dt = F.softplus(precise(dt) + self.dt_bias)
        if self.config.dt_limit:
            dt = dt.clamp(*self.config.dt_limit)
        log_decay = -precise(self.A_log).exp() * dt
        o, ssm_state = linear_attention(
            c,
            b,
            u * dt[..., None],
            log_decay,
            ssm_state,
            scale=1.0,
            backend=main_backend(self.config.backend),
            **packing(context),
        )
        o = torch.addcmul(o, self.D[:, None].to(o.dtype), u.to(o.dtype)).flatten(-2)
        o = self.norm(o, z) if self.config.rms_norm else o * F.silu(z)
        return self.out_proj(o.to(x.dtype)), Mamba2State(conv_state, ssm_state)

    def _scaled(
        self, z: Tensor, u: Tensor, dt: Tensor, of_z: float, of_u: float, of_b: float, of_c: float, of_dt: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What W_in gives, u with B and C, times a factor for each of the five."""
        scaled = [part * f for part, f in zip(u.split(self.conv_parts, -1), (of_u, of_b, of_c), strict=True)]
        return z * of_z, torch.cat(scaled, -1), dt * of_dt

    def _cell(self) -> HeadsCell | None:
        """How a single step is computed in one call, None where it is not."""
        c = self.config
        if c.backend not in STEPPING or c.dt_limit or c.part_scales:
            return None
        keys = c.n_groups * c.d_state
        return HeadsCell(
            width=sum(self.parts),
            conv_at=self.d_inner,
            channels=sum(self.conv_parts),
            conv_size=c.conv_size,
            silu=True,
            q_at=self.d_inner + keys,
            k_at=self.d_inner,
            v_at=0,
            beta_at=-1,
            dt_at=sum(self.parts[:2]),
            gate_at=0,
            n_key_heads=c.n_groups,
            n_heads=self.n_heads,
            d_key=c.d_state,
            d_value=self.d_inner // self.n_heads,
            v_times_dt=True,
            n_parts=c.n_groups,
            gate_first=not c.norm_before_gate,
            q_norm=-1.0,
            beta_range=1.0,
            scale=1.0,
            norm_eps=c.norm_eps,
        )

    def flops_per_token(self, context_length: int) -> int:
        projections = 2 * self.d_model * (sum(self.parts) + self.d_inner)
        return projections + 2 * self.d_inner * self.config.d_state  # the read S^T C; the outer product is no matmul

    @classmethod
    def law_cases(cls) -> list[dict[str, Any]]:
        return [
            {},
            {"d_state": 5, "expand": 1.5, "head_dim": 3, "n_groups": 2, "conv_size": 3, "backend": "reference"},
            {"d_state": 16, "norm_before_gate": True, "bias": True, "conv_bias": False, "backend": "chunked"},
            {"d_state": 8, "rms_norm": False, "A_init_range": (0.5, 2.0), "dt_init_range": (0.01, 1.0)},
            {"d_state": 16, "dt_limit": (0.002, 0.05), "n_groups": 2, "head_dim": 8, "norm_eps": 1e-4},
            {"d_state": 8, "dt_limit": (0.02, None), "out_bias": True, "part_scales": (0.7, 1.2, 0.8, 1.1, 0.9)},
        ]
