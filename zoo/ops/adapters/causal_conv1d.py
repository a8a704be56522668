"""causal-conv1d: the short convolution in CUDA, laid out (B, D, T)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zoo.ops.adapters import missing

WIDTHS = (2, 3, 4)


def why_not(x: Tensor, weight: Tensor, lengths: Tensor | None, resets: Tensor | None) -> str | None:
    """Why it cannot take these inputs."""
    if x.device.type != "cuda":  # compiled CUDA: no interpreter
        return f"it needs a GPU, the inputs are on {x.device}"
    if torch.compiler.is_compiling():
        return "torch.compile takes the plain forms"
    if (why := missing("causal_conv1d", "causal_conv1d", "causal-conv1d")) is not None:
        return why
    if weight.shape[1] not in WIDTHS:
        return f"its windows are {', '.join(map(str, WIDTHS))} steps, this one {weight.shape[1]}"
    if weight.shape[0] % 8:
        return f"it takes multiples of 8 channels, these are {weight.shape[0]}"
    if x.dtype == torch.float64:
        return "it computes in float32 at most, the inputs are torch.float64"
    if lengths is not None or resets is not None:
        return "it starts no documents from a state and knows no lengths"
    return None


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor,
    activation: str | None,
    kernel: Callable[..., Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """The op of that name: x (B, T, D), state (B, W - 1, D); `kernel` is the library's own by default."""
    if kernel is None:
        from causal_conv1d import causal_conv1d_fn

        kernel = causal_conv1d_fn
    before = state.to(x.dtype).contiguous().transpose(1, 2)  # channels last in memory, as x
    y, after = kernel(
        x.contiguous().transpose(1, 2),
        weight,
        bias,
        initial_states=before,
        return_final_states=True,
        activation=activation,
    )
    return y.transpose(1, 2), after.transpose(1, 2).to(state.dtype)
