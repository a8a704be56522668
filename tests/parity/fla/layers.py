"""flash-linear-attention's own layers, which run here in Triton's interpreter (see `conftest.py`)."""

from __future__ import annotations

import importlib
import sys
import types

import fla
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import zoo
from zoo.protocol import Mixer

TOLERANCE = 2e-5


def layer(module: str, name: str, **options) -> nn.Module:
    """A layer of `fla.layers` with parameters off their inits; its package, which needs transformers, is not."""
    if "fla.layers" not in sys.modules:
        package = types.ModuleType("fla.layers")
        package.__path__ = [f"{fla.__path__[0]}/layers"]
        sys.modules["fla.layers"] = package
    activations = types.ModuleType("transformers.activations")
    activations.ACT2FN = {"swish": F.silu}
    absent = "transformers.activations" not in sys.modules
    if absent:
        sys.modules |= {"transformers": types.ModuleType("transformers"), "transformers.activations": activations}
    found = importlib.import_module(f"fla.layers.{module}")
    if absent:
        del sys.modules["transformers"], sys.modules["transformers.activations"]
    torch.manual_seed(0)
    built = getattr(found, name)(**options).eval()
    with torch.no_grad():
        for p in built.parameters():
            p += 0.1 * torch.randn_like(p)
    return built


def stacked(*parts: nn.Module | Tensor | None) -> Tensor:
    """One weight of several projections or depthwise convolutions, (sum of outputs, inputs)."""
    weights = [part.weight if isinstance(part, nn.Module) else part for part in parts if part is not None]
    return torch.cat([w.flatten(1) for w in weights])


def ours(word: str, weights: dict[str, Tensor], d_model: int) -> Mixer:
    """The mixer with exactly these weights."""
    mixer = zoo.create_mixer(word, d_model)
    mixer.load_state_dict(weights)
    return mixer


def agree(mixer: Mixer, theirs: nn.Module, d_model: int, steps: int, *, gradients: bool = True) -> None:
    """Both give the same outputs without gradients (up to 64 steps their recurrent kernels), and the same outputs and
    gradients of the input with them (their chunked kernels)."""
    x = torch.randn(2, steps, d_model, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        y = theirs(x)
        close(mixer(x)[0], y[0] if isinstance(y, tuple) else y, "outputs")
    if gradients:
        leaves, outputs = [x.clone().requires_grad_() for _ in range(2)], []
        for leaf, model in zip(leaves, (mixer, theirs), strict=True):
            y = model(leaf)
            outputs.append(y[0] if isinstance(y, tuple) else y)
            (outputs[-1] * torch.linspace(-1, 1, d_model)).sum().backward()
        close(outputs[0], outputs[1], "outputs with gradients")
        close(leaves[0].grad, leaves[1].grad, "gradients")


def close(actual: Tensor, expected: Tensor, what: str) -> None:
    assert actual.shape == expected.shape
    error = ((actual - expected).abs().max() / expected.abs().max()).item()
    print(f"{what}: {error:.1e}")
    assert error <= TOLERANCE, f"{what}: relative error {error:.1e}"
