"""What the layers around the delta rule share: their state, their sizes and what they cost."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zoo.core.errors import UsageError
from zoo.mixers._parts import whole
from zoo.protocol import Mixer, first_parameter_like, recurrent_dtype


class DeltaState(NamedTuple):
    conv: Tensor  # (B, W - 1, channels of q, k and v): the last inputs of the convolution
    memory: Tensor  # (B, H, K, V)


class DeltaMixer(Mixer):
    """A layer of H heads, each with a memory (K, V), behind one convolution over q, k and v. Its `__init__` sets:

    n_heads: H; d_key: K; d_value: V; qkv_parts: widths of q, k and v; parts: of all that W_in gives; n_writes: steps of
    the delta rule a token.
    """

    n_heads: int
    d_key: int
    d_value: int
    qkv_parts: list[int]
    parts: list[int]
    n_writes: int = 1

    def init_state(self, batch_size: int, *, capacity: int | None = None, device=None, dtype=None) -> DeltaState:
        device, dtype = first_parameter_like(self, device, dtype)
        shapes = self._state_shapes(batch_size)
        return DeltaState(*(torch.zeros(s, device=device, dtype=recurrent_dtype(dtype)) for s in shapes))

    def _state_shapes(self, batch_size: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        conv = (batch_size, max(self.config.conv_size - 1, 0), sum(self.qkv_parts))
        return conv, (batch_size, self.n_heads, self.d_key, self.d_value)

    def flops_per_token(self, context_length: int) -> int:
        projections = self.d_model * (sum(self.parts) + self.n_heads * self.d_value)
        recall_and_read = 2 * self.n_writes * self.n_heads * self.d_key * self.d_value  # of k, and with q
        return 2 * projections + 2 * recall_and_read

    def state_bytes(self, batch_size: int, context_length: int, dtype) -> int:
        return sum(map(math.prod, self._state_shapes(batch_size))) * recurrent_dtype(dtype).itemsize


def head_sizes(mixer: str, config: Any, width: float, head_width: int) -> tuple[int, int, int, int]:
    """G, K, H, V from the options n_heads, head_dim, n_v_heads and expand_v.

    By default the heads of q and k are about `head_width` wide and `width` together.
    """
    groups = config.n_heads or max(1, round(width / head_width))
    d_key = config.head_dim or max(1, round(width / groups))
    heads = config.n_v_heads or groups
    if heads % groups:
        raise UsageError(f"{mixer}: n_v_heads={heads} is no multiple of n_heads={groups}.")
    d_value = whole(mixer, f"expand_v * head_dim = {config.expand_v:g} * {d_key}", config.expand_v * d_key)
    return groups, d_key, heads, d_value
