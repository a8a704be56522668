"""Causal convolution with a filter as long as the sequence, by FFT: y_t = sum over s <= t of filter_{t-s} u_s.

The core of Hyena (Poli et al. 2023, arXiv 2302.10866). Its state is all that was read: a filter of any shape has no
recurrence. Documents of a packed row are kept apart by halving: of every block of steps the first half acts on the
second one, unless a document starts between. That takes one FFT a level, O(T log^2 T) in all.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.core.errors import UsageError
from zoo.ops import common
from zoo.ops.common import blank
from zoo.ops.derivatives import traced
from zoo.ops.kv_cache import INITIAL_CAPACITY, append, first_cache, in_order_of_time

FEW_STEPS = 1  # decoding
LEGEND = (
    "u (B, T, D); filters (N, D); state: values (B, M, D), length (B,); lengths (B,) whole numbers; resets (B, T) bool."
)


class ConvHistory(NamedTuple):
    """All inputs of the current document. A buffer that is full grows.

    Attributes:
        values: (B, M, D), position p in row p, unwritten rows zero.
        length: (B,) int64, steps of the current document so far.
    """

    values: Tensor
    length: Tensor

    def canonical(self) -> ConvHistory:
        """Only the stored inputs, trimmed to the longest row."""
        return in_order_of_time(self)

    def rows_held(self) -> int:
        """Number of rows that a pass reads: those of the longest row of the batch, or, in a trace, all there are."""
        n = self.values.shape[1]
        return n if traced() else min(n, int(self.length.max()))


def init_history(
    batch_size: int,
    width: int,
    *,
    capacity: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> ConvHistory:
    """An empty history of `capacity` rows (256 where not given)."""
    rows = max(INITIAL_CAPACITY if capacity is None else capacity, 1)
    values = torch.zeros(batch_size, rows, width, device=device, dtype=dtype)
    return ConvHistory(values, torch.zeros(batch_size, dtype=torch.int64, device=device))


@common.without_autocast
def long_conv(
    u: Tensor,
    filters: Tensor,
    state: ConvHistory | None = None,
    *,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, ConvHistory]:
    """y_t = sum of filter_{t-s} u_s over the steps s <= t of t's document.

    Args:
        u: (B, T, D).
        filters: (N, D), the filter of every channel, N at least T and `rows_held()` of the state.
        state: all inputs before, consumed; None for none.
        lengths: (B,) valid steps of a right-padded batch; later steps stay out of the state and give zeros.
        resets: (B, T) bool; a document starts where it is true.
        backend: "auto", "reference" (one step at a time) or "chunked" (by FFT).
    Returns:
        y (B, T, D) in u's dtype, the inputs so far.
    """
    if u.ndim != 3 or filters.ndim != 2 or 0 in u.shape or filters.shape[1] != u.shape[2]:
        raise UsageError(f"long_conv: u {tuple(u.shape)}, filters {tuple(filters.shape)}. Expected shapes: {LEGEND}")
    B, T, D = u.shape
    lengths = common.check_packing("long_conv", LEGEND, u, lengths, resets)
    common.check_dtypes("long_conv", None, u.dtype, u=u, filters=filters)
    if state is not None:
        common.check("long_conv", LEGEND, "state.values", state.values, u, (B, state.values.shape[1], D))
        common.check_counts("long_conv", LEGEND, state.length, u)
    n_past = 0 if state is None else state.rows_held()
    if len(filters) < n_past + T:
        n = n_past + T
        raise UsageError(f"long_conv: filters of {len(filters)} steps, expected {n} at least. Shapes: {LEGEND}")
    valid = None if lengths is None else common.valid_steps(lengths, T)
    if valid is not None:
        u = blank(u, ~valid)
        resets = None if resets is None else resets & valid
    dtype = common.state_dtype(u, filters)
    inputs, h = u.to(dtype), filters.to(dtype)
    past = None if state is None or not n_past else state.values[:, :n_past].to(dtype)
    if common.choose_form("long_conv", backend, T, FEW_STEPS) == "reference":
        y = _reference(inputs, h, past, state, resets)
    else:
        y = _by_fft(inputs, h[:T]) if resets is None else _by_halves(inputs, h[:T], resets)
        if state is not None and past is not None:
            more = _from_past(past, h[: n_past + T], state.length, T)
            y = y + (more if resets is None else blank(more, resets.cumsum(1) > 0))
    y = y.to(u.dtype)
    if state is None:
        state = first_cache(ConvHistory, u, lengths=lengths, resets=resets)
    else:
        state = append(state, u, lengths=lengths, resets=resets)
    return y if valid is None else blank(y, ~valid), state


def _reference(u: Tensor, h: Tensor, past: Tensor | None, state: ConvHistory | None, resets: Tensor | None) -> Tensor:
    """The definition, one step at a time."""
    documents = None if resets is None else resets.cumsum(1)
    outputs = []
    for t in range(u.shape[1]):
        seen = u[:, : t + 1]
        if documents is not None:
            seen = blank(seen, documents[:, : t + 1] != documents[:, t, None])
        y = (seen * h[: t + 1].flip(0)).sum(1)
        if past is not None and state is not None:
            lag = (state.length + t)[:, None] - torch.arange(past.shape[1], device=u.device)
            more = (past * h[lag.clamp(min=0)]).sum(1)  # rows that are not written are zero
            y = y + (more if documents is None else blank(more, documents[:, t] > 0))
        outputs.append(y)
    return torch.stack(outputs, 1)


def _convolved(u: Tensor, h: Tensor, n: int) -> Tensor:
    """The circular convolution of u (..., T, D) and h (N, D) over n steps."""
    return torch.fft.irfft(torch.fft.rfft(u, n, dim=-2) * torch.fft.rfft(h, n, dim=-2), n, dim=-2)


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _by_fft(u: Tensor, h: Tensor) -> Tensor:
    T = u.shape[1]
    return _convolved(u, h, _power_of_two(2 * T))[:, :T]


def _from_past(past: Tensor, h: Tensor, length: Tensor, n_steps: int) -> Tensor:
    """What the inputs before act on each of the next steps (B, T, D)."""
    y = _convolved(past, h, _power_of_two(len(h) + past.shape[1]))
    at = length[:, None] + torch.arange(n_steps, device=past.device)
    return y.gather(1, at[..., None].expand(-1, -1, past.shape[2]))


def _by_halves(u: Tensor, h: Tensor, resets: Tensor) -> Tensor:
    """As `_by_fft`, within documents."""
    B, T, D = u.shape
    P = _power_of_two(T)
    y = u * h[0]
    u, h, document = F.pad(u, (0, 0, 0, P - T)), F.pad(h, (0, 0, 0, P - T)), F.pad(resets, (0, P - T)).cumsum(1)
    half = 1
    while half < T:
        blocks, ids = u.view(B, -1, 2, half, D), document.view(B, -1, 2, half)
        last = ids[:, :, 0, -1:]  # the document that goes from one half to the other
        left = blocks[:, :, 0] * (ids[:, :, 0] == last)[..., None]
        right = _convolved(left, h[: 2 * half], 2 * half)[:, :, half:] * (ids[:, :, 1] == last)[..., None]
        y = y + F.pad(right, (0, 0, half, 0)).reshape(B, P, D)[:, :T]
        half *= 2
    return y
