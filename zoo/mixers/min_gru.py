"""The minimal gated recurrent unit, whose gates do not read its state."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from zoo.core.options import Options
from zoo.mixers.parts import Backend, precise, whole
from zoo.ops import scan
from zoo.protocol import Context, Mixer, Place, State, Traits, first_parameter_like, packing, recurrent_dtype, register


class MinGRUState(NamedTuple):
    h: Tensor  # (B, d_hidden)


@register("min_gru")
class MinGRU(Mixer):
    """The minimal GRU: gate and candidate depend only on the input (Feng et al. 2024, arXiv 2410.01201, section 3.1).

    Positive candidates are those of appendix B.

        z = sigmoid(W_z x + b_z) ;  c = g(W_h x + b_h) ;  h_t = (1 - z_t) * h_{t-1} + z_t * c_t
        y_t = h_t, or W_out h_t where d_hidden differs from D

    with g(v) = v + 0.5 for v >= 0 and sigmoid(v) below: positive, as the paper's log-space form needs. That form takes
    the cumulated logarithms of 1 - z, whose rounding grows with their sum. The same recurrence as a scan of products
    and sums of positive numbers loses nothing: every term is exact to a few roundings and none cancels.

    | state    | cost per token | parallel form | cannot                                                           |
    |----------|----------------|---------------|------------------------------------------------------------------|
    | d_hidden | 4 D d_hidden   | a scan        | let its gates depend on its state: no counting, no parity in one |
    |          |                |               | layer; recall more than its state can hold                       |
    """

    traits = Traits(cuts_in_ops=True)

    class Config(Options):
        """The options.

        Attributes:
            expand: d_hidden / D; other than 1, the state is projected back to D.
            positive: candidates through g; otherwise the linear ones of section 3.1.
            bias: biases of both projections.
            backend: form of the op.
        """

        expand: float = Field(default=1.0, gt=0)
        positive: bool = True
        bias: bool = True
        backend: Backend = "auto"

    def __init__(self, d_model: int, config: Config, *, place: Place = Place()):
        super().__init__(d_model, config, place=place)
        self.d_hidden = whole(self.name, f"expand * d_model = {config.expand:g} * {d_model}", config.expand * d_model)
        self.linear_z = nn.Linear(d_model, self.d_hidden, bias=config.bias)
        self.linear_h = nn.Linear(d_model, self.d_hidden, bias=config.bias)
        self.out_proj = nn.Linear(self.d_hidden, d_model, bias=False) if self.d_hidden != d_model else None

    def init_state(self, batch_size: int, *, capacity: int | None = None, device=None, dtype=None) -> MinGRUState:
        device, dtype = first_parameter_like(self, device, dtype)
        return MinGRUState(torch.zeros(batch_size, self.d_hidden, device=device, dtype=recurrent_dtype(dtype)))

    def forward(self, x: Tensor, state: State | None = None, context: Context | None = None) -> tuple[Tensor, State]:
        gate, candidate = precise(self.linear_z(x)), precise(self.linear_h(x))
        if self.config.positive:
            candidate = torch.where(candidate >= 0, candidate + 0.5, candidate.sigmoid())
        before = None if state is None else state.h
        keep, take = (-gate).sigmoid(), gate.sigmoid() * candidate
        h, after = scan(keep, take, before, backend=self.config.backend, **packing(context))
        h = h.to(x.dtype)
        return h if self.out_proj is None else self.out_proj(h), MinGRUState(after)

    def flops_per_token(self, context_length: int) -> int:
        return (4 if self.out_proj is None else 6) * self.d_model * self.d_hidden

    @classmethod
    def law_cases(cls) -> list[dict[str, Any]]:
        return [
            {},
            {"expand": 1.5, "backend": "reference"},
            {"positive": False, "bias": False, "backend": "chunked"},
        ]
