"""Gated DeltaNet against the layers of transformers' Qwen3-Next and OLMo Hybrid."""

from __future__ import annotations

import pytest
import torch
from cached_layers import agree, moved
from torch import Tensor
from transformers import OlmoHybridConfig, Qwen3NextConfig
from transformers.models.olmo_hybrid.modeling_olmo_hybrid import OlmoHybridGatedDeltaNet
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

import zoo

D = 32


def ungrouped(weight: Tensor, groups: int, parts: list[int]) -> list[Tensor]:
    """Rows that come group by group, in every group `parts` one after another, as one weight for each part."""
    return [part.flatten(0, 1) for part in weight.unflatten(0, (groups, -1)).split(parts, 1)]


@pytest.mark.parametrize(("groups", "heads"), [(2, 4), (3, 3)])
def test_qwen3_next(groups, heads):
    K, V, shared = 8, 16, heads // groups
    config = Qwen3NextConfig(
        hidden_size=D,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
        linear_num_key_heads=groups,
        linear_num_value_heads=heads,
        linear_key_head_dim=K,
        linear_value_head_dim=V,
    )
    theirs = moved(Qwen3NextGatedDeltaNet(config, 0))
    weights = theirs.state_dict()
    q, k, v, z = ungrouped(weights.pop("in_proj_qkvz.weight"), groups, [K, K, shared * V, shared * V])
    beta, a = ungrouped(weights.pop("in_proj_ba.weight"), groups, [shared, shared])
    weights["in_proj.weight"] = torch.cat([q, k, v, beta, a, z])
    weights["conv.weight"] = weights.pop("conv1d.weight").squeeze(1)
    word = f"gated_deltanet(n_heads={groups}, n_v_heads={heads}, head_dim={K}, norm_eps=1e-6)"
    mixer = zoo.create_mixer(word, D)
    mixer.load_state_dict(weights)
    agree(mixer, theirs, config)


@pytest.mark.parametrize("negative", [False, True])
def test_olmo_hybrid(negative):
    K, V, H = 8, 16, 3
    config = OlmoHybridConfig(
        hidden_size=D,
        num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"],
        linear_num_key_heads=H,
        linear_num_value_heads=H,
        linear_key_head_dim=K,
        linear_value_head_dim=V,
        linear_allow_neg_eigval=negative,
    )
    theirs = moved(OlmoHybridGatedDeltaNet(config, 0))
    weights = theirs.state_dict()
    projections = [weights.pop(f"{name}_proj.weight") for name in ("q", "k", "v", "b", "a", "g")]
    weights["in_proj.weight"] = torch.cat(projections)
    weights["conv.weight"] = weights.pop("conv1d.weight").squeeze(1)
    weights["norm.weight"] = weights.pop("o_norm.weight")
    weights["out_proj.weight"] = weights.pop("o_proj.weight")
    mixer = zoo.create_mixer(f"gated_deltanet(n_heads={H}, head_dim={K}, allow_neg_eigval={negative})", D)
    mixer.load_state_dict(weights)
    agree(mixer, theirs, config)
