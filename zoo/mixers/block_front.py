"""What the words of attention to chosen blocks share: projections, rotary positions, the state and its costs."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from zoo.mixers.attention_parts import RopeOptions, count_heads, turn
from zoo.mixers.parts import init_projections, project
from zoo.norms import rms_norm
from zoo.ops import BlockCache, block_attention, rotary_width
from zoo.protocol import Context, Mixer, Place, State, first_parameter_like, packing


class BlockOptions(RopeOptions):
    """What every word of attention to blocks can set; see `RopeOptions` for the rest.

    Attributes:
        n_heads: H, by default the most heads of at least 64 channels.
        n_kv_heads: G, number of keys and values, each for H / G heads.
        head_dim: K, by default d_model / n_heads.
        block_size: keys of a block.
        n_blocks: number of blocks that a query attends to, its own among them.
        qk_norm: RMSNorm of each head's query and key, with weights that all heads share.
        norm_eps: added to the mean square in every norm.
        bias: biases of q, k and v.
        backend: form of the op, see `zoo.ops.block_attention`.
    """

    n_heads: int | None = Field(default=None, ge=1)
    n_kv_heads: int | None = Field(default=None, ge=1)
    head_dim: int | None = Field(default=None, ge=1)
    block_size: int = Field(default=16, ge=1)
    n_blocks: int = Field(default=4, ge=1)
    qk_norm: bool = False
    norm_eps: float = Field(default=1e-6, gt=0)
    bias: bool = False
    backend: Literal["auto", "reference", "chunked"] = "auto"


class BlockAttention(Mixer):
    """Attention to chosen blocks of keys; always causal.

    Attributes:
        n_gates: gates of a head.
        window: keys that a window sees; None for no window.
    """

    n_gates: int = 0
    window: int | None = None

    def __init__(self, d_model: int, config: Any, *, place: Place = Place()):
        super().__init__(d_model, config, place=place)
        c, D = config, d_model
        H, G = count_heads(self.name, D, c.n_heads, c.n_kv_heads, c.head_dim)
        self.n_heads, self.n_kv_heads = H, G
        self.head_dim = K = c.head_dim or D // H
        self.rotated = rotary_width(K, 1.0) if c.rope else 0
        self.scaling = c.scaling(self.name)
        self.parts = [H * K, G * K, G * K, H * self.n_gates]
        self.in_proj = nn.Linear(D, sum(self.parts), bias=False)
        self.out_proj = nn.Linear(H * K, D, bias=False)
        init_projections(self.in_proj, self.out_proj, place)
        self.qkv_bias = nn.Parameter(torch.zeros((H + 2 * G) * K)) if c.bias else None
        self.q_norm, self.k_norm = (nn.Parameter(torch.ones(K)) if c.qk_norm else None for _ in range(2))

    @property
    def mean_width(self) -> int:
        """W: means of keys, and with gates of values too."""
        return self.head_dim * (2 if self.n_gates else 1)

    def init_state(self, batch_size: int, *, capacity: int | None = None, device=None, dtype=None) -> BlockCache:
        device, dtype = first_parameter_like(self, device, dtype)
        G, K, size = self.n_kv_heads, self.head_dim, self.config.block_size
        return BlockCache.empty(batch_size, G, K, self.mean_width, size, capacity, device=device, dtype=dtype)

    def attend(self, x: Tensor, state: State | None, context: Context | None) -> tuple[Tensor, State]:
        """The heads' outputs (B, T, H, K) and the next state."""
        context, c = Context() if context is None else context, self.config
        H, G, K = self.n_heads, self.n_kv_heads, self.head_dim
        q, k, v, gates = project(x, self.in_proj, self.parts)
        if self.qkv_bias is not None:
            q, k, v = (y + b for y, b in zip((q, k, v), self.qkv_bias.split(self.parts[:3]), strict=True))
        q, k, v = q.unflatten(-1, (H, K)), k.unflatten(-1, (G, K)), v.unflatten(-1, (G, K))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = rms_norm(q, self.q_norm, c.norm_eps), rms_norm(k, self.k_norm, c.norm_eps)
        if self.rotated:
            length = None if state is None else state.length
            q, k = turn([q, k], length, context, self.rotated, c.rope_base, self.scaling, c.rope_interleaved)
        return block_attention(
            q,
            k,
            v,
            state,
            block_size=c.block_size,
            n_blocks=c.n_blocks,
            gates=gates.sigmoid().unflatten(-1, (H, -1)) if self.n_gates else None,
            window=self.window,
            backend=c.backend,
            **packing(context),
        )

    def flops_per_token(self, context_length: int) -> int:
        H, K, c = self.n_heads, self.head_dim, self.config
        n_means = -(-context_length // c.block_size)
        scored = n_means * self.mean_width if self.n_gates or n_means > c.n_blocks else 0
        seen = min(n_means, c.n_blocks) * c.block_size + min(self.window or 0, context_length)
        projections = self.d_model * (sum(self.parts) + H * K)
        return 2 * (projections + H * (scored + 2 * K * seen))
