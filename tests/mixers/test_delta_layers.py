"""DeltaNet and Gated DeltaNet against the papers: recurrences written out, inits, sizes."""

import math

import pytest
import torch
import torch.nn.functional as F

import zoo
from zoo.registry import mixers

ACTIVATIONS = {"silu": F.silu, "relu": F.relu, "elu": lambda x: F.elu(x) + 1, "identity": lambda x: x}


def moved(name, d_model, **options):
    mixer = zoo.create_mixer(name, d_model, **options).double()
    for p in mixer.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return mixer


def convolved(mixer, qkv):
    """(T, channels) through the short convolution, one step and tap at a time, without activation."""
    if mixer.conv is None:
        return qkv
    W = mixer.config.conv_size
    padded = F.pad(qkv, (0, 0, W - 1, 0))
    y = [sum(mixer.conv.weight[:, w] * padded[t + w] for w in range(W)) for t in range(len(qkv))]
    return torch.stack(y) + (mixer.conv.bias if mixer.config.conv_bias else 0)


def plain(mixer, x, activation):
    """Both layers' equations, one step and one head at a time, for x (T, D)."""
    c, H, K, V = mixer.config, mixer.n_heads, mixer.d_key, mixer.d_value
    G = getattr(mixer, "n_key_heads", H)
    weights = mixer.in_proj.weight.split(mixer.parts)
    q, k, v = convolved(mixer, x @ weights[0].T).split([G * K, G * K, H * V], -1)
    q, k, v = ACTIVATIONS[activation](q), ACTIVATIONS[activation](k), F.silu(v)
    beta = torch.sigmoid(x @ weights[1].T) * (2 if c.allow_neg_eigval else 1)
    gate = F.silu(x @ weights[-1].T) if c.gate else x.new_ones(len(x), H * V)
    decay = x.new_ones(len(x), H)
    if mixer.name == "gated_deltanet":
        decay = torch.exp(-mixer.A_log.exp() * torch.log(1 + torch.exp(x @ weights[2].T + mixer.dt_bias)))

    def unit(m):
        return m / (m.sum() if getattr(c, "qk_norm", "l2") == "sum" else torch.sqrt(m @ m + 1e-6))

    outputs = []
    S = [x.new_zeros(K, V) for _ in range(H)]
    for t in range(len(x)):
        heads = []
        for h in range(H):
            g = h * G // H
            q_h, k_h = unit(q[t].view(G, K)[g]), unit(k[t].view(G, K)[g])
            S[h] = decay[t, h] * S[h]
            S[h] = S[h] + beta[t, h] * torch.outer(k_h, v[t].view(H, V)[h] - S[h].T @ k_h)
            o = S[h].T @ q_h / math.sqrt(K)
            heads.append(
                o / torch.sqrt((o**2).mean() + getattr(c, "norm_eps", 1e-5)) * mixer.norm.weight * gate[t].view(H, V)[h]
            )
        outputs.append(mixer.out_proj(torch.cat(heads)))
    return torch.stack(outputs)


CASES = [(name, options) for name in ("deltanet", "gated_deltanet") for options in mixers[name].law_cases()]


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_equals_the_paper_written_out(name, options):
    mixer = moved(name, 16, **options)
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    y, _ = mixer(x)
    activation = options.get("qk_activation", "silu")
    torch.testing.assert_close(y, torch.stack([plain(mixer, row, activation) for row in x]))


def test_gated_inits_are_the_published_ones():
    mixer = zoo.create_mixer("gated_deltanet(n_heads=512, head_dim=1, expand_v=1.0)", 64)
    rates, steps = mixer.A_log.exp(), F.softplus(mixer.dt_bias)
    assert 0 < rates.min() < 1
    assert 15 < rates.max() <= 16
    assert steps.min() * (1 + 1e-4) >= 1e-3
    assert steps.max() <= 1e-1 * (1 + 1e-4)
    assert abs(steps.log().mean() - math.log(1e-2)) < 0.25


def test_projections_keep_the_variance_and_shrink_with_depth():
    mixer = zoo.create_mixer("deltanet", 256, place=zoo.protocol.Place(n_layers=8))
    assert mixer.in_proj.weight.std().item() == pytest.approx(256**-0.5, rel=0.02)
    assert mixer.out_proj.weight.std().item() == pytest.approx(256**-0.5 / 4, rel=0.02)


def test_published_sizes():
    """fla's DeltaNet at 1024 and Gated DeltaNet at 2048 (6 D^2); Qwen3-Next-80B-A3B's layer."""
    with torch.device("meta"):
        layers = [
            zoo.create_mixer("deltanet", 1024),
            zoo.create_mixer("gated_deltanet", 2048),
            zoo.create_mixer("gated_deltanet(n_heads=16, n_v_heads=32, head_dim=128, expand_v=1.0)", 2048),
        ]
    delta, gated, qwen = (sum(p.numel() for p in layer.parameters()) for layer in layers)
    assert (layers[0].n_heads, layers[0].d_key) == (8, 128)
    assert delta == 4 * 1024**2 + 1024 * 8 + 3 * 1024 * 4 + 128
    assert (layers[1].n_heads, layers[1].d_key, layers[1].d_value) == (6, 256, 512)
    assert gated == 6 * 3 * 2048**2 // 4 * 4 // 3 + 2 * 2048 * 6 + 2 * 6 + (2 * 1536 + 3072) * 4 + 512
    in_proj = 2048 * (2 * 2048 + 2 * 4096) + 2048 * 64
    assert qwen == in_proj + (2 * 2048 + 4096) * 4 + 2 * 32 + 128 + 4096 * 2048


def test_a_second_write_replaces_the_first():
    """What sets the delta rule apart: with beta = 1 and the same key, the old value is gone."""
    k = F.normalize(torch.randn(1, 1, 1, 8, dtype=torch.float64), dim=-1).expand(1, 2, 1, 8)
    v = torch.randn(1, 2, 1, 8, dtype=torch.float64)
    o, _ = zoo.ops.delta_rule(k, k, v, torch.ones(1, 2, 1, dtype=torch.float64), scale=1.0)
    torch.testing.assert_close(o, v)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("deltanet(n_heads=3)", "expand_k * 64 / 3 heads = 21.3333 is not allowed: it should be a whole number"),
        ('deltanet(qk_norm="sum")', 'qk_norm="sum" needs qk_activation="elu"'),
        ("gated_deltanet(n_heads=4, n_v_heads=6)", "n_v_heads=6 is no multiple of n_heads=4"),
        ("gated_deltanet(head_dim=3, expand_v=1.5)", "expand_v * head_dim = 1.5 * 3 = 4.5 is not allowed"),
        ("gated_deltanet(A_init_range=[2.0, 1.0])", "A_init_range=[2, 1] is not allowed"),
    ],
)
def test_what_does_not_fit(word, message):
    with pytest.raises(zoo.UsageError) as error:
        zoo.create_mixer(word, 64)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
