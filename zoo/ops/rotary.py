"""Rotary positions (RoPE): pairs of channels turned by an angle that grows with the position (Su et al. 2021, eq. 34).

Dot products of turned queries and keys depend on their distance alone.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_width(head_dim: int, fraction: float = 1.0) -> int:
    """Number of leading channels that are rotated: the largest even number within `fraction` of them."""
    return int(head_dim * fraction) // 2 * 2


def rotary_table(positions: Tensor, width: int, *, base: float = 10000.0) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the angles positions * base ** (-2 i / width), i < width / 2.

    Args:
        positions: (..., T) whole numbers.
        width: number of rotated channels, even.
        base: the slowest pair turns once in about 2 pi base steps.
    Returns:
        cos, sin (..., T, width / 2), float64 (float32 on devices without it): far positions need the digits.
    """
    dtype = torch.float32 if positions.device.type == "mps" else torch.float64
    frequency = base ** (torch.arange(0, width, 2, device=positions.device, dtype=dtype) / -max(width, 1))
    angle = positions[..., None].to(dtype) * frequency
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """x with its leading channels rotated; computed in float32 at least, returned in x's dtype.

    Args:
        x: (B, T, H, K).
        cos, sin: (B or 1, T, width / 2) as from `rotary_table`; channels from `width` on pass through.
        interleaved: pair channels 2i and 2i + 1 (GPT-J) instead of i and i + width / 2 (GPT-NeoX, Llama).
    """
    half = cos.shape[-1]
    if half == 0:
        return x
    dtype = torch.promote_types(torch.float32, x.dtype)
    cos, sin = cos.to(dtype).unsqueeze(-2), sin.to(dtype).unsqueeze(-2)
    turned = x[..., : 2 * half].to(dtype)
    a, b = turned.unflatten(-1, (half, 2)).unbind(-1) if interleaved else turned.chunk(2, -1)
    pair = a * cos - b * sin, b * cos + a * sin
    turned = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    turned = turned.to(x.dtype)
    return turned if 2 * half == x.shape[-1] else torch.cat([turned, x[..., 2 * half :]], -1)
