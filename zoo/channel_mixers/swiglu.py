"""SwiGLU feed-forward layer."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from tasks.registry import Options
from zoo.protocol import Context, Mixer, Place, State
from zoo.registry import register


@register("swiglu")
class SwiGLU(Mixer):
    """y = W_down (silu(W_gate x) * W_up x) (Shazeer 2020, arXiv 2002.05202, equation 6)."""

    kind = "channel"

    class Config(Options):
        """d_hidden: inner width, by default 8/3 D rounded up to a multiple of 32; bias: on all three projections."""

        d_hidden: int | None = Field(default=None, ge=1)
        bias: bool = False

    def __init__(self, d_model: int, config: Config, *, place: Place = Place()):
        super().__init__(d_model, config, place=place)
        self.d_hidden = config.d_hidden or -(-8 * d_model // 3 // 32) * 32
        self.in_proj = nn.Linear(d_model, 2 * self.d_hidden, bias=config.bias)
        self.out_proj = nn.Linear(self.d_hidden, d_model, bias=config.bias)

    def init_state(self, batch_size: int, *, capacity: int | None = None, device=None, dtype=None) -> State:
        return ()

    def forward(self, x: Tensor, state: State | None = None, context: Context | None = None) -> tuple[Tensor, State]:
        gate, up = self.in_proj(x).chunk(2, -1)
        return self.out_proj(F.silu(gate) * up), ()

    def flops_per_token(self, context_length: int) -> int:
        return 6 * self.d_model * self.d_hidden

    def state_bytes(self, batch_size: int, context_length: int, dtype) -> int:
        return 0

    @classmethod
    def law_cases(cls) -> list[dict[str, Any]]:
        return [{}, {"d_hidden": 40, "bias": True}]
