"""GLM-5 whole, with an indexer in every layer and with shared ones."""

from __future__ import annotations

import pytest
import torch
from published import check, check_config, perturbed, refusal
from transformers import GlmMoeDsaConfig, GlmMoeDsaForCausalLM

import zoo

SIZES = {
    "hidden_size": 36,
    "intermediate_size": 50,
    "moe_intermediate_size": 22,
    "num_hidden_layers": 4,
    "num_attention_heads": 5,
    "num_key_value_heads": 5,
    "q_lora_rank": 14,
    "kv_lora_rank": 11,
    "qk_nope_head_dim": 7,
    "qk_rope_head_dim": 6,
    "v_head_dim": 9,
    "n_routed_experts": 12,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "index_topk": 7,
    "index_n_heads": 12,  # with few, scores of 0 are frequent, and of equal ones transformers takes any
    "index_head_dim": 10,
    "vocab_size": 61,
    "max_position_embeddings": 128,
    "experts_implementation": "eager",  # their grouped matmul wants rows of 16 bytes
}
SHARED = ["full", "full", "shared", "shared"]
FOUND = {  # every key of the config.json of GLM-5.2, but for the sizes
    "architectures": ["GlmMoeDsaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "dtype": "bfloat16",
    "eos_token_id": [1, 2],
    "ep_size": 1,
    "head_dim": 6,
    "hidden_act": "silu",
    "index_share_for_mtp_iteration": True,
    "index_skip_topk_offset": 2,
    "index_topk_freq": 4,
    "indexer_rope_interleave": True,
    "indexer_types": SHARED,
    "initializer_range": 0.02,
    "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
    "model_type": "glm_moe_dsa",
    "moe_layer_freq": 1,
    "moe_router_dtype": "float32",
    "n_group": 1,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_nextn_predict_layers": 1,
    "pad_token_id": 0,
    "pretraining_tp": 1,
    "qk_head_dim": 13,
    "rms_norm_eps": 1e-05,
    "rope_interleave": True,
    "rope_parameters": {"rope_theta": 8000000, "rope_type": "default"},
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "transformers_version": "5.0.2.dev0",
    "use_cache": True,
    **SIZES,
}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"indexer_types": SHARED},
        {"indexer_types": ["full", "shared", "full", "shared"], "index_topk": 3, "rms_norm_eps": 1e-3},
        {"tie_word_embeddings": True, "attention_bias": True, "n_shared_experts": 2, "first_k_dense_replace": 0},
        {
            "n_group": 4,
            "topk_group": 2,
            "index_topk": 64,
            "rope_parameters": {"rope_type": "default", "rope_theta": 50.0},
        },
    ],
)
def test_glm_dsa(options, tmp_path):
    check(perturbed(GlmMoeDsaForCausalLM(GlmMoeDsaConfig(**{**SIZES, **options}))), tmp_path)


@pytest.mark.parametrize(
    "changes", [{}, {"indexer_types": ...}, {"indexer_types": ..., "index_topk_pattern": "FSFS"}, {"head_dim": ...}]
)
def test_configs_as_published(changes, tmp_path):
    check_config({k: v for k, v in {**FOUND, **changes}.items() if v is not ...}, tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"indexer_rope_interleave": False}, "indexer_rope_interleave=False is not supported, only True"),
        ({"rope_interleave": False}, "rope_interleave=False is not supported, only True"),
        ({"indexer_types": ["shared"] * 4}, "a first layer that shares an indexer is not supported"),
        ({"indexer_types": ["full", "none"] * 2}, "a layer of type 'none' is not supported: 'full' or 'shared'"),
        ({"index_topk_pattern": "FS"}, "num_hidden_layers=4 is not supported, only 2"),
        ({"layer_types": ["full_attention"] * 4}, "layer_types="),
    ],
)
def test_refused(changes, message):
    assert message in refusal({**FOUND, **changes})


@pytest.mark.parametrize("size", ["5-744b", "5.2-744b"])
def test_sizes(size):
    """As many parameters as transformers' class of that config, and as are told of the published model."""
    with torch.device("meta"):
        ours = zoo.create_model(f"glm_dsa-{size}")
        theirs = GlmMoeDsaForCausalLM(GlmMoeDsaConfig(**ours.config.published))
    assert ours.n_parameters() == sum(p.numel() for p in theirs.parameters())
    assert ours.n_parameters() == pytest.approx(744e9, rel=0.01)
