"""Token shift: what every step mixes of the step before it, in RWKV."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.core.errors import UsageError
from zoo.ops import common
from zoo.ops.common import blank
from zoo.ops.cut import edge_before
from zoo.pieces import Pieces

LEGEND = "x (B, T, D); state (B, 1, D); lengths (B,) whole numbers; resets (B, T) bool."


def token_shift(
    x: Tensor,
    state: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    pieces: Pieces | None = None,
) -> tuple[Tensor, Tensor]:
    """x_{t-1} at every step t.

    Args:
        x: (B, T, D).
        state: (B, 1, D), the input before x, float32 (float64 for float64 inputs); None for zeros. Not changed.
        lengths: (B,) valid steps of a right-padded batch; later steps stay out of the state.
        resets: (B, T) bool; there is nothing before a step where it is true.
        pieces: of a sequence that is cut over processes, of which the other arguments are one piece; `state` is then
            that before the first one.
    Returns:
        (B, T, D) in x's dtype, state (B, 1, D): the last input.
    """
    if x.ndim != 3 or 0 in x.shape:
        raise UsageError(f"token_shift: x has shape {tuple(x.shape)}. Expected shapes: {LEGEND}")
    dtype = common.state_dtype(x)
    common.check("token_shift", LEGEND, "state", state, x, (x.shape[0], 1, x.shape[2]))
    lengths = common.check_packing("token_shift", LEGEND, x, lengths, resets)
    common.check_dtypes("token_shift", state, dtype, x=x)
    if pieces is not None:
        state, x = edge_before(pieces, x, 1, None if state is None else state.to(x.dtype), resets)
    if state is None:
        state = x.new_zeros(x.shape[0], 1, x.shape[2], dtype=dtype)
    inputs = torch.cat([state.to(x.dtype), x], 1)
    before = inputs[:, :-1] if resets is None else blank(inputs[:, :-1], resets)
    if lengths is None:
        return before, common.owned(x[:, -1:].to(dtype))
    last = inputs.gather(1, lengths[:, None, None].expand(-1, 1, x.shape[2])).to(dtype)
    return before, torch.where(lengths[:, None, None] > 0, last, state)
