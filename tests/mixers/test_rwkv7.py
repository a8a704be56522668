"""RWKV-7 against its equations written out for a token, its published inits, and values handed from layer to layer."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import zoo
from zoo.core.errors import UsageError
from zoo.mixers.rwkv7 import FIRST_VALUES
from zoo.protocol import Context, Place

D = 32


def perturbed(mixer):
    with torch.no_grad():
        for p in mixer.parameters():
            p += 0.1 * torch.randn_like(p)
    return mixer.double()


def layer(index: int, n_layers: int = 4, d_model: int = D, **options):
    return perturbed(zoo.create_mixer("rwkv7", d_model, place=Place(index, n_layers), **options))


def by_hand(m, x: Tensor, first: Tensor | None) -> tuple[Tensor, Tensor]:
    """One row x (T, D), one token at a time, the state transposed (values by keys), the decay as it is published."""
    H, K = m.r_k.shape
    S, before = x.new_zeros(H, K, K), x.new_zeros(x.shape[1])
    outputs, values = [], []
    for t, x_t in enumerate(x):
        r, w, k, v, a, g = (x_t + (before - x_t) * getattr(m, f"x_{i}") for i in "rwkvag")
        x_v, before = v, x_t
        r, k, v = r @ m.receptance.weight.T, k @ m.key.weight.T, v @ m.value.weight.T
        w = -F.softplus(-(m.w0 + torch.tanh(w @ m.w1) @ m.w2)) - 0.5
        w = torch.exp(-torch.exp(w)).view(H, K)
        a = torch.sigmoid(m.a0 + a @ m.a1 @ m.a2)
        g = torch.sigmoid(g @ m.g1) @ m.g2
        values.append(v)
        if first is not None:
            v = v + (first[t] - v) * torch.sigmoid(m.v0 + x_v @ m.v1 @ m.v2)
        kappa = (k * m.k_k).view(H, K)
        kappa = kappa / (kappa.square().sum(-1, keepdim=True) + m.config.kappa_eps).sqrt()
        k = k * (1 + (a - 1) * m.k_a)
        r, k, v, a = (z.view(H, K) for z in (r, k, v, a))
        for h in range(H):
            S[h] = S[h] * w[h] - torch.outer(S[h] @ kappa[h], kappa[h] * a[h]) + torch.outer(v[h], k[h])
        y = (S @ r[..., None]).reshape(1, -1)
        y = F.group_norm(y, H, m.ln_x.weight, m.ln_x.bias, eps=64e-5).view(H, K)
        y = y + (r * k * m.r_k).sum(-1, keepdim=True) * v
        outputs.append((y.flatten() * g) @ m.output.weight.T)
    return torch.stack(outputs), torch.stack(values)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@torch.no_grad()
def test_the_equations(backend):
    first, second = (layer(i, head_dim=8, backend=backend) for i in (0, 1))
    x, x_second, context = torch.randn(2, 40, D).double(), torch.randn(2, 40, D).double(), Context()
    y, _ = first(x, None, context)
    y_second, _ = second(x_second, None, context)
    for row in range(2):
        expected, values = by_hand(first, x[row], None)
        torch.testing.assert_close(y[row], expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(context.shared[FIRST_VALUES][row], values, rtol=1e-9, atol=1e-9)
        expected, _ = by_hand(second, x_second[row], values)
        torch.testing.assert_close(y_second[row], expected, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_a_layer_that_finds_no_values_takes_zeros_and_leaves_its_own():
    second = layer(1, head_dim=8)
    x, context = torch.randn(1, 10, D).double(), Context()
    y, _ = second(x, None, context)
    expected, values = by_hand(second, x[0], torch.zeros(10, D).double())
    torch.testing.assert_close(y[0], expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(context.shared[FIRST_VALUES][0], values)
    torch.testing.assert_close(second(x)[0], y)


@torch.no_grad()
def test_the_first_layer_replaces_values_of_an_earlier_pass():
    first, context, x = layer(0), Context(), torch.randn(1, 10, D).double()
    first(torch.randn(1, 4, D).double(), None, context)
    torch.testing.assert_close(first(x, None, context)[0], first(x)[0])
    assert context.shared[FIRST_VALUES].shape == (1, 10, D)


def test_value_residual_can_be_switched_off():
    second = layer(1, value_residual=False)
    assert not any(name.startswith("v0") for name, _ in second.named_parameters())
    x, context = torch.randn(1, 10, D).double(), Context()
    second(x, None, context)
    assert not context.shared
    y, _ = layer(0)(x, None, context)
    assert set(context.shared) == {FIRST_VALUES}
    assert y.shape == x.shape


@pytest.mark.parametrize("pattern", ["3*(rwkv7 rwkv_channel_mix)", "mamba2(d_state=8) rwkv7 lstm rwkv7"])
@torch.no_grad()
def test_a_model_step_by_step_equals_one_pass(pattern):
    model = perturbed(zoo.create_model(pattern, d_model=D, vocab_size=16))
    tokens = torch.randint(16, (2, 30))
    expected, last = model(tokens)
    state, outputs = model.init_state(2), []
    for t in range(30):
        y, state = model(tokens[:, t : t + 1], state)
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, 1), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(zoo.canonical(state), zoo.canonical(last), rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_both_directions_have_values_of_their_own():
    """The mirrored stack of a bidirectional model gets its own first values, in its own order of time."""
    stack = [perturbed(zoo.create_mixer("bidirectional(rwkv7)", D, place=Place(i, 2, False))) for i in range(2)]
    x, context, alone = torch.randn(1, 12, D).double(), Context(), [Context(), Context()]
    for step in stack:
        y, _ = step(x, None, context)
        forward, _ = step.inner(x, None, alone[0])
        backward, _ = step.mirrored(x.flip(1), None, alone[1])
        torch.testing.assert_close(y, forward + backward.flip(1))


def test_gradients_pass_through_the_first_values():
    first, second, context = layer(0), layer(1), Context()
    x = torch.randn(1, 10, D).double().requires_grad_()
    first(x, None, context)
    y, _ = second(x.detach(), None, context)
    (gradient,) = torch.autograd.grad(y.square().sum(), x)
    assert gradient.any()


@pytest.mark.parametrize(("index", "n_layers", "d_model"), [(0, 12, 768), (5, 12, 768), (11, 12, 768), (0, 1, 128)])
def test_published_inits(index, n_layers, d_model):
    """The formulas of the authors' training code, one channel at a time."""
    mixer = zoo.create_mixer("rwkv7", d_model, place=Place(index, n_layers))
    C, N, state = d_model, 64, mixer.state_dict()
    deep, rest = index / max(n_layers - 1, 1), 1 - index / n_layers
    for n in (0, 1, 31, 63, 64, 100, C - 1):
        line, zigzag = n / (C - 1) - 0.5, (n % N - (N - 1) / 2) / ((N - 1) / 2)
        zigzag *= abs(zigzag)
        powers = {"r": 0.2, "w": 0.9, "k": 0.7, "v": 0.7, "a": 0.9, "g": 0.2}
        expected = {
            **{f"x_{i}": 1 - (n / C) ** (power * rest) for i, power in powers.items()},
            "w0": -6 + 6 * (n / (C - 1)) ** (1 + deep**0.3) + 0.5 + 2.5 * zigzag,
            "a0": -0.19 + 0.3 * zigzag + 0.4 * line,
            **({"v0": 0.73 - 0.4 * line} if index else {}),
            "k_k": 0.71 - 0.1 * line,
            "k_a": 1.02,
            "ln_x.weight": ((1 + index) / n_layers) ** 0.7,
            "ln_x.bias": 0.0,
        }
        for name, value in expected.items():
            assert state[name][n].item() == pytest.approx(value, rel=1e-5, abs=1e-5), name
    assert state["r_k"].shape == (C // 64, 64)
    assert (state["r_k"] == -0.04).all()
    assert {name for name in state if name.startswith("v") and name != "value.weight"} == (
        {"v0", "v1", "v2"} if index else set()
    )
    for name in {"w1", "a1", "v1", "g1", "output.weight"} & state.keys():
        assert not state[name].any()
    for name, gain in (("receptance.weight", 1.0), ("key.weight", 0.1), ("value.weight", 1.0)):
        torch.testing.assert_close(state[name] @ state[name].T, gain**2 * torch.eye(C), rtol=0, atol=1e-4)
    for name in {"w2", "a2", "v2", "g2"} & state.keys():
        torch.testing.assert_close(state[name] @ state[name].T, 0.01 * torch.eye(len(state[name])), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("d_model", "ranks"), [(768, (64, 64, 32, 128)), (2048, (128, 128, 64, 224)), (32, (32, 32, 32, 32))]
)
def test_published_ranks(d_model, ranks):
    """Those of the decay, the in-context rate, the values and the gate."""
    with torch.device("meta"):
        m = zoo.create_mixer("rwkv7", d_model, place=Place(1, 2))
    assert tuple(w.shape[1] for w in (m.w1, m.a1, m.v1, m.g1)) == ranks


@pytest.mark.parametrize("index", [0, 3])
def test_channel_mixing(index):
    mixer = zoo.create_mixer("rwkv_channel_mix", D, place=Place(index, 4))
    shares = 1 - (torch.arange(D) / D) ** (1 - index / 4) ** 4
    torch.testing.assert_close(mixer.x_k.detach(), shares)
    torch.testing.assert_close(mixer.key.weight.T @ mixer.key.weight, torch.eye(D), rtol=0, atol=1e-5)
    assert mixer.key.weight.shape == (4 * D, D)
    assert not mixer.value.weight.any()
    mixer = perturbed(mixer)
    x = torch.randn(1, 9, D).double()
    y, state = mixer(x)
    for t in range(9):
        before = x[0, t - 1] if t else torch.zeros(D)
        k = x[0, t] + (before - x[0, t]) * mixer.x_k
        torch.testing.assert_close(y[0, t], mixer.value(torch.relu(mixer.key(k)) ** 2))
    torch.testing.assert_close(state.shift, x[:, -1:])


def test_head_dims():
    assert layer(0, d_model=130).r_k.shape == (2, 65)
    assert layer(0, d_model=48).r_k.shape == (1, 48)
    with pytest.raises(UsageError, match="head_dim=5 does not divide d_model=32"):
        layer(0, head_dim=5)
