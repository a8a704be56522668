"""A mixer beside a recurrent layer of transformers: outputs, gradients of the input, and decoding from a cache."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from zoo.protocol import Mixer

TOLERANCE = 2e-5


def moved(layer: nn.Module) -> nn.Module:
    """The layer with every parameter set at random, uninitialised ones too."""
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in layer.named_parameters():
            scale = 0.5 if p.ndim == 1 or name.endswith("A_log") else p[0].numel() ** -0.5
            p.copy_(scale * torch.randn(p.shape, generator=rng) + ("norm" in name))
    return layer.eval()


def agree(mixer: Mixer, theirs: nn.Module, config, steps: int = 150, cut: int = 90, decoded: int = 5) -> None:
    """All of `steps` at once, and the first `cut` followed by `decoded` single steps."""
    x = torch.randn(2, steps, config.hidden_size, generator=torch.Generator().manual_seed(1))
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [mixer(leaves[0])[0], theirs(leaves[1])]
    for y in outputs:
        (y * torch.linspace(-1, 1, config.hidden_size)).sum().backward()
    close(outputs[0], outputs[1], "outputs")
    close(leaves[0].grad, leaves[1].grad, "gradients of the input")

    cache, state = DynamicCache(config=config), mixer.init_state(2)
    edges = [0, cut, *range(cut + 1, cut + decoded + 1)]
    with torch.no_grad():
        for start, end in pairwise(edges):
            y, state = mixer(x[:, start:end], state)
            close(y, theirs(x[:, start:end], cache_params=cache), f"from a cache, steps {start} to {end}")


def close(actual: Tensor, expected: Tensor, what: str) -> None:
    assert actual.shape == expected.shape
    error = ((actual - expected).abs().max() / expected.abs().max()).item()
    print(f"{what}: {error:.1e}")
    assert error <= TOLERANCE, f"{what}: relative error {error:.1e}"
