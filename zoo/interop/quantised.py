"""Quantised weights of published checkpoints, dequantised one at a time when they are read.

Two forms, with the arithmetic of transformers. *fp8* (DeepSeek-V3, Kimi K2): a matrix in float8 e4m3, and `_scale_inv`
beside it, one factor for each block of 128 x 128; the last block of a side may be smaller. *mxfp4* (GPT-OSS; OCP
Microscaling Formats 1.0): experts as `_blocks` of 32 numbers of 4 bits (e2m1; the lower half of a byte comes first) and
`_scales`, an exponent for each block, with the two axes of a matrix exchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from zoo.core.errors import UsageError
from zoo.core.readers import shown
from zoo.models.published.quantised import Quantised

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""The number of each code of 4 bits."""
BLOCK = 16  # bytes of a block of MXFP4


class Dequantised(Mapping[str, Tensor]):
    """The weights of a checkpoint with those that are quantised as plain numbers, each computed on access.

    Args:
        stored: the tensors of the checkpoint.
        shapes: the same on the meta device.
        how: they are quantised.
        dtype: of the weights that are.

    Attributes:
        shapes: of the weights, on the meta device.
        parts: the names of the tensors that each dequantised weight is computed from.

    Raises:
        UsageError: tensors of other shapes or dtypes than that form has.
    """

    def __init__(self, stored: Mapping[str, Tensor], shapes: Mapping[str, Tensor], how: Quantised, dtype: torch.dtype):
        self._stored, self._dtype, self._block, self._method = stored, dtype, how.block, how.method
        self._compute: Callable[[Tensor, Tensor], Tensor] = {"fp8": self._fp8, "mxfp4": self._mxfp4}[how.method]
        weight, scale = {"fp8": ("", "_scale_inv"), "mxfp4": ("_blocks", "_scales")}[how.method]
        names = (name.removesuffix(scale) for name in shapes if name.endswith(scale))
        self.parts = {name: (name + weight, name + scale) for name in names if name + weight in shapes}
        check = {"fp8": self._fp8_shape, "mxfp4": _mxfp4_shape}[how.method]
        used = {part for parts in self.parts.values() for part in parts}
        self.shapes = {name: shape for name, shape in shapes.items() if name not in used}
        for name, parts in self.parts.items():
            given = [shapes[part] for part in parts]
            if (shape := check(*given)) is None:
                told = ", ".join(
                    f"{shown(part)} {t.dtype} {tuple(t.shape)}" for part, t in zip(parts, given, strict=True)
                )
                raise UsageError(f"{told}: these are no weights of {how.told}.")
            self.shapes[name] = torch.empty(shape, dtype=dtype, device="meta")

    @property
    def told(self) -> str:
        """What is done to which weights, for messages."""
        name = str(self._dtype).removeprefix("torch.")
        return f"{len(self.parts):,} weights in {self._method} are dequantised to {name}, and will be written so"

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.parts:
            return self._stored[name]
        weight, scale = self.parts[name]
        return self._compute(self._stored[weight], self._stored[scale])

    def __contains__(self, name: object) -> bool:
        return name in self.shapes  # without dequantising it

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def _fp8_shape(self, weight: Tensor, scale: Tensor) -> tuple[int, ...] | None:
        """The shape of a weight; None if these are not the parts of one."""
        if weight.dtype != torch.float8_e4m3fn or scale.dtype != torch.float32 or weight.ndim != 2:
            return None
        blocks = tuple(-(-n // most) for n, most in zip(weight.shape, self._block, strict=True))
        return tuple(weight.shape) if scale.shape == blocks else None

    def _fp8(self, weight: Tensor, scale: Tensor) -> Tensor:
        """A matrix of float8 times the factors of its blocks, computed in float32."""
        rows, columns = map(min, self._block, weight.shape)  # a config may say any size
        whole = torch.empty(weight.shape, dtype=self._dtype, device=weight.device)
        for out, part, factors in zip(whole.split(rows), weight.split(rows), scale, strict=True):
            out.copy_(part.float() * factors.repeat_interleave(columns)[: weight.shape[1]])
        return whole

    def _mxfp4(self, blocks: Tensor, scales: Tensor) -> Tensor:
        """Experts (E, I, O) of blocks (E, O, I / 32, 16) and exponents (E, O, I / 32)."""
        numbers = torch.tensor(E2M1, dtype=self._dtype, device=blocks.device)
        whole = torch.empty(*blocks.shape[:-1], 2 * BLOCK, dtype=self._dtype, device=blocks.device)
        for out, packed, exponents in zip(whole, blocks, scales, strict=True):  # an expert at a time: codes need more
            out[..., 0::2] = numbers[(packed & 15).int()]
            out[..., 1::2] = numbers[(packed >> 4).int()]
            torch.ldexp(out, exponents.int().unsqueeze(-1) - 127, out=out)
        return whole.flatten(-2).transpose(1, 2)


def _mxfp4_shape(blocks: Tensor, scales: Tensor) -> tuple[int, ...] | None:
    """The shape of experts; None if these are not the parts of any."""
    fits = blocks.dtype == scales.dtype == torch.uint8 and blocks.ndim == 4 and blocks.shape[-1] == BLOCK
    if not fits or blocks.shape[:-1] != scales.shape:
        return None
    n, rows, width, _ = blocks.shape
    return n, width * 2 * BLOCK, rows
