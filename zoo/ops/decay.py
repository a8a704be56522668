"""Products of decays inside a chunk, built by doubling so that nothing is ever divided.

With a_t = exp(g_t) in [0, 1], the decay from step j to step i of a chunk is a product of a's. The textbook form
exp(c_i - c_j), with c the running sum of g, loses its precision once c is large. Here blocks of 1, 2, 4, ... steps are
joined in pairs, and only products of numbers in [0, 1] are formed: each is exact to a few roundings whatever the
decays and the dtype, a_t = 0 (a reset) is no special case, and the backward pass subtracts nothing either.

Sub-chunks with a reference step at the boundary are the secondary chunking of Yang et al., Gated Linear Attention
Transformers with Hardware-Efficient Training (2024), section 4.3, here taken down to single steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Decays(NamedTuple):
    """Decays within blocks of s steps, cut as (..., m, s, D) with m blocks; D is K, or 1 for one decay a head."""

    since_start: Tensor  # at i: product over the block's first step .. i
    until_end: Tensor  # at j: product over j + 1 .. the block's last step

    @property
    def total(self) -> Tensor:
        """(..., m, 1, D): product over the whole block."""
        return self.since_start[..., -1:, :]


def pair_decays(a: Tensor) -> tuple[Tensor, Decays]:
    """The matrix of decays from step j to step i >= j, zero above the diagonal, and those to the chunk's ends.

    Args:
        a: (..., C, 1), C a power of two.
    Returns:
        (..., C, C); decays of the chunk, each (..., C, 1).
    """
    blocks, square = _single_steps(a), torch.ones_like(a).unsqueeze(-1)
    while square.shape[-3] > 1:
        left, right = _halves(blocks)
        square = join_squares(square, right.since_start * left.until_end.mT)
        blocks = _join(left, right)
    return square.squeeze(-3), _whole(blocks)


def pair_scores(rows: Sequence[Tensor], columns: Tensor, a: Tensor) -> tuple[list[Tensor], Decays]:
    """For each r of rows, A_ij = sum_d r_id k_jd (decay of channel d from step j to step i) for i >= j, else zero.

    Args:
        rows: each (..., C, K), broadcasting with a.
        columns: k, the same.
        a: (..., C, K), C a power of two.
    Returns:
        one (..., C, C) for each of rows; decays of the chunk, each (..., C, K).
    """
    blocks = _single_steps(a)
    squares = [((r * columns).sum(-1, keepdim=True) * torch.ones_like(a[..., :1])).unsqueeze(-1) for r in rows]
    while (m := blocks.since_start.shape[-3]) > 1:
        left, right = _halves(blocks)
        decayed_columns = even_odd(columns.unflatten(-2, (m, -1)))[0] * left.until_end
        for index, r in enumerate(rows):
            decayed_rows = even_odd(r.unflatten(-2, (m, -1)))[1] * right.since_start
            squares[index] = join_squares(squares[index], decayed_rows @ decayed_columns.mT)
        blocks = _join(left, right)
    return [square.squeeze(-3) for square in squares], _whole(blocks)


def decayed_sums(weights: Tensor, x: Tensor, a: Tensor) -> tuple[Tensor, Decays]:
    """o_id = sum over j <= i of weights_ij (decay of channel d from step j to step i) x_jd.

    Args:
        weights: (..., C, C); what lies above the diagonal is not read.
        x: (..., C, K).
        a: (..., C, K), C a power of two.
    Returns:
        (..., C, K); decays of the chunk, each (..., C, K).
    """
    blocks, sums = _single_steps(a), weights.diagonal(dim1=-2, dim2=-1).unsqueeze(-1) * x
    while (m := blocks.since_start.shape[-3]) > 1:
        left, right = _halves(blocks)
        corners = weights.unflatten(-1, (m // 2, 2, -1)).unflatten(-4, (m // 2, 2, -1))[..., 1, :, :, 0, :]
        corners = corners.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)  # of each pair: its right rows, its left columns
        above, below = even_odd(sums.unflatten(-2, (m, -1)))
        decayed = even_odd(x.unflatten(-2, (m, -1)))[0] * left.until_end
        below = below + right.since_start * (corners @ decayed)
        sums = torch.stack([above, below], -3).flatten(-4, -2)
        blocks = _join(left, right)
    return sums, _whole(blocks)


def _single_steps(a: Tensor) -> Decays:
    """Every step of (..., C, D) as a block of its own."""
    return Decays(a.unsqueeze(-2), torch.ones_like(a).unsqueeze(-2))


def _whole(blocks: Decays) -> Decays:
    return Decays(*(x.squeeze(-3) for x in blocks))


def even_odd(x: Tensor) -> tuple[Tensor, Tensor]:
    """(..., m, s, D) -> the left and the right block of each pair, (..., m / 2, s, D)."""
    left, right = x.unflatten(-3, (-1, 2)).unbind(-3)
    return left, right


def _halves(blocks: Decays) -> tuple[Decays, Decays]:
    start, end = even_odd(blocks.since_start), even_odd(blocks.until_end)
    return Decays(start[0], end[0]), Decays(start[1], end[1])


def _join(left: Decays, right: Decays) -> Decays:
    """Blocks of 2 s steps from pairs of blocks of s steps."""
    return Decays(
        torch.cat([left.since_start, right.since_start * left.total], -2),
        torch.cat([left.until_end * right.total, right.until_end], -2),
    )


def join_squares(squares: Tensor, corners: Tensor) -> Tensor:
    """Lower triangles (..., m, s, s) and the corner below each pair, (..., m / 2, s, s) -> (..., m / 2, 2 s, 2 s)."""
    upper, lower = even_odd(squares)
    return torch.cat([torch.cat([upper, torch.zeros_like(corners)], -1), torch.cat([corners, lower], -1)], -2)
