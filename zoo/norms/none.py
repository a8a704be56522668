"""No norm."""

from __future__ import annotations

from typing import final

from torch import Tensor

from zoo.norms.make import register
from zoo.protocol import Norm


@final
@register("none")
class NoNorm(Norm):
    """No norm: x unchanged."""

    axes = ("channels", "time")

    def forward(self, x: Tensor) -> Tensor:
        return x
