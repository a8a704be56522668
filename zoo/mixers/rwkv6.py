"""RWKV-6's time mixing."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from zoo.core.errors import UsageError
from zoo.core.options import Options
from zoo.mixers.parts import Backend, precise, whole
from zoo.ops import linear_attention, token_shift
from zoo.ops.common import blank
from zoo.ops.modules import widely
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

MIXED = "wkvrg"  # the authors' order


class RWKV6State(NamedTuple):
    shift: Tensor  # (B, 1, D): the last input
    memory: Tensor  # (B, H, K, V)


@register("rwkv6")
class RWKV6(Mixer):
    """RWKV-6 "Finch": linear attention with shifts and decays that depend on the input (Peng et al. 2024, arXiv
    2404.05892, section 4).

        d = x_{t-1} - x_t ;  m^i = tanh((x_t + maa_x d) W1^i) W2^i
        x^i = x_t + (maa_i + m^i) d for i in w, k, v, r, g
        r, k, v = W_r x^r, W_k x^k, W_v x^v ;  g = silu(W_g x^g) ;  log decay = -exp(decay + tanh(x^w D1) D2)
        o_t = (S_{t-1} + diag(u) k_t v_t^T)^T r_t ;  S_t = diag(exp(log decay_t)) S_{t-1} + k_t v_t^T
        y = W_o (GroupNorm(o) * g)

    A step reads the memory before the step's own decay and writing; of its own key it sees the share u (`time_faaaa`).
    Parameters have the authors' names and shapes, axes of 1 aside. The five W1^i lie in one matrix.

    Published inits: maa, decay and u depend on channel and depth, the first halves of the low ranks and W_o start at
    zero, W_r and W_v orthogonal, W_k and W_g a tenth of that. Published rules of training: only the five matrices are
    decayed, and `time_decay` has twice the learning rate.

    | state   | cost per token                          | parallel form         | cannot                            |
    |---------|-----------------------------------------|-----------------------|-----------------------------------|
    | D + D K | 10 D^2 + 20 D mix_rank + 4 D decay_rank | chunked matmuls, O(T) | overwrite what it has stored, or  |
    |         | + 2 D K                                 |                       | track states such as parity       |
    """

    class Config(Options):
        """The options.

        Attributes:
            head_dim: D / H, by default the smallest width of at least 64 that cuts D into equal heads.
            expand_k: channels of r, k and the decay, as a multiple of D (flash-linear-attention: 0.5).
            expand_v: channels of v and the gate, as a multiple of D.
            mix_rank: rank of each of the five mixings; 32 by default, 64 from D = 4096 on.
            decay_rank: rank of the decay; 64 by default, 128 from D = 4096 on.
            norm_eps: epsilon of the group norm (flash-linear-attention: 1e-5).
            backend: form of the op.
        """

        head_dim: int | None = Field(default=None, ge=1)
        expand_k: float = Field(default=1.0, gt=0)
        expand_v: float = Field(default=1.0, gt=0)
        mix_rank: int | None = Field(default=None, ge=1)
        decay_rank: int | None = Field(default=None, ge=1)
        norm_eps: float = Field(default=64e-5, gt=0)
        backend: Backend = "auto"

    def __init__(self, d_model: int, config: Config, *, place: Place = Place()):
        super().__init__(d_model, config, place=place)
        c, D = config, d_model
        if c.head_dim and D % c.head_dim:
            raise UsageError(f"{self.name}: head_dim={c.head_dim} does not divide d_model={D}.")
        self.n_heads = H = D // c.head_dim if c.head_dim else derive_heads(D, 64)
        self.d_key = whole(self.name, f"expand_k * {D} / {H} heads", c.expand_k * D / H)
        self.d_value = whole(self.name, f"expand_v * {D} / {H} heads", c.expand_v * D / H)
        keys, values, wide = H * self.d_key, H * self.d_value, D >= 4096
        mix, decay = c.mix_rank or (64 if wide else 32), c.decay_rank or (128 if wide else 64)

        for name in ("x", *MIXED):
            setattr(self, f"time_maa_{name}", nn.Parameter(torch.empty(D)))
        self.time_maa_w1 = nn.Parameter(torch.zeros(D, 5 * mix))
        self.time_maa_w2 = nn.Parameter(torch.empty(5, mix, D).uniform_(-0.01, 0.01))
        self.time_decay = nn.Parameter(torch.empty(keys))
        self.time_decay_w1 = nn.Parameter(torch.zeros(D, decay))
        self.time_decay_w2 = nn.Parameter(torch.empty(decay, keys).uniform_(-0.01, 0.01))
        self.time_faaaa = nn.Parameter(torch.empty(H, self.d_key))
        self.receptance, self.key = (nn.Linear(D, keys, bias=False) for _ in "rk")
        self.value, self.gate = (nn.Linear(D, values, bias=False) for _ in "vg")
        self.output = nn.Linear(values, D, bias=False)
        self.ln_x = nn.GroupNorm(H, values, eps=c.norm_eps)
        self._init(place.layer, place.n_layers)
        set_rule(self, "time_decay", lr_scale=2.0)
        for name in ("time_faaaa", "time_maa_w1", "time_maa_w2", "time_decay_w1", "time_decay_w2"):
            set_rule(self, name, weight_decay=False)

    @torch.no_grad()
    def _init(self, layer: int, n_layers: int) -> None:
        depth, rest = layer / max(n_layers - 1, 1), 1 - layer / n_layers  # 0 to 1, 1 to almost 0
        share = torch.arange(self.d_model) / self.d_model
        for name, power in (("x", 1.0), ("w", 1.0), ("k", 1.0), ("v", 1.0), ("r", 0.5), ("g", 0.5)):
            maa = getattr(self, f"time_maa_{name}")
            maa.copy_(1 - share ** (power * rest) - (0.3 * depth if name == "v" else 0))
        channel = torch.arange(self.time_decay.numel())
        line = channel / max(len(channel) - 1, 1)
        self.time_decay.copy_(-6 + 5 * line ** (0.7 + 1.3 * depth))
        zigzag = ((channel + 1) % 3 - 1) * 0.1
        self.time_faaaa.copy_((depth * (1 - line) + zigzag).view_as(self.time_faaaa))
        for linear, gain in ((self.receptance, 1.0), (self.key, 0.1), (self.value, 1.0), (self.gate, 0.1)):
            nn.init.orthogonal_(linear.weight, gain=gain)
        self.output.weight.zero_()
        self.ln_x.weight.fill_(((1 + layer) / n_layers) ** 0.7)

    def init_state(self, batch_size: int, *, capacity: int | None = None, device=None, dtype=None) -> RWKV6State:
        device, dtype = first_parameter_like(self, device, dtype)
        shapes = self._state_shapes(batch_size)
        return RWKV6State(*(torch.zeros(s, device=device, dtype=recurrent_dtype(dtype)) for s in shapes))

    def _state_shapes(self, batch_size: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (batch_size, 1, self.d_model), (batch_size, self.n_heads, self.d_key, self.d_value)

    def forward(self, x: Tensor, state: State | None = None, context: Context | None = None) -> tuple[Tensor, State]:
        state = self.init_state(len(x), device=x.device, dtype=x.dtype) if state is None else state
        before, shift = token_shift(x, state.shift, **packing(context))
        x_w, x_k, x_v, x_r, x_g = self._mixed(x, before)
        r, k, v, gate = self.receptance(x_r), self.key(x_k), self.value(x_v), F.silu(self.gate(x_g))
        decay = precise(torch.tanh(x_w @ self.time_decay_w1) @ self.time_decay_w2)
        log_decay = -torch.exp(precise(self.time_decay) + decay)
        r, k, v, log_decay = (precise(m).unflatten(-1, (self.n_heads, -1)) for m in (r, k, v, log_decay))
        o, memory = self._attend(r, k, v, log_decay, state.memory, context)
        norm = widely(self.ln_x, o.flatten(0, 1).flatten(1))
        return self.output((norm.view_as(gate) * gate).to(x.dtype)), RWKV6State(shift, memory)

    def _mixed(self, x: Tensor, before: Tensor) -> list[Tensor]:
        """x moved towards the previous step, each channel by a share that depends on both: for w, k, v, r and g."""
        step, (first, *fixed) = before - x, [getattr(self, f"time_maa_{i}") for i in ("x", *MIXED)]
        low = torch.tanh(torch.addcmul(x, step, first.to(x.dtype)) @ self.time_maa_w1)
        low = low.flatten(0, 1).unflatten(-1, (5, -1)).transpose(0, 1)  # (5, B T, rank)
        shares = torch.baddbmm(torch.stack(fixed)[:, None].to(low.dtype), low, self.time_maa_w2.to(low.dtype))
        return [torch.addcmul(x, step, share.view_as(x).to(x.dtype)) for share in shares.unbind()]

    def _attend(self, r, k, v, log_decay, memory: Tensor, context: Context | None) -> tuple[Tensor, Tensor]:
        """(S_{t-1} + diag(u) k_t v_t^T)^T r_t of every step (B, T, H, V), and the last S.

        The op reads after it has decayed and written. So each step there reads for the next one, and what the first one
        reads is added here.
        """
        lengths, resets = (None, None) if context is None else (context.lengths, context.resets)
        bonus = (r * precise(self.time_faaaa) * k).sum(-1, keepdim=True)
        r = r if resets is None else blank(r, resets)
        first = (r[:, :1, ..., None] * memory[:, None]).sum(-2)
        o, memory = linear_attention(
            F.pad(r[:, 1:], (0, 0, 0, 0, 0, 1)),
            k,
            v,
            log_decay,
            memory,
            scale=1.0,
            backend=self.config.backend,
            lengths=lengths,
            resets=resets,
        )
        return torch.addcmul(torch.cat([first, o[:, :-1]], 1), bonus, v), memory

    def flops_per_token(self, context_length: int) -> int:
        D, keys, values = self.d_model, self.n_heads * self.d_key, self.n_heads * self.d_value
        mix, decay = self.time_maa_w2.shape[1], self.time_decay_w1.shape[1]
        projections = D * (2 * keys + 3 * values) + 10 * D * mix + decay * (D + keys)
        return 2 * projections + 2 * keys * self.d_value  # the read S^T r

    @classmethod
    def law_cases(cls) -> list[dict[str, Any]]:
        return [
            {},
            {"head_dim": 8, "expand_k": 0.5, "expand_v": 1.5, "mix_rank": 3, "decay_rank": 5, "norm_eps": 1e-3}
            | {"backend": "reference"},
        ]
