"""Kernels as Python sees them: declared once, loaded when they are first needed, and called with checked arguments."""

from __future__ import annotations

import ctypes
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from zoo.core.imports import add_source
from zoo.ops import native

DTYPES = {"f": torch.float32, "d": torch.float64, "h": torch.bfloat16, "l": torch.int64, "b": torch.bool}
NUMBERS = {"i": ctypes.c_int64, "x": ctypes.c_double}


class Strided(NamedTuple):
    """A tensor that is passed as it lies in memory: its strides are among the numbers."""

    tensor: Tensor


Given = Tensor | Strided | None
Call = Callable[..., None]
"""`call(reads, writes, *numbers)`."""


def unfit(
    tensors: Sequence[Tensor | None], devices: Sequence[str], place: str, dtypes: Sequence[torch.dtype]
) -> str | None:
    """Why a kernel at a place, whose devices and dtypes these are, cannot take the tensors; None where it can."""
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.device.type not in devices:
            return f"it runs on {place}, the inputs are on {tensor.device}"
        if (tensor.is_floating_point() or tensor.is_complex()) and tensor.dtype not in dtypes:
            known = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            return f"it computes in {known}, the inputs are {tensor.dtype}"
    return None


class Kernel:
    """The functions of one C++ source, compiled and loaded when the first of them is needed.

    `kernel(function, reads, writes, *numbers)` calls one. `reads` and `writes` are the tensors that it reads and those
    that it writes, in the order of its parameters; None is a null pointer, and so is an empty tensor.

    Args:
        source: name of a source in `zoo/ops/kernels`, or the path of one elsewhere, which ends in .cpp.
        sizes: constants of the source on which its callers rely, by name. They are compared when it is loaded.
        dtypes: the floating-point and complex dtypes in which it computes. Its functions see complex numbers as pairs
            of real ones (`torch.view_as_real`).
    """

    form = "compiled"
    devices: ClassVar = ["cpu"]

    def __init__(
        self,
        source: str | pathlib.Path,
        *,
        sizes: Mapping[str, int] | None = None,
        dtypes: Sequence[torch.dtype] = (torch.float32,),
    ):
        self.source = str(source)
        self.dtypes = tuple(dtypes)
        self._functions: dict[str, Call] = {}
        self._bare: dict[str, Any] = {}
        native.SIZES[self.source] = dict(sizes or {})
        if self.source.endswith(".cpp"):
            add_source(self.source)

    def why_not(self, *tensors: Tensor | None) -> str | None:
        """Why the kernel cannot take these inputs, in one line, or None where it can; then it is loaded."""
        return unfit(tensors, self.devices, "the CPU", self.dtypes) or native.why_not(self.source)

    def __call__(self, function: str, reads: Sequence[Given], writes: Sequence[Given], *numbers: int | float) -> None:
        call = self._functions.get(function)
        if call is None:
            library = native.load(self.source)
            call = self._functions[function] = typed(function, library.function(function), library.signature(function))
        call(reads, writes, *numbers)

    def bare(self, function: str) -> Any:
        """The C function alone: called with addresses and numbers, in its order, it checks nothing."""
        found = self._bare.get(function)
        if found is None:
            library = native.load(self.source)
            found = library.function(function)
            typed(function, found, library.signature(function))  # its parameters' types
            self._bare[function] = found
        return found


SUFFIXES = {
    torch.complex64: "complex64",
    torch.complex128: "complex128",
    torch.float32: "float",
    torch.float64: "double",
}


def suffix(x: Tensor) -> str:
    """How the name of a C++ function ends that has a form for each dtype: float, double, bfloat16, complex64, ..."""
    return SUFFIXES.get(x.dtype, "bfloat16")


def typed(name: str, function: Any, signature: str) -> Call:
    """A function of a loaded library whose arguments are checked against its signature at every call.

    Args:
        name: for errors.
        function: of ctypes.
        signature: as `kernels/kernel.h` has it.
    Raises:
        TypeError: by the call, where the number of arguments is wrong, or a tensor's dtype, device or memory.
    """
    parts = re.fullmatch(r"([fdhlb]*)([FDHLB]*)([ix]*)", signature)
    if parts is None:
        raise TypeError(f"{name}: the parameters should be what it reads, what it writes, and numbers, in this order.")
    kinds = [DTYPES[letter.lower()] for letter in parts[1] + parts[2]]
    counts = tuple(map(len, parts.groups()))
    function.restype = None
    function.argtypes = [*[ctypes.c_void_p] * len(kinds), *(NUMBERS[letter] for letter in parts[3])]

    def call(reads: Sequence[Given], writes: Sequence[Given], *numbers: int | float) -> None:
        if (len(reads), len(writes), len(numbers)) != counts:
            wanted = "reads {} tensors, writes {} and takes {} numbers".format(*counts)
            raise TypeError(f"{name} {wanted}; it was given {len(reads)}, {len(writes)} and {len(numbers)}.")
        function(*map(_address, (*reads, *writes), kinds), *numbers)

    return call


def _address(given: Given, dtype: torch.dtype) -> int | None:
    if given is None:
        return None
    x, strided = (given.tensor, True) if isinstance(given, Strided) else (given, False)
    if x.dtype is dtype and x.is_cpu and (strided or x.is_contiguous()):
        return x.data_ptr()
    what = f"{x.dtype} {tuple(x.shape)} with strides {x.stride()} on {x.device}"
    raise TypeError(f"A kernel takes a contiguous tensor of {dtype} on the CPU here; it was given {what}.")
