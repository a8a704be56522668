"""GPT-OSS whole."""

from __future__ import annotations

import pytest
import torch
from published import check, check_config, perturbed, refusal
from transformers import GptOssConfig, GptOssForCausalLM

import zoo

SIZES = {
    "hidden_size": 36,
    "intermediate_size": 22,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "num_local_experts": 7,
    "num_experts_per_tok": 3,
    "sliding_window": 6,
    "vocab_size": 61,
    "experts_implementation": "eager",  # their grouped matmul wants rows of 16 bytes
}
YARN = {
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "factor": 32.0,
    "original_max_position_embeddings": 4096,
    "rope_type": "yarn",
    "truncate": False,
}
FOUND = {
    "architectures": ["GptOssForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "eos_token_id": 200002,
    "experts_per_token": 3,
    "hidden_act": "silu",
    "initial_context_length": 4096,
    "initializer_range": 0.02,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "max_position_embeddings": 131072,
    "model_type": "gpt_oss",
    "output_router_logits": False,
    "pad_token_id": 11,
    "rms_norm_eps": 1e-05,
    "rope_scaling": YARN,
    "rope_theta": 150000,
    "router_aux_loss_coef": 0.9,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.55.0.dev0",
    "use_cache": True,
    **SIZES,
}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tie_word_embeddings": True, "attention_bias": False, "num_key_value_heads": 6, "rms_norm_eps": 1e-3},
        {"layer_types": ["full_attention"] * 2 + ["sliding_attention"], "num_experts_per_tok": 7},
        {"rope_parameters": {**YARN, "rope_theta": 500.0, "original_max_position_embeddings": 16}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    ],
)
def test_gpt_oss(options, tmp_path):
    check(perturbed(GptOssForCausalLM(GptOssConfig(**{**SIZES, **options}))), tmp_path)


def test_experts_beyond_their_clamps(tmp_path):
    theirs = perturbed(GptOssForCausalLM(GptOssConfig(**SIZES)))
    for layer in theirs.model.layers:
        layer.mlp.experts.gate_up_proj.data *= 20  # gates and inputs of a standard deviation of 12, clamped at 7
    check(theirs, tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rope_scaling": {**YARN, "original_max_position_embeddings": 16}, "rope_theta": 500.0},
        {"layer_types": None},
    ],
)
def test_configs_as_published(changes, tmp_path):
    check_config({**FOUND, **changes}, tmp_path)


@pytest.mark.parametrize("option", [{"swiglu_limit": 6.0}, {"swiglu_alpha": 1.0}, {"hidden_act": "gelu"}])
def test_options_that_are_refused(option):
    assert f"GptOssForCausalLM with {next(iter(option))}=" in refusal({**FOUND, **option})


@pytest.mark.parametrize(
    ("size", "published"),
    [("20b", 20_914_757_184), ("120b", 116_829_156_672)],
)
def test_sizes(size, published):
    with torch.device("meta"):
        assert zoo.create_model(f"gpt_oss-{size}").n_parameters() == published
