"""RG-LRU against the recurrent block of transformers' RecurrentGemma: outputs, all gradients, decoding, documents."""

from __future__ import annotations

import pytest
import torch
from cached_layers import close, moved
from transformers import RecurrentGemmaConfig
from transformers.models.recurrent_gemma.modeling_recurrent_gemma import RecurrentGemmaRecurrentBlock

import zoo
from zoo.protocol import Context

D, STEPS = 32, 70


def weights_of(theirs: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Our names for the parameters of `theirs`: a rename, the two gates stacked, the convolution without an axis."""
    weights = {name: x for name, x in theirs.named_parameters() if name.startswith("linear")}
    weights["conv.weight"], weights["conv.bias"] = theirs.conv_1d.weight.squeeze(1), theirs.conv_1d.bias
    unit = theirs.rg_lru
    weights["gate_weight"] = torch.stack([unit.input_gate_weight, unit.recurrent_gate_weight])
    weights["gate_bias"] = torch.stack([unit.input_gate_bias, unit.recurrent_gate_bias])
    weights["decay"] = unit.recurrent_param
    return weights


def pair(blocks: int = 4, expand: int = 1, backend: str = "auto", kernel: int = 4):
    config = RecurrentGemmaConfig(
        hidden_size=D, lru_width=expand * D, num_attention_heads=blocks, conv1d_width=kernel, num_hidden_layers=1
    )
    theirs = moved(RecurrentGemmaRecurrentBlock(config, 0))
    mixer = zoo.create_mixer("rg_lru", D, n_blocks=blocks, expand=expand, conv_size=kernel, backend=backend)
    mixer.load_state_dict(weights_of(theirs))
    return mixer, theirs


def noise(seed: int) -> torch.Tensor:
    return torch.randn(2, STEPS, D, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("backend", ["auto", "chunked", "reference"])
@pytest.mark.parametrize(("blocks", "expand", "kernel"), [(4, 1, 4), (1, 1, 3), (6, 3, 4)])
def test_values_and_gradients(blocks, expand, kernel, backend):
    mixer, theirs = pair(blocks, expand, backend, kernel)
    x, other, w = noise(1).requires_grad_(), noise(1).requires_grad_(), noise(2)
    positions = torch.arange(STEPS).expand(2, STEPS)
    y, expected = mixer(x)[0], theirs(other, positions, None, use_cache=False)[0]
    close(y, expected, "outputs")
    (y * w).sum().backward()
    (expected * w).sum().backward()
    close(x.grad, other.grad, "gradient of the input")
    ours = {name: p.grad for name, p in mixer.named_parameters()}
    for p in theirs.parameters():
        p.data = p.grad
    for name, g in weights_of(theirs).items():
        close(ours[name], g, f"gradient of {name}")


@torch.no_grad()
def test_decoding():
    mixer, theirs = pair()
    x, state, cut = noise(1), None, 60
    theirs._setup_cache(2, x.device, x.dtype)
    for start, end in [(0, cut), *((t, t + 1) for t in range(cut, STEPS))]:
        y, state = mixer(x[:, start:end], state)
        positions = torch.arange(start, end).expand(2, -1)
        close(y, theirs(x[:, start:end], positions, None, use_cache=True)[0], f"from a cache, steps {start} to {end}")


@torch.no_grad()
def test_documents():
    """Their unit starts anew where a position is 0; their convolution does not, and is left out by a window of 1."""
    mixer, theirs = pair(kernel=1)
    x, positions = noise(1), torch.cat([torch.arange(30), torch.arange(STEPS - 30)]).expand(2, -1)
    context = Context(resets=(positions == 0) & (torch.arange(STEPS) > 0))
    close(mixer(x, None, context)[0], theirs(x, positions, None, use_cache=False)[0], "outputs")
