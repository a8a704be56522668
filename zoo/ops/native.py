"""Compiled CPU kernels: C++ sources, built once by the system's compiler.

A source, `kernels/NAME.cpp` or a file of the user's own, holds `extern "C"` functions over raw pointers, so that it
compiles in a second and depends on no version of torch (`kernels/kernel.h` has its conventions). The library is kept in
the user's cache folder under a name made of its sources, the compiler and the CPU, and beside it its size and digest:
what does not agree with them is built again and never loaded. Loops run in parallel through the OpenMP pool that torch
has loaded already, with torch's own number of threads.

A kernel that cannot be built or loaded is left out alone: its op runs in plain PyTorch, which one warning says, and
`zoo doctor`.

Environment: ZOO_KERNELS=off leaves them out; ZOO_CACHE names the cache folder, which must be this user's (or root's)
and writable by nobody else; CXX names the compiler, with arguments if need be ("ccache g++").
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import json
import os
import pathlib
import platform
import re
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

from filelock import FileLock

from zoo.core.errors import UsageWarning
from zoo.ops.derivatives import constant_in_graphs, transformed

SOURCES = pathlib.Path(__file__).parent / "kernels"
FLAGS = (
    *("-std=c++17", "-O3", "-fPIC", "-shared", "-march=native", "-mprefer-vector-width=512"),
    *("-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-ffp-contract=fast"),
    *("-Wno-psabi", "-Wno-attributes"),
)
OPTIONAL = ("-mprefer-vector-width=512", "-march=native", "-fopenmp")  # left out in turn where a compiler knows none
SIZES: dict[str, dict[str, int]] = {}
"""The constants of every declared source on which Python relies, by the source as it was declared."""


class Unavailable(RuntimeError):
    """No compiled kernel can be had here; the message says why, in one line."""


def compiler() -> str | None:
    """The C++ compiler as a command line: $CXX, else the first of c++, g++ and clang++."""
    command = _compiler()
    return None if command is None else shlex.join(command)


def _compiler() -> list[str] | None:
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    for name in names:
        if path := shutil.which(name):  # a path with spaces too
            return [path]
        try:
            first, *arguments = shlex.split(name)
        except ValueError:  # quotes that do not end, or nothing but spaces
            continue
        if path := shutil.which(first):
            return [path, *arguments]
    return None


@constant_in_graphs
def no_kernels() -> str | None:
    """Why no kernel, in C++ or in Triton, serves at this moment; None where they do."""
    if os.environ.get("ZOO_KERNELS", "").lower() in ("off", "0"):
        return "switched off by ZOO_KERNELS"
    if transformed():  # torch would take a tangent of zero for one that an op does not tell
        return "forward-mode differentiation and torch.func are none of a kernel's"
    return None


@constant_in_graphs
def why_not(kernel: str = "probe") -> str | None:
    """Why there is no such compiled kernel; None where there is. The first call builds and loads it, to be sure, also
    where torch.compile is tracing the caller."""
    if (why := no_kernels()) is not None:
        return why
    if os.name == "nt":
        return "they are built on Linux and macOS only"
    return _why_not("probe") or _why_not(kernel)


@functools.cache
def _why_not(kernel: str) -> str | None:
    """Says so once where there is none."""
    try:
        load(kernel)
    except Unavailable as error:
        name = path_of(kernel).stem
        what = "There are no compiled kernels" if name == "probe" else f"The compiled kernel {name} is left out"
        warnings.warn(f"{what}, plain PyTorch runs instead: {error}", UsageWarning, stacklevel=2)
        return str(error)
    return None


class Library:
    """One compiled source, loaded.

    Raises:
        OSError: the file is no library, or lacks one of `functions` or its signature.
    """

    def __init__(self, path: pathlib.Path, functions: list[str]):
        self._library = ctypes.CDLL(str(path))
        names = (name for function in functions for name in (function, f"{function}_signature"))
        if missing := [name for name in names if not hasattr(self._library, name)]:
            raise OSError(f"the library lacks {missing[0]}")

    def function(self, name: str) -> Any:
        """As ctypes has it."""
        return getattr(self._library, name)

    def signature(self, name: str) -> str:
        """The letters of a function's parameters, see `kernels/kernel.h`."""
        signature = getattr(self._library, f"{name}_signature")
        signature.restype = ctypes.c_char_p
        return signature().decode()

    def sizes(self) -> dict[str, int]:
        """The constants that the source exports, by name."""
        if not hasattr(self._library, "zoo_sizes"):
            return {}
        sizes, found = self._library.zoo_sizes, {}
        sizes.restype = ctypes.POINTER(_Size)
        for size in sizes():
            if size.name is None:
                break
            found[size.name.decode()] = size.value
        return found


class _Size(ctypes.Structure):
    _fields_ = (("name", ctypes.c_char_p), ("value", ctypes.c_int64))


def path_of(source: str) -> pathlib.Path:
    """The file of a source that is named, or given by its path."""
    return pathlib.Path(source) if source.endswith(".cpp") else SOURCES / f"{source}.cpp"


@functools.cache
def load(source: str) -> Library:
    """The library built from a source, compiled where it has not been yet.

    Args:
        source: NAME for `kernels/NAME.cpp`, or a path that ends in .cpp.

    Raises:
        Unavailable: no compiler, no folder to write to, a source that does not compile, or one whose constants are not
            those on which Python relies.
    """
    path = path_of(source)
    library = _library(path)
    if (found := library.sizes()) != (wanted := SIZES.get(source, {})):
        pairs = {name: (found.get(name), wanted.get(name)) for name in found | wanted}
        told = ", ".join(f"{name} = {a} (in Python {b})" for name, (a, b) in pairs.items() if a != b)
        raise Unavailable(f"{path.name} and its declaration disagree: {told}")
    return library


def _library(source: pathlib.Path) -> Library:
    command = _compiler()
    if command is None:
        raise Unavailable("no C++ compiler found (install g++ or clang, or name one in CXX)")
    try:
        headers = [header for folder in {SOURCES: 0, source.parent: 0} for header in sorted(folder.glob("*.h"))]
        texts = [text.read_text(encoding="utf-8") for text in (source, *headers)]
        parts = [_version(*command), *command[1:], *FLAGS, *OPTIONAL, _cpu(), *texts]
        digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]
        path, functions = folder() / f"{source.stem}-{digest}.so", exported(texts[0])

        def make() -> None:
            _build(command, source, path)
            try:
                Library(path, functions)
            except OSError:
                path.unlink(missing_ok=True)
                raise

        keep(path, make)
        return Library(path, functions)
    except (OSError, NotImplementedError) as error:  # the latter where a file system knows no locks
        told = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise Unavailable(f"{told}: {getattr(error, 'filename', None) or source.stem}") from error


@functools.cache
def _version(*command: str) -> str:
    done = subprocess.run([*command, "--version"], capture_output=True, text=True, errors="replace")
    return done.stdout


def exported(text: str) -> list[str]:
    """The functions that a kernel's source exports whatever the CPU: those outside of `#if`, macros spelt out."""
    text = re.sub(r"(?s)^#if.*?^#endif", "", text.replace("\\\n", " "), flags=re.MULTILINE)
    found = re.findall(r'^extern "C" void (\w+)\(', text, re.MULTILINE)
    for macro, parameters, body in re.findall(r"^#define (\w+)\((.*?)\)(.*)", text, re.MULTILINE):
        for given in re.findall(rf"^{macro}\((.*)\)", text, re.MULTILINE):
            words = dict(zip(*(re.split(r"\s*,\s*", part) for part in (parameters, given)), strict=False))
            functions = re.findall(r'extern "C" void (\w+)##(\w+)\(', body)
            found += [start + words.get(end, end) for start, end in functions]
    return found


def keep(path: pathlib.Path, make: Callable[[], None]) -> None:
    """Have a file of native code at a path: as it was sealed earlier, or made now, once for all processes.

    Args:
        path: in a folder that nobody else can write to.
        make: puts the file there, whole or not at all.
    """
    if is_whole(path):
        return
    with FileLock(path.with_suffix(".lock")):
        if not is_whole(path):  # else another process was faster
            make()
            _seal(path)


def is_whole(path: pathlib.Path) -> bool:
    """Whether a file is the one that was made: a file of its own, of the size and digest kept beside it."""
    try:
        if not all(stat.S_ISREG(os.lstat(file).st_mode) for file in (path, _seal_of(path))):
            return False
        return json.loads(_seal_of(path).read_bytes()) == _sum(path)
    except (OSError, ValueError, RecursionError):
        return False


def _seal_of(path: pathlib.Path) -> pathlib.Path:
    return path.with_suffix(".json")


def _sum(path: pathlib.Path) -> dict[str, Any]:
    content = path.read_bytes()
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _seal(path: pathlib.Path) -> None:
    """Keep a file's size and digest beside it, once both are on the disk."""
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        written = pathlib.Path(scratch, "seal")
        written.write_text(json.dumps(_sum(path)))
        _to_disk(path, written)
        written.replace(_seal_of(path))
    _to_disk(path.parent)


def _to_disk(*paths: pathlib.Path) -> None:
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _build(compiler: list[str], source: pathlib.Path, library: pathlib.Path) -> None:
    """Compile into a file of its own and move it into place, so that no other process meets half a library.

    Linking leaves OpenMP's functions open: torch has loaded them into this process, and a second OpenMP beside torch's
    would have a second pool of threads.
    """
    flags, optional = list(FLAGS), list(OPTIONAL)
    if sys.platform.startswith("linux"):
        flags.append("-fopenmp")

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*compiler, *arguments], capture_output=True, text=True, errors="replace")

    while True:
        with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
            unlinked, out = pathlib.Path(scratch, "kernel.o"), pathlib.Path(scratch, library.name)
            compiling = [f for f in flags if f != "-shared"]
            undefined = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
            done = run(*compiling, f"-I{SOURCES}", "-c", str(source), "-o", str(unlinked))
            if done.returncode == 0:
                done = run("-shared", *undefined, str(unlinked), "-o", str(out))
            if done.returncode == 0:
                out.replace(library)
                return
        if not optional:
            complaint = next((line for line in done.stderr.splitlines() if "error" in line), "it failed")
            raise Unavailable(f"{pathlib.Path(compiler[0]).name} cannot build {source.name}: {complaint.strip()}")
        refused = optional.pop(0)
        flags = [f for f in flags if f != refused]


@functools.cache
def folder() -> pathlib.Path:
    """The folder of built libraries, which nobody else can write to.

    Where the user has no home, or none to write to, it is a folder for temporary files of this user's alone.

    Raises:
        Unavailable: the folder is another user's, or others may write to it: their libraries would be run.
        OSError: it cannot be made.
    """
    if chosen := os.environ.get("ZOO_CACHE"):
        return _private(pathlib.Path(chosen))
    try:
        found = _private(_caches() / "sequence-zoo")
        if os.access(found, os.W_OK):
            return found
    except Unavailable as error:
        warnings.warn(f"The cache for compiled kernels is not used: {error}", UsageWarning, stacklevel=2)
    except (OSError, RuntimeError):  # a container's user has no home, or that of nobody
        pass
    user = os.geteuid() if hasattr(os, "geteuid") else "cache"
    return _private(pathlib.Path(tempfile.gettempdir(), f"sequence-zoo-{user}"))


def _caches() -> pathlib.Path:
    root = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(root):
        root = str(pathlib.Path.home() / ".cache")
    if not os.path.isabs(root):
        raise RuntimeError("HOME is no absolute path")
    return pathlib.Path(root)


def _private(root: pathlib.Path) -> pathlib.Path:
    """`root/kernels`, made where it is not there."""
    kernels = root / "kernels"
    for path in (root, kernels):
        _own(path, sticky=path is root)
    return kernels


def _own(path: pathlib.Path, *, sticky: bool = False, named: str = "ZOO_CACHE") -> None:
    """Make a folder where it is not there; refuse one of another user, or that others may write to."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = path.stat()
    if not hasattr(os, "geteuid"):
        return
    if found.st_uid not in (os.geteuid(), 0):
        raise Unavailable(f"{path} belongs to another user; name a folder of your own in {named}")
    # In a sticky folder such as /tmp nobody can replace what is ours.
    if found.st_mode & 0o022 and not (sticky and found.st_mode & stat.S_ISVTX):
        raise Unavailable(f"others may write to {path}: chmod go-w it, or name another folder in {named}")


def compiled_graphs() -> pathlib.Path:
    """The folder of what `torch.compile` makes, beside the kernels; TORCHINDUCTOR_CACHE_DIR names another one.

    Torch's own choice is a folder for temporary files that anybody on the machine can make first.

    Raises:
        Unavailable: the folder is another user's, or others may write to it: their code would be run.
        OSError: it cannot be made.
    """
    if chosen := os.environ.get("TORCHINDUCTOR_CACHE_DIR"):
        _own(pathlib.Path(chosen), named="TORCHINDUCTOR_CACHE_DIR")
        return pathlib.Path(chosen)
    graphs = folder() / "graphs"
    _own(graphs)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(graphs)
    return graphs


def machine() -> str:
    """The compiler and the CPU: what is compiled by one for the other serves nowhere else."""
    command = _compiler() or []
    return "\0".join([*command, _version(*command) if command else "", _cpu()])


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


def build_all() -> tuple[dict[str, float], dict[str, str]]:
    """Build every kernel: seconds that each took (next to none where it had been built before), and why some are not
    to be had."""
    seconds, refused = {}, {}
    for source in sorted(SOURCES.glob("*.cpp")):
        started = time.perf_counter()
        try:
            load(source.stem)
            seconds[source.stem] = time.perf_counter() - started
        except Unavailable as error:
            refused[source.stem] = str(error)
    return seconds, refused
