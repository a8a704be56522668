"""Adapters of low rank on the projections of a word, one for each use of the shared block that the word belongs to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zoo.core.errors import UsageError, quoted
from zoo.protocol import Context


class UseAdapters(nn.Module):
    """x (..., D_in) to U_p V_p x for each part p of a projection, end to end, with the weights of the pass's use.

    As in Zamba2 (Glorioso et al. 2024, arXiv 2411.15242, section II), where what is added belongs to the model and no
    weight is frozen. The U start at zero, as in LoRA (Hu et al. 2021, arXiv 2106.09685), so that all uses start alike;
    the V start normal with std D_in^-0.5.

    Args:
        d_in: D_in.
        widths: channels of each part.
        rank: of each U_p V_p.
        uses: number of uses.
    """

    def __init__(self, d_in: int, widths: Sequence[int], rank: int, uses: int):
        super().__init__()
        self.d_in, self.widths, self.rank = d_in, list(widths), rank
        self.down = nn.ModuleList(nn.Linear(d_in, len(self.widths) * rank, bias=False) for _ in range(uses))
        self.up = nn.ModuleList(
            nn.ModuleList(nn.Linear(rank, width, bias=False) for width in self.widths) for _ in range(uses)
        )
        with torch.no_grad():
            for name, weight in self.named_parameters():
                weight.normal_(std=d_in**-0.5) if name.startswith("down") else weight.zero_()

    def forward(self, x: Tensor, context: Context | None) -> Tensor:
        use = 0 if context is None else context.use
        if use not in range(len(self.down)):
            raise UsageError(f"context.use={quoted(use)} is no use of a shared block with {len(self.down)} uses.")
        up: Any = self.up[use]
        parts = self.down[use](x).split(self.rank, -1)
        return torch.cat([layer(part) for layer, part in zip(up, parts, strict=True)], -1)

    def flops_per_token(self) -> int:
        """Matmul FLOPs of one vector, multiply-add = 2."""
        return 2 * self.rank * (len(self.widths) * self.d_in + sum(self.widths))
