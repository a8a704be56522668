"""The double-gated short convolution against transformers' LFM2 layer, weights copied."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, Lfm2Config
from transformers.models.lfm2.modeling_lfm2 import Lfm2ShortConv

import zoo
from zoo.protocol import Mixer

D = 32


def pair(size: int, bias: bool) -> tuple[Mixer, nn.Module, Lfm2Config]:
    """Ours and theirs; the map is a rename, and the convolution's weight loses its axis of 1."""
    config = Lfm2Config(
        hidden_size=D, conv_L_cache=size, conv_bias=bias, num_hidden_layers=1, layer_types=["conv"], vocab_size=8
    )
    theirs = Lfm2ShortConv(config, 0)
    ours = zoo.create_mixer("gated_short_conv", D, conv_size=size, bias=bias)
    ours.load_state_dict({k: v.squeeze(1) if k == "conv.weight" else v for k, v in theirs.state_dict().items()})
    return ours, theirs, config


def close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    assert actual.shape == expected.shape
    error = ((actual - expected).abs().max() / expected.abs().max()).item()
    print(f"{actual.dtype}: {error:.1e}")
    assert error <= tolerance


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-5)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("size", [3, 4])
def test_outputs_and_gradients(size, bias, dtype, tolerance):
    ours, theirs, _ = pair(size, bias)
    ours.to(dtype), theirs.to(dtype)
    x = torch.randn(2, 50, D, dtype=dtype)
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [ours(leaves[0])[0], theirs(leaves[1])]
    close(*outputs, tolerance)
    for y in outputs:
        (y * torch.linspace(-1, 1, D, dtype=dtype)).sum().backward()
    close(leaves[0].grad, leaves[1].grad, tolerance)
    expected = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        close(p.grad, expected[name].grad.reshape(p.shape), tolerance)


def test_decoding_from_a_cache():
    ours, theirs, config = pair(3, bias=False)
    x, cache, state = torch.randn(2, 40, D), DynamicCache(config=config), None
    with torch.no_grad():
        for start, end in pairwise([0, 33, *range(34, 41)]):
            y, state = ours(x[:, start:end], state)
            close(y, theirs(x[:, start:end], past_key_values=cache), 2e-5)
