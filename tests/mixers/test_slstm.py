"""The sLSTM layer against the paper: the recurrence written out, inits, sizes, wrong options."""

import pytest
import torch

import zoo
from zoo.protocol import Place, mixers


def plain(mixer, x):
    """The layer's equations, one step, head and tap at a time, the gates as they are: no logarithms, no stabiliser."""
    H, W = mixer.n_heads, mixer.config.conv_size
    bias = mixer.bias.view(4, H, -1)
    h, c, n = (x.new_zeros(H, mixer.d_head) for _ in range(3))
    past, outputs = [x.new_zeros(mixer.d_model)] * W, []
    for x_t in x:
        u = x_t
        if W:
            past = [*past[1:], x_t]
            u = sum(mixer.conv.weight[:, w] * past[w] for w in range(W)) + mixer.conv.bias
            u = u * torch.sigmoid(u)
        h, c, n, before = h.clone(), c.clone(), n.clone(), h
        for k in range(H):
            inputs = (u, u, x_t, x_t)
            maps = (mixer.igate, mixer.fgate, mixer.zgate, mixer.ogate)
            i, f, z, o = (
                m.weight[k] @ part.view(H, -1)[k] + mixer.recurrent[k, g] @ before[k] + bias[g, k]
                for g, (m, part) in enumerate(zip(maps, inputs, strict=True))
            )
            c[k] = torch.sigmoid(f) * c[k] + torch.exp(i) * torch.tanh(z)
            n[k] = torch.sigmoid(f) * n[k] + torch.exp(i)
            h[k] = torch.sigmoid(o) * c[k] / n[k]
        y = (h - h.mean(-1, keepdim=True)) / torch.sqrt(h.var(-1, unbiased=False, keepdim=True) + 1e-5)
        outputs.append(y.flatten() * (1 if mixer.norm.weight is None else 1 + mixer.norm.weight))
    return torch.stack(outputs)


@pytest.mark.parametrize("options", mixers["slstm"].law_cases(), ids=str)
def test_equals_the_paper_written_out(options):
    mixer = zoo.create_mixer("slstm", 16, **options).double()
    for p in mixer.parameters():
        p.data += 0.1 * torch.randn_like(p)
    x = torch.randn(2, 11, 16, dtype=torch.float64)
    y, _ = mixer(x)
    torch.testing.assert_close(y, torch.stack([plain(mixer, row) for row in x]))


def test_inits_are_the_published_ones():
    first, last = (zoo.create_mixer("slstm", 256, place=Place(layer=layer, n_layers=4)) for layer in (0, 3))
    biases = [mixer.bias.view(4, 4, 64) for mixer in (first, last)]
    for mixer, bias in zip((first, last), biases, strict=True):
        assert not mixer.recurrent.any()
        assert not bias[[0, 2, 3]].any()
        assert torch.equal(bias[1, :, 0], torch.full((4,), 5.0))
        torch.testing.assert_close(bias[1, :, -1], torch.full((4,), -7.0))
        assert abs(mixer.igate.weight.std() / (2 / (5 * 256)) ** 0.5 - 1) < 0.05
    assert biases[0][1, 0, 32] < -3 < 0 < biases[1][1, 0, 32]  # half way, the deepest layer forgets the slowest
    other = zoo.create_mixer("slstm", 64, forget_bias="linspace", recurrent_init="uniform")
    assert torch.equal(other.bias.view(4, 4, 16)[1, 2], torch.linspace(3, 6, 16))
    assert 0.1 < other.recurrent.abs().max() <= 1 / 8


def test_default_heads():
    heads = {16: 4, 18: 3, 34: 2, 66: 3, 130: 2, 256: 4}
    assert {d: zoo.create_mixer("slstm", d).n_heads for d in heads} == heads
    with pytest.raises(zoo.UsageError, match="n_heads=3 does not divide d_model=16"):
        zoo.create_mixer("slstm", 16, n_heads=3)


@pytest.mark.parametrize("scale", [1.0, 100.0, 1e4])
def test_huge_inputs_stay_finite(scale):
    mixer = zoo.create_mixer("slstm", 32)
    x = (scale * torch.randn(2, 50, 32)).requires_grad_()
    y, state = mixer(x)
    y.sum().backward()
    assert all(t.isfinite().all() for t in (y, *state, x.grad, *(p.grad for p in mixer.parameters())))
