"""The scalar LSTM of the xLSTM."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from zoo.core.errors import UsageError
from zoo.core.options import Options
from zoo.mixers._xlstm import HeadNorm, HeadwiseLinear, small_std
from zoo.mixers.parts import CausalConv, conv_backend
from zoo.ops import SLSTMState, slstm
from zoo.parameters import set_rule
from zoo.protocol import Context, Mixer, Place, State, first_parameter_like, packing, recurrent_dtype, register

MAX_HEADS = 4


class SLSTMMixerState(NamedTuple):
    conv: Tensor  # (B, W - 1, D): the last inputs of the convolution
    h: Tensor  # (B, H, D / H)
    c: Tensor  # (B, H, D / H)
    n: Tensor  # (B, H, D / H), zero at rest alone
    m: Tensor  # (B, H, D / H)


@register("slstm")
class SLSTM(Mixer):
    """sLSTM: an LSTM with exponential gates that read its outputs (Beck et al. 2024, arXiv 2405.04517, eq. 8 to 18
    and figure 10), as in `xlstm` 2.

        u = silu(conv(x)) ;  (i, f, z, o)_t = (W_i u, W_f u, W_z x, W_o x)_t + R h_{t-1} + b
        l_t = log sigmoid(f_t) + m_{t-1} ;  m_t = max(l_t, i_t) ;  f'_t = exp(l_t - m_t) ;  i'_t = exp(i_t - m_t)
        c_t = f'_t c_{t-1} + i'_t tanh(z_t) ;  n_t = f'_t n_{t-1} + i'_t ;  h_t = sigmoid(o_t) c_t / n_t ;  y = norm(h)

    All W and R are block-diagonal, one block a head; the norm is a layer norm of each head. Published inits: W small,
    R zero, b zero except for the forget gate, whose units range from slow to fast, more widely in deeper layers.

    | state         | cost per token | parallel form                | cannot                              |
    |---------------|----------------|------------------------------|-------------------------------------|
    | 4 D + (W-1) D | 16 D^2 / H     | none: one step after another | recall more than its state can hold |

    Within a head the gates read the outputs of all units, so it tracks states (parity, S5) that linear recurrences
    cannot. The layer has no output projection: put a feed-forward layer after it. The recurrence runs in float32 at
    least.
    """

    class Config(Options):
        """The options.

        Attributes:
            n_heads: H, by default the largest number up to 4 that divides D.
            conv_size: W, steps in the window of the convolution before the gates i and f; 0 for none.
            forget_bias: "powerlaw" over a head's units, depending on depth, or "linspace" from 3 to 6.
            recurrent_init: R starts "zeros", or "uniform" within 1 / sqrt(D).
            norm_weight: a learnt factor for each unit after the norm.
            backend: "reference" is one step at a time, "compiled" the same loop in C++, forward and backward.
        """

        n_heads: int | None = Field(default=None, ge=1)
        conv_size: int = Field(default=4, ge=0)
        forget_bias: Literal["powerlaw", "linspace"] = "powerlaw"
        recurrent_init: Literal["zeros", "uniform"] = "zeros"
        norm_weight: bool = True
        backend: Literal["auto", "reference", "compiled"] = "auto"

    def __init__(self, d_model: int, config: Config, *, place: Place = Place()):
        super().__init__(d_model, config, place=place)
        c = config
        self.n_heads = c.n_heads or next(n for n in range(MAX_HEADS, 0, -1) if d_model % n == 0)
        if d_model % self.n_heads:
            raise UsageError(f"slstm: n_heads={self.n_heads} does not divide d_model={d_model}.")
        self.d_head = d_model // self.n_heads
        self.conv = None
        if c.conv_size:
            self.conv = CausalConv(d_model, c.conv_size, bias=True, activation="silu", backend=conv_backend(c.backend))
        self.igate, self.fgate, self.zgate, self.ogate = (
            HeadwiseLinear(d_model, self.n_heads, bias=False, std=small_std(d_model)) for _ in range(4)
        )
        recurrent = torch.zeros(self.n_heads, 4, self.d_head, self.d_head)
        if c.recurrent_init == "uniform":
            recurrent.uniform_(-(d_model**-0.5), d_model**-0.5)
        self.recurrent = nn.Parameter(recurrent)
        set_rule(self, "recurrent", weight_decay=False)  # as published
        bias = torch.zeros(4, self.n_heads, self.d_head)
        bias[1] = _forget_bias(self.d_head, place) if c.forget_bias == "powerlaw" else torch.linspace(3, 6, self.d_head)
        self.bias = nn.Parameter(bias.flatten())
        self.norm = HeadNorm(d_model, eps=1e-5, weight="centred" if c.norm_weight else None)

    def init_state(self, batch_size: int, *, capacity: int | None = None, device=None, dtype=None) -> SLSTMMixerState:
        device, dtype = first_parameter_like(self, device, dtype)
        shapes = self._state_shapes(batch_size)
        return SLSTMMixerState(*(torch.zeros(s, device=device, dtype=recurrent_dtype(dtype)) for s in shapes))

    def _state_shapes(self, batch_size: int) -> list[tuple[int, ...]]:
        conv = (batch_size, max(self.config.conv_size - 1, 0), self.d_model)
        return [conv, *4 * [(batch_size, self.n_heads, self.d_head)]]

    def forward(self, x: Tensor, state: State | None = None, context: Context | None = None) -> tuple[Tensor, State]:
        conv, *cell = self.init_state(len(x), device=x.device, dtype=x.dtype) if state is None else state
        u, conv = self.conv(x, conv, context) if self.conv else (x, conv)
        gates = torch.stack([self.igate(u), self.fgate(u), self.zgate(x), self.ogate(x)], 2) + self.bias.view(4, -1)
        gates = gates.unflatten(-1, (self.n_heads, -1))
        h, cell = slstm(gates, self.recurrent, SLSTMState(*cell), backend=self.config.backend, **packing(context))
        return self.norm(h).to(x.dtype), SLSTMMixerState(conv, *cell)

    def flops_per_token(self, context_length: int) -> int:
        return 16 * self.d_model * self.d_head

    @classmethod
    def law_cases(cls) -> list[dict[str, Any]]:
        return [
            {},
            {"n_heads": 2, "conv_size": 0, "forget_bias": "linspace", "recurrent_init": "uniform"},
            {"n_heads": 1, "conv_size": 3, "norm_weight": False, "backend": "reference"},
        ]


def _forget_bias(width: int, place: Place) -> Tensor:
    """From 5 down to -7 along the units, the steeper at first the shallower the layer ("powerlaw_blockdependent")."""
    depth = place.layer / (place.n_layers - 1) if place.n_layers > 1 else 0.0
    return 5 - 12 * (torch.arange(width) / max(width - 1, 1)) ** (0.3 + 1.3 * depth)
