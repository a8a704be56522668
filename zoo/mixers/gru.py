"""The gated recurrent unit."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from zoo.core.options import Options
from zoo.mixers._rnn import TorchCell, by_document
from zoo.mixers.parts import at_last_step
from zoo.ops.common import blank, valid_steps, without_autocast
from zoo.protocol import register


class GRUState(NamedTuple):
    h: Tensor  # (B, d_hidden)


@register("gru")
class GRU(TorchCell):
    """The gated recurrent unit (Cho et al. 2014, arXiv 1406.1078), with the parameters of torch.nn.GRU,
    under the same names.

        r, z = sigmoid(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh)
        n = tanh(W_in x_t + b_in + r * (W_hn h_{t-1} + b_hn)) ;  h_t = (1 - z) * n + z * h_{t-1}
        y_t = h_t, or W_out h_t where d_hidden differs from D

    The reset gate r acts on the product, not on h: the variant of cuDNN and torch; the published paper has
    W_hn (r * h_{t-1}).

    | state    | cost per token            | parallel form                | cannot                              |
    |----------|---------------------------|------------------------------|-------------------------------------|
    | d_hidden | 6 d_hidden (D + d_hidden) | none: one step after another | recall more than its state can hold |

    The recurrence runs in float32 at least, under autocast too: rounding feeds back at every step.
    """

    n_gates = 3
    state_type = GRUState

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

    def _forms(self):
        return reference, fused

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
