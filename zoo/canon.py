"""Canon layers: a short convolution that is added to what a layer reads (Allen-Zhu 2025, arXiv 2512.17351)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from zoo.core.errors import UsageError
from zoo.ops import causal_conv1d
from zoo.protocol import Context, Place, packing, recurrent_dtype


def require_causal(option: str, size: int, place: Place) -> None:
    """Raises a `UsageError` where the model looks ahead, as a Canon layer reads left to right."""
    if not place.causal:
        raise UsageError(f"{option}={size} reads left to right only, but the model has causal=False: leave it out.")


class Canon(nn.Module):
    """u + conv(u): causal, depthwise, W taps, without an activation. Its state is the last W - 1 inputs.

    The weights start as those of torch's Conv1d, as in PhysicsLM4.
    """

    def __init__(self, width: int, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, size).uniform_(-(size**-0.5), size**-0.5))

    def forward(self, u: Tensor, state: Tensor | None, context: Context) -> tuple[Tensor, Tensor]:
        y, state = causal_conv1d(u, self.weight.to(u.dtype), None, state, in_place=True, **packing(context))
        return u + y, state

    def init_state(self, batch_size: int, device: Any, dtype: torch.dtype | None) -> Tensor:
        """(B, W - 1, width) zeros, those before a first step."""
        width, size = self.weight.shape
        device = self.weight.device if device is None else device
        kind = recurrent_dtype(self.weight.dtype if dtype is None else dtype)
        return torch.zeros(batch_size, size - 1, width, device=device, dtype=kind)
