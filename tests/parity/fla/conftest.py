"""Triton's interpreter in place of a GPU, so that the libraries' own kernels run on the CPU.

Four things are missing there: the autotuner would time kernels on a driver, so it takes its first configuration; a
loop's counter is a plain int, to which kernels apply `.to`; products of bfloat16 operands would be those of the whole
numbers that hold their bits; and CUDA extensions, whose Python files are read without.
"""

from __future__ import annotations

import builtins
import importlib
import importlib.machinery
import os
import sys
import types
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

import pytest
import triton.language as tl
from triton.runtime import autotuner
from triton.runtime.interpreter import InterpreterBuilder

SOURCES = Path(sys.prefix) / "sources"  # where `make parity` unpacks mamba-ssm and causal-conv1d


def _first_configuration(self, *args, **kwargs):
    self.best_config = self.configs[0]
    kwargs = {**kwargs, **self.best_config.all_kwargs()}
    if self.best_config.pre_hook is not None:  # zeroes what the kernel adds to
        self.best_config.pre_hook({**dict(zip(self.arg_names, args, strict=False)), **kwargs})
    return self.fn.run(*args, **kwargs)


_dot = InterpreterBuilder.create_dot


def _dot_of_numbers(self, *given):
    a, b = (self.create_fp_ext(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in given[:2])
    return _dot(self, a, b, *given[2:])


class Counter(int):
    """A loop's counter with a tensor's `.to`."""

    def to(self, dtype):
        return tl.full((), int(self), dtype)


def counters(*bounds):
    return map(Counter, builtins.range(*map(int, bounds)))


autotuner.Autotuner.run = _first_configuration
InterpreterBuilder.create_dot = _dot_of_numbers
_OPS = "comba forgetting_attn gated_delta_rule gdn2 generalized_delta_rule gla gsa hgrn kda nsa rwkv6 simple_gla"
for _op in _OPS.split():
    importlib.import_module(f"fla.ops.{_op}")
for _name, _module in list(sys.modules.items()):
    if _name.startswith("fla.ops") and hasattr(_module, "tl"):
        _module.range = counters
        if hasattr(_module, "IS_GATHER_SUPPORTED"):  # not by the interpreter
            _module.IS_GATHER_SUPPORTED = False


@pytest.fixture
def sources():
    """`mamba_ssm` and `causal_conv1d` importable file by file: neither the packages' own imports nor CUDA are run."""
    before = set(sys.modules)
    for name in ("mamba_ssm", "causal_conv1d"):
        (folder,) = SOURCES.glob(f"{name}-*/{name}")
        package = types.ModuleType(name)
        package.__path__ = [str(folder)]
        package.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        sys.modules[name] = package
    for extension in ("selective_scan_cuda", "causal_conv1d_cuda"):
        sys.modules[extension] = types.ModuleType(extension)
    functions = types.ModuleType("causal_conv1d.cpp_functions")
    for name in ("fwd", "bwd", "update"):
        setattr(functions, f"causal_conv1d_{name}_function", None)
    sys.modules[functions.__name__] = functions
    yield
    for name in set(sys.modules) - before:
        if name.startswith(("mamba_ssm", "causal_conv1d", "selective_scan_cuda")):
            del sys.modules[name]
