"""The gated recurrent unit."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from tasks.registry import Options
from zoo.mixers._parts import precise
from zoo.mixers._rnn import at_last_step, by_document, uniform
from zoo.ops.common import blank, log_form, valid_steps, without_autocast
from zoo.protocol import Context, Mixer, Place, State, first_parameter_like, recurrent_dtype
from zoo.registry import register


class GRUState(NamedTuple):
    h: Tensor  # (B, d_hidden)


@register("gru")
class GRU(Mixer):
    """The GRU (Cho et al. 2014, arXiv 1406.1078), its parameters those of torch.nn.GRU, under the same names.

        r, z = sigmoid(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh)
        n = tanh(W_in x_t + b_in + r * (W_hn h_{t-1} + b_hn)) ;  h_t = (1 - z) * n + z * h_{t-1}
        y_t = h_t, or W_out h_t where d_hidden differs from D

    The reset gate r acts on the product, not on h (the variant that cuDNN and torch have, as in Cho et al.'s second
    paper, arXiv 1409.1259).

    | state    | cost per token            | parallel form                | cannot                              |
    |----------|---------------------------|------------------------------|-------------------------------------|
    | d_hidden | 6 d_hidden (D + d_hidden) | none: one step after another | recall more than its state can hold |

    The recurrence runs in float32 at least, under autocast too: rounding feeds back at every step.
    """

    class Config(Options):
        """The options.

        Attributes:
            d_hidden: width of the state, D by default; any other width is projected back to D.
            bias: both biases.
            backend: "reference" is one step at a time, "fused" torch's own GRU; "auto" fuses where it can.
        """

        d_hidden: int | None = Field(default=None, ge=1)
        bias: bool = True
        backend: Literal["auto", "reference", "fused"] = "auto"

    def __init__(self, d_model: int, config: Config, *, place: Place = Place()):
        super().__init__(d_model, config, place=place)
        self.d_hidden = config.d_hidden or d_model
        if config.backend == "fused":
            self.compiles = "torch.gru takes packed documents as rows of their own, whose number depends on the data."
        width, gates = self.d_hidden, 3 * self.d_hidden
        self.weight_ih_l0 = uniform(width, gates, d_model)
        self.weight_hh_l0 = uniform(width, gates, width)
        if config.bias:
            self.bias_ih_l0, self.bias_hh_l0 = uniform(width, gates), uniform(width, gates)
        self.out_proj = nn.Linear(width, d_model, bias=False) if width != d_model else None

    def init_state(self, batch_size: int, *, capacity: int | None = None, device=None, dtype=None) -> GRUState:
        device, dtype = first_parameter_like(self, device, dtype)
        return GRUState(torch.zeros(batch_size, self.d_hidden, device=device, dtype=recurrent_dtype(dtype)))

    def forward(self, x: Tensor, state: State | None = None, context: Context | None = None) -> tuple[Tensor, State]:
        state = self.init_state(len(x), device=x.device, dtype=x.dtype) if state is None else state
        lengths, resets = (None, None) if context is None else (context.lengths, context.resets)
        biases = (self.bias_ih_l0, self.bias_hh_l0) if self.config.bias else ()
        weights = [precise(w) for w in (self.weight_ih_l0, self.weight_hh_l0, *biases)]
        form = self._form(x.shape[1], resets)
        log_form("gru", form.__name__)
        h, state = form(precise(x), state, weights, lengths, resets)
        h = (h if lengths is None else blank(h, ~valid_steps(lengths, x.shape[1]))).to(x.dtype)
        return h if self.out_proj is None else self.out_proj(h), state

    def _form(self, n_steps: int, resets: Tensor | None):
        if self.config.backend != "auto":
            return reference if self.config.backend == "reference" else fused
        return reference if n_steps == 1 or resets is not None or torch.compiler.is_compiling() else fused

    def flops_per_token(self, context_length: int) -> int:
        gates = 6 * self.d_hidden * (self.d_model + self.d_hidden)
        return gates + (2 * self.d_hidden * self.d_model if self.out_proj is not None else 0)

    def state_bytes(self, batch_size: int, context_length: int, dtype) -> int:
        return batch_size * self.d_hidden * recurrent_dtype(dtype).itemsize

    @classmethod
    def law_cases(cls) -> list[dict[str, Any]]:
        return [{}, {"d_hidden": 24, "backend": "reference"}, {"bias": False, "backend": "fused"}]


@without_autocast
def reference(
    x: Tensor, state: GRUState, weights: list[Tensor], lengths: Tensor | None, resets: Tensor | None
) -> tuple[Tensor, GRUState]:
    """The definition, one step at a time; only the input's part of the gates is taken for all steps at once."""
    w_ih, w_hh, *biases = weights
    b_ih, b_hh = biases or (None, None)
    inputs = F.linear(x, w_ih, b_ih)
    valid = None if lengths is None else valid_steps(lengths, x.shape[1])
    if valid is not None and resets is not None:
        resets = resets & valid
    h, outputs = state.h, []
    for t in range(x.shape[1]):
        if resets is not None:
            h = blank(h, resets[:, t])
        x_r, x_z, x_n = inputs[:, t].chunk(3, -1)
        h_r, h_z, h_n = F.linear(h, w_hh, b_hh).chunk(3, -1)
        new = torch.lerp((x_n + (x_r + h_r).sigmoid() * h_n).tanh(), h, (x_z + h_z).sigmoid())
        outputs.append(new)
        h = new if valid is None else torch.where(valid[:, t, None], new, h)
    return torch.stack(outputs, 1), GRUState(h)


@without_autocast
def fused(
    x: Tensor, state: GRUState, weights: list[Tensor], lengths: Tensor | None, resets: Tensor | None
) -> tuple[Tensor, GRUState]:
    """torch's own GRU. It knows neither lengths nor resets: documents become rows, and padding comes last."""
    if resets is not None:
        return by_document(lambda x, state, lengths: fused(x, state, weights, lengths, None), x, state, lengths, resets)
    if lengths is not None:
        x = blank(x, ~valid_steps(lengths, x.shape[1]))
    h, last = torch.gru(x, state.h[None], weights, len(weights) == 4, 1, 0.0, False, False, True)
    return h, GRUState(last.squeeze(0) if lengths is None else at_last_step(h, state.h, lengths))
