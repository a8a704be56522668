"""Gated slot attention: softmax attention to a fixed number of slots, which forget and are written by gates."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from zoo.core.errors import UsageError
from zoo.core.options import Options
from zoo.mixers.parts import (
    Backend,
    CausalConv,
    conv_backend,
    head_widths,
    init_projections,
    main_backend,
    precise,
    project,
)
from zoo.norms import GatedRMSNorm
from zoo.ops import linear_attention, slot_scores
from zoo.ops.common import owned
from zoo.protocol import Context, Mixer, Place, State, first_parameter_like, packing, recurrent_dtype, register

SLOTS = 64


class GSAState(NamedTuple):
    conv: Tensor  # (B, W - 1, channels of q, k and v): the last inputs of the convolution
    keys: Tensor  # (B, G, M, K): the key of every slot
    values: Tensor  # (B, G, M, V): its value


@register("gsa")
class GatedSlotAttention(Mixer):
    """Gated slot attention: softmax attention to M slots, each a gated mean of keys and values
    (Zhang et al. 2024, arXiv 2409.07146).

    Section 3 of the paper, as in flash-linear-attention:

        q, k, v = silu(W x) ;  f = sigmoid(W_f x)^(1 / tau) in (0, 1)^M
        K_t = diag(f_t) K_{t-1} + (1 - f_t) k_t^T ;  V_t = diag(f_t) V_{t-1} + (1 - f_t) v_t^T
        o_t = V_t^T softmax(K_t q_t) ;  y = W_out RMSNorm(silu(o))             the norm runs over all heads

    Two linear recurrences with a softmax between: `zoo.ops.slot_scores`, then `zoo.ops.linear_attention`. Sizes as
    published: keys and values D wide in four heads (fewer where a head would have less than 16 channels), 64 slots,
    tau = 8.

    | state       | cost per token                 | parallel form         | cannot                                   |
    |-------------|--------------------------------|-----------------------|------------------------------------------|
    | G M (K + V) | 8 D^2 + 2 D G M + 2 H M (K + V)| chunked matmuls, O(T) | look up more than M things sharply, or   |
    |             | for G = H                      |                       | track states such as parity              |
    """

    class Config(Options):
        """The options.

        Attributes:
            n_heads: H, by default the most heads that divide the widths of q and v, up to 4, of 16 channels each.
            n_kv_heads: G, heads of k, v and f, each shared by H / G heads of q; H by default.
            expand_k: channels of q, as a multiple of D.
            expand_v: channels of the output of all heads, as a multiple of D.
            n_slots: M, slots of a head; by default 64, or K where heads are narrower.
            feature_map: activation of q and k.
            gate_temperature: tau; the larger, the longer the memory.
            scale: factor on the scores before the softmax.
            conv_size: W, steps in the window of a convolution with silu over q, k and v; 0 for none.
            conv_bias: a bias of the convolution.
            norm_eps: added to the mean square in the norm.
            backend: form of the ops.
        """

        n_heads: int | None = Field(default=None, ge=1)
        n_kv_heads: int | None = Field(default=None, ge=1)
        expand_k: float = Field(default=1.0, gt=0)
        expand_v: float = Field(default=1.0, gt=0)
        n_slots: int | None = Field(default=None, ge=1)
        feature_map: Literal["silu", "relu"] = "silu"
        gate_temperature: float = Field(default=8.0, gt=0)
        scale: float = Field(default=1.0, gt=0)
        conv_size: int = Field(default=0, ge=0)
        conv_bias: bool = False
        norm_eps: float = Field(default=1e-5, gt=0)
        backend: Backend = "auto"

    def __init__(self, d_model: int, config: Config, *, place: Place = Place()):
        super().__init__(d_model, config, place=place)
        c = config
        self.n_heads, self.d_key, self.d_value = head_widths(self.name, d_model, c.n_heads, c.expand_k, c.expand_v)
        self.n_kv_heads = c.n_kv_heads or self.n_heads
        if self.n_heads % self.n_kv_heads:
            raise UsageError(f"{self.name}: n_kv_heads={self.n_kv_heads} does not divide n_heads={self.n_heads}.")
        keys, values = self.n_heads * self.d_key, self.n_heads * self.d_value
        self.n_slots = c.n_slots or min(SLOTS, self.d_key)
        G = self.n_kv_heads
        self.qkv_parts = [keys, G * self.d_key, G * self.d_value]
        self.parts = [sum(self.qkv_parts), G * self.n_slots]
        self.in_proj = nn.Linear(d_model, sum(self.parts), bias=False)
        self.conv = None
        if c.conv_size:
            self.conv = CausalConv(
                self.parts[0], c.conv_size, bias=c.conv_bias, activation="silu", backend=conv_backend(c.backend)
            )
        self.norm = GatedRMSNorm(values, eps=c.norm_eps)
        self.out_proj = nn.Linear(values, d_model, bias=False)
        init_projections(self.in_proj, self.out_proj, place)

    def init_state(self, batch_size: int, *, capacity: int | None = None, device=None, dtype=None) -> GSAState:
        device, dtype = first_parameter_like(self, device, dtype)
        shapes = self._state_shapes(batch_size)
        return GSAState(*(torch.zeros(s, device=device, dtype=recurrent_dtype(dtype)) for s in shapes))

    def _state_shapes(self, batch_size: int) -> list[tuple[int, ...]]:
        conv = (batch_size, max(self.config.conv_size - 1, 0), self.parts[0])
        return [conv, *((batch_size, self.n_kv_heads, self.n_slots, d) for d in (self.d_key, self.d_value))]

    def forward(self, x: Tensor, state: State | None = None, context: Context | None = None) -> tuple[Tensor, State]:
        state = self.init_state(len(x), device=x.device, dtype=x.dtype) if state is None else state
        c, G, shared, packed = self.config, self.n_kv_heads, self.n_heads // self.n_kv_heads, packing(context)
        conv = state.conv
        if self.conv:
            qkv, f = self.in_proj(x).split(self.parts, -1)
            qkv, conv = self.conv(qkv, conv, context)
            q, k, v = qkv.split(self.qkv_parts, -1)
        else:
            q, k, v, f = project(x, self.in_proj, [*self.qkv_parts, self.parts[1]])
        q, k = (_ACTIVATIONS[c.feature_map](precise(m)) for m in (q, k))
        q, k, v, f = (
            m.unflatten(-1, (n, -1)) for m, n in ((q, self.n_heads), (k, G), (F.silu(precise(v)), G), (precise(f), G))
        )
        log_decay = F.logsigmoid(f) / c.gate_temperature
        slots = -torch.expm1(log_decay)
        keys, values = state.keys, state.values
        if shared > 1:  # the ops have one memory a head of q: equal ones, of which one is kept
            k, v, slots, log_decay = (m.repeat_interleave(shared, 2) for m in (k, v, slots, log_decay))
            keys, values = (m.repeat_interleave(shared, 1) for m in (keys, values))
        backend = main_backend(c.backend)
        scores, keys = slot_scores(q, k, slots, log_decay, keys, scale=c.scale, backend=backend, **packed)
        o, values = linear_attention(
            scores.softmax(-1), slots, v, log_decay, values, scale=1.0, backend=backend, **packed
        )
        if shared > 1:
            keys, values = (owned(m[:, ::shared]) for m in (keys, values))
        return self.out_proj(self.norm(F.silu(o.flatten(-2))).to(x.dtype)), GSAState(conv, keys, values)

    def flops_per_token(self, context_length: int) -> int:
        projections = self.d_model * (sum(self.parts) + self.n_heads * self.d_value)
        return 2 * projections + 2 * self.n_heads * self.n_slots * (self.d_key + self.d_value)  # the scores, the read

    @classmethod
    def law_cases(cls) -> list[dict[str, Any]]:
        return [
            {},
            {"n_heads": 4, "n_kv_heads": 2, "expand_k": 0.5, "expand_v": 1.5, "n_slots": 5, "scale": 0.5}
            | {"feature_map": "relu", "gate_temperature": 2.0, "norm_eps": 1e-4, "conv_size": 3, "conv_bias": True}
            | {"backend": "reference"},
        ]


_ACTIVATIONS = {"silu": F.silu, "relu": F.relu}
