"""What the layers around the delta rule share: their state and what they cost."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from zoo.protocol import Mixer, first_parameter_like, recurrent_dtype


class DeltaState(NamedTuple):
    conv: Tensor  # (B, W - 1, channels of q, k, v): the last inputs of the convolution
    memory: Tensor  # (B, H, K, V)


class DeltaMixer(Mixer):
    """A layer of H heads, each with a memory (K, V), behind one convolution over q, k and v. Its `__init__` sets:

    n_heads: H; d_key: K; d_value: V; parts: widths of the input projection, the first that of q, k and v together;
    qkv_parts: their widths apart.
    """

    n_heads: int
    d_key: int
    d_value: int
    parts: list[int]
    qkv_parts: list[int]

    def init_state(self, batch_size: int, *, capacity: int | None = None, device=None, dtype=None) -> DeltaState:
        device, dtype = first_parameter_like(self, device, dtype)
        shapes = self._state_shapes(batch_size)
        return DeltaState(*(torch.zeros(s, device=device, dtype=recurrent_dtype(dtype)) for s in shapes))

    def _state_shapes(self, batch_size: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        conv = (batch_size, max(self.config.conv_size - 1, 0), self.parts[0])
        return conv, (batch_size, self.n_heads, self.d_key, self.d_value)

    def flops_per_token(self, context_length: int) -> int:
        projections = 2 * self.d_model * (sum(self.parts) + self.qkv_parts[2])
        return projections + 4 * self.n_heads * self.d_key * self.d_value  # recall of k, read of q

    def state_bytes(self, batch_size: int, context_length: int, dtype) -> int:
        return sum(map(math.prod, self._state_shapes(batch_size))) * recurrent_dtype(dtype).itemsize
