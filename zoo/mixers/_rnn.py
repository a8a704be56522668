"""What the recurrent cells that torch itself has (lstm, gru) share: their init, and packed rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from zoo.ops.common import valid_steps

RNNState = TypeVar("RNNState", bound=tuple)


def uniform(fan: int, *shape: int) -> nn.Parameter:
    """A parameter uniform within fan^-0.5, as torch's own recurrent layers start."""
    return nn.Parameter(torch.empty(shape).uniform_(-(fan**-0.5), fan**-0.5))


def at_last_step(h: Tensor, before: Tensor, lengths: Tensor) -> Tensor:
    """h (B, T, d) at the last valid step of each row, (B, d); `before` where a row has no step."""
    last = h.gather(1, (lengths - 1).clamp(min=0)[:, None, None].expand(-1, -1, h.shape[-1])).squeeze(1)
    return torch.where(lengths[:, None] > 0, last, before)


def by_document(
    run: Callable[[Tensor, RNNState, Tensor], tuple[Tensor, RNNState]],
    x: Tensor,
    state: RNNState,
    lengths: Tensor | None,
    resets: Tensor,
) -> tuple[Tensor, RNNState]:
    """`run(x, state, lengths)` on every document as a row of its own, for cells that know no resets.

    The first document of a row goes on from the state unless it starts one. A state is a NamedTuple of (B, d).
    """
    B, T, _ = x.shape
    lengths = x.new_full((B,), T, dtype=torch.long) if lengths is None else lengths
    starts = resets.clone()
    starts[:, 0] = True
    row, start = (starts & valid_steps(lengths, T)).nonzero(as_tuple=True)
    if not len(row):
        return x.new_zeros(B, T, state[0].shape[1]), state
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
