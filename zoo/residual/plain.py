"""One residual stream."""

from __future__ import annotations

from typing import final

from torch import Tensor

from zoo.residual.connection import Connection, register


@final
@register("plain")
class Plain(Connection):
    """One residual stream (B, T, D): x + y."""

    def forward(self, stream: Tensor) -> tuple[Tensor, Tensor, None]:
        return stream, stream, None

    def write(self, stream: Tensor, y: Tensor, weights: None) -> Tensor:
        return stream + y

    def flops_per_token(self) -> int:
        return 0
