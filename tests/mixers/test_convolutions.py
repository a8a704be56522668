"""The short convolutions against torch's Conv1d."""

import pytest
import torch
import torch.nn.functional as F

import zoo


@pytest.mark.parametrize("word", ["short_conv", 'short_conv(conv_size=3, bias=True, activation="silu")'])
def test_short_conv_equals_conv1d(word):
    mixer = zoo.create_mixer(word, 16)
    weight, bias, W = mixer.conv.weight, mixer.conv.bias, mixer.config.conv_size
    x = torch.randn(2, 9, 16)
    y = F.conv1d(F.pad(x.mT, (W - 1, 0)), weight[:, None], bias, groups=16).mT
    y = F.silu(y) if mixer.config.activation else y
    torch.testing.assert_close(mixer(x)[0], y)
    assert weight.abs().max() <= W**-0.5


def test_gated_short_conv_equals_lfm2_written_out():
    mixer = zoo.create_mixer("gated_short_conv(bias=True)", 16)
    for p in mixer.parameters():
        p.data += 0.1 * torch.randn_like(p)
    x = torch.randn(2, 9, 16)
    b, c, u = mixer.in_proj(x).chunk(3, -1)
    convolved = F.conv1d(F.pad((b * u).mT, (2, 0)), mixer.conv.weight[:, None], mixer.conv.bias, groups=16).mT
    torch.testing.assert_close(mixer(x)[0], mixer.out_proj(c * convolved))


def test_sizes():
    """LFM2-1.2B: width 2048, three taps, no biases."""
    with torch.device("meta"):
        gated, short = zoo.create_mixer("gated_short_conv", 2048), zoo.create_mixer("short_conv", 2048)
    assert sum(p.numel() for p in gated.parameters()) == 4 * 2048**2 + 3 * 2048
    assert sum(p.numel() for p in short.parameters()) == 4 * 2048
