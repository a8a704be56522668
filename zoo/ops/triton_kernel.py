"""Triton kernels as Python sees them: declared once, imported when they are first needed, called like those in C++."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from zoo.ops.derivatives import constant_in_graphs, transformed
from zoo.ops.kernel import Given, Strided


@constant_in_graphs
def interpreted() -> bool:
    """Whether Triton runs its kernels in Python, on a CPU, for tests (`TRITON_INTERPRET=1`)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


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
        for tensor in tensors:
            if tensor is None:
                continue
            if tensor.device.type not in self.devices:
                return f"it runs on a GPU, the inputs are on {tensor.device}"
            if (tensor.is_floating_point() or tensor.is_complex()) and tensor.dtype not in self.dtypes:
                known = " or ".join(str(dtype).removeprefix("torch.") for dtype in self.dtypes)
                return f"it computes in {known}, the inputs are {tensor.dtype}"
        if transformed():
            return "forward-mode differentiation and torch.func are none of a kernel's"
        return _missing(self.source)

    def __call__(
        self, function: str, reads: Sequence[Given], writes: Sequence[Tensor | None], *numbers: int | float
    ) -> None:
        first = next(x for x in writes if x is not None)
        reads = [x.tensor if isinstance(x, Strided) else x for x in reads]
        with torch.cuda.device(first.device) if first.is_cuda else contextlib.nullcontext():
            getattr(_module(self.source), function)(*reads, *writes, *numbers)


@constant_in_graphs
def _missing(source: str) -> str | None:
    """Why a module of kernels cannot be imported; None where it can."""
    if os.environ.get("ZOO_KERNELS", "").lower() in ("off", "0"):
        return "switched off by ZOO_KERNELS"
    return _import_error(source)


@functools.cache
def _import_error(source: str) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    try:
        _module(source)
    except Exception as error:  # a triton for another torch or system may fail in any way
        return f"triton cannot be imported: {(str(error).splitlines() or [type(error).__name__])[0]}"
    return None


def _module(source: str) -> ModuleType:
    return importlib.import_module(f"zoo.ops.kernels.{source}")
