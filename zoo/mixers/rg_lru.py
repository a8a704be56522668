"""The recurrent block of Griffin, around the real-gated linear recurrent unit."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from zoo.core.errors import UsageError
from zoo.core.options import Options
from zoo.mixers.parts import Backend, CausalConv, conv_backend, main_backend, precise, started, whole
from zoo.ops import scan
from zoo.ops.derivatives import transformed
from zoo.protocol import (
    Context,
    Mixer,
    Place,
    State,
    Traits,
    derive_heads,
    first_parameter_like,
    packing,
    recurrent_dtype,
    register,
)
from zoo.states import document_positions, next_position

POWER = 8.0  # the paper's constant c
STEEPEST = 1000.0  # bound of the derivative of the square root, as in the authors' code


class RGLRUState(NamedTuple):
    conv: Tensor  # (B, W - 1, d_rnn): the last inputs of the convolution
    h: Tensor  # (B, d_rnn)
    position: Tensor  # (B,): steps of the current document seen


@register("rg_lru")
class RGLRU(Mixer):
    """The recurrent block of Griffin and RecurrentGemma: a gated decay for each channel (De et al. 2024,
    arXiv 2402.19427, sections 2.3 and 2.4).

        x = conv(W_x x) ;  r = sigmoid(W_r x + b_r) ;  i = sigmoid(W_i x + b_i)
        a_t = exp(-c softplus(p) r_t) ;  h_t = a_t * h_{t-1} + sqrt(1 - a_t^2) * i_t * x_t
        y = W_out (h * gelu(W_y x))

    with c = 8. The gates W_r, W_i are block-diagonal. The first step of a document is not scaled by sqrt(1 - a^2), so
    that its states have the size of later ones from the start. Published inits: p such that exp(-c softplus(p)), the
    decay under an open gate, is uniform in [0.9, 0.999]; W_x, W_y normal with variance 1 / D, W_out 2 / (d_rnn
    n_layers), gates 1 / block, convolution 0.01 / W; all biases zero.

    | state             | cost per token                        | parallel form | cannot                              |
    |-------------------|---------------------------------------|---------------|-------------------------------------|
    | W d_rnn           | 6 D d_rnn + 4 d_rnn^2 / n_blocks      | a scan        | recall more than d_rnn numbers;     |
    |                   |                                       |               | track parity (positive decays)      |

    Gates, decays and states are computed in float32 at least.
    """

    traits = Traits(cuts_in_ops=True)

    class Config(Options):
        """The options.

        Attributes:
            expand: d_rnn / D; the paper has 4/3, RecurrentGemma 1.
            n_blocks: blocks of the gates, by default the most of at least 64 channels that divide d_rnn.
            conv_size: W, steps in the window of the convolution.
            decay_range: the decays under an open gate start uniform between these. (The authors' code leaves out the
                power c in its init, which gives about [0.43, 0.992].)
            backend: form of the ops.
        """

        expand: float = Field(default=1.0, gt=0)
        n_blocks: int | None = Field(default=None, ge=1)
        conv_size: int = Field(default=4, ge=1)
        decay_range: tuple[float, float] = (0.9, 0.999)
        backend: Backend = "auto"

    def __init__(self, d_model: int, config: Config, *, place: Place = Place()):
        super().__init__(d_model, config, place=place)
        c = config
        low, high = c.decay_range
        if not 0 < low <= high < 1:
            raise UsageError(
                f"rg_lru: decay_range=[{low:g}, {high:g}] is not allowed: it should be 0 < low <= high < 1."
            )
        self.d_rnn = whole(self.name, f"expand * d_model = {c.expand:g} * {d_model}", c.expand * d_model)
        blocks = c.n_blocks or derive_heads(self.d_rnn)
        if self.d_rnn % blocks:
            raise UsageError(f"rg_lru: n_blocks={blocks} does not divide expand * d_model = {self.d_rnn}.")
        size = self.d_rnn // blocks

        self.linear_x = nn.Linear(d_model, self.d_rnn)
        self.linear_y = nn.Linear(d_model, self.d_rnn)
        self.conv = CausalConv(self.d_rnn, c.conv_size, bias=True, activation=None, backend=conv_backend(c.backend))
        self.gate_weight = nn.Parameter(torch.randn(2, blocks, size, size) * size**-0.5)  # of i, of r; x_j w_ji
        self.gate_bias = nn.Parameter(torch.zeros(2, blocks, size))
        decays = torch.empty(self.d_rnn).uniform_(low, high)
        self.decay = nn.Parameter(torch.log(torch.expm1(-decays.log() / POWER)))  # p
        self.linear_out = nn.Linear(self.d_rnn, d_model)
        with torch.no_grad():
            for layer, variance in ((self.linear_x, 1), (self.linear_y, 1), (self.linear_out, 2 / place.n_layers)):
                layer.weight.normal_(std=math.sqrt(variance / layer.in_features))
                layer.bias.zero_()
            self.conv.weight.normal_(std=math.sqrt(0.01 / c.conv_size))
            self.conv.bias = nn.Parameter(torch.zeros(self.d_rnn))

    def init_state(self, batch_size: int, *, capacity: int | None = None, device=None, dtype=None) -> RGLRUState:
        device, dtype = first_parameter_like(self, device, dtype)
        conv = torch.zeros(self.conv.state_shape(batch_size), device=device, dtype=recurrent_dtype(dtype))
        h = conv.new_zeros(batch_size, self.d_rnn)
        return RGLRUState(conv, h, torch.zeros(batch_size, device=device, dtype=torch.int64))

    def forward(self, x: Tensor, state: State | None = None, context: Context | None = None) -> tuple[Tensor, State]:
        state = self.init_state(len(x), device=x.device, dtype=x.dtype) if state is None else state
        lengths, resets = (None, None) if context is None else (context.lengths, context.resets)
        start = started(state.position, context)
        positions = document_positions(start, x.shape[1], resets)
        gate = F.gelu(self.linear_y(x), approximate="tanh")
        u, conv_state = self.conv(self.linear_x(x), state.conv, context)

        i, r = self._gates(u)
        log_a = -POWER * F.softplus(precise(self.decay)) * r
        scale = bounded_sqrt(-torch.expm1(2 * log_a)).masked_fill((positions == 0)[..., None], 1)
        backend = main_backend(self.config.backend)
        h, h_state = scan(log_a.exp(), u * i * scale, state.h, backend=backend, **packing(context))
        y = self.linear_out(h.to(x.dtype) * gate)
        return y, RGLRUState(conv_state, h_state, next_position(positions, start, lengths))

    def _gates(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """i and r, (B, T, d_rnn)."""
        blocks = u.unflatten(-1, self.gate_bias.shape[1:]).flatten(0, 1).transpose(0, 1)  # (blocks, B T, size)
        gates = []
        for weight, bias in zip(self.gate_weight, self.gate_bias, strict=True):
            gate = precise(torch.bmm(blocks, weight)) + bias[:, None]
            gates.append(gate.sigmoid().transpose(0, 1).reshape(u.shape))
        return gates[0], gates[1]

    def flops_per_token(self, context_length: int) -> int:
        return 6 * self.d_model * self.d_rnn + 4 * self.d_rnn * self.gate_bias.shape[2]

    @classmethod
    def law_cases(cls) -> list[dict[str, Any]]:
        return [
            {},
            {"expand": 1.5, "n_blocks": 3, "conv_size": 2, "backend": "reference"},
            {"n_blocks": 4, "decay_range": (0.3, 0.99), "backend": "chunked"},
        ]


def bounded_sqrt(x: Tensor) -> Tensor:
    """sqrt(x) with a derivative of at most STEEPEST: near x = 0 the true one is infinite."""
    if not transformed():
        return _BoundedSqrt.apply(x)
    least = STEEPEST**-2 / 4
    root = x.clamp(min=least).sqrt()
    line = STEEPEST * x
    return torch.where(x > least, root, line + (x.sqrt() - line).detach())


class _BoundedSqrt(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.sqrt()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, d_y: Tensor) -> Tensor:
        return d_y * (4 * ctx.saved_tensors[0]).clamp(min=STEEPEST**-2).rsqrt()
