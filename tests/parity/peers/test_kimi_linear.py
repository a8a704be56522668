"""Kimi Delta Attention against the layer of transformers' Kimi Linear."""

from __future__ import annotations

import pytest
import torch
from cached_layers import agree, moved
from transformers import KimiLinearConfig
from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearDeltaAttention

import zoo

D, K = 32, 8


@pytest.mark.parametrize("heads", [1, 4])
def test_kimi_linear(heads):
    config = KimiLinearConfig(
        hidden_size=D,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
        linear_head_dim=K,
        linear_num_heads=heads,
        linear_conv_kernel_dim=3,
    )
    theirs = moved(KimiLinearDeltaAttention(config, 0))
    weights = theirs.state_dict()
    projections = ["q_proj", "k_proj", "v_proj", "b_proj", "forget_gate.f_a_proj", "g_a_proj"]
    mixer = zoo.create_mixer(f"kda(n_heads={heads}, head_dim={K}, conv_size=3)", D)
    mixer.load_state_dict(
        {
            "in_proj.weight": torch.cat([weights[f"{name}.weight"] for name in projections]),
            "conv.weight": weights["conv1d.weight"].squeeze(1),
            "decay_up.weight": weights["forget_gate.f_b_proj.weight"],
            "A_log": weights["forget_gate.A_log"].flatten(),
            "dt_bias": weights["forget_gate.dt_bias"],
            "gate_up.weight": weights["g_b_proj.weight"],
            "norm.weight": weights["o_norm.weight"],
            "out_proj.weight": weights["o_proj.weight"],
        }
    )
    agree(mixer, theirs, config)
