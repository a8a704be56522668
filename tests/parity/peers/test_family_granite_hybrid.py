"""Bamba and Granite 4.0 H whole."""

from __future__ import annotations

import math

import pytest
import torch
from published import check, check_config, perturbed, refusal
from transformers import (
    AutoModelForCausalLM,
    BambaConfig,
    BambaForCausalLM,
    GraniteMoeHybridConfig,
    GraniteMoeHybridForCausalLM,
)

import zoo
from zoo.models.families import families

SIZES = {
    "hidden_size": 36,
    "intermediate_size": 22,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "mamba_n_heads": 6,
    "mamba_d_state": 10,
    "vocab_size": 61,
}
KINDS = ["linear_attention", "full_attention", "linear_attention", "full_attention"]
FACTORS = {
    "embedding_multiplier": 3.0,
    "logits_scaling": 0.5,
    "residual_multiplier": 0.7,
    "attention_multiplier": 0.3,
    "layer_types": KINDS,
    "experts_implementation": "eager",
}


@pytest.mark.parametrize(
    "options",
    [
        {"attn_layer_indices": [1, 3]},
        {"attn_layer_indices": [0], "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
        {"mamba_n_groups": 3, "mamba_proj_bias": True, "mamba_conv_bias": False, "rms_norm_eps": 1e-3},
        {"attn_layer_indices": [1], "time_step_limit": (0.7, math.inf), "mamba_expand": 3, "mamba_d_conv": 3},
        {"attn_layer_indices": [1], "rope_parameters": {"rope_type": "default", "rope_theta": 50.0}},
    ],
)
def test_bamba(options, tmp_path):
    check(perturbed(BambaForCausalLM(BambaConfig(**{**SIZES, "pad_token_id": None, **options}))), tmp_path)


@pytest.mark.parametrize(
    "options",
    [
        {"num_local_experts": 5, "num_experts_per_tok": 3, "shared_intermediate_size": 14},
        {"num_local_experts": 0, "shared_intermediate_size": 50, "tie_word_embeddings": True},
        {"num_local_experts": 4, "position_embedding_type": "rope", "attention_bias": True, "mamba_n_groups": 3},
        {"num_local_experts": 0, "mamba_proj_bias": True, "mamba_conv_bias": False, "rms_norm_eps": 1e-3},
    ],
)
def test_granite_hybrid(options, tmp_path):
    config = GraniteMoeHybridConfig(**{**SIZES, **FACTORS, "shared_intermediate_size": 14, **options})
    check(perturbed(GraniteMoeHybridForCausalLM(config)), tmp_path)


BAMBA = {  # every key of a config.json, but for the sizes
    "architectures": ["BambaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_layer_indices": [1, 3],
    "attn_rotary_emb": 6,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "mamba_chunk_size": 256,
    "mamba_conv_bias": True,
    "mamba_d_conv": 4,
    "mamba_d_head": 12,
    "mamba_expand": 2,
    "mamba_n_groups": 1,
    "mamba_proj_bias": False,
    "max_position_embeddings": 262144,
    "mlp_bias": False,
    "model_type": "bamba",
    "num_logits_to_keep": 1,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.48.0.dev0",
    "use_cache": True,
    **SIZES,
}
GRANITE = {
    "architectures": ["GraniteMoeHybridForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attention_multiplier": 0.015625,
    "bos_token_id": 1,
    "embedding_multiplier": 12,
    "eos_token_id": 2,
    "experts_implementation": "eager",  # their grouped matmul wants rows of 16 bytes
    "hidden_act": "silu",
    "initializer_range": 0.1,
    "layer_types": ["mamba", "attention", "mamba", "attention"],
    "logits_scaling": 8,
    "mamba_chunk_size": 256,
    "mamba_conv_bias": True,
    "mamba_d_conv": 4,
    "mamba_d_head": 12,
    "mamba_expand": 2,
    "mamba_n_groups": 1,
    "mamba_proj_bias": False,
    "max_position_embeddings": 131072,
    "model_type": "granitemoehybrid",
    "normalization_function": "rmsnorm",
    "num_experts_per_tok": 2,
    "num_local_experts": 5,
    "output_router_logits": False,
    "pad_token_id": 0,
    "position_embedding_type": "nope",
    "residual_multiplier": 0.22,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000,
    "router_aux_loss_coef": 0.01,
    "shared_intermediate_size": 14,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.56.0",
    "use_cache": True,
    **SIZES,
}


@pytest.mark.parametrize(
    "config",
    [
        BAMBA,
        {**BAMBA, "attn_layer_indices": [0], "mamba_d_head": "auto", "rope_theta": 50.0},
        GRANITE,
        {**GRANITE, "num_local_experts": 0, "num_experts_per_tok": 0, "position_embedding_type": "rope"},
    ],
)
def test_configs_as_published(config, tmp_path):
    check_config(config, tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**BAMBA, "mamba_d_head": 13}, "mamba_d_head=13 is not supported, only 'auto' or 12"),
        ({**BAMBA, "attn_rotary_emb": 12}, "attn_rotary_emb=12 is not supported, only 6"),
        ({**BAMBA, "partial_rotary_factor": 1.0}, "partial_rotary_factor=1.0 is not supported, only 0.5"),
        ({**GRANITE, "position_embedding_type": "alibi"}, "position_embedding_type='alibi' is not supported"),
        ({**GRANITE, "layer_types": ["mamba", "conv"] * 2}, "a layer of type 'conv' is not supported"),
        ({**GRANITE, "normalization_function": "layernorm"}, "normalization_function='layernorm' is not supported"),
    ],
)
def test_refused(config, message):
    assert message in refusal(config)


@pytest.mark.parametrize(
    ("name", "told"),
    [("bamba-9b", 9.78e9), ("granite_hybrid-micro", 3.19e9), ("granite_hybrid-7b-a1b", 6.94e9)],
)
def test_sizes(name, told):
    """As many parameters as transformers' class of that config, and as are told of the published model."""
    with torch.device("meta"):
        ours = zoo.create_model(name)
        config = {"bamba": BambaConfig, "granite_hybrid": GraniteMoeHybridConfig}[families.of(name)[0].name]
        theirs = AutoModelForCausalLM.from_config(config(**ours.config.published))
    assert ours.n_parameters() == sum(p.numel() for p in theirs.parameters())
    assert ours.n_parameters() == pytest.approx(told, rel=0.01)
