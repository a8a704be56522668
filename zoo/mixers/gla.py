"""Gated linear attention: each channel of the memory has a decay that depends on the input."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from zoo.core.options import Options
from zoo.mixers.parts import Backend, head_widths, init_projections, precise, project
from zoo.norms import GatedRMSNorm
from zoo.ops import linear_attention
from zoo.protocol import Context, Mixer, Place, State, Traits, first_parameter_like, packing, recurrent_dtype, register


class GLAState(NamedTuple):
    memory: Tensor  # (B, H, K, V)


@register("gla")
class GatedLinearAttention(Mixer):
    """Gated linear attention: each channel has a decay that depends on the input (Yang et al. 2024, arXiv 2312.06635).

    Equation 3 and section 4.4 of the paper, as in flash-linear-attention:

        q, k, v, z = W x ;  g = log sigmoid(W_up W_down x + b) / tau
        S_t = diag(exp g_t) S_{t-1} + k_t v_t^T ;  o_t = S_t^T q_t / sqrt(K)
        y = W_out (silu(z) * RMSNorm_head(o))

    Sizes as published: keys D / 2 wide and values D, in four heads (fewer where a head's keys would have less than 16
    channels), a gate of rank 16, tau = 16. The gate starts small (Xavier uniform with gain 2^-2.5) with b = 0, so that
    every channel halves in about 16 steps.

    | state | cost per token             | parallel form         | cannot                                           |
    |-------|----------------------------|-----------------------|--------------------------------------------------|
    | H K V | 8 D^2 + 3 rank D + 2 H K V | chunked matmuls, O(T) | overwrite what it has stored, or track states    |
    |       | (K is half of V)           |                       | such as parity                                   |
    """

    traits = Traits(cuts_in_ops=True)

    class Config(Options):
        """The options.

        Attributes:
            n_heads: H, by default the most heads that divide the widths of k and v, up to 4, of 16 key channels each.
            expand_k: channels of q and of k, as a multiple of D.
            expand_v: channels of v and of the output gate, as a multiple of D.
            gate_rank: width between the two halves of the decay's projection.
            gate_temperature: tau; the larger, the longer the memory.
            gate: use an output gate.
            norm_eps: added to the mean square in the norm.
            backend: form of the op.
        """

        n_heads: int | None = Field(default=None, ge=1)
        expand_k: float = Field(default=0.5, gt=0)
        expand_v: float = Field(default=1.0, gt=0)
        gate_rank: int = Field(default=16, ge=1)
        gate_temperature: float = Field(default=16.0, gt=0)
        gate: bool = True
        norm_eps: float = Field(default=1e-5, gt=0)
        backend: Backend = "auto"

    def __init__(self, d_model: int, config: Config, *, place: Place = Place()):
        super().__init__(d_model, config, place=place)
        c = config
        self.n_heads, self.d_key, self.d_value = head_widths(self.name, d_model, c.n_heads, c.expand_k, c.expand_v)
        keys, values = self.n_heads * self.d_key, self.n_heads * self.d_value
        self.parts = [keys, keys, values, c.gate_rank, values if c.gate else 0]  # q, k, v, W_down, z
        self.in_proj = nn.Linear(d_model, sum(self.parts), bias=False)
        self.decay_up = nn.Linear(c.gate_rank, keys)
        self.norm = GatedRMSNorm(self.d_value, eps=c.norm_eps)
        self.out_proj = nn.Linear(values, d_model, bias=False)
        init_projections(self.in_proj, self.out_proj, place)
        nn.init.xavier_uniform_(self.decay_up.weight, gain=2**-2.5)
        nn.init.zeros_(self.decay_up.bias)

    def init_state(self, batch_size: int, *, capacity: int | None = None, device=None, dtype=None) -> GLAState:
        device, dtype = first_parameter_like(self, device, dtype)
        return GLAState(torch.zeros(self._state_shape(batch_size), device=device, dtype=recurrent_dtype(dtype)))

    def _state_shape(self, batch_size: int) -> tuple[int, ...]:
        return batch_size, self.n_heads, self.d_key, self.d_value

    def forward(self, x: Tensor, state: State | None = None, context: Context | None = None) -> tuple[Tensor, State]:
        c, H = self.config, self.n_heads
        q, k, v, decay, gate = project(x, self.in_proj, self.parts)
        log_decay = F.logsigmoid(precise(self.decay_up(decay))) / c.gate_temperature
        q, k, v, log_decay = (m.unflatten(-1, (H, -1)) for m in (q, k, v, log_decay))
        memory = None if state is None else state.memory
        o, memory = linear_attention(q, k, v, log_decay, memory, backend=c.backend, in_place=True, **packing(context))
        o = self.norm(o, gate.unflatten(-1, (H, -1)) if c.gate else None)
        return self.out_proj(o.flatten(-2).to(x.dtype)), GLAState(memory)

    def flops_per_token(self, context_length: int) -> int:
        projections = self.d_model * (sum(self.parts) + self.n_heads * self.d_value)
        projections += self.config.gate_rank * self.n_heads * self.d_key
        return 2 * projections + 2 * self.n_heads * self.d_key * self.d_value  # the read S^T q

    @classmethod
    def law_cases(cls) -> list[dict[str, Any]]:
        return [
            {},
            {"n_heads": 2, "expand_k": 1.0, "expand_v": 1.5, "gate_rank": 3, "backend": "chunked"},
            {"n_heads": 4, "gate_temperature": 2.0, "gate": False, "norm_eps": 1e-4, "backend": "reference"},
        ]
