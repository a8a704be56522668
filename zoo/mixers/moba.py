"""Mixture of block attention: each head of a query chooses a few blocks of keys by their means."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from zoo.core.errors import UsageError
from zoo.mixers.block_front import BlockAttention, BlockOptions
from zoo.norms import rms_norm
from zoo.protocol import Context, Place, State, register


@register("moba")
class MixtureOfBlockAttention(BlockAttention):
    """Mixture of block attention: softmax attention over a few blocks of keys (Lu et al. 2025, arXiv 2502.13189).

        q, k, v = R W x ;  s_b = q . mean of the keys of block b
        C_t = the query's own block, and of the blocks before it the n_blocks - 1 with the largest s_b
        y = W_o concat_h softmax over the keys of C_t up to t (q . k / sqrt(K)) v

    Each head chooses for itself. In its own block a query sees the keys up to its own; that block's mean, which would
    contain later keys, is never scored. Of equal blocks the latest is chosen. Blocks are counted from the start of a
    document. Single steps choose as in training; the authors decode with attention to everything. Always causal. Inits:
    normal, std fan_in^-0.5, W_o as in `mha`.

    | state                  | cost per token at context T                            | cannot                  |
    |------------------------|--------------------------------------------------------|-------------------------|
    | 2 G K T + G K T / s    | projections + 2 H K T / s + 4 H K n s, n blocks of s   | see what is not chosen  |
    """

    class Config(BlockOptions):
        """The options; see `BlockOptions` for the rest. flash-linear-attention's sizes are 256 keys and 4 blocks.

        Attributes:
            out_norm: RMSNorm of each head's output, with weights that all heads share (flash-linear-attention).
        """

        out_norm: bool = False

    def __init__(self, d_model: int, config: Config, *, place: Place = Place()):
        super().__init__(d_model, config, place=place)
        if "norm_eps" in config.changed() and not (config.qk_norm or config.out_norm):
            raise UsageError(f"{self.name}: norm_eps belongs to qk_norm and out_norm, which are not set.")
        self.out_norm = nn.Parameter(torch.ones(self.head_dim)) if config.out_norm else None

    def forward(self, x: Tensor, state: State | None = None, context: Context | None = None) -> tuple[Tensor, State]:
        o, state = self.attend(x, state, context)
        if self.out_norm is not None:
            o = rms_norm(o, self.out_norm, self.config.norm_eps)
        return self.out_proj(o.flatten(2)), state

    @classmethod
    def law_cases(cls) -> list[dict[str, Any]]:
        return [
            {"n_heads": 2, "block_size": 4, "n_blocks": 3, "rope_base": 500.0, "rope_scaling": "yarn"}
            | {"rope_factor": 4.0, "rope_context": 16, "rope_bands": (0.5, 4.0), "rope_truncate": False}
            | {"rope_amplitude": 1.1},
            {"n_heads": 4, "n_kv_heads": 2, "head_dim": 7, "block_size": 3, "bias": True, "backend": "chunked"}
            | {"qk_norm": True, "out_norm": True, "norm_eps": 1e-5, "rope_interleaved": False},
            {"n_heads": 2, "block_size": 5, "n_blocks": 1, "rope": False, "backend": "reference"},
        ]
