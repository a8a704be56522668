"""RWKV-7's time mixing."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from zoo.core.errors import UsageError
from zoo.core.options import Options
from zoo.mixers.parts import Backend, precise
from zoo.norms import l2_norm
from zoo.ops import dplr, token_shift
from zoo.ops.bridge import steps_alone
from zoo.ops.cells import KERNEL, rwkv7_step, shift_step
from zoo.ops.modules import bare, widely
from zoo.ops.single_step import STEPPING
from zoo.parameters import set_rule
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

FIRST_VALUES = "rwkv7.first_values"  # (B, T, D) in the context: the values of the first layer that ran

SHARES = ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g")
LOW_RANKS, VALUE_RANKS = ("w0", "w1", "w2", "a0", "a1", "a2"), ("v0", "v1", "v2")
OTHERS = ("g1", "g2", "k_k", "k_a", "r_k")


class RWKV7State(NamedTuple):
    shift: Tensor  # (B, 1, D): the last input
    memory: Tensor  # (B, H, K, K)


@register("rwkv7")
class RWKV7(Mixer):
    """The time mixing of RWKV-7 "Goose": a delta rule with decays and rates (Peng et al. 2025, arXiv 2503.14456).

    Section 4 of the paper, as in the authors' code:

        x^i = x_t + x_i * (x_{t-1} - x_t) for i in r, w, k, v, a, g
        r, k, v = W_r x^r, W_k x^k, W_v x^v ;  gate = sigmoid(x^g g1) g2
        log decay = -exp(-1/2) sigmoid(w0 + tanh(x^w w1) w2) ;  rate = sigmoid(a0 + x^a a1 a2)
        v = v + (v_first - v) * sigmoid(v0 + x^v v1 v2)
        kappa = k * k_k / |k * k_k| in each head ;  k = k * (1 + (rate - 1) * k_a)
        S_t = diag(exp(log decay)) S_{t-1} - (rate * kappa) kappa^T S_{t-1} + k v^T ;  o = S_t^T r
        y = W_o ((GroupNorm(o) + (sum of r * k * r_k) v) * gate)

    v_first are the values of the first rwkv7 layer, which stores them in `context.shared` and mixes in none (the
    model's first layer has no v0, v1 and v2). If a later layer finds no values there, it uses zeros, and the gate
    scales its own values. Parameters have the authors' names and shapes, axes of 1 aside.

    Published inits: x_i, w0 and a0 depend on channel and depth, the low ranks and W_o start at zero; W_r and W_v are
    orthogonal, W_k a tenth of that. Published rules of training: only the four matrices are decayed, and w0 has twice
    the learning rate (as rules for the optimizer, see `zoo.parameters`).

    | state   | cost per token              | parallel form (WY)           | cannot                            |
    |---------|-----------------------------|------------------------------|-----------------------------------|
    | D + D K | 8 D^2 + 4 D ranks + 4 D K   | chunked matmuls, O(T) in all | reflect without decay: see below  |

    A head stores up to K associations without interference. Eigenvalues of a step are real and between -0.46 and 1
    (decays are above 0.54, |kappa| = 1, rates below 1): a sign can change, but then the value shrinks. A delta rule
    with negative eigenvalues keeps its size (Grazzi et al. 2025, arXiv 2411.12537).
    """

    traits = Traits(cuts_in_ops=True)

    class Config(Options):
        """The options.

        Attributes:
            head_dim: K, by default the smallest width of at least 64 that cuts D into equal heads.
            decay_rank: rank of the decay, by default the authors' max(32, 2.5 sqrt(D) rounded to a multiple of 32).
            rate_rank: rank of the in-context rate, by default the same.
            value_rank: rank of the gate on the first layer's values, by default with 1.7 instead of 2.5.
            gate_rank: rank of the output gate, by default with 5 instead of 2.5.
            value_residual: mix the first layer's values in.
            norm_eps: epsilon of the group norm.
            kappa_eps: added to |k * k_k|^2 under its root; 0 in the authors' code, 1e-6 in fla's fused form.
            backend: form of the op.
        """

        head_dim: int | None = Field(default=None, ge=1)
        decay_rank: int | None = Field(default=None, ge=1)
        rate_rank: int | None = Field(default=None, ge=1)
        value_rank: int | None = Field(default=None, ge=1)
        gate_rank: int | None = Field(default=None, ge=1)
        value_residual: bool = True
        norm_eps: float = Field(default=64e-5, gt=0)
        kappa_eps: float = Field(default=0.0, ge=0)
        backend: Backend = "auto"

    def __init__(self, d_model: int, config: Config, *, place: Place = Place()):
        super().__init__(d_model, config, place=place)
        c = config
        if c.head_dim and d_model % c.head_dim:
            raise UsageError(f"{self.name}: head_dim={c.head_dim} does not divide d_model={d_model}.")
        self.n_heads = d_model // c.head_dim if c.head_dim else derive_heads(d_model, 64)
        self.head_dim = d_model // self.n_heads
        self.first = place.layer == 0

        def vector() -> nn.Parameter:
            return nn.Parameter(torch.empty(d_model))

        self.x_r, self.x_w, self.x_k, self.x_v, self.x_a, self.x_g = (vector() for _ in range(6))
        self.w0, self.w1, self.w2 = vector(), *low_rank(d_model, c.decay_rank, 2.5)
        self.a0, self.a1, self.a2 = vector(), *low_rank(d_model, c.rate_rank, 2.5)
        if c.value_residual and not self.first:
            self.v0, self.v1, self.v2 = vector(), *low_rank(d_model, c.value_rank, 1.7)
        self.g1, self.g2 = low_rank(d_model, c.gate_rank, 5.0)
        self.k_k, self.k_a = vector(), vector()
        self.r_k = nn.Parameter(torch.empty(self.n_heads, self.head_dim))
        self.receptance, self.key, self.value, self.output = (nn.Linear(d_model, d_model, bias=False) for _ in "rkvo")
        self.ln_x = nn.GroupNorm(self.n_heads, d_model, eps=c.norm_eps)
        self._init(place.layer, place.n_layers)
        set_rule(self, "w0", lr_scale=2.0)
        for name in ("r_k", "w1", "w2", "a1", "a2", "v1", "v2", "g1", "g2"):
            set_rule(self, name, weight_decay=False)

    @torch.no_grad()
    def _init(self, layer: int, n_layers: int) -> None:
        D, K = self.d_model, self.head_dim
        depth, rest = layer / max(n_layers - 1, 1), 1 - layer / n_layers  # 0 to 1, 1 to almost 0
        channel = torch.arange(D)
        shifts = ((self.x_r, 0.2), (self.x_w, 0.9), (self.x_k, 0.7), (self.x_v, 0.7), (self.x_a, 0.9), (self.x_g, 0.2))
        for x, power in shifts:
            x.copy_(1 - (channel / D) ** (power * rest))
        line = channel / (D - 1)
        zigzag = (2 * (channel % K) - (K - 1)) / max(K - 1, 1)  # -1 to 1 across a head
        zigzag = zigzag * zigzag.abs()
        self.w0.copy_(-5.5 + 6 * line ** (1 + depth**0.3) + 2.5 * zigzag)
        self.a0.copy_(-0.19 + 0.3 * zigzag + 0.4 * (line - 0.5))
        if self.config.value_residual and not self.first:
            self.v0.copy_(0.73 - 0.4 * (line - 0.5))
        self.k_k.copy_(0.71 - 0.1 * (line - 0.5))
        self.k_a.fill_(1.02)
        self.r_k.fill_(-0.04)
        for linear, gain in ((self.receptance, 1.0), (self.key, 0.1), (self.value, 1.0)):
            nn.init.orthogonal_(linear.weight, gain=gain)
        self.output.weight.zero_()
        self.ln_x.weight.fill_(((1 + layer) / n_layers) ** 0.7)

    def init_state(self, batch_size: int, *, capacity: int | None = None, device=None, dtype=None) -> RWKV7State:
        device, dtype = first_parameter_like(self, device, dtype)
        shapes = self._state_shapes(batch_size)
        return RWKV7State(*(torch.zeros(s, device=device, dtype=recurrent_dtype(dtype)) for s in shapes))

    def _state_shapes(self, batch_size: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (batch_size, 1, self.d_model), (batch_size, self.n_heads, self.head_dim, self.head_dim)

    def forward(self, x: Tensor, state: State | None = None, context: Context | None = None) -> tuple[Tensor, State]:
        if single(x, state, context) and self.config.backend in STEPPING and bare(self.ln_x, cls=nn.GroupNorm):
            done = self._one_step(x, cast(RWKV7State, state), context)
            if done is not None:
                return self.output(done), state
        shift, memory = (None, None) if state is None else state
        before, shift = token_shift(x, shift, **packing(context))
        shifts = (self.x_r, self.x_w, self.x_k, self.x_v, self.x_a, self.x_g)
        x_r, x_w, x_k, x_v, x_a, x_g = (torch.lerp(x, before, mu.to(x.dtype)) for mu in shifts)

        r, k, v = self.receptance(x_r), self.key(x_k), self.value(x_v)
        gate = torch.sigmoid(x_g @ self.g1) @ self.g2
        log_decay = -(math.e**-0.5) * torch.sigmoid(self.w0 + precise(torch.tanh(x_w @ self.w1) @ self.w2))
        rate = torch.sigmoid(self.a0 + precise(x_a @ self.a1 @ self.a2))
        if self.config.value_residual:
            v = self._mix_first_values(v, x_v, context)

        kappa = self._heads(precise(k) * self.k_k)
        kappa = l2_norm(kappa, self.config.kappa_eps) if self.config.kappa_eps else F.normalize(kappa, dim=-1)
        k = precise(k) * (1 + (rate - 1) * self.k_a)
        r, k, v, rate, log_decay = (self._heads(m) for m in (precise(r), k, v, rate, log_decay))
        o, memory = dplr(
            r, k, v, -kappa, kappa * rate, log_decay, memory, scale=1.0, backend=self.config.backend, **packing(context)
        )
        bonus = (r * k * self.r_k).sum(-1, keepdim=True) * v
        norm = widely(self.ln_x, o.reshape(-1, self.d_model))
        y = (norm.view(x.shape) + bonus.flatten(-2)) * gate
        return self.output(y.to(x.dtype)), RWKV7State(shift, memory)

    def _one_step(self, x: Tensor, state: RWKV7State, context: Context | None) -> Tensor | None:
        """What a single step gives before the last projection, computed in two calls; the state moves on in place."""
        (shift, memory), c = state, self.config
        own = self._parameters  # by name at once: torch looks up each attribute in 2 microseconds
        shares, before, after = ([own.get(name) for name in names] for names in (SHARES, LOW_RANKS, OTHERS))
        mixes = c.value_residual and not self.first
        mixing = [own.get(name) for name in VALUE_RANKS] if mixes else [None] * 3
        if any(x is None for x in (*shares, *before, *after, *(mixing if mixes else ()))):
            return None  # something stands in its place
        weights = [*before, *mixing, *after, self.ln_x.weight, self.ln_x.bias]
        if memory.requires_grad or not steps_alone(KERNEL, x, *weights, shift, memory):
            return None
        mixed = shift_step(x, shift, *cast(list[Tensor], shares))
        if mixed is None:
            return None
        x_r, _, x_k, x_v, _, _ = mixed.unbind()
        products = self.receptance(x_r), self.key(x_k), self.value(x_v)
        r, k, v = (product.to(x.dtype).contiguous() for product in products)
        first = own_values = None
        if c.value_residual and context is not None:
            first = None if self.first else context.shared.get(FIRST_VALUES)
            if first is None:
                own_values = v if self.first else v.clone()
        y = rwkv7_step(mixed, r, k, v, first, weights, memory, c.kappa_eps, c.norm_eps)
        if y is not None:
            shift.copy_(x)
            if own_values is not None and context is not None:
                context.shared[FIRST_VALUES] = own_values
        return y

    def _mix_first_values(self, v: Tensor, x_v: Tensor, context: Context | None) -> Tensor:
        """v moved towards the first layer's; the first layer that runs leaves its own in the context."""
        first = None if context is None or self.first else context.shared.get(FIRST_VALUES)
        if first is None and context is not None:
            context.shared[FIRST_VALUES] = v
        if self.first:
            return v
        share = torch.sigmoid(self.v0 + precise(x_v @ self.v1 @ self.v2))
        mixed = precise(v) * (1 - share) if first is None else torch.lerp(precise(v), precise(first), share)
        return mixed.to(v.dtype)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.n_heads, self.head_dim))

    def flops_per_token(self, context_length: int) -> int:
        ranks = self.w1.shape[1] + self.a1.shape[1] + self.g1.shape[1]
        if self.config.value_residual and not self.first:
            ranks += self.v1.shape[1]
        return 8 * self.d_model**2 + 4 * self.d_model * ranks + 4 * self.d_model * self.head_dim  # read of a, and of r

    @classmethod
    def law_cases(cls) -> list[dict[str, Any]]:
        return [
            {},
            {"head_dim": 8, "decay_rank": 3, "rate_rank": 5, "value_rank": 2, "gate_rank": 7, "backend": "reference"},
            {"head_dim": 16, "value_residual": False, "norm_eps": 1e-3, "kappa_eps": 0.1, "backend": "chunked"},
        ]


def low_rank(width: int, rank: int | None, factor: float) -> tuple[nn.Parameter, nn.Parameter]:
    """Weights D to rank, starting at zero, and rank to D, orthogonal and a tenth in size."""
    rank = rank or max(32, round(factor * width**0.5 / 32) * 32)
    down, up = nn.Parameter(torch.zeros(width, rank)), nn.Parameter(torch.empty(rank, width))
    nn.init.orthogonal_(up, gain=0.1 * max(1.0, rank / width) ** 0.5)
    return down, up
