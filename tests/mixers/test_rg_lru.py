"""RG-LRU against the paper: the recurrence written out, inits, the first step of a document."""

import math

import pytest
import torch
import torch.nn.functional as F

import zoo
from zoo.protocol import Context, Place


def plain(mixer, x):
    """The block's equations, one step and one block of gates at a time, for x (T, D)."""
    W, blocks = mixer.config.conv_size, mixer.gate_bias.shape[1]
    past, h, outputs = [x.new_zeros(mixer.d_rnn)] * W, x.new_zeros(mixer.d_rnn), []
    for t, x_t in enumerate(x):
        past = [*past[1:], mixer.linear_x(x_t)]
        u = mixer.conv.bias + sum(mixer.conv.weight[:, w] * past[w] for w in range(W))
        cut = u.chunk(blocks)
        i, r = (
            torch.cat([torch.sigmoid(cut[n] @ w[n] + b[n]) for n in range(blocks)])
            for w, b in zip(mixer.gate_weight, mixer.gate_bias, strict=True)
        )
        a = torch.sigmoid(-mixer.decay) ** (8 * r)  # exp(-softplus(p)) = sigmoid(-p)
        h = a * h + (torch.sqrt(1 - a**2) if t else 1) * i * u
        outputs.append(mixer.linear_out(h * F.gelu(mixer.linear_y(x_t), approximate="tanh")))
    return torch.stack(outputs)


@pytest.mark.parametrize("options", zoo.protocol.mixers["rg_lru"].law_cases(), ids=str)
def test_equals_the_paper_written_out(options):
    mixer = zoo.create_mixer("rg_lru", 16, **options).double()
    for p in mixer.parameters():
        p.data += 0.1 * torch.randn_like(p)
    x = torch.randn(2, 11, 16, dtype=torch.float64)
    y, _ = mixer(x)
    torch.testing.assert_close(y, torch.stack([plain(mixer, row) for row in x]))


def test_inits_are_the_published_ones():
    mixer = zoo.create_mixer("rg_lru(expand=2)", 512, place=Place(n_layers=8))
    decays = torch.exp(-8 * F.softplus(mixer.decay))
    assert 0.8999 <= decays.min() < 0.902 < 0.997 < decays.max() <= 0.9991
    assert abs(decays.mean() - 0.9495) < 0.005
    stds = {
        mixer.linear_x.weight: 512**-0.5,
        mixer.linear_y.weight: 512**-0.5,
        mixer.linear_out.weight: math.sqrt(2 / 8 / 1024),
        mixer.gate_weight: 64**-0.5,
        mixer.conv.weight: 0.05,
    }
    for weight, std in stds.items():
        assert weight.std().item() == pytest.approx(std, rel=0.05)
    for bias in (mixer.linear_x.bias, mixer.linear_y.bias, mixer.linear_out.bias, mixer.gate_bias, mixer.conv.bias):
        assert not bias.any()


def test_the_first_step_of_a_document_is_not_scaled():
    mixer = zoo.create_mixer("rg_lru(conv_size=1)", 16).double()
    x = torch.randn(1, 6, 16, dtype=torch.float64)
    alone, state = mixer(x[:, 3:])
    packed, last = mixer(x, None, Context(resets=torch.arange(6)[None] == 3))
    torch.testing.assert_close(packed[:, 3:], alone)
    torch.testing.assert_close((last.h, last.position), (state.h, state.position))
    assert last.position.tolist() == [3]


def test_gradients_stay_finite_where_nothing_is_forgotten():
    """At a = 1 the derivative of sqrt(1 - a^2) is infinite; it is bounded, as in the authors' code."""
    mixer = zoo.create_mixer("rg_lru", 16)
    with torch.no_grad():
        mixer.decay.fill_(-60.0)
    mixer(torch.randn(1, 20, 16))[0].sum().backward()
    assert all(p.grad.isfinite().all() for p in mixer.parameters())


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("rg_lru(n_blocks=3)", "n_blocks=3 does not divide expand * d_model = 64"),
        ("rg_lru(expand=1.51)", "expand * d_model = 1.51 * 64 = 96.64 is not allowed: it should be a whole number"),
        ("rg_lru(decay_range=[0.9, 1.0])", "decay_range=[0.9, 1] is not allowed: it should be 0 < low <= high < 1"),
    ],
)
def test_what_does_not_fit(word, message):
    with pytest.raises(zoo.UsageError) as error:
        zoo.create_mixer(word, 64)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
