"""Rotary positions for longer contexts: what each scaling does to the slowest and fastest turns, and its options."""

from __future__ import annotations

import math

import pytest
import torch

from zoo.core.errors import UsageError
from zoo.ops import RopeScaling, frequencies, rotary_table, yarn_amplitude
from zoo.pattern import create_mixer

KINDS = ["linear", "ntk", "yarn", "llama3"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [2, 4, 32, 64])
def test_slow_turns_are_slowed_down_and_fast_ones_kept(kind, width):
    plain = frequencies(width)
    scaled = frequencies(width, scaling=RopeScaling(kind, 4.0, context=512))
    ratio = plain / scaled
    assert (ratio >= 1 - 1e-12).all()
    assert (ratio <= 4 + 1e-12).all()
    assert (ratio.diff() >= -1e-12).all()  # the slower the turn, the more
    if width >= 32:
        assert ratio[-1].item() == pytest.approx(4)
        assert ratio[0].item() == pytest.approx(4 if kind == "linear" else 1)


def test_linear_is_slower_time():
    slow = rotary_table(torch.arange(40), 16, scaling=RopeScaling("linear", 4.0))
    for actual, expected in zip(slow, rotary_table(torch.arange(40) / 4, 16), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_factor_of_one_changes_nothing(kind):
    torch.testing.assert_close(frequencies(32, scaling=RopeScaling(kind, 1.0, context=512)), frequencies(32))


def test_llama3_by_its_definition():
    factor, context, low, high = 8.0, 8192, 1.0, 4.0
    for plain, scaled in zip(
        frequencies(128, 5e5), frequencies(128, 5e5, RopeScaling("llama3", factor, context)), strict=True
    ):
        wavelength = 2 * math.pi / plain.item()
        share = min(max((context / wavelength - low) / (high - low), 0), 1)
        assert scaled.item() == pytest.approx((1 - share) * plain.item() / factor + share * plain.item())


def test_yarn_sharpens_attention():
    cos, sin = rotary_table(torch.arange(5), 8, scaling=RopeScaling("yarn", 16.0))
    amplitude = 0.1 * math.log(16) + 1
    assert yarn_amplitude(16.0) == pytest.approx(amplitude)
    torch.testing.assert_close(cos.square() + sin.square(), torch.full_like(cos, amplitude**2))
    assert yarn_amplitude(0.5) == 1


@pytest.mark.parametrize("word", ["mha", "mqa", "gqa", "swa", "mla"])
def test_every_word_takes_it(word):
    plain, scaled = create_mixer(word, 32), create_mixer(f'{word}(rope_scaling="linear", rope_factor=2.0)', 32)
    scaled.load_state_dict(plain.state_dict())
    x = torch.randn(1, 20, 32)
    assert not torch.allclose(plain(x)[0], scaled(x)[0])
    with pytest.raises(UsageError, match=f"{word}: rope_context belongs to rope_scaling"):
        create_mixer(f"{word}(rope_context=512)", 32)
    with pytest.raises(UsageError, match=f"{word}: rope_bands=.1, 1. is not allowed"):
        create_mixer(f'{word}(rope_scaling="llama3", rope_bands=[1.0, 1.0])', 32)
