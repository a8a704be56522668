"""The mLSTM layer against the papers: both blocks written out, inits, sizes, wrong options."""

import math

import pytest
import torch

import zoo
from zoo.protocol import Place, mixers


def blocks(layer, x):
    """A block-diagonal map, block by block."""
    parts = [w @ part for w, part in zip(layer.weight, x.view(len(layer.weight), -1), strict=True)]
    return torch.cat(parts) + (0 if layer.bias is None else layer.bias)


def normed(norm, h):
    y = torch.cat([(x - x.mean()) / torch.sqrt(x.var(unbiased=False) + norm.eps) for x in h])
    return y * (1 + norm.weight if norm.centred else norm.weight) + (0 if norm.bias is None else norm.bias)


class Cell:
    """The recurrence with its gates as they are, neither logarithms nor stabilised."""

    def __init__(self, n_heads, keys, values):
        self.H, self.K = n_heads, keys // n_heads
        self.C = torch.zeros(n_heads, self.K, values // n_heads, dtype=torch.float64)
        self.n = torch.zeros(n_heads, self.K, dtype=torch.float64)

    def step(self, q, k, v, i, f):
        q, k, v = (x.view(self.H, -1) for x in (q * self.K**-0.5, k, v))
        f, i = torch.sigmoid(f), torch.exp(i)
        self.C = f[:, None, None] * self.C + i[:, None, None] * k[:, :, None] * v[:, None, :]
        self.n = f[:, None] * self.n + i[:, None] * k
        return [self.C[h].T @ q[h] / (self.n[h] @ q[h]).abs().clamp(min=1) for h in range(self.H)]


def plain_v1(mixer, x):
    layer, c = mixer.layer, mixer.config
    width, cell, outputs = layer.widths[0], Cell(layer.n_heads, *layer.widths), []
    past = [x.new_zeros(width)] * c.conv_size
    for x_t in x:
        u, z = layer.proj_up(x_t).split(width)
        past = [*past[1:], u]
        a = sum(layer.conv.weight[:, w] * past[w] for w in range(c.conv_size)) + layer.conv.bias
        a = a * torch.sigmoid(a)
        q, k, v = blocks(layer.q_proj, a), blocks(layer.k_proj, a), blocks(layer.v_proj, u)
        qkv = torch.cat([q, k, v])
        h = normed(layer.outnorm, cell.step(q, k, v, layer.igate(qkv), layer.fgate(qkv)))
        outputs.append(layer.proj_down((h + layer.learnable_skip * a) * z * torch.sigmoid(z)))
    return torch.stack(outputs)


def plain_7b(mixer, x):
    layer, cap, outputs = mixer.layer, mixer.config.gate_cap, []
    cell = Cell(layer.n_heads, *layer.widths)
    for x_t in x:
        i, f = layer.igate_preact(x_t), layer.fgate_preact(x_t)
        if cap is not None:
            i, f = cap * torch.tanh(i / cap), cap * torch.tanh(f / cap)
        h = cell.step(layer.q(x_t), layer.k(x_t), layer.v(x_t), i, f)
        outputs.append(layer.out_proj(torch.sigmoid(layer.ogate_preact(x_t)) * normed(layer.multihead_norm, h)))
    return torch.stack(outputs)


@pytest.mark.parametrize("options", mixers["mlstm"].law_cases(), ids=str)
def test_equals_the_paper_written_out(options):
    mixer = zoo.create_mixer("mlstm", 16, **options).double()
    for p in mixer.parameters():
        p.data += 0.1 * torch.randn_like(p)
    x = torch.randn(2, 11, 16, dtype=torch.float64)
    y, _ = mixer(x)
    plain = plain_v1 if mixer.config.block == "v1" else plain_7b
    # the published eps of 1e-6 in the divisor is not in the paper's equations
    torch.testing.assert_close(y, torch.stack([plain(mixer, row) for row in x]), rtol=1e-4, atol=1e-5)


def test_inits_of_the_first_block():
    layer = zoo.create_mixer("mlstm", 256, place=Place(layer=1, n_layers=6)).layer
    small = math.sqrt(2 / (5 * 256))
    for part in (layer.proj_up, layer.q_proj, layer.k_proj, layer.v_proj):
        assert abs(part.weight.std() / small - 1) < 0.05
    assert abs(layer.proj_down.weight.std() / (2 / 6 / math.sqrt(256)) - 1) < 0.05
    assert torch.equal(layer.fgate.bias, torch.linspace(3, 6, 4))
    assert 0 < layer.igate.bias.abs().max() < 0.5
    assert not any(gate.weight.any() for gate in (layer.igate, layer.fgate))
    assert (layer.learnable_skip == 1).all()


def test_inits_of_the_7b_block():
    layer = zoo.create_mixer("mlstm", 256, block="7b", place=Place(layer=1, n_layers=6)).layer
    assert (layer.igate_preact.bias == -10).all()
    assert torch.equal(layer.fgate_preact.bias, torch.linspace(3, 6, 4))
    assert abs(layer.q.weight.std() / math.sqrt(2 / (5 * 256)) - 1) < 0.05
    assert zoo.create_mixer("mlstm", 64, block="7b", input_bias=0.5).layer.igate_preact.bias.eq(0.5).all()


def test_number_of_parameters_of_xlstm_7b():
    with torch.device("meta"):
        mixer = zoo.create_mixer("mlstm", 4096, block="7b", n_heads=8)
    q_and_k, v_gate_and_out = 2 * 4096 * 2048, 3 * 4096 * 4096
    assert sum(p.numel() for p in mixer.parameters()) == q_and_k + v_gate_and_out + 2 * (4096 * 8 + 8) + 4096
    assert mixer.state_bytes(1, 1, torch.bfloat16) == 4 * 8 * (256 * 512 + 256 + 1)


def test_default_sizes():
    inner = {16: 64, 18: 64, 34: 128, 66: 192, 128: 256}
    assert {d: zoo.create_mixer("mlstm", d).layer.widths[0] for d in inner} == inner
    heads = {16: 1, 18: 1, 130: 1, 128: 2, 256: 4}
    assert {d: zoo.create_mixer("mlstm", d, block="7b").layer.n_heads for d in heads} == heads


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block": "7b", "conv_size": 2}, "conv_size is an option of block='v1', not of block='7b'"),
        ({"gate_cap": None}, "gate_cap is an option of block='7b', not of block='v1'"),
        ({"n_heads": 3}, "n_heads=3 does not divide the inner width, 64"),
        ({"qkv_block": 5}, "qkv_block=5 does not divide the inner width, 64"),
        ({"block": "7b", "n_heads": 3}, "n_heads=3 does not divide the widths of k and v, 8 and 16"),
        ({"block": "7b", "qk_factor": 0.3}, r"qk_factor \* d_model = 0.3 \* 16 = 4.8 is not allowed"),
    ],
)
def test_wrong_options_say_what_is_wrong(options, message):
    with pytest.raises(zoo.UsageError, match=message):
        zoo.create_mixer("mlstm", 16, **options)
