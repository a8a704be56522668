"""Zamba2 whole."""

from __future__ import annotations

import pytest
import torch
from published import check, check_config, perturbed, refusal
from safetensors.torch import load_file, save_file
from transformers import Zamba2Config, Zamba2ForCausalLM

import zoo
from zoo.models.families import families

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


CONFIG = {  # every key of a config.json, but for the sizes
    "adapter_rank": 5,
    "add_bias_linear": False,
    "architectures": ["Zamba2ForCausalLM"],
    "attention_dropout": 0.0,
    "attention_head_dim": 24,
    "attention_hidden_size": 72,
    "bos_token_id": 1,
    "chunk_size": 256,
    "eos_token_id": 2,
    "hidden_act": "gelu",
    "hidden_size": 36,
    "hybrid_layer_ids": [1, 3, 4],
    "initializer_range": 0.02,
    "intermediate_size": 22,
    "kv_channels": 12,
    "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid", "hybrid", "mamba"],
    "mamba_d_conv": 4,
    "mamba_d_state": 10,
    "mamba_expand": 2,
    "mamba_headdim": 12,
    "mamba_ngroups": 1,
    "max_position_embeddings": 4096,
    "model_type": "zamba2",
    "n_mamba_heads": 6,
    "num_attention_heads": 3,
    "num_hidden_layers": 6,
    "num_key_value_heads": 3,
    "num_logits_to_keep": 1,
    "num_mem_blocks": 2,
    "num_query_groups": 3,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000,
    "time_step_floor": 0.0001,
    "time_step_limit": None,
    "time_step_max": 0.1,
    "time_step_min": 0.001,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.49.0.dev0",
    "use_cache": True,
    "use_conv_bias": True,
    "use_long_context": False,
    "use_mamba_kernels": True,
    "use_mem_eff_path": False,
    "use_mem_rope": False,
    "use_shared_attention_adapter": False,
    "vocab_size": 61,
}


@pytest.mark.parametrize("options", [{}, {"use_mem_rope": True, "use_shared_attention_adapter": True}])
def test_configs_as_they_are_found(options, tmp_path):
    check_config({**CONFIG, **options}, tmp_path)


@pytest.mark.parametrize("size", [size for size in families.registry["zamba2"].sizes if size != "tiny"])
def test_published_sizes_have_the_parameters_of_transformers(size):
    published = families.registry["zamba2"].sizes[size]
    with torch.device("meta"):
        expected, ours = Zamba2ForCausalLM(Zamba2Config(**published)), zoo.create_model(f"zamba2-{size}")
    assert ours.n_parameters() == expected.num_parameters()


def test_weights_under_the_names_of_later_uses_are_left_aside(tmp_path):
    """Some libraries write what is shared under all its names."""
    model = theirs(num_mem_blocks=2)
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    first, again = "model.layers.1.shared_transformer.", "model.layers.4.shared_transformer."
    more = {name.replace(first, again): tensor.clone() for name, tensor in weights.items() if name.startswith(first)}
    assert more
    save_file({**weights, **more}, file, metadata={"format": "pt"})
    tokens = torch.arange(20).view(2, 10)
    with torch.no_grad():
        assert torch.equal(zoo.from_hf(tmp_path)(tokens)[0], zoo.from_hf(model)(tokens)[0])


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"use_long_context": True}, "use_long_context=True"),
        ({"hidden_act": "silu"}, "hidden_act='silu'"),
        ({"layers_block_type": ["attention"] * 6}, "'attention'"),
        ({"hybrid_layer_ids": [1]}, "hybrid_layer_ids=[1]"),
        ({"num_mem_blocks": 0}, "num_mem_blocks"),
        ({"num_key_value_heads": 1, "use_shared_attention_adapter": True}, "num_key_value_heads=1"),
        ({"time_step_limit": [0.0, 1.0]}, "time_step_limit"),
        ({"use_shared_mlp_adapter": False}, "use_shared_mlp_adapter=False"),
    ],
)
def test_what_is_not_supported_is_named(options, told):
    assert told in refusal({**CONFIG, **options})
