"""Shared by the recurrent cells that torch has too (lstm, gru): the layer around the cell, and packed rows."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from zoo.core.errors import UsageError
from zoo.mixers.parts import precise
from zoo.ops.common import blank, log_form, valid_steps
from zoo.ops.derivatives import TRANSFORMED, traced, transformed
from zoo.protocol import Context, Mixer, Place, State, first_parameter_like, recurrent_dtype

RNNState = TypeVar("RNNState", bound=tuple)


class TorchCell(Mixer):
    """A cell with the parameters of torch's own layer, under the same names. A subclass adds the rest.

    n_gates: blocks of the weights; state_type: a NamedTuple of (B, d_hidden), h first. Forms are functions of
    (x, state, weights, lengths, resets) that return h of all steps and the last state.
    """

    n_gates: ClassVar[int]
    state_type: ClassVar[Any]

    def __init__(self, d_model: int, config: Any, *, place: Place = Place()):
        super().__init__(d_model, config, place=place)
        self.d_hidden = width = config.d_hidden or d_model
        if config.backend == "fused":
            why = f"torch.{self.name} takes packed documents as rows of their own, whose number depends on the data."
            self.traits = self.traits._replace(not_compilable=why)
        rows = self.n_gates * width
        self.weight_ih_l0 = uniform(width, rows, d_model)
        self.weight_hh_l0 = uniform(width, rows, width)
        if config.bias:
            self.bias_ih_l0, self.bias_hh_l0 = uniform(width, rows), uniform(width, rows)
        self.out_proj = nn.Linear(width, d_model, bias=False) if width != d_model else None

    @abstractmethod
    def _forms(self) -> tuple[Callable[..., tuple[Tensor, Any]], Callable[..., tuple[Tensor, Any]]]:
        """The step form and torch's own."""

    def init_state(self, batch_size: int, *, capacity: int | None = None, device=None, dtype=None) -> State:
        device, dtype = first_parameter_like(self, device, dtype)
        shape = batch_size, self.d_hidden
        return self.state_type(
            *(torch.zeros(shape, device=device, dtype=recurrent_dtype(dtype)) for _ in self.state_type._fields)
        )

    def forward(self, x: Tensor, state: State | None = None, context: Context | None = None) -> tuple[Tensor, State]:
        state = self.init_state(len(x), device=x.device, dtype=x.dtype) if state is None else state
        lengths, resets = (None, None) if context is None else (context.lengths, context.resets)
        biases = (self.bias_ih_l0, self.bias_hh_l0) if self.config.bias else ()
        weights = [precise(w) for w in (self.weight_ih_l0, self.weight_hh_l0, *biases)]
        by_steps, fused = self._forms()
        slow = x.shape[1] == 1 or traced() or (resets is not None and not launches(x))
        backend = self.config.backend
        if backend == "fused" and transformed():
            raise UsageError(f"{self.name}: backend='fused' does not serve {TRANSFORMED}.")
        form = by_steps if backend == "reference" or (backend == "auto" and slow) else fused
        log_form(self.name, form.__name__)
        h, state = form(precise(x), state, weights, lengths, resets)
        h = (h if lengths is None else blank(h, ~valid_steps(lengths, x.shape[1]))).to(x.dtype)
        return h if self.out_proj is None else self.out_proj(h), state

    def flops_per_token(self, context_length: int) -> int:
        gates = 2 * self.n_gates * self.d_hidden * (self.d_model + self.d_hidden)
        return gates + (2 * self.d_hidden * self.d_model if self.out_proj is not None else 0)


def uniform(fan: int, *shape: int) -> nn.Parameter:
    """A parameter uniform within fan^-0.5, as torch's own recurrent layers start."""
    return nn.Parameter(torch.empty(shape).uniform_(-(fan**-0.5), fan**-0.5))


def launches(x: Tensor) -> bool:
    """Whether every operator on x is a launch, so that a loop over steps takes longer than documents as padded rows."""
    return x.is_cuda


def by_document(
    run: Callable[[Tensor, RNNState, Tensor], tuple[Tensor, RNNState]],
    x: Tensor,
    state: RNNState,
    lengths: Tensor | None,
    resets: Tensor,
) -> tuple[Tensor, RNNState]:
    """`run(x, state, lengths)` on every document as a row of its own, for cells that know no resets.

    The first document of a row continues from the state, unless a document starts there. A state is a NamedTuple of (B,
    d), or `()` where there is none and outputs are as wide as inputs.
    """
    B, T, _ = x.shape
    lengths = x.new_full((B,), T, dtype=torch.long) if lengths is None else lengths
    starts = resets.clone()
    starts[:, 0] = True
    row, start = (starts & valid_steps(lengths, T)).nonzero(as_tuple=True)
    if not len(row):
        return x.new_zeros(B, T, state[0].shape[1] if state else x.shape[-1]), state
    last = torch.cat([row[1:] != row[:-1], row.new_ones(1, dtype=torch.bool)])
    end = torch.where(last, lengths[row], start.roll(-1))
    goes_on = ~resets[row, start][:, None]
    size = end - start
    steps = start[:, None] + torch.arange(int(size.max()), device=x.device)
    documents = x[row[:, None], steps.clamp(max=T - 1)]
    h, after = run(documents, type(state)(*(torch.where(goes_on, s[row], 0) for s in state)), size)
    inside = steps < end[:, None]
    y = h.new_zeros(B, T, h.shape[-1]).index_put((row[:, None].expand_as(steps)[inside], steps[inside]), h[inside])
    return y, type(state)(*(s.index_put((row[last],), a[last]) for s, a in zip(state, after, strict=True)))
