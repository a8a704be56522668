"""Other people's GPU kernels, one file per library, imported on first use.

Every adapter has `why_not(...)`, which says in one line why it cannot serve a call (None where it can), and functions
in the terms of our own ops: the same arguments, shapes and signs.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os

import torch
from torch import Tensor

from zoo.ops.derivatives import constant_in_graphs


@functools.cache
def missing(package: str, module: str, install: str) -> str | None:
    """Why `module` of `package` cannot be imported; None where it can."""
    if importlib.util.find_spec(package) is None:
        return f"{install} is not installed"
    try:
        importlib.import_module(module)
    except Exception as error:  # built for another torch or CUDA: an extension may fail in any way
        return f"{install} cannot be imported: {(str(error).splitlines() or [type(error).__name__])[0]}"
    return None


@constant_in_graphs
def interpreted() -> bool:
    """Whether Triton runs its kernels in Python, on a CPU, for tests (`TRITON_INTERPRET=1`)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def off_device(x: Tensor) -> str | None:
    """Why kernels for GPUs cannot take x; Triton's interpreter runs on the CPU."""
    if torch.compiler.is_compiling():
        return "torch.compile takes the plain forms"
    if x.device.type == "cuda" or interpreted():
        return None
    return f"it needs a GPU, the inputs are on {x.device}"
