"""The M2RNN layer against its authors' code: the equations written out, inits, sizes, wrong options."""

import pytest
import torch
import torch.nn.functional as F

import zoo
from zoo.parameters import rules_of
from zoo.protocol import Place, mixers


def plain(mixer, x):
    """The layer's equations for x (T, D), one step and one head at a time."""
    c, H = mixer.config, mixer.n_heads
    G, K, V, W = c.n_groups, c.d_key, c.d_value, c.conv_size
    projected = x @ mixer.in_proj.weight.T + (0 if mixer.in_proj.bias is None else mixer.in_proj.bias)
    qkv, f, g = projected.split([2 * G * K + H * V, H, H * V], -1)
    if W:
        past = F.pad(qkv, (0, 0, W - 1, 0))
        qkv = sum(mixer.conv.weight[:, w] * past[w : w + len(x)] for w in range(W))
        qkv = F.silu(qkv + (0 if mixer.conv.bias is None else mixer.conv.bias))
    q, k, v = qkv.split([G * K, G * K, H * V], -1)
    f = torch.exp(-mixer.A_log.exp() * F.softplus(f + mixer.dt_bias))
    h, outputs = x.new_zeros(H, K, V), []
    for t in range(len(x)):
        o = []
        for n in range(H):
            q_t, k_t = (m[t].view(G, K)[n // (H // G)] for m in (q, k))
            v_t = v[t].view(H, V)[n]
            new = torch.tanh(h[n] @ mixer.state_weight[n] + torch.outer(k_t, v_t))
            h = torch.cat([h[:n], (f[t, n] * h[n] + (1 - f[t, n]) * new)[None], h[n + 1 :]])
            o.append(q_t @ h[n] + (mixer.D[n] * v_t if c.residual else 0))
        o = torch.cat(o) * F.silu(g[t])
        outputs.append(o * (o.square().mean() + c.norm_eps).rsqrt() * mixer.norm.weight)
    return torch.stack(outputs) @ mixer.out_proj.weight.T


@pytest.mark.parametrize("options", [{}, *mixers["m2rnn"].law_cases()[:3]], ids=str)
def test_equals_the_published_layer_written_out(options):
    mixer = zoo.create_mixer("m2rnn", 16, **options).double()
    for p in mixer.parameters():
        p.data += 0.1 * torch.randn_like(p)
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    y, _ = mixer(x)
    torch.testing.assert_close(y, torch.stack([plain(mixer, row) for row in x]))


def test_inits_are_the_published_ones():
    mixer = zoo.create_mixer("m2rnn(n_heads=200)", 64, place=Place(layer=0, n_layers=8))
    assert torch.equal(mixer.state_weight, torch.eye(16).expand(200, 16, 16))
    assert torch.equal(mixer.D, torch.ones(200, 16))
    rates, steps = mixer.A_log.exp(), F.softplus(mixer.dt_bias)
    assert 0 < rates.min() < 1 < 15 < rates.max() <= 16
    assert 0.99e-3 < steps.min() < 2e-3 < 0.05 < steps.max() < 0.101
    assert mixer.in_proj.bias is None
    assert mixer.conv.bias is None
    decayed = {
        name: rules_of(mixer)[id(p)].weight_decay for name, p in mixer.named_parameters() if id(p) in rules_of(mixer)
    }
    assert decayed == {"D": False}


def test_sizes_of_the_published_layers():
    """D 1,024 with 84 heads and D 1,536 with 132, of 64 x 16 numbers; what the count of parameters comes to."""
    for width, heads in ((1024, 84), (1536, 132)):
        with torch.device("meta"):
            mixer = zoo.create_mixer("m2rnn", width, n_heads=heads)
        values, convolved = heads * 16, 128 + heads * 16
        expected = width * (convolved + heads + 2 * values) + 4 * convolved + 2 * heads + heads * 16 * 17 + values
        assert sum(p.numel() for p in mixer.parameters()) == expected


def test_default_heads():
    heads = {16: 1, 34: 3, 64: 5, 256: 21}
    assert {d: zoo.create_mixer("m2rnn", d).n_heads for d in heads} == heads
    assert zoo.create_mixer("m2rnn(n_groups=2)", 64).n_heads == 6
    with pytest.raises(zoo.UsageError, match="m2rnn: n_groups=2 does not divide n_heads=3"):
        zoo.create_mixer("m2rnn(n_heads=3, n_groups=2)", 16)


def test_gradient_clipping_bounds_what_flows_back():
    """Through a W that doubles, gradients of the first step grow without it, and stay small with it."""
    sizes = {}
    for clipping in (None, 1e-3):
        torch.manual_seed(0)
        mixer = zoo.create_mixer("m2rnn(conv_size=0)", 16, gradient_clipping=clipping)
        mixer.state_weight.data *= 2
        mixer.A_log.data.fill_(3.0)
        mixer.dt_bias.data.fill_(1.0)
        x = (1e-3 * torch.randn(1, 40, 16)).requires_grad_()
        y, _ = mixer(x)
        y[:, -1].sum().backward()
        sizes[clipping] = x.grad[:, 0].abs().max().item()
    assert sizes[1e-3] < 0.1 * sizes[None]
