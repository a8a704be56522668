"""The double-gated short convolution of LFM2."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from zoo.core.options import Options
from zoo.mixers.parts import Backend, CausalConv, init_projections
from zoo.mixers.short_conv import ShortConvState
from zoo.protocol import Context, Mixer, Place, State, Traits, first_parameter_like, recurrent_dtype, register


@register("gated_short_conv")
class GatedShortConv(Mixer):
    """The gated short convolution of LFM2 (Liquid AI 2025, arXiv 2511.23404): y = W_out (C * conv(B * u)).

    B, C, u = W_in x, and W = 3. The authors call it LIV convolution; it is a short relative of H3 and Hyena. Both gates
    are linear: there is no activation.

    | state            | cost per token | parallel form   | cannot                                             |
    |------------------|----------------|-----------------|----------------------------------------------------|
    | (W - 1) D floats | 8 D^2          | exact, one pass | see beyond W steps; needs attention layers between |
    """

    traits = Traits(cuts_in_ops=True)

    class Config(Options):
        """The options.

        Attributes:
            conv_size: W, steps in the window.
            bias: biases of projections and convolution.
            backend: form of the op.
        """

        conv_size: int = Field(default=3, ge=1)
        bias: bool = False
        backend: Backend = "auto"

    def __init__(self, d_model: int, config: Config, *, place: Place = Place()):
        super().__init__(d_model, config, place=place)
        self.in_proj = nn.Linear(d_model, 3 * d_model, bias=config.bias)
        self.conv = CausalConv(d_model, config.conv_size, bias=config.bias, activation=None, backend=config.backend)
        self.out_proj = nn.Linear(d_model, d_model, bias=config.bias)
        init_projections(self.in_proj, self.out_proj, place)

    def init_state(self, batch_size: int, *, capacity: int | None = None, device=None, dtype=None) -> ShortConvState:
        device, dtype = first_parameter_like(self, device, dtype)
        shape = self.conv.state_shape(batch_size)
        return ShortConvState(torch.zeros(shape, device=device, dtype=recurrent_dtype(dtype)))

    def forward(self, x: Tensor, state: State | None = None, context: Context | None = None) -> tuple[Tensor, State]:
        b, c, u = self.in_proj(x).chunk(3, -1)
        u, conv_state = self.conv(b * u, None if state is None else state.conv, context)
        return self.out_proj(c * u), ShortConvState(conv_state)

    def flops_per_token(self, context_length: int) -> int:
        return 8 * self.d_model**2

    @classmethod
    def law_cases(cls) -> list[dict[str, Any]]:
        return [{}, {"conv_size": 4, "bias": True, "backend": "reference"}, {"conv_size": 1, "backend": "chunked"}]
