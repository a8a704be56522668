"""Compiled CPU kernels: C++ sources shipped with the package, built once by the system's compiler.

A source `kernels/NAME.cpp` holds `extern "C"` functions over raw pointers, so that it compiles in a second and depends
on no version of torch. The library is kept in the user's cache folder under a name made of its sources, the compiler
and the CPU. Loops run in parallel through the OpenMP pool that torch has loaded already, with torch's own number of
threads.

Environment: ZOO_KERNELS=off leaves them out; ZOO_CACHE names the cache folder; CXX names the compiler.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor
from torch.autograd import forward_ad

SOURCES = pathlib.Path(__file__).parent / "kernels"
FLAGS = (
    *("-std=c++17", "-O3", "-fPIC", "-shared", "-march=native", "-mprefer-vector-width=512"),
    *("-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-ffp-contract=fast"),
    *("-Wno-psabi", "-Wno-attributes"),
)
OPTIONAL = ("-mprefer-vector-width=512", "-march=native", "-fopenmp")  # left out in turn where a compiler knows none
Argument = Tensor | int | float | None


class Unavailable(RuntimeError):
    """No compiled kernel can be had here; the message says why, in one line."""


def compiler() -> str | None:
    """Path of the C++ compiler: $CXX, else the first of c++, g++ and clang++."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next((path for name in names if (path := shutil.which(name))), None)


@torch.compiler.assume_constant_result
def why_not() -> str | None:
    """Why there are no compiled kernels; None where there are. The first call builds one, to be sure."""
    if os.environ.get("ZOO_KERNELS", "").lower() in ("off", "0"):
        return "switched off by ZOO_KERNELS"
    if forward_ad._current_level >= 0:  # torch would take a tangent of zero for one that an op does not tell
        return "forward-mode differentiation, which kernels do not know"
    return _why_not()


@functools.cache
def _why_not() -> str | None:
    try:
        load("probe")
    except Unavailable as error:
        return str(error)
    return None


class Library:
    """The functions of one compiled source: `library.name(*arguments)`.

    Tensors (contiguous, on the CPU) are passed as pointers, None as a null pointer, whole numbers and bools as
    int64_t, floats as double.
    """

    def __init__(self, path: pathlib.Path):
        self._library = ctypes.CDLL(str(path))

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("_"):
            raise AttributeError(name)
        function = getattr(self._library, name)
        function.restype = None

        def call(*arguments: Argument) -> None:
            function(*map(_argument, arguments))

        setattr(self, name, call)
        return call


def _argument(value: Argument) -> Any:
    if isinstance(value, Tensor):
        assert value.is_contiguous(), "kernels read contiguous memory"
        assert value.device.type == "cpu", "kernels read the CPU's memory"
        return ctypes.c_void_p(value.data_ptr())
    if value is None:
        return ctypes.c_void_p(None)
    return ctypes.c_double(value) if isinstance(value, float) else ctypes.c_int64(value)


@functools.cache
def load(name: str) -> Library:
    """The library built from `kernels/{name}.cpp`, compiled where it has not been yet.

    Raises:
        Unavailable: no compiler, no folder to write to, or a source that does not compile.
    """
    path = compiler()
    if path is None:
        raise Unavailable("no C++ compiler found (install g++ or clang, or name one in CXX)")
    texts = [SOURCES / f"{name}.cpp", *sorted(SOURCES.glob("*.h"))]
    version = subprocess.run([path, "--version"], capture_output=True, text=True).stdout
    parts = [version, *FLAGS, *OPTIONAL, _cpu(), *(text.read_text() for text in texts)]
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]
    try:
        folder = _cache()
        library = folder / f"{name}-{digest}.so"
        if not library.exists():
            with FileLock(library.with_suffix(".lock")):
                if not library.exists():
                    _build(path, texts[0], library)
        return Library(library)
    except OSError as error:
        raise Unavailable(f"{error.strerror or error}: {error.filename or name}") from error


def _build(compiler: str, source: pathlib.Path, library: pathlib.Path) -> None:
    """Compile into a file of its own and move it into place, so that no other process meets half a library.

    Linking leaves OpenMP's functions open: torch has loaded them into this process, and a second OpenMP beside torch's
    would have a second pool of threads.
    """
    flags, optional = list(FLAGS), list(OPTIONAL)
    if sys.platform.startswith("linux"):
        flags.append("-fopenmp")
    while True:
        with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
            unlinked, out = pathlib.Path(scratch, "kernel.o"), pathlib.Path(scratch, library.name)
            compiling = [f for f in flags if f != "-shared"]
            undefined = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
            done = subprocess.run(
                [compiler, *compiling, "-c", str(source), "-o", str(unlinked)], capture_output=True, text=True
            )
            if done.returncode == 0:
                done = subprocess.run(
                    [compiler, "-shared", *undefined, str(unlinked), "-o", str(out)], capture_output=True, text=True
                )
            if done.returncode == 0:
                out.replace(library)
                return
        if not optional:
            complaint = next((line for line in done.stderr.splitlines() if "error" in line), "it failed")
            raise Unavailable(f"{pathlib.Path(compiler).name} cannot build {source.name}: {complaint.strip()}")
        refused = optional.pop(0)
        flags = [f for f in flags if f != refused]


def _cache() -> pathlib.Path:
    """The folder of built libraries, this user's alone."""
    if chosen := os.environ.get("ZOO_CACHE"):
        folder = pathlib.Path(chosen)
    else:
        root = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
        folder = pathlib.Path(root) / "sequence-zoo"
    folder = folder / "kernels"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def _cpu() -> str:
    """What `-march=native` depends on."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return platform.processor() + platform.machine()


@functools.cache
def has_flag(flag: str) -> bool:
    """Whether the CPU says that it has the feature `flag`."""
    return flag in _cpu().split()


def serves(*tensors: Tensor | None, double: bool = False, bfloat16: bool = False) -> str | None:
    """Why compiled kernels cannot take these inputs: they read float32 on the CPU, and float64 where `double`, to which
    lower precision is widened before; `bfloat16` where they have a form of it. None where they can."""
    reads = (torch.float32, torch.bfloat16) if bfloat16 else (torch.float32,)
    for tensor in tensors:
        if tensor is not None and tensor.device.type != "cpu":
            return f"it runs on the CPU, the inputs are on {tensor.device}"
        if tensor is not None and tensor.is_floating_point() and tensor.dtype not in reads and not double:
            return f"it computes in float32, the inputs are {tensor.dtype}"
    return why_not()


def form_of(library: str, function: str, x: Tensor) -> Callable[..., None]:
    """The form for x's dtype of a kernel that has one for float32 and one for bfloat16."""
    return getattr(load(library), f"{library}_{function}_{'bfloat16' if x.dtype == torch.bfloat16 else 'float'}")


def build_all() -> dict[str, float]:
    """Build every kernel; seconds that each took (next to none where it had been built before)."""
    seconds = {}
    for source in sorted(SOURCES.glob("*.cpp")):
        started = time.perf_counter()
        load(source.stem)
        seconds[source.stem] = time.perf_counter() - started
    return seconds
