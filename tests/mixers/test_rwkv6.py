"""RWKV-6 against its equations written out for a token, its published inits and sizes, and its channel mixing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import zoo
from zoo.protocol import Place, mixers

D = 32


def perturbed(mixer):
    with torch.no_grad():
        for p in mixer.parameters():
            p += 0.1 * torch.randn_like(p)
    return mixer.double()


def by_hand(m, x: Tensor) -> Tensor:
    """One row x (T, D), one token at a time."""
    H, K, V = m.n_heads, m.d_key, m.d_value
    S, before, outputs = x.new_zeros(H, K, V), x.new_zeros(x.shape[1]), []
    rank = m.time_maa_w2.shape[1]
    for x_t in x:
        step, before = before - x_t, x_t
        low = torch.tanh((x_t + step * m.time_maa_x) @ m.time_maa_w1)
        moves = {i: low[n * rank : (n + 1) * rank] @ m.time_maa_w2[n] for n, i in enumerate("wkvrg")}
        w, k, v, r, g = (x_t + step * (getattr(m, f"time_maa_{i}") + moves[i]) for i in "wkvrg")
        r, k, v = r @ m.receptance.weight.T, k @ m.key.weight.T, v @ m.value.weight.T
        w = torch.exp(-torch.exp(m.time_decay + torch.tanh(w @ m.time_decay_w1) @ m.time_decay_w2))
        r, k, v, w = r.view(H, K), k.view(H, K), v.view(H, V), w.view(H, K)
        o, S = S.clone(), S.clone()
        for h in range(H):
            write = torch.outer(k[h], v[h])
            o[h, 0] = r[h] @ (S[h] + torch.diag(m.time_faaaa[h]) @ write)
            S[h] = torch.diag(w[h]) @ S[h] + write
        o = F.group_norm(o[:, 0].reshape(1, -1), H, m.ln_x.weight, m.ln_x.bias, eps=m.config.norm_eps)[0]
        outputs.append((o * F.silu(g @ m.gate.weight.T)) @ m.output.weight.T)
    return torch.stack(outputs)


@pytest.mark.parametrize("options", mixers["rwkv6"].law_cases(), ids=str)
@torch.no_grad()
def test_the_equations(options):
    mixer = perturbed(zoo.create_mixer("rwkv6", D, place=Place(1, 4), **options))
    x = torch.randn(2, 40, D).double()
    torch.testing.assert_close(mixer(x)[0], torch.stack([by_hand(mixer, row) for row in x]), rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_decays_of_any_strength_are_exact():
    """A step that forgets everything (decays of exp(-exp(9))) beside one that forgets nothing."""
    mixer = perturbed(zoo.create_mixer("rwkv6(head_dim=16)", D))
    mixer.time_decay.copy_(torch.where(torch.arange(D) % 2 == 0, 9.0, -30.0))
    x = torch.randn(1, 100, D)
    expected = by_hand(mixer, x[0].double())
    torch.testing.assert_close(mixer(x.double())[0][0], expected, rtol=1e-9, atol=1e-9)
    y = mixer.float()(x)[0][0].double()
    assert (y - expected).abs().max() < 2e-5 * expected.abs().max()


@pytest.mark.parametrize(("index", "n_layers", "d_model"), [(0, 24, 768), (5, 24, 768), (23, 24, 768), (0, 1, 128)])
def test_published_inits(index, n_layers, d_model):
    """The formulas of the authors' training code, one channel at a time."""
    mixer = zoo.create_mixer("rwkv6", d_model, place=Place(index, n_layers))
    C, state = d_model, mixer.state_dict()
    deep, rest = index / max(n_layers - 1, 1), 1 - index / n_layers
    for n in (0, 1, 31, 63, 64, 100, C - 1):
        expected = {f"time_maa_{i}": 1 - (n / C) ** rest for i in "xwk"}
        expected |= {f"time_maa_{i}": 1 - (n / C) ** (0.5 * rest) for i in "rg"}
        expected["time_maa_v"] = 1 - ((n / C) ** rest + 0.3 * deep)
        expected["time_decay"] = -6 + 5 * (n / (C - 1)) ** (0.7 + 1.3 * deep)
        expected |= {"ln_x.weight": ((1 + index) / n_layers) ** 0.7, "ln_x.bias": 0.0}
        for name, value in expected.items():
            assert state[name][n].item() == pytest.approx(value, rel=1e-5, abs=1e-5), name
        bonus = deep * (1 - n / (C - 1)) + ((n + 1) % 3 - 1) * 0.1
        assert state["time_faaaa"].flatten()[n].item() == pytest.approx(bonus, abs=1e-5)
    for name in ("time_maa_w1", "time_decay_w1", "output.weight"):
        assert not state[name].any()
    for name in ("time_maa_w2", "time_decay_w2"):
        assert 0.009 < state[name].abs().max() <= 0.01
    for name, gain in (("receptance", 1.0), ("key", 0.1), ("value", 1.0), ("gate", 0.1)):
        weight = state[f"{name}.weight"]
        torch.testing.assert_close(weight @ weight.T, gain**2 * torch.eye(C), rtol=0, atol=1e-4)


def test_published_size():
    """RWKV-6 World 1.6B: 24 layers, 2048 wide, a vocabulary of 65536: 1.60e9 weights."""
    with torch.device("meta"):
        model = zoo.create_model(
            "24*(rwkv6 rwkv_channel_mix(gate=True))",
            d_model=2048,
            vocab_size=65536,
            norm="layernorm",
            embedding_norm=True,
        )
    layer = 9 * 2048 + 2 * 2048 * 160 + 2 * 2048 * 64 + 5 * 2048**2 + 2 * 2048  # maa, decay, u; low ranks; ln_x
    layer += 2 * 2048 + 2 * 2048 * 7168 + 2048**2 + 4 * 2048 - 2048  # channel mixing; norms; 8, not 9, vectors
    assert sum(p.numel() for p in model.parameters()) == 24 * layer + 2 * 65536 * 2048 + 4 * 2048 == 1_599_873_024


@torch.no_grad()
def test_channel_mixing():
    mixer = zoo.create_mixer("rwkv_channel_mix(gate=True)", D, place=Place(3, 4))
    for share in (mixer.x_k, mixer.x_r):
        torch.testing.assert_close(share, 1 - (torch.arange(D) / D) ** 0.25)
    assert not mixer.receptance.weight.any()
    assert not mixer.value.weight.any()
    assert mixer.d_hidden == 96  # 112, rounded down to a multiple of 32
    perturbed(mixer)
    x = torch.randn(2, 5, D).double()
    before = F.pad(x[:, :-1], (0, 0, 1, 0))
    x_k, x_r = (x + (before - x) * share for share in (mixer.x_k, mixer.x_r))
    expected = (F.relu(x_k @ mixer.key.weight.T) ** 2 @ mixer.value.weight.T) * torch.sigmoid(
        x_r @ mixer.receptance.weight.T
    )
    torch.testing.assert_close(mixer(x)[0], expected)
