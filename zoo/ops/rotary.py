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


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = True) -> Tensor:
    """x with its leading channels rotated; computed in float32 at least, returned in x's dtype.

    Args:
        x: (B, T, H, K).
        cos, sin: (B or 1, T, width / 2) as from `rotary_table`; channels from `width` on pass through.
        interleaved: pair channels 2i and 2i + 1 (the paper, GPT-J), else i and i + width / 2 (GPT-NeoX, Llama in
            transformers). On a CPU the former is twice as fast.
    """
    width = 2 * cos.shape[-1]
    if width == 0:
        return x
    if width < x.shape[-1]:
        return torch.cat([rotate(x[..., :width], cos, sin, interleaved=interleaved), x[..., width:]], -1)
    dtype = torch.promote_types(torch.float32, x.dtype)
    cos, sin = cos.to(dtype).unsqueeze(-2), sin.to(dtype).unsqueeze(-2)
    turn = _interleaved if interleaved else _halves
    return turn(x.to(dtype), cos, sin).to(x.dtype)


def _interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    if x.device.type == "mps" or torch.compiler.is_compiling():  # complex numbers are not fused, or not there
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
    if x.stride(-1) != 1 or any(n % 2 for n in (x.storage_offset(), *x.stride()[:-1])):
        x = x.clone(memory_format=torch.contiguous_format)  # what can be seen as complex numbers
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.complex(cos, sin)
    return torch.view_as_real(turned).flatten(-2)


def _halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    shape = (*cos.shape[:2], x.shape[2], x.shape[3])  # the table once a head: long runs of memory, faster on a CPU
    cos, sin = (torch.cat(c, -1).expand(shape).contiguous() for c in ((cos, cos), (-sin, sin)))
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)
