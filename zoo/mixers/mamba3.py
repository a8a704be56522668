"""Mamba-3: a state space with a trapezoidal step, rotating states, and several inputs and outputs a head."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from zoo.core.errors import UsageError
from zoo.core.options import Options
from zoo.mixers.parts import Backend, at_last_step, check_range, precise, project, step_bias, whole
from zoo.norms import GatedRMSNorm
from zoo.ops import linear_attention, rotary_width, rotate
from zoo.ops.common import blank, check_packing, owned, valid_steps, widest, without_autocast
from zoo.parameters import set_rule
from zoo.protocol import (
    Context,
    Mixer,
    Place,
    State,
    derive_heads,
    first_parameter_like,
    packing,
    recurrent_dtype,
    register,
)


class Mamba3State(NamedTuple):
    angle: Tensor  # (B, H, A): how far each pair of channels has turned, between -pi and pi
    ssm: Tensor  # (B, H, N, V)
    k: Tensor  # (B, H, R, N): the last keys, turned; the next step writes them once more
    v: Tensor  # (B, H, V): the last u


@register("mamba3")
class Mamba3(Mixer):
    """Mamba-3, a state space with trapezoidal steps and rotations (Lahoti et al. 2026, arXiv 2603.15569).

    As in `mamba_ssm` 2.3.2, whose later code takes the rate of decay by `A_activation="heavy_tail"`.

        z, u, B, C, dt, a, l, theta = W_in x ;  dt = softplus(dt + dt_bias) ;  lambda = sigmoid(l)
        alpha_t = exp(-max(softplus(a), A_floor) dt_t) ;  phi_t = phi_{t-1} + pi tanh(theta_t) dt_t
        k_t = turn(RMSNorm(B) + B_bias, phi_t) ;  q_t = turn(RMSNorm(C) + C_bias, phi_t)
        S_t = alpha_t S_{t-1} + (1 - lambda_t) dt_t alpha_t k_{t-1} u_{t-1}^T + lambda_t dt_t k_t u_t^T
        y = W_out ((S_t^T q_t + D u_t) * silu(z))

    B and C are shared by the heads of a group; their biases, phi and all rates belong to one head. `turn` rotates
    pairs of a part of the N channels, `rope_fraction`. With `rank` R > 1 (MIMO) a step writes R keys with the values
    mimo_x_r * u, reads with R queries, gates each output with mimo_z_r * z, and sums them with the weights mimo_o_r.
    There is no convolution. The layer is computed as linear attention over R T steps: a key is written once, with the
    sum of both its weights, and the part that belongs to the next step is subtracted from the output.

    Sizes: d_inner = expand D, H = d_inner / head_dim, N = d_state, V = head_dim, A = rope_fraction N / 2. Published
    inits: dt log-uniform in [1e-3, 1e-1], D, the biases of B and C and mimo_z 1, mimo_x and mimo_o 1 / R, W_out divided
    by the root of the number of layers. Other weights start as torch's own linear layers do.

    | state                         | cost per token                            | parallel form                |
    |-------------------------------|-------------------------------------------|------------------------------|
    | H (A + R N) + d_inner (N + 1) | 6 expand D^2 + 4 D G R N + 2 R d_inner N  | chunked matmuls, O(R T)      |

    The rotations are those of complex decays: one layer can track parity, with steps of half a turn. Cannot overwrite
    what it has stored under a key: the stored value only turns and fades.
    """

    class Config(Options):
        """The options.

        Attributes:
            d_state: N, width of keys and queries.
            expand: d_inner / D.
            head_dim: V, by default the smallest width of at least 64 that cuts d_inner into equal heads.
            n_groups: G, number of B's and C's; each serves H / G heads.
            rank: R, keys that a step writes and queries that it reads with; 1 for SISO, above for MIMO (published: 4).
            rope_fraction: fraction of the N channels that are rotated (published: 0.5 or 1).
            dt_init_range: the step sizes start log-uniform between these.
            A_floor: the least rate of decay.
            A_activation: of the rate, softplus(a), or "heavy_tail", 1 + a from zero on and 1 / (1 - a) below, as in
                `mamba_ssm` from June 2026 on.
            out_norm: RMSNorm_head(o) * silu(z) in place of o * silu(z).
            norm_eps: added to the mean square in all norms.
            backend: form of the op.
        """

        d_state: int = Field(default=128, ge=2)
        expand: float = Field(default=2.0, gt=0)
        head_dim: int | None = Field(default=None, ge=1)
        n_groups: int = Field(default=1, ge=1)
        rank: int = Field(default=1, ge=1)
        rope_fraction: float = Field(default=0.5, gt=0, le=1)
        dt_init_range: tuple[float, float] = (0.001, 0.1)
        A_floor: float = Field(default=1e-4, ge=0)
        A_activation: Literal["softplus", "heavy_tail"] = "softplus"
        out_norm: bool = False
        norm_eps: float = Field(default=1e-5, gt=0)
        backend: Backend = "auto"

    def __init__(self, d_model: int, config: Config, *, place: Place = Place()):
        super().__init__(d_model, config, place=place)
        c = config
        check_range(self.name, "dt_init_range", c.dt_init_range)
        self.d_inner = whole(self.name, f"expand * d_model = {c.expand:g} * {d_model}", c.expand * d_model)
        if c.head_dim and self.d_inner % c.head_dim:
            raise UsageError(f"{self.name}: head_dim={c.head_dim} does not divide expand * d_model = {self.d_inner}.")
        self.n_heads = H = self.d_inner // c.head_dim if c.head_dim else derive_heads(self.d_inner, 64)
        if H % c.n_groups:
            raise UsageError(f"{self.name}: n_groups={c.n_groups} does not divide the number of heads, {H}.")
        self.n_angles = rotary_width(c.d_state, c.rope_fraction) // 2
        if not self.n_angles:
            raise UsageError(
                f"{self.name}: rope_fraction={c.rope_fraction:g} of d_state={c.d_state} holds no pair of channels. "
                "Raise either, to a product of at least 2."
            )
        if c.rank > 1 and c.d_state % 2:
            raise UsageError(f"{self.name}: d_state={c.d_state} is odd. With rank > 1 it should be even.")
        keys, V = c.n_groups * c.rank * c.d_state, self.d_inner // H
        self.parts = [self.d_inner, self.d_inner, keys, keys, H, H, H, self.n_angles]  # z, u, B, C, dt, a, l, theta

        self.in_proj = nn.Linear(d_model, sum(self.parts), bias=False)
        self.dt_bias = nn.Parameter(step_bias(H, *c.dt_init_range))
        self.B_bias, self.C_bias = (nn.Parameter(torch.ones(H, c.rank, c.d_state)) for _ in range(2))
        self.B_norm, self.C_norm = (GatedRMSNorm(c.d_state, eps=c.norm_eps) for _ in range(2))
        if c.rank > 1:
            shape = (H, c.rank, V)
            self.mimo_x, self.mimo_o = (nn.Parameter(torch.full(shape, 1 / c.rank)) for _ in range(2))
            self.mimo_z = nn.Parameter(torch.ones(shape))
        self.D = nn.Parameter(torch.ones(H))
        if c.out_norm:
            self.norm = GatedRMSNorm(self.d_inner, n_groups=H, eps=c.norm_eps)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=False)
        with torch.no_grad():
            self.out_proj.weight /= math.sqrt(place.n_layers)
        for name in ("B_bias", "C_bias"):
            set_rule(self, name, weight_decay=False)

    def init_state(self, batch_size: int, *, capacity: int | None = None, device=None, dtype=None) -> Mamba3State:
        device, dtype = first_parameter_like(self, device, dtype)
        H, N, V = self.n_heads, self.config.d_state, self.d_inner // self.n_heads
        shapes = [(H, self.n_angles), (H, N, V), (H, self.config.rank, N), (H, V)]
        return Mamba3State(*(torch.zeros(batch_size, *s, device=device, dtype=recurrent_dtype(dtype)) for s in shapes))

    def forward(self, x: Tensor, state: State | None = None, context: Context | None = None) -> tuple[Tensor, State]:
        c, H = self.config, self.n_heads
        state = self.init_state(len(x), device=x.device, dtype=x.dtype) if state is None else state
        packed = packing(context)
        lengths, resets = packed.get("lengths"), packed.get("resets")
        lengths = check_packing(self.name, "lengths (B,) whole numbers; resets (B, T) bool.", x, lengths, resets)
        padding = None if lengths is None else ~valid_steps(lengths, x.shape[1])
        if padding is not None and resets is not None:
            resets = blank(resets, padding)

        z, u, b, q, dt, rate, mix, theta = project(x, self.in_proj, self.parts)
        z, u = (precise(m).unflatten(-1, (H, -1)) for m in (z, u))
        dt = F.softplus(precise(dt) + self.dt_bias)
        dt = dt if padding is None else blank(dt, padding)  # padding writes nothing and turns nothing
        rate = precise(rate)
        rate = F.softplus(rate) if c.A_activation == "softplus" else rate.clamp(min=0) + 1 / (1 - rate.clamp(max=0))
        log_decay = -rate.clamp(min=c.A_floor) * dt
        now = torch.sigmoid(precise(mix)) * dt  # what a step writes of its own key, and of the key before it
        before = dt - now
        after = F.pad(before[:, 1:], (0, 0, 0, 1))
        if resets is not None:
            after = blank(after, F.pad(resets[:, 1:], (0, 1)))

        angle = self._angles(theta, dt, state.angle, resets)
        k = self._turned(self.B_norm(self._keys(b)), self.B_bias, angle)
        q = self._turned(self.C_norm(self._keys(q)), self.C_bias, angle)
        pending = before[:, 0, :, None, None] * self._outer(state.k, state.v)
        o, ssm = self._attend(q, k, u, now + after, after, log_decay, state.ssm + pending, lengths, resets)
        y = self._out(o, u, z).to(x.dtype)
        last = at_last_step(k, state.k, lengths), at_last_step(u, state.v, lengths)
        return self.out_proj(y), Mamba3State(owned(angle[:, -1].to(state.angle.dtype)), ssm, *last)

    def _keys(self, x: Tensor) -> Tensor:
        """B or C as W_in gives them -> (B, T, G, R, N)."""
        return precise(x).unflatten(-1, (self.config.rank, self.config.n_groups, -1)).transpose(2, 3)

    def _angles(self, theta: Tensor, dt: Tensor, start: Tensor, resets: Tensor | None) -> Tensor:
        """phi of every step (B, T, H, A), from -pi to pi; summed in float64 where there is one: sums grow with T."""
        turns = (math.pi * torch.tanh(precise(theta))[:, :, None] * dt[..., None]).to(widest(dt.device))
        total, start = turns.cumsum(1), start[:, None].to(turns.dtype)
        if resets is not None:  # from the last reset on, the sum since then
            since = torch.where(resets, torch.arange(resets.shape[1], device=resets.device), -1).cummax(1).values
            since = since[..., None, None].expand_as(turns)
            start = torch.where(since < 0, start, -(total - turns).gather(1, since.clamp(min=0)))
        total = total + start
        return total - 2 * math.pi * (total.detach() / (2 * math.pi)).round()

    def _turned(self, x: Tensor, bias: Tensor, angle: Tensor) -> Tensor:
        """Keys (B, T, G, R, N) with each head's bias, turned: (B, T, H, R, N).

        SISO pairs channels 2i and 2i + 1, MIMO i and i + N / 2, as in the authors' code.
        """
        x = x.repeat_interleave(self.n_heads // self.config.n_groups, 2) + precise(bias)
        halves = self.config.rank > 1
        if halves:
            angle = F.pad(angle, (0, self.config.d_state // 2 - self.n_angles))
        cos, sin = (a.flatten(1, 2) for a in (angle.cos(), angle.sin()))
        return rotate(x.flatten(1, 2), cos, sin, interleaved=not halves).view_as(x)

    def _values(self, u: Tensor) -> Tensor:
        """The R values of every head, (..., H, V) -> (..., H, R, V)."""
        return u[..., None, :] * precise(self.mimo_x) if self.config.rank > 1 else u[..., None, :]

    def _outer(self, k: Tensor, u: Tensor) -> Tensor:
        """sum_r k_r v_r^T: what one step writes, (B, H, R, N) and (B, H, V) -> (B, H, N, V)."""
        return (k[..., None] * self._values(u)[..., None, :]).sum(2)

    @without_autocast
    def _attend(self, q, k, u, written, after, log_decay, state, lengths, resets) -> tuple[Tensor, Tensor]:
        """S_t^T q_t of every query, (B, T, H, R, V), and the last S.

        Linear attention over R T steps writes `written` k_r v_r^T, of which `after` belongs to the next step; and its
        query r reads no keys of its own step behind r. Both are put right by products inside the step.
        """
        R = self.config.rank
        v = self._values(u)
        wide_q, wide_k, wide_v = (m.transpose(2, 3).flatten(1, 2) for m in (q, k, v))
        scale = written.repeat_interleave(R, 1)[..., None]
        if R > 1:
            log_decay = F.pad(log_decay[:, :, None], (0, 0, 0, R - 1)).flatten(1, 2)  # at a token's first step
            resets = None if resets is None else F.pad(resets[..., None], (0, R - 1)).flatten(1)
            lengths = None if lengths is None else lengths * R
        o, state = linear_attention(
            wide_q,
            wide_k * scale,
            wide_v,
            log_decay,
            state,
            lengths=lengths,
            resets=resets,
            scale=1.0,
            backend=self.config.backend,
        )
        o = o.unflatten(1, (-1, R)).transpose(2, 3)
        after = after[..., None, None]
        if R == 1:
            return torch.addcmul(o, (q * k).sum(-1, keepdim=True) * after, v, value=-1), state
        unread = torch.ones(R, R, dtype=o.dtype, device=o.device).triu(1) * written[..., None, None]
        return o + (q @ k.mT * (unread - after)) @ v, state

    def _out(self, o: Tensor, u: Tensor, z: Tensor) -> Tensor:
        """What the R queries read (B, T, H, R, V), with the skip and the gate, summed to (B, T, d_inner)."""
        mimo = self.config.rank > 1
        o = torch.addcmul(o, precise(self.D)[:, None, None], self._values(u))
        z = z[..., None, :] * precise(self.mimo_z) if mimo else z[..., None, :]
        if self.config.out_norm:
            o, z = (m.transpose(2, 3).flatten(-2) for m in (o, z))
            o = self.norm(o, z).unflatten(-1, (self.n_heads, -1)).transpose(2, 3)
        else:
            o = o * F.silu(z)
        return ((o * precise(self.mimo_o)).sum(-2) if mimo else o.squeeze(-2)).flatten(-2)

    def flops_per_token(self, context_length: int) -> int:
        R, N = self.config.rank, self.config.d_state
        projections = self.d_model * (sum(self.parts) + self.d_inner)
        inside = R * R * (self.n_heads * N + self.d_inner) if R > 1 else 0  # q k^T of a step, and its values
        return 2 * (projections + R * self.d_inner * N + inside)

    @classmethod
    def law_cases(cls) -> list[dict[str, Any]]:
        return [
            {"d_state": 16},
            {"d_state": 5, "expand": 1.5, "head_dim": 3, "n_groups": 2, "rope_fraction": 1.0, "backend": "reference"},
            {"d_state": 6, "rank": 2, "n_groups": 2, "head_dim": 8, "out_norm": True, "norm_eps": 1e-4, "A_floor": 0.02}
            | {"dt_init_range": (0.01, 1.0), "backend": "chunked", "A_activation": "heavy_tail"},
        ]
