"""Rotary positions (RoPE): pairs of channels turned by an angle that grows with the position (Su et al. 2021, eq. 34).

Dot products of turned queries and keys depend on their distance alone.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from zoo.ops.common import widest


def rotary_width(head_dim: int, fraction: float = 1.0) -> int:
    """Number of leading channels that are rotated: the largest even number within `fraction` of them."""
    return int(head_dim * fraction) // 2 * 2


class RopeScaling(NamedTuple):
    """How the rotations are slowed down for contexts longer than those a model was trained on.

    A pair of channels turns `context * frequency / (2 pi)` times within the trained context.

    Attributes:
        kind: "linear" divides every frequency by `factor` (Chen et al. 2023, arXiv 2306.15595). "ntk" raises the base
            so that the slowest does so and the fastest stays. "yarn" (Peng et al. 2023, arXiv 2309.00071, section 3.2)
            and "llama3" divide those that turn less than `bands[0]` times, leave those that turn more than `bands[1]`
            times, and go from one to the other between: yarn linearly in the number of the pair, llama3 in the turns.
        factor: how much longer the contexts get.
        context: the length trained on.
        bands: turns between which yarn and llama3 blend; by default (1, 32) and (1, 4).
        truncate: yarn widens its blend to whole pairs (GPT-OSS does not).
        amplitude: factor on cosines and sines, so its square on the logits; by default 0.1 ln(factor) + 1 for yarn,
            else 1.
    """

    kind: Literal["linear", "ntk", "yarn", "llama3"]
    factor: float
    context: int = 8192
    bands: tuple[float, float] | None = None
    truncate: bool = True
    amplitude: float | None = None


def yarn_amplitude(factor: float, weight: float = 1.0) -> float:
    """0.1 weight ln(factor) + 1: what keeps attention as sharp in a context `factor` times longer."""
    return 0.1 * weight * math.log(max(factor, 1.0)) + 1.0


def frequencies(
    width: int,
    base: float = 10000.0,
    scaling: RopeScaling | None = None,
    *,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """(width / 2,) angles a step: base ** (-2 i / width), or those scaled by `scaling`."""
    if scaling is not None and scaling.kind == "ntk" and width > 2:
        base *= scaling.factor ** (width / (width - 2))
    frequency = base ** (torch.arange(0, width, 2, device=device, dtype=dtype) / -max(width, 1))
    if scaling is None or scaling.kind == "ntk":
        return frequency
    if scaling.kind == "linear":
        return frequency / scaling.factor
    low, high = scaling.bands or ((1.0, 32.0) if scaling.kind == "yarn" else (1.0, 4.0))
    if scaling.kind == "llama3":
        kept = (scaling.context * frequency / (2 * math.pi) - low) / (high - low)
    else:  # pairs are numbered from the fastest
        first, last = (
            width * math.log(scaling.context / (turns * 2 * math.pi)) / (2 * math.log(base)) for turns in (high, low)
        )
        if scaling.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, width - 1)
        kept = 1 - (torch.arange(width // 2, device=device, dtype=dtype) - first) / max(last - first, 1e-3)
    kept = kept.clamp(0, 1)
    return frequency * (kept + (1 - kept) / scaling.factor)


def rotary_table(
    positions: Tensor, width: int, *, base: float = 10000.0, scaling: RopeScaling | None = None
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the angles positions * frequencies.

    Args:
        positions: (..., T) whole numbers.
        width: number of rotated channels, even.
        base: the slowest pair turns once in about 2 pi base steps.
        scaling: for longer contexts; none by default.
    Returns:
        cos, sin (..., T, width / 2), float64 (float32 on devices without it): far positions need the digits.
    """
    dtype = widest(positions.device)
    angle = positions[..., None].to(dtype) * frequencies(width, base, scaling, device=positions.device, dtype=dtype)
    cos, sin = angle.cos(), angle.sin()
    if scaling is None:
        return cos, sin
    factor = amplitude(scaling)
    return cos * factor, sin * factor


def amplitude(scaling: RopeScaling | None) -> float:
    """The factor on cosines and sines."""
    if scaling is None or scaling.amplitude is not None:
        return 1.0 if scaling is None or scaling.amplitude is None else scaling.amplitude
    return yarn_amplitude(scaling.factor) if scaling.kind == "yarn" else 1.0


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
