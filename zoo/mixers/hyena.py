"""Hyena: a convolution with a learned filter as long as the sequence, between two gates."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from zoo.core.errors import UsageError
from zoo.core.options import Options
from zoo.mixers.parts import CausalConv, init_projections
from zoo.ops import ConvHistory, init_history, long_conv
from zoo.ops.common import state_dtype
from zoo.ops.modules import widely
from zoo.parameters import set_rule
from zoo.protocol import Context, Mixer, Place, State, first_parameter_like, packing, recurrent_dtype, register

TARGET = 1e-2  # what a window has decayed to at its share of the length


class HyenaState(NamedTuple):
    conv: Tensor  # (B, W - 1, 3 D): the last inputs of the short convolution
    history: ConvHistory  # all inputs of the long one


@register("hyena")
class Hyena(Mixer):
    """Hyena of order 2: a long convolution between two gates (Poli et al. 2023, arXiv 2302.10866).

    Sections 3.1 to 3.3, as in the authors' `standalone_hyena.py`:

        x2, x1, v = conv(W_in x + b_in) ;  u = v * x1
        y_t = W_out (x2_t * (sum over s <= t of h_{t-s} u_s + d * u_t)) + b_out
        h_i = MLP(z_i) * (exp(-a i / (L - 1)) + shift) ;  z_i = (i / (L - 1), cos and -sin of 2 pi f i / L)

    The MLP has sines for activations, sin(w z), w learned. Frequencies f go evenly from 1e-4 to their number less one;
    the window's rates a go over the channels from ln(100) / slow_decay to ln(100) / fast_decay. L is `max_length`;
    beyond it h continues by its equation, untrained. z is fixed here; the authors' code may train it at a small rate.
    Inits: d normal, w = `frequency`, MLP as torch's Linear (undecayed, as published), projections fan_in^-0.5.

    | state            | cost per token                       | parallel form       | cannot                          |
    |------------------|--------------------------------------|---------------------|---------------------------------|
    | T D + 3 (W - 1) D| 8 D^2 in training; a single step     | FFT, O(T log T)     | choose by content how far back  |
    |                  | evaluates the filter at all T        |                     | it looks; decode in O(1)        |
    """

    class Config(Options):
        """The options.

        Attributes:
            max_length: L, the number of steps that positions and windows are scaled to.
            position_dim: width of z, odd: the time, cosines and sines.
            filter_width: hidden width of the filter's MLP.
            filter_depth: its hidden layers beyond the first.
            frequency: w at the start.
            fast_decay: share of L after which the shortest window is at 1 %.
            slow_decay: the same for the longest.
            shift: added to every window.
            conv_size: W, steps in the window of the short convolution.
            backend: form of the op.
        """

        max_length: int = Field(default=1024, ge=2)
        position_dim: int = Field(default=3, ge=3)
        filter_width: int = Field(default=64, ge=1)
        filter_depth: int = Field(default=2, ge=0)
        frequency: float = Field(default=1.0, gt=0)
        fast_decay: float = Field(default=0.3, gt=0)
        slow_decay: float = Field(default=1.5, gt=0)
        shift: float = Field(default=0.0, ge=0)
        conv_size: int = Field(default=3, ge=1)
        backend: Literal["auto", "reference", "chunked"] = "auto"

    def __init__(self, d_model: int, config: Config, *, place: Place = Place()):
        super().__init__(d_model, config, place=place)
        c = config
        if c.position_dim % 2 == 0:
            raise UsageError(
                f"{self.name}: position_dim={c.position_dim} is not allowed: it should be odd, the time and pairs of "
                "a cosine and a sine."
            )
        self.in_proj = nn.Linear(d_model, 3 * d_model)
        self.conv = CausalConv(3 * d_model, c.conv_size, bias=True, activation=None, backend=c.backend)
        widths = [c.position_dim, *[c.filter_width] * (c.filter_depth + 1)]
        hidden = [nn.Linear(inputs, outputs) for inputs, outputs in pairwise(widths)]
        self.filter = nn.ModuleList([*hidden, nn.Linear(c.filter_width, d_model, bias=False)])
        for layer in self.filter:
            set_rule(layer, "weight", weight_decay=False)
        self.frequency = nn.Parameter(torch.full((c.filter_width,), c.frequency))
        self.D = nn.Parameter(torch.empty(d_model).normal_())
        self.out_proj = nn.Linear(d_model, d_model)
        init_projections(self.in_proj, self.out_proj, place)

    def init_state(self, batch_size: int, *, capacity: int | None = None, device=None, dtype=None) -> HyenaState:
        device, dtype = first_parameter_like(self, device, dtype)
        conv = torch.zeros(self.conv.state_shape(batch_size), device=device, dtype=recurrent_dtype(dtype))
        return HyenaState(conv, init_history(batch_size, self.d_model, capacity=capacity, device=device, dtype=dtype))

    def forward(self, x: Tensor, state: State | None = None, context: Context | None = None) -> tuple[Tensor, State]:
        conv, history = (None, None) if state is None else state
        packed = packing(context)
        mixed, conv = self.conv(self.in_proj(x), conv, context)
        x2, x1, v = mixed.chunk(3, -1)
        u = (v * x1).to(x.dtype)
        filters = self.filters(x.shape[1] + (0 if history is None else history.rows_held()), x)
        y, history = long_conv(u, filters, history, backend=self.config.backend, **packed)
        return self.out_proj((x2 * y).to(x.dtype)), HyenaState(conv, history)

    def filters(self, n_steps: int, like: Tensor) -> Tensor:
        """The filter of every channel, (N, D), in float32 at least."""
        c, dtype = self.config, state_dtype(like)
        step = torch.arange(n_steps, device=like.device, dtype=dtype)
        bands = (c.position_dim - 1) // 2
        frequencies = torch.linspace(1e-4, bands - 1, bands, device=like.device, dtype=dtype)
        angle = step[:, None] * frequencies * (2 * math.pi / c.max_length)
        time = step[:, None] / (c.max_length - 1)
        h = torch.cat([time, angle.cos(), -angle.sin()], 1)
        for layer in self.filter[:-1]:
            h = torch.sin(self.frequency.to(dtype) * widely(layer, h))
        slow, fast = (-math.log(TARGET) / share for share in (c.slow_decay, c.fast_decay))
        rates = torch.linspace(slow, fast, self.d_model, device=like.device, dtype=dtype)
        h = widely(self.filter[-1], h) * (torch.exp(-time * rates) + c.shift)
        return torch.cat([h[:1] + self.D.to(dtype), h[1:]])

    def flops_per_token(self, context_length: int) -> int:
        c, D = self.config, self.d_model
        of_filter = c.filter_width * (c.position_dim + c.filter_depth * c.filter_width + D)
        return 2 * (4 * D * D + context_length * of_filter)  # a step evaluates the filter anew

    @classmethod
    def law_cases(cls) -> list[dict[str, Any]]:
        return [
            {},
            {"max_length": 50, "position_dim": 7, "filter_width": 5, "filter_depth": 1, "frequency": 3.0}
            | {"fast_decay": 0.5, "slow_decay": 2.0, "shift": 0.1, "conv_size": 4, "backend": "reference"},
        ]
