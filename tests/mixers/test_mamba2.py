"""Mamba-2 against the paper: the recurrence written out, inits, sizes."""

import math

import pytest
import torch
import torch.nn.functional as F

import zoo
from zoo.protocol import Place


def plain(mixer, x):
    """The layer's equations, one step, head and tap at a time, for x (T, D)."""
    c = mixer.config
    H, V, G, N, W = mixer.n_heads, mixer.d_inner // mixer.n_heads, c.n_groups, c.d_state, c.conv_size
    S = x.new_zeros(H, N, V)
    past = [x.new_zeros(mixer.d_inner + 2 * G * N)] * W
    outputs = []
    for x_t in x:
        projected = mixer.in_proj.weight @ x_t + (mixer.in_proj.bias if c.bias else 0)
        if c.part_scales:
            widths = torch.tensor([H * V, H * V, G * N, G * N, H])
            projected = projected * torch.repeat_interleave(x.new_tensor(c.part_scales), widths)
        z, u, dt = projected[: mixer.d_inner], projected[mixer.d_inner : -H], projected[-H:]
        past = [*past[1:], u]
        u = sum(mixer.conv.weight[:, w] * past[w] for w in range(W)) + (mixer.conv.bias if c.conv_bias else 0)
        u, B, C = F.silu(u).split([mixer.d_inner, G * N, G * N])
        u, B, C = u.view(H, V), B.view(G, N), C.view(G, N)
        dt = torch.log(1 + torch.exp(dt + mixer.dt_bias))
        if c.dt_limit:
            dt = dt.clamp(*c.dt_limit)
        o = torch.zeros_like(u)
        S = S.clone()
        for h in range(H):
            g = h * G // H
            S[h] = torch.exp(-torch.exp(mixer.A_log[h]) * dt[h]) * S[h] + torch.outer(B[g], dt[h] * u[h])
            o[h] = S[h].T @ C[g] + mixer.D[h] * u[h]
        o, gate = o.flatten(), z * torch.sigmoid(z)
        o = o if c.norm_before_gate and c.rms_norm else o * gate
        if c.rms_norm:
            parts = o.view(G, -1)
            o = (parts / torch.sqrt((parts**2).mean(-1, keepdim=True) + c.norm_eps)).flatten() * mixer.norm.weight
            o = o * gate if c.norm_before_gate else o
        outputs.append(mixer.out_proj(o))
    return torch.stack(outputs)


@pytest.mark.parametrize("options", zoo.protocol.mixers["mamba2"].law_cases(), ids=str)
def test_equals_the_paper_written_out(options):
    mixer = zoo.create_mixer("mamba2", 16, **{**options, "d_state": 6}).double()
    for p in mixer.parameters():
        p.data += 0.1 * torch.randn_like(p)
    x = torch.randn(2, 11, 16, dtype=torch.float64)
    y, _ = mixer(x)
    torch.testing.assert_close(y, torch.stack([plain(mixer, row) for row in x]))


def test_inits_are_the_published_ones():
    mixer = zoo.create_mixer("mamba2(head_dim=2)", 512, place=Place(n_layers=16))
    rates, steps = mixer.A_log.exp(), F.softplus(mixer.dt_bias)
    assert 1 <= rates.min() < 2 < 15 < rates.max() <= 16
    assert steps.min() * (1 + 1e-4) >= 1e-3
    assert steps.max() <= 1e-1 * (1 + 1e-4)
    assert abs(steps.log().mean() - math.log(1e-2)) < 0.2  # log-uniform: the median is the geometric mean
    assert (mixer.D == 1).all()
    assert (mixer.norm.weight == 1).all()
    assert mixer.conv.weight.abs().max() <= 0.5
    assert 0.9 / math.sqrt(16 * 1024) < mixer.out_proj.weight.abs().max() <= 1 / math.sqrt(16 * 1024)


def test_number_of_parameters_is_that_of_mamba2_130m():
    with torch.device("meta"):
        mixer = zoo.create_mixer("mamba2", 768)
    n = sum(p.numel() for p in mixer.parameters())
    assert 24 * (n + 768) + 50288 * 768 + 768 == 128_989_632


def test_default_heads():
    heads = {16: 1, 18: 1, 64: 2, 96: 3, 128: 4}
    assert {d: zoo.create_mixer("mamba2", d).n_heads for d in heads} == heads


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("mamba2(head_dim=5)", "head_dim=5 does not divide expand * d_model = 128"),
        ("mamba2(n_groups=3)", "n_groups=3 does not divide the number of heads, 2"),
        ("mamba2(expand=1.51)", "expand * d_model = 1.51 * 64 = 96.64 is not allowed: it should be a whole number"),
        ("mamba2(A_init_range=[0.0, 1.0])", "A_init_range=[0, 1] is not allowed"),
        ("mamba2(dt_init_range=[0.1, 0.01])", "dt_init_range=[0.1, 0.01] is not allowed"),
        ("mamba2(dt_limit=[-1.0, 1.0])", "dt_limit=[-1, 1] is not allowed"),
    ],
)
def test_what_does_not_fit(word, message):
    with pytest.raises(zoo.UsageError) as error:
        zoo.create_mixer(word, 64)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
