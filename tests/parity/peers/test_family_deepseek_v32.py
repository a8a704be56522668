"""DeepSeek-V3.2 whole."""

from __future__ import annotations

import re

import pytest
from published import check, perturbed, refusal
from transformers import DeepseekV32Config, DeepseekV32ForCausalLM

SIZES = {
    "hidden_size": 36,
    "intermediate_size": 50,
    "moe_intermediate_size": 22,
    "num_hidden_layers": 3,
    "num_attention_heads": 5,
    "num_key_value_heads": 5,
    "q_lora_rank": 14,
    "kv_lora_rank": 11,
    "qk_nope_head_dim": 7,
    "qk_rope_head_dim": 6,
    "v_head_dim": 9,
    "n_routed_experts": 12,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "index_topk": 7,
    "index_n_heads": 12,
    "index_head_dim": 10,
    "vocab_size": 61,
    "max_position_embeddings": 128,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 500.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 8,
    "beta_slow": 0.5,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tie_word_embeddings": True, "attention_bias": True, "n_shared_experts": 2, "index_head_dim": 6},
        {"index_topk": 64, "n_group": 1, "topk_group": 1, "norm_topk_prob": False, "first_k_dense_replace": 0},
        {"rope_parameters": YARN, "routed_scaling_factor": 1.3, "first_k_dense_replace": 3, "index_topk": 3},
        {"rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.2}, "rms_norm_eps": 1e-3},
    ],
)
def test_deepseek_v32(options, tmp_path):
    config = DeepseekV32Config(**{**SIZES, **options}, experts_implementation="eager")
    check(perturbed(DeepseekV32ForCausalLM(config)), tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mlp_layer_types": ["dense", "sparse", "dense"]}, r"mlp_layer_types=\['dense', 'sparse', 'dense'\] is not"),
        ({"layer_types": ["full_attention"] * 3}, r"layer_types=.* is not supported"),
        ({"index_topk_freq": 4}, "index_topk_freq=4 is not supported"),
    ],
)
def test_refused(options, message):
    assert re.search(message, refusal({**SIZES, "architectures": ["DeepseekV32ForCausalLM"], **options}))
