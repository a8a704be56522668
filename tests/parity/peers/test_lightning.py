"""Lightning attention against transformers' MiniMax layer, weights copied: slopes of all layers, whole and by steps."""

from __future__ import annotations

import pytest
import torch
from transformers.models.minimax.modeling_minimax import MiniMaxCache, MiniMaxConfig, MiniMaxLightningAttention

import zoo
from zoo.protocol import Place

D, H, HEAD, LAYERS = 32, 4, 16, 4


def pair(layer: int):
    config = MiniMaxConfig(
        hidden_size=D,
        num_attention_heads=H,
        head_dim=HEAD,
        num_hidden_layers=LAYERS,
        block_size=16,
        hidden_act="silu",
        layer_types=["linear_attention"] * LAYERS,
    )
    torch.manual_seed(layer)
    theirs = MiniMaxLightningAttention(config, layer).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p += 0.1 * torch.randn_like(p)
    word = f'linear_attention(n_heads={H}, feature_dim={HEAD}, value_dim={HEAD}, feature_map="silu", value_silu=True, '
    word += 'decay="lightning", norm_heads=False, norm_eps=1e-6, gate=True)'
    mixer = zoo.create_mixer(word, D, place=Place(layer, LAYERS))
    qkv = theirs.qkv_proj.weight.view(H, 3, HEAD, D).transpose(0, 1).reshape(-1, D)  # theirs lie head by head
    weights = {"in_proj.weight": torch.cat([qkv, theirs.output_gate.weight])}
    weights |= {"norm.weight": theirs.norm.weight, "out_proj.weight": theirs.out_proj.weight}
    mixer.load_state_dict(weights)
    return mixer, theirs


def close(ours, theirs):
    error = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    print(f"{error:.1e}")
    assert error <= 2e-5


@pytest.mark.parametrize("layer", range(LAYERS))
def test_outputs_and_gradients(layer):
    mixer, theirs = pair(layer)
    x = torch.randn(2, 50, D, generator=torch.Generator().manual_seed(1)).requires_grad_()
    outputs = mixer(x)[0], theirs(x, None, None)[0]
    close(*outputs)
    close(*(torch.autograd.grad((y * torch.linspace(-1, 1, D)).sum(), x)[0] for y in outputs))


@torch.no_grad()
def test_single_steps():
    mixer, theirs = pair(1)
    x = torch.randn(2, 40, D, generator=torch.Generator().manual_seed(1))
    cache, (y, state) = MiniMaxCache(), mixer(x[:, :30])
    close(y, theirs(x[:, :30], None, None, cache)[0])
    for t in range(30, 40):
        y, state = mixer.step(x[:, t], state)
        close(y, theirs(x[:, t : t + 1], None, None, cache)[0][:, 0])
    close(state.memory, cache.get_linear_cache(1))
