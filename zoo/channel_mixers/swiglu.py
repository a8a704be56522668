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
    """y = W_down (silu(W_gate x) * W_up x) (Shazeer 2020, arXiv 2002.05202, equation 6).

    Width 8/3 D keeps the weights of a 4 D perceptron (there: section 3; rounding as in Llama). Init: normal with std
    fan_in^-0.5, W_down divided by sqrt(2 n_layers) (GPT-2).

    | state | cost per token | parallel form      | cannot             |
    |-------|----------------|--------------------|--------------------|
    | none  | 6 D d_hidden   | every step at once | see any other step |
    """

    kind = "channel"

    class Config(Options):
        """The options.

        Attributes:
            d_hidden: inner width, by default 8/3 D rounded up to a multiple of 32.
            bias: on all three projections.
        """

        d_hidden: int | None = Field(default=None, ge=1)
        bias: bool = False

    def __init__(self, d_model: int, config: Config, *, place: Place = Place()):
        super().__init__(d_model, config, place=place)
        self.d_hidden = config.d_hidden or -(-8 * d_model // 3 // 32) * 32
        self.gate_proj = nn.Linear(d_model, self.d_hidden, bias=config.bias)
        self.up_proj = nn.Linear(d_model, self.d_hidden, bias=config.bias)
        self.down_proj = nn.Linear(self.d_hidden, d_model, bias=config.bias)
        nn.init.normal_(self.gate_proj.weight, std=d_model**-0.5)
        nn.init.normal_(self.up_proj.weight, std=d_model**-0.5)
        nn.init.normal_(self.down_proj.weight, std=(2 * place.n_layers * self.d_hidden) ** -0.5)
        if config.bias:
            for layer in (self.gate_proj, self.up_proj, self.down_proj):
                nn.init.zeros_(layer.bias)

    def init_state(self, batch_size: int, *, capacity: int | None = None, device=None, dtype=None) -> State:
        return ()

    def forward(self, x: Tensor, state: State | None = None, context: Context | None = None) -> tuple[Tensor, State]:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x)), ()

    def flops_per_token(self, context_length: int) -> int:
        return 6 * self.d_model * self.d_hidden

    def state_bytes(self, batch_size: int, context_length: int, dtype) -> int:
        return 0

    @classmethod
    def law_cases(cls) -> list[dict[str, Any]]:
        return [{}, {"d_hidden": 40, "bias": True}]
