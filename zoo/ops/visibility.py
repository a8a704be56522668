"""Which keys a step of attention sees.

Whatever hides a key (causality, a window, packed documents, padding, unwritten rows of a cache), it is one rule here:
number the new steps 0 to T - 1 and the cached ones backwards from -1; query t sees the keys from first_t to last_t.

Shape legend: B batch, T new steps, S keys.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.ops.kv_cache import DecayingCache, KVCache
from zoo.states import document_positions


class Visibility(NamedTuple):
    """Query t sees the keys numbered first[t] to last[t], itself (numbered t) always among them."""

    number: Tensor  # (B or 1, S)
    first: Tensor  # (B or 1, T or 1)
    last: Tensor  # (B or 1, T or 1)

    def mask(self, queries: slice | None = None, keys: slice | None = None) -> Tensor:
        """(B or 1, T, S) bool, true where a key is seen."""
        # Not as defaults: torch 2.11 does not compile a default that is a slice.
        queries, keys = queries or slice(None), keys or slice(None)
        first, last = (x[:, queries] if x.shape[1] > 1 else x for x in (self.first, self.last))
        number = self.number[:, None, keys]
        return (number >= first[..., None]) & (number <= last[..., None])


def visibility_of(
    n_steps: int,
    past: KVCache | DecayingCache | None,
    n_past: int,
    causal: bool,
    window: int | None,
    lengths: Tensor | None,
    resets: Tensor | None,
    device: torch.device,
    prefix: Tensor | None = None,
) -> Visibility:
    t = torch.arange(n_steps, device=device)[None]
    number, first = t.clone(), torch.zeros_like(t)  # a clone: the compiler takes no tensor twice
    if past is not None:
        start, rows = past.length[:, None], torch.arange(n_past, device=device)
        old = -1 - (start - 1 - rows) % past.k.shape[1]  # an unwritten row gets a number before the document's start
        number, first = torch.cat([old, t.expand(len(old), -1)], 1), -start
    if resets is not None:
        start = past.length if past is not None else t.new_zeros(len(resets))
        first = t - document_positions(start, n_steps, resets)
    if window is not None:
        first = torch.maximum(first, t - window + 1)
    if causal and prefix is None:
        return Visibility(number, first, t)
    if prefix is not None:  # its steps see each other, within the window
        end = prefix[:, None] if lengths is None else torch.minimum(prefix, lengths)[:, None]
        last = torch.where(t < end, end - 1, t)
        last = last if window is None else torch.minimum(last, t + window - 1)
        return Visibility(number, first, torch.maximum(last, t))
    last = torch.full_like(t, n_steps - 1)
    if resets is not None:
        starts = torch.where(resets, t, n_steps).flip(1).cummin(1).values.flip(1)
        last = F.pad(starts[:, 1:], (0, 1), value=n_steps) - 1
    if window is not None:
        last = torch.minimum(last, t + window - 1)
    if lengths is not None:
        last = torch.minimum(last, lengths[:, None] - 1)
    return Visibility(number, first, torch.maximum(last, t))
