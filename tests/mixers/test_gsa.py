"""Gated slot attention against the paper's equations, its sizes, and what its slots can hold."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import zoo
from zoo.protocol import mixers

D = 16


def by_hand(m, x: Tensor) -> Tensor:
    """One row x (T, D), one token and one head at a time."""
    c, H, G, M = m.config, m.n_heads, m.n_kv_heads, m.n_slots
    qkv, f = (x @ m.in_proj.weight.T).split(m.parts, -1)
    if c.conv_size:
        padded = F.pad(qkv, (0, 0, c.conv_size - 1, 0))
        qkv = sum(m.conv.weight[:, w] * padded[w : w + len(x)] for w in range(c.conv_size)) + m.conv.bias
        qkv = F.silu(qkv)
    act = F.silu if c.feature_map == "silu" else F.relu
    keys, values, outputs = x.new_zeros(G, M, m.d_key), x.new_zeros(G, M, m.d_value), []
    for t in range(len(x)):
        q, k, v = qkv[t].split(m.qkv_parts)
        q, k, v = act(q).view(H, -1), act(k).view(G, -1), F.silu(v).view(G, -1)
        keep = torch.sigmoid(f[t]).view(G, M, 1) ** (1 / c.gate_temperature)
        keys = keep * keys + (1 - keep) * k[:, None]
        values = keep * values + (1 - keep) * v[:, None]
        heads = [values[h * G // H].T @ torch.softmax(c.scale * keys[h * G // H] @ q[h], 0) for h in range(H)]
        o = F.silu(torch.cat(heads))
        outputs.append(m.out_proj(o / torch.sqrt((o**2).mean() + c.norm_eps) * m.norm.weight))
    return torch.stack(outputs)


@pytest.mark.parametrize("options", mixers["gsa"].law_cases(), ids=str)
@torch.no_grad()
def test_the_equations(options):
    mixer = zoo.create_mixer("gsa", D, **options).double()
    for p in mixer.parameters():
        p += 0.1 * torch.randn_like(p)
    x = torch.randn(2, 13, D).double()
    torch.testing.assert_close(mixer(x)[0], torch.stack([by_hand(mixer, row) for row in x]))


def test_published_size():
    """The authors' 1.3B shape: 2048 wide, 4 heads, 64 slots."""
    with torch.device("meta"):
        mixer = zoo.create_mixer("gsa(n_heads=4, n_slots=64)", 2048)
    assert sum(p.numel() for p in mixer.parameters()) == 4 * 2048**2 + 2048 * 4 * 64 + 2048
    assert mixer.state_bytes(1, 1, torch.float32) == 4 * (4 * 64 * (512 + 512))


def test_defaults_fit_narrow_layers():
    assert [(m.n_heads, m.n_slots) for m in (zoo.create_mixer("gsa", d) for d in (16, 64, 512))] == [
        (1, 16),
        (4, 16),
        (4, 64),
    ]
    with pytest.raises(zoo.UsageError, match="n_kv_heads=3 does not divide n_heads=4"):
        zoo.create_mixer("gsa(n_heads=4, n_kv_heads=3)", 64)
