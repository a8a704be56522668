"""Mamba-2 against the layer of transformers."""

from __future__ import annotations

import pytest
from cached_layers import agree, moved
from transformers import Mamba2Config
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

import zoo


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({}, ""),
        ({"n_groups": 4}, ", n_groups=4"),
        ({"use_bias": True, "use_conv_bias": False, "conv_kernel": 3}, ", bias=True, conv_bias=False, conv_size=3"),
        ({"time_step_limit": (0.0, 0.3)}, ", dt_limit=[0.0, 0.3]"),
    ],
)
def test_mamba2(options, word):
    sizes = {"hidden_size": 32, "num_heads": 8, "head_dim": 8, "state_size": 16, "n_groups": 2, "expand": 2}
    config = Mamba2Config(num_hidden_layers=1, chunk_size=32, **(sizes | options))
    theirs = moved(Mamba2Mixer(config, 0))
    weights = theirs.state_dict()
    weights["conv.weight"] = weights.pop("conv1d.weight").squeeze(1)
    if "conv1d.bias" in weights:
        weights["conv.bias"] = weights.pop("conv1d.bias")
    groups = "" if "n_groups" in word else ", n_groups=2"
    mixer = zoo.create_mixer(f"mamba2(head_dim=8, d_state=16{groups}{word})", 32)
    mixer.load_state_dict(weights)
    agree(mixer, theirs, config, decoded=0 if "time_step_limit" in options else 5)  # their single step knows no limit
