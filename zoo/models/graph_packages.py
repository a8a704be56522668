"""Packages of compiled graphs (AOTInductor), kept in the user's own folder, so that later processes only load them.

A package is native code. It is loaded from the folder of compiled graphs alone, which nobody else may write to, and
only if it agrees with the size and digest that were kept beside it (`zoo.ops.native`). Its name is a digest of all that
its graph depends on: the architecture, every size, the code of this package, torch, the compiler and the CPU. Weights
are inputs of the graph, so one package serves all weights of an architecture.
"""

from __future__ import annotations

import functools
import hashlib
import pathlib
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from zoo.ops import native
from zoo.ops.modules import bare

Run = Callable[[list[Tensor]], list[Tensor]]
_OWN = ("zoo.", "torch.")  # modules whose code the digest covers


def build(traced: nn.Module, inputs: list[Tensor], name: str | None, device: torch.device) -> Run:
    """The graph of a module over a list of tensors: loaded by its name, compiled where it is not there.

    Args:
        traced: takes a list of tensors and returns one.
        inputs: of the sizes, dtypes and devices that the graph is made for; no value of them is in it.
        name: from `identity`; without one the graph is compiled for this process alone.
        device: where it runs.
    """
    folder = native.compiled_graphs()
    if name is None:
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            path = pathlib.Path(scratch, "graph.pt2")
            _compile(traced, inputs, path)
            return _load(path, device)
    path = folder / f"{name}.pt2"

    def make() -> None:
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = pathlib.Path(scratch, path.name)
            _compile(traced, inputs, made)
            made.replace(path)

    native.keep(path, make)
    return _load(path, device)


def _compile(traced: nn.Module, inputs: list[Tensor], path: pathlib.Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch about its own code
        program = torch.export.export(traced, (inputs,), strict=False)
        torch._inductor.aoti_compile_and_package(program, package_path=str(path))


def _load(path: pathlib.Path, device: torch.device) -> Run:
    # `torch._inductor.aoti_load_package` does the same after an import of two seconds
    index = -1 if device.index is None else device.index
    loader: Any = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", False, 1, index)  # type: ignore[attr-defined]
    return loader.run


def identity(model: nn.Module, sizes: str) -> str | None:
    """The name of a model's graph for these sizes; None if the model has parts or hooks that no digest covers."""
    modules = []
    for name, module in model.named_modules():
        kind = type(module)
        if not bare(module, cls=kind) or not kind.__module__.startswith(_OWN):
            return None
        options = {k: _told(v) for k, v in vars(module).items() if not k.startswith("_")}  # others are kept results
        modules.append((name, kind.__module__, kind.__qualname__, options))
    parts = (torch.__version__, _code(), native.machine(), sizes, str(modules))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _told(value: Any) -> str:
    """An attribute of a module in words that are the same in every process."""
    if isinstance(value, Tensor):  # not a weight: a constant of the graph
        return hashlib.sha256(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
    if isinstance(value, dict):
        return str({k: _told(v) for k, v in value.items()})
    if isinstance(value, set | frozenset):
        return str(sorted(_told(v) for v in value))
    if isinstance(value, list | tuple):
        return str([_told(v) for v in value])
    said = repr(value)
    return said if " at 0x" not in said else getattr(value, "__qualname__", type(value).__qualname__)


@functools.cache
def _code() -> str:
    """A digest of this package's sources."""
    folder, found = pathlib.Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        found.update(path.read_bytes())
    return found.hexdigest()


__all__ = ["Run", "build", "identity"]
