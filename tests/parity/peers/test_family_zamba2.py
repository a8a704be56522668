"""Zamba2 whole."""

from __future__ import annotations

import pytest
from published import check, perturbed
from transformers import Zamba2Config, Zamba2ForCausalLM

KINDS = ["linear_attention", "hybrid", "linear_attention", "hybrid", "hybrid", "linear_attention"]
SIZES = {
    "hidden_size": 36,
    "intermediate_size": 22,
    "num_hidden_layers": 6,
    "layers_block_type": KINDS,
    "num_attention_heads": 3,
    "n_mamba_heads": 6,
    "mamba_d_state": 10,
    "adapter_rank": 5,
    "vocab_size": 61,
    "pad_token_id": None,
}


def theirs(**options):
    return perturbed(Zamba2ForCausalLM(Zamba2Config(**{**SIZES, **options})))


@pytest.mark.parametrize(
    "options",
    [
        {"num_mem_blocks": 2},
        {"num_mem_blocks": 1, "use_shared_attention_adapter": True, "use_mem_rope": True},
        {"num_mem_blocks": 2, "use_shared_attention_adapter": True, "mamba_ngroups": 3, "rms_norm_eps": 1e-3},
        {"num_mem_blocks": 3, "use_mem_rope": True, "tie_word_embeddings": False, "add_bias_linear": True},
        {"num_mem_blocks": 2, "time_step_min": 0.7, "mamba_expand": 3, "mamba_d_conv": 3, "num_key_value_heads": 1},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}, "use_mem_rope": True},
    ],
)
def test_zamba2(options, tmp_path):
    check(theirs(**options), tmp_path)
