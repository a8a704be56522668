"""RWKV's channel mixing: a squared-ReLU perceptron that also reads the previous step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from zoo.core.options import Options
from zoo.ops import token_shift
from zoo.ops.cells import shift_step
from zoo.ops.modules import bare
from zoo.ops.single_step import squared_relu_step
from zoo.protocol import (
    Context,
    Mixer,
    Place,
    State,
    Traits,
    first_parameter_like,
    packing,
    recurrent_dtype,
    register,
    single,
)


class RWKVChannelMixState(NamedTuple):
    shift: Tensor  # (B, 1, D): the last input


@register("rwkv_channel_mix")
class RWKVChannelMix(Mixer):
    """The channel mixing of RWKV-7: a perceptron that also reads the previous step (Peng et al. 2025, arXiv 2503.14456,
    section 4).

        y_t = W_value relu(W_key (x_t + x_k * (x_{t-1} - x_t)))^2
        with `gate`, as in RWKV-6: that times sigmoid(W_receptance (x_t + x_r * (x_{t-1} - x_t)))

    Published inits: W_key orthogonal, W_value zero, x_k = 1 - (i / D)^((1 - layer / n_layers)^4) for channel i, so that
    early layers look back with most of their channels and late ones with few. With `gate` (RWKV-6) the power is
    1 - layer / n_layers, for x_r too, and W_receptance zero. Only the matrices are decayed.

    | state    | cost per token               | parallel form      | cannot                    |
    |----------|------------------------------|--------------------|---------------------------|
    | D floats | 4 D d_hidden, and 2 D^2 more | every step at once | see beyond the last step  |
    |          | with `gate`                  |                    |                           |
    """

    kind = "channel"

    traits = Traits(cuts_in_ops=True)

    class Config(Options):
        """The options.

        Attributes:
            d_hidden: inner width, by default 4 D, and with `gate` 3.5 D rounded down to a multiple of 32.
            gate: RWKV-6's output gate.
        """

        d_hidden: int | None = Field(default=None, ge=1)
        gate: bool = False

    def __init__(self, d_model: int, config: Config, *, place: Place = Place()):
        super().__init__(d_model, config, place=place)
        self.d_hidden = config.d_hidden or (int(3.5 * d_model) // 32 * 32 if config.gate else 4 * d_model)
        rest = 1 - place.layer / place.n_layers
        self.x_k = nn.Parameter(1 - (torch.arange(d_model) / d_model) ** (rest if config.gate else rest**4))
        self.key = nn.Linear(d_model, self.d_hidden, bias=False)
        self.value = nn.Linear(self.d_hidden, d_model, bias=False)
        nn.init.orthogonal_(self.key.weight)
        nn.init.zeros_(self.value.weight)
        if config.gate:
            self.x_r = nn.Parameter(self.x_k.detach().clone())
            self.receptance = nn.Linear(d_model, d_model, bias=False)
            nn.init.zeros_(self.receptance.weight)

    def init_projections(self, init: Callable[[Tensor], Any]) -> None:
        """Keeps its inits, RWKV's own."""

    def init_state(
        self, batch_size: int, *, capacity: int | None = None, device=None, dtype=None
    ) -> RWKVChannelMixState:
        device, dtype = first_parameter_like(self, device, dtype)
        shift = torch.zeros(batch_size, 1, self.d_model, device=device, dtype=recurrent_dtype(dtype))
        return RWKVChannelMixState(shift)

    def forward(self, x: Tensor, state: State | None = None, context: Context | None = None) -> tuple[Tensor, State]:
        if state is not None and single(x, state, context) and not self.config.gate:
            mixed = shift_step(x, state.shift, self.x_k)
            if mixed is not None:
                state.shift.copy_(x)
                done = None
                if bare(self.key, self.value):
                    done = squared_relu_step(mixed[0], self.key.weight, self.value.weight)
                return self.value(F.relu(self.key(mixed[0])).square()) if done is None else done, state
        before, shift = token_shift(x, None if state is None else state.shift, **packing(context))
        mixed = torch.lerp(x, before, self.x_k.to(x.dtype))
        y = self.value(F.relu(self.key(mixed)).square())
        if self.config.gate:
            y = y * torch.sigmoid(self.receptance(torch.lerp(x, before, self.x_r.to(x.dtype))))
        return y, RWKVChannelMixState(shift)

    def flops_per_token(self, context_length: int) -> int:
        return 4 * self.d_model * self.d_hidden + (2 * self.d_model**2 if self.config.gate else 0)

    @classmethod
    def law_cases(cls) -> list[dict[str, Any]]:
        return [{}, {"d_hidden": 40, "gate": True}]
