"""Compilation of a model's layers before its training, so that no step waits for it."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zoo.core.errors import UsageError
from zoo.models.ends import Ends
from zoo.ops import native
from zoo.protocol import Mixer
from zoo.training.machine import choose_device
from zoo.training.train_options import TrainConfig


def check_compilation(config: TrainConfig) -> None:
    """Refuse a compilation that this machine cannot do, and choose the folder for what it makes.

    Raises:
        UsageError: no GPU for CUDA graphs, no compiler, or no folder to which nobody else may write.
    """
    if not config.compile:
        return
    kind = choose_device(config.device).type
    if config.cuda_graphs and kind != "cuda":
        raise UsageError(f"train.cuda_graphs=true needs a GPU of NVIDIA, and the device is {kind}: leave it out.")
    if kind == "cpu" and native.compiler() is None and shutil.which("cl") is None:
        raise UsageError("train.compile=true needs a C++ compiler: install g++ or clang, or name one in CXX.")
    try:
        native.compiled_graphs()
    except (native.Unavailable, OSError) as error:
        raise UsageError(f"train.compile=true has no folder for what it compiles: {error}.") from None


def compile_layers(model: Ends, loss: Callable[[], Tensor], *, cuda_graphs: bool = False) -> float:
    """Compile the layers by one pass forward and back, of which nothing stays, and return the seconds that it took.

    They are one graph, or fail: only words that cannot be (`Traits.not_compilable`) leave breaks.

    Args:
        model: whose layers are compiled where they stand.
        loss: runs the model on inputs of the shapes of training.
        cuda_graphs: replay the graphs of a GPU without launching their kernels one by one.
    """
    started, random = time.perf_counter(), torch.get_rng_state()
    backbone = model.backbone
    whole = not model.recompute or model.config.recursion is not None
    broken = any(isinstance(m, Mixer) and m.traits.not_compilable for m in model.modules())
    how: dict[str, Any] = {"fullgraph": not broken, "mode": "reduce-overhead" if cuda_graphs else None}
    for module in [backbone] if whole else backbone.recomputed_parts():  # what is computed again is compiled within
        module.compile(**how)
    buffers = [buffer.clone() for buffer in model.buffers()]
    loss().backward()
    model.zero_grad(set_to_none=True)
    for buffer, before in zip(model.buffers(), buffers, strict=True):
        buffer.copy_(before)
    torch.set_rng_state(random)
    return time.perf_counter() - started


__all__ = ["check_compilation", "compile_layers"]
