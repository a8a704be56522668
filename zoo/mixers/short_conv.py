"""A short convolution as a separate mixer."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from zoo.core.options import Options
from zoo.mixers.parts import Backend, CausalConv
from zoo.protocol import Context, Mixer, Place, State, Traits, first_parameter_like, recurrent_dtype, register


class ShortConvState(NamedTuple):
    conv: Tensor  # (B, W - 1, D): the last inputs in time order


@register("short_conv")
class ShortConv(Mixer):
    """A short causal convolution of each channel: y_t = act(b + sum_w weight[:, w] * x_{t - W + 1 + w}).

    As a residual step it is h + conv(norm(h)). The Canon layers of Allen-Zhu 2025 (Physics of Language Models: Part
    4.1, arXiv 2512.17351) are different: u + conv(u) within a layer, on the input of attention or feed-forward (A, C),
    on queries, keys and values (B) or on hidden features (D), with W = 4, no activation and no bias. With
    `activation="silu"` it is the short convolution inside Mamba and DeltaNet (Gu and Dao 2023, section 3.4). It puts a
    key's features beside its value, for which attention alone needs a second layer (Arora et al. 2023, Zoology, arXiv
    2312.04927, section 4, whose BaseConv has a multiplicative gate besides: see `gated_short_conv`).

    | state            | cost per token  | parallel form | cannot                                                |
    |------------------|-----------------|---------------|-------------------------------------------------------|
    | (W - 1) D floats | 2 W D, no matmul | exact, one pass | see beyond W steps, mix channels, depend on content |
    """

    traits = Traits(cuts_in_ops=True)

    class Config(Options):
        """The options.

        Attributes:
            conv_size: W, steps in the window.
            activation: activation after the convolution.
            bias: one per channel.
            backend: form of the op.
        """

        conv_size: int = Field(default=4, ge=1)
        activation: Literal["silu"] | None = None
        bias: bool = False
        backend: Backend = "auto"

    def __init__(self, d_model: int, config: Config, *, place: Place = Place()):
        super().__init__(d_model, config, place=place)
        self.conv = CausalConv(
            d_model, config.conv_size, bias=config.bias, activation=config.activation, backend=config.backend
        )

    def init_state(self, batch_size: int, *, capacity: int | None = None, device=None, dtype=None) -> ShortConvState:
        device, dtype = first_parameter_like(self, device, dtype)
        shape = self.conv.state_shape(batch_size)
        return ShortConvState(torch.zeros(shape, device=device, dtype=recurrent_dtype(dtype)))

    def forward(self, x: Tensor, state: State | None = None, context: Context | None = None) -> tuple[Tensor, State]:
        y, conv_state = self.conv(x, None if state is None else state.conv, context)
        return y, ShortConvState(conv_state)

    def flops_per_token(self, context_length: int) -> int:
        return 0

    @classmethod
    def law_cases(cls) -> list[dict[str, Any]]:
        return [
            {},
            {"conv_size": 3, "activation": "silu", "bias": True, "backend": "reference"},
            {"conv_size": 1},
            {"conv_size": 7, "backend": "chunked"},
        ]
