"""Triton kernels as Python sees them: declared once, imported when they are first needed, called like those in C++."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Sequence

import torch
from torch import Tensor

from zoo.ops import native
from zoo.ops.adapters import interpreted, missing
from zoo.ops.derivatives import constant_in_graphs
from zoo.ops.kernel import Given, Strided, unfit


class TritonKernel:
    """The functions of one module `zoo.ops.kernels.NAME`, for tensors on a GPU.

    `kernel(function, reads, writes, *numbers)` calls the function of that name with all of them in this order, as
    `Kernel` does; the function launches what it needs. Its configurations are few and fixed, so that a first call waits
    for a compilation and never for a search.

    Args:
        source: NAME.
        dtypes: the floating-point and complex dtypes in which it computes. Its functions see complex numbers as pairs
            of real ones (`torch.view_as_real`).
    """

    form = "triton"

    def __init__(self, source: str, *, dtypes: Sequence[torch.dtype] = (torch.float32,)):
        self.source, self.dtypes = source, tuple(dtypes)

    @property
    def devices(self) -> list[str]:
        """The kinds of devices whose tensors it takes."""
        return ["cuda", "cpu"] if interpreted() else ["cuda"]

    def why_not(self, *tensors: Tensor | None) -> str | None:
        """Why the kernel cannot take these inputs, in one line, or None where it can."""
        return unfit(tensors, self.devices, "a GPU", self.dtypes) or native.no_kernels() or _missing(self.source)

    def __call__(
        self, function: str, reads: Sequence[Given], writes: Sequence[Tensor | None], *numbers: int | float
    ) -> None:
        first = next(x for x in writes if x is not None)
        reads = [x.tensor if isinstance(x, Strided) else x for x in reads]
        with torch.cuda.device(first.device) if first.is_cuda else contextlib.nullcontext():
            getattr(importlib.import_module(_name(self.source)), function)(*reads, *writes, *numbers)


@constant_in_graphs
def _missing(source: str) -> str | None:
    """Why a module of kernels cannot be imported; None where it can."""
    return missing("triton", _name(source), "triton")


def _name(source: str) -> str:
    return f"zoo.ops.kernels.{source}"
