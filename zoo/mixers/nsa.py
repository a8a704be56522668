"""Native sparse attention: compressed blocks, chosen blocks and a window, each with a gate."""

from __future__ import annotations

from typing import Any

from pydantic import Field
from torch import Tensor

from zoo.core.errors import UsageError
from zoo.mixers.block_front import BlockAttention, BlockOptions
from zoo.protocol import Context, Place, State, register


@register("nsa")
class NativeSparseAttention(BlockAttention):
    """Native sparse attention: means of blocks, a few chosen blocks, a window (Yuan et al. 2025, arXiv 2502.11089).

        q, k, v = R W x ;  g = sigmoid(W_g x), three gates a head ;  k', v' = the means of k and v over each block
        p = softmax over ended blocks of q . k' / sqrt(K) ;  o_cmp = sum p v'
        C_t = the query's own block, the one before, the document's first, and those with the largest mean p of a group
        o_slc = attention to the keys of C_t up to t ;  o_win = attention to the last `window` keys
        y = W_o (g_cmp o_cmp + g_slc o_slc + g_win o_win)

    This is the layer of flash-linear-attention 0.6: blocks are compressed to their means, and all branches share their
    keys. The paper learns the compression, over overlapping blocks, and gives each branch keys of its own. The heads of
    a group choose together; of equal blocks they choose the latest. Blocks are counted from the start of a document.
    Always causal. Inits: normal, std fan_in^-0.5, W_o as in `mha`.

    | state             | cost per token at context T                                | cannot                |
    |-------------------|------------------------------------------------------------|-----------------------|
    | 2 G K (T + T / s) | projections + 4 H K (T / s + n s + window), blocks of s, n | see all of T in detail |
    """

    class Config(BlockOptions):
        """The options; see `BlockOptions` for the rest. The published sizes are 64 keys, 16 blocks, a window of 512.

        Attributes:
            n_kv_heads: G, by default 1; the heads of a group choose together.
            window: keys that the window sees; None leaves out its branch and its gate.
        """

        n_kv_heads: int | None = Field(default=1, ge=1)
        window: int | None = Field(default=64, ge=1)

    def __init__(self, d_model: int, config: Config, *, place: Place = Place()):
        self.window, self.n_gates = config.window, 3 if config.window else 2
        super().__init__(d_model, config, place=place)
        if "norm_eps" in config.changed() and not config.qk_norm:
            raise UsageError(f"{self.name}: norm_eps belongs to qk_norm, which is not set.")

    def forward(self, x: Tensor, state: State | None = None, context: Context | None = None) -> tuple[Tensor, State]:
        o, state = self.attend(x, state, context)
        return self.out_proj(o.flatten(2)), state

    @classmethod
    def law_cases(cls) -> list[dict[str, Any]]:
        return [
            {"n_heads": 2, "block_size": 4, "window": 6, "rope_base": 500.0, "rope_scaling": "yarn", "rope_factor": 4.0}
            | {"rope_context": 16, "rope_bands": (0.5, 4.0), "rope_truncate": False, "rope_amplitude": 1.1},
            {"n_heads": 4, "n_kv_heads": 2, "head_dim": 7, "block_size": 3, "n_blocks": 5, "window": None}
            | {"qk_norm": True, "norm_eps": 1e-5, "bias": True, "rope_interleaved": False, "backend": "chunked"},
            {"n_heads": 2, "block_size": 5, "n_blocks": 2, "rope": False, "backend": "reference"},
        ]
