"""Qwen3, dense, whole."""

from __future__ import annotations

import json

import pytest
import torch
from published import LOGITS, check, check_config, perturbed, refusal
from safetensors.torch import load_file
from transformers import Qwen3Config, Qwen3ForCausalLM

import zoo
from zoo.interop.hf import CONFIG, WEIGHTS

SIZES = {
    "hidden_size": 38,
    "intermediate_size": 50,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "vocab_size": 61,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
FOUND = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 40960,
    "max_window_layers": 36,
    "model_type": "qwen3",
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    **SIZES,
}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tie_word_embeddings": True, "attention_bias": True, "rms_norm_eps": 1e-3, "num_key_value_heads": 6},
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
        {"use_sliding_window": True, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"] * 2},
        {"rope_parameters": {**YARN, "rope_theta": 500.0}, "head_dim": 14},
    ],
)
def test_qwen3(options, tmp_path):
    options = {**SIZES, **options, "num_hidden_layers": len(options.get("layer_types", range(3)))}
    check(perturbed(Qwen3ForCausalLM(Qwen3Config(**options))), tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rope_scaling": YARN, "tie_word_embeddings": True},
        {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2},
        {"use_sliding_window": True, "max_window_layers": 2},
    ],
)
def test_configs_as_published(changes, tmp_path):
    check_config({**FOUND, **changes}, tmp_path)


def test_names_of_the_stack_alone(tmp_path):
    """As Qwen3-Embedding's checkpoints have them: without `model.`, and with the embedding for a head."""
    tied = {**FOUND, "tie_word_embeddings": True}
    theirs = perturbed(Qwen3ForCausalLM(Qwen3Config.from_dict(tied)))
    theirs.model.save_pretrained(tmp_path)
    assert "embed_tokens.weight" in load_file(tmp_path / WEIGHTS)
    (tmp_path / CONFIG).write_text(json.dumps(tied))
    tokens = torch.arange(20)[None]
    assert (zoo.from_hf(tmp_path)(tokens)[0] - theirs(tokens).logits).abs().max() < LOGITS
    (tmp_path / CONFIG).write_text(json.dumps(FOUND))
    with pytest.raises(zoo.UsageError, match=r"without its head: it lacks lm_head\.weight, which"):
        zoo.from_hf(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_types": ["sliding_attention"] * 3}, "with 'sliding_attention' layers needs a sliding_window"),
        ({"layer_types": ["full_attention"] * 2}, "has 3 layers, but layer_types tells of 2"),
        ({"layer_types": ["linear_attention"] * 3}, "with a layer of type 'linear_attention' is not supported"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "lacks 'factor'"),
        ({"rope_scaling": {**YARN, "long_factor": [1.0]}}, "long_factor of rope_type='yarn' is not supported"),
        ({"hidden_act": "gelu"}, "with hidden_act='gelu' is not supported"),
    ],
)
def test_configs_that_are_refused(changes, message):
    assert message in refusal({**FOUND, **changes})


@pytest.mark.parametrize(
    ("size", "published"),
    [
        ("0.6b", 596_049_920),
        ("1.7b", 1_720_574_976),
        ("4b", 4_022_468_096),
        ("8b", 8_190_735_360),
        ("14b", 14_768_307_200),
        ("32b", 32_762_123_264),
    ],
)
def test_sizes(size, published):
    with torch.device("meta"):
        assert zoo.create_model(f"qwen3-{size}").n_parameters() == published
