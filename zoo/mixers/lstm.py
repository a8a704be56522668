"""The long short-term memory."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from zoo.core.options import Options
from zoo.mixers._rnn import TorchCell, by_document
from zoo.mixers.parts import at_last_step
from zoo.ops.common import valid_steps, without_autocast
from zoo.protocol import Place, register


class LSTMState(NamedTuple):
    h: Tensor  # (B, d_hidden)
    c: Tensor  # (B, d_hidden)


@register("lstm")
class LSTM(TorchCell):
    """The LSTM with forget gate (Gers et al. 2000), with the parameters of torch.nn.LSTM, under the same names.

        i, f, g, o = W_ih x_t + b_ih + W_hh h_{t-1} + b_hh
        c_t = sigmoid(f) * c_{t-1} + sigmoid(i) * tanh(g) ;  h_t = sigmoid(o) * tanh(c_t)
        y_t = h_t, or W_out h_t where d_hidden differs from D

    | state      | cost per token            | parallel form                | cannot                              |
    |------------|---------------------------|------------------------------|-------------------------------------|
    | 2 d_hidden | 8 d_hidden (D + d_hidden) | none: one step after another | recall more than its state can hold |

    The recurrence runs in float32 at least, under autocast too: rounding feeds back at every step.
    """

    n_gates = 4
    state_type = LSTMState

    class Config(Options):
        """The options.

        Attributes:
            d_hidden: width of the state, D by default; any other width is projected back to D.
            forget_bias: initial bias of the forget gate (Jozefowicz et al. 2015: 1); None for torch's own init.
            bias: both biases.
            backend: "reference" is one step at a time, "fused" torch's own LSTM; "auto" fuses where it can.
        """

        d_hidden: int | None = Field(default=None, ge=1)
        forget_bias: float | None = 1.0
        bias: bool = True
        backend: Literal["auto", "reference", "fused"] = "auto"

    def __init__(self, d_model: int, config: Config, *, place: Place = Place()):
        super().__init__(d_model, config, place=place)
        if config.bias and config.forget_bias is not None:
            forget = slice(self.d_hidden, 2 * self.d_hidden)
            with torch.no_grad():
                self.bias_ih_l0[forget] = config.forget_bias
                self.bias_hh_l0[forget] = 0.0

    def _forms(self):
        return reference, fused

    @classmethod
    def law_cases(cls) -> list[dict[str, Any]]:
        return [
            {},
            {"d_hidden": 24, "forget_bias": None, "backend": "reference"},
            {"bias": False, "backend": "fused"},
        ]


@without_autocast
def reference(
    x: Tensor, state: LSTMState, weights: list[Tensor], lengths: Tensor | None, resets: Tensor | None
) -> tuple[Tensor, LSTMState]:
    """The definition, one step at a time; only the input's part of the gates is taken for all steps at once."""
    w_ih, w_hh, *biases = weights
    gates = F.linear(x, w_ih, biases[0] + biases[1] if biases else None)
    valid = None if lengths is None else valid_steps(lengths, x.shape[1])
    if valid is not None and resets is not None:
        resets = resets & valid
    h, c = state
    outputs = []
    for t in range(x.shape[1]):
        if resets is not None:
            h, c = (s.masked_fill(resets[:, t, None], 0) for s in (h, c))
        i, f, g, o = torch.addmm(gates[:, t], h, w_hh.T).chunk(4, -1)
        new_c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        new_h = o.sigmoid() * new_c.tanh()
        outputs.append(new_h)
        if valid is not None:
            new_h, new_c = (torch.where(valid[:, t, None], new, old) for new, old in ((new_h, h), (new_c, c)))
        h, c = new_h, new_c
    return torch.stack(outputs, 1), LSTMState(h, c)


@without_autocast
def fused(
    x: Tensor, state: LSTMState, weights: list[Tensor], lengths: Tensor | None, resets: Tensor | None
) -> tuple[Tensor, LSTMState]:
    """torch's own LSTM. It knows neither lengths nor resets: documents become rows, and padding is frozen."""
    if resets is not None:
        return by_document(lambda x, state, lengths: fused(x, state, weights, lengths, None), x, state, lengths, resets)
    if lengths is not None:
        padding = ~valid_steps(lengths, x.shape[1])
        x, weights = _freeze(x, padding, weights)
    h, last_h, last_c = torch.lstm(
        x, (state.h[None], state.c[None]), weights, len(weights) == 4, 1, 0.0, False, False, True
    )
    last_h = last_h.squeeze(0)
    if lengths is not None:
        last_h = at_last_step(h, state.h, lengths)
    return h, LSTMState(last_h, last_c.squeeze(0))


def _freeze(x: Tensor, padding: Tensor, weights: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """One more input, 1 on padding, that shuts the input gate and opens the forget gate: c stays, to the bit."""
    x = torch.cat([x.masked_fill(padding[..., None], 0), padding[..., None].to(x.dtype)], -1)
    w_ih, *rest = weights
    shut = w_ih.new_zeros(4, len(w_ih) // 4)
    shut[0], shut[1] = -1e4, 1e4
    return x, [torch.cat([w_ih, shut.flatten()[:, None]], 1), *rest]
