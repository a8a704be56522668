"""Retention: linear attention with a fixed decay for each head, over rotated queries and keys."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from zoo.core.options import Options
from zoo.mixers.parts import Backend, init_projections, precise, project, started, whole
from zoo.ops import linear_attention, rotary_table, rotary_width, rotate
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
)
from zoo.states import document_positions, next_position


class RetentionState(NamedTuple):
    position: Tensor  # (B,) int64: steps of the current document seen
    memory: Tensor  # (B, H, K, V)


@register("retention")
class Retention(Mixer):
    """RetNet's retention: linear attention with a fixed decay for each head (Sun et al. 2023, arXiv 2307.08621,
    equations 5, 6 and 8).

        q, k, v, z = W x ;  q_t, k_t rotated by the angles t theta ;  gamma_h = 1 - 2^(-5 - h), h = 0 .. H - 1
        S_t = gamma_h S_{t-1} + k_t v_t^T ;  o_t = S_t^T q_t / sqrt(K)
        y = W_out (silu(z) * GroupNorm_h(o))

    Rotation and decay together are the published xPos. Heads have 256 channels, as published; a narrow layer has at
    least four heads, as long as each has 16 channels. The heads remember about 32, 64, 128 ... steps, so one is not
    enough.

    | state           | cost per token   | parallel form         | cannot                                       |
    |-----------------|------------------|-----------------------|----------------------------------------------|
    | H K V, position | 16 D^2 + 2 H K V | chunked matmuls, O(T) | choose what to forget (its decays are        |
    |                 | with V = 2 K     |                       | fixed), or overwrite what it has stored      |
    """

    traits = Traits(cuts_in_ops=True)

    class Config(Options):
        """The options.

        Attributes:
            n_heads: H, by default the most heads of at least min(256, D / 4) channels, or 16, that divide D.
            expand_v: channels of v and of the gate, as a multiple of D.
            rope_base: the slowest rotation takes about 2 pi base steps.
            rope_interleaved: rotate neighbouring channels (the authors' code) or the two halves of a head
                (flash-linear-attention): the same model with its channels in another order.
            head_norm: "group" takes off each head's mean and divides by its deviation (the paper), "rms" divides by its
                root mean square (the authors' later code, and flash-linear-attention).
            norm_eps: added to the variance or mean square.
            gate: use an output gate.
            backend: form of the op.
        """

        n_heads: int | None = Field(default=None, ge=1)
        expand_v: float = Field(default=2.0, gt=0)
        rope_base: float = Field(default=10000.0, gt=0)
        rope_interleaved: bool = True
        head_norm: Literal["group", "rms"] = "group"
        norm_eps: float = Field(default=1e-6, gt=0)
        gate: bool = True
        backend: Backend = "auto"

    def __init__(self, d_model: int, config: Config, *, place: Place = Place()):
        super().__init__(d_model, config, place=place)
        c = config
        self.n_heads = c.n_heads or derive_heads(d_model, min(256, max(16, d_model // 4)))
        self.d_key = whole(self.name, f"{d_model} / {self.n_heads} heads", d_model / self.n_heads)
        head = f"expand_v * {d_model} / {self.n_heads} heads"
        self.d_value = whole(self.name, head, c.expand_v * d_model / self.n_heads)
        values = self.n_heads * self.d_value
        self.parts = [d_model, d_model, values, values if c.gate else 0]  # q, k, v, gate
        self.in_proj = nn.Linear(d_model, sum(self.parts), bias=False)
        self.norm_weight = nn.Parameter(torch.ones(self.d_value))
        self.out_proj = nn.Linear(values, d_model, bias=False)
        init_projections(self.in_proj, self.out_proj, place)

    def init_state(self, batch_size: int, *, capacity: int | None = None, device=None, dtype=None) -> RetentionState:
        device, dtype = first_parameter_like(self, device, dtype)
        memory = torch.zeros(self._memory_shape(batch_size), device=device, dtype=recurrent_dtype(dtype))
        return RetentionState(torch.zeros(batch_size, device=device, dtype=torch.int64), memory)

    def _memory_shape(self, batch_size: int) -> tuple[int, ...]:
        return batch_size, self.n_heads, self.d_key, self.d_value

    def log_decay(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """log gamma of every head, (H,)."""
        return torch.log1p(-torch.exp2(-5.0 - torch.arange(self.n_heads, device=device, dtype=dtype)))

    def forward(self, x: Tensor, state: State | None = None, context: Context | None = None) -> tuple[Tensor, State]:
        c, context = self.config, Context() if context is None else context
        in_step = state is None and context.resets is None  # all rows stand at the same positions
        state = self.init_state(len(x), device=x.device, dtype=x.dtype) if state is None else state
        q, k, v, gate = project(x, self.in_proj, self.parts)
        q, k, v = (m.unflatten(-1, (self.n_heads, -1)) for m in (q, k, v))
        start = started(state.position, context)
        positions = document_positions(start, x.shape[1], context.resets)
        angles = rotary_table(positions[:1] if in_step else positions, rotary_width(self.d_key), base=c.rope_base)
        q, k = (rotate(m, *angles, interleaved=c.rope_interleaved) for m in (q, k))
        log_decay = self.log_decay(x.device, state.memory.dtype).expand(*x.shape[:2], -1)
        o, memory = linear_attention(
            q, k, v, log_decay, state.memory, backend=c.backend, in_place=True, **packing(context)
        )
        o = self._normed(precise(o)).flatten(-2)
        o = o * F.silu(precise(gate)) if c.gate else o
        position = next_position(positions, start, context.lengths)
        return self.out_proj(o.to(x.dtype)), RetentionState(position, memory)

    def _normed(self, o: Tensor) -> Tensor:
        weight, eps = self.norm_weight.to(o.dtype), self.config.norm_eps
        if self.config.head_norm == "rms":
            return F.rms_norm(o, weight.shape, weight, eps)
        return F.layer_norm(o, weight.shape, weight, None, eps)

    def flops_per_token(self, context_length: int) -> int:
        projections = self.d_model * (sum(self.parts) + self.n_heads * self.d_value)
        return 2 * projections + 2 * self.n_heads * self.d_key * self.d_value  # the read S^T q

    @classmethod
    def law_cases(cls) -> list[dict[str, Any]]:
        return [
            {},
            {"n_heads": 2, "expand_v": 1.5, "head_norm": "rms", "norm_eps": 1e-4, "backend": "chunked"},
            {"n_heads": 4, "rope_base": 100.0, "rope_interleaved": False, "gate": False, "backend": "reference"},
        ]
