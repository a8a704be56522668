"""Qwen3.5, dense, whole: the text model, and the text part of a model that sees too."""

from __future__ import annotations

import json

import pytest
import torch
from published import LOGITS, check, check_config, perturbed, refusal
from safetensors.torch import load_file, save_file
from transformers import Qwen3_5Config, Qwen3_5ForCausalLM, Qwen3_5ForConditionalGeneration, Qwen3_5TextConfig

import zoo
from zoo.interop.hf import CONFIG, WEIGHTS

SIZES = {
    "hidden_size": 36,
    "intermediate_size": 50,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "linear_num_key_heads": 3,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 6,
    "vocab_size": 61,
}
ROPE = {
    "mrope_interleaved": True,
    "mrope_section": [1, 1, 0],
    "partial_rotary_factor": 0.25,
    "rope_theta": 10000000,
    "rope_type": "default",
}
KINDS = ["linear_attention", "full_attention", "linear_attention", "linear_attention", "full_attention"]
FOUND = {  # the text_config of a published config.json, but for the sizes
    "architectures": ["Qwen3_5ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_output_gate": True,
    "dtype": "bfloat16",
    "eos_token_id": 2,
    "full_attention_interval": 4,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "layer_types": KINDS,
    "linear_conv_kernel_dim": 4,
    "mamba_ssm_dtype": "float32",
    "max_position_embeddings": 262144,
    "mlp_only_layers": [],
    "model_type": "qwen3_5_text",
    "mtp_num_hidden_layers": 1,
    "mtp_use_dedicated_embeddings": False,
    "rms_norm_eps": 1e-06,
    "rope_parameters": ROPE,
    "tie_word_embeddings": True,
    "use_cache": True,
    **SIZES,
}
VISION = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 36}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tie_word_embeddings": True, "attention_bias": True, "rms_norm_eps": 1e-3, "layer_types": KINDS},
        {"linear_num_value_heads": 3, "linear_conv_kernel_dim": 3, "rope_parameters": {**ROPE, "rope_theta": 50.0}},
        {"rope_parameters": {**ROPE, "partial_rotary_factor": 0.5, "rope_theta": 50.0}, "num_key_value_heads": 6},
    ],
)
def test_qwen3_5(options, tmp_path):
    check(perturbed(Qwen3_5ForCausalLM(Qwen3_5TextConfig(**{**SIZES, **options}))), tmp_path)


@pytest.mark.parametrize("changes", [{}, {"layer_types": ..., "full_attention_interval": 2}, {"rope_parameters": ...}])
def test_configs_as_published(changes, tmp_path):
    check_config({k: v for k, v in {**FOUND, **changes}.items() if v is not ...}, tmp_path)


@pytest.mark.parametrize("tied", [True, False])
def test_the_text_part_of_a_model_that_sees(tied, tmp_path):
    config = Qwen3_5Config(text_config={**SIZES, "layer_types": KINDS}, vision_config=VISION, tie_word_embeddings=tied)
    config.text_config.tie_word_embeddings = tied
    theirs = perturbed(Qwen3_5ForConditionalGeneration(config))
    theirs.save_pretrained(tmp_path / "seeing")
    weights = load_file(tmp_path / "seeing" / WEIGHTS)
    save_file({**weights, "mtp.fc.weight": torch.ones(3)}, tmp_path / "seeing" / WEIGHTS, metadata={"format": "pt"})
    ours = zoo.from_hf(tmp_path / "seeing")
    tokens = torch.randint(61, (2, 37), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(tokens, use_cache=False).logits
        assert (ours(tokens)[0] - expected).abs().max() < LOGITS
        zoo.to_hf(ours, tmp_path / "text")
        assert json.loads((tmp_path / "text" / CONFIG).read_text())["architectures"] == ["Qwen3_5ForCausalLM"]
        alone, told = Qwen3_5ForCausalLM.from_pretrained(tmp_path / "text", output_loading_info=True)
        assert not told["missing_keys"]
        assert not told["unexpected_keys"]
        assert (alone(tokens, use_cache=False).logits - expected).abs().max() < LOGITS
        for source in (theirs, tmp_path / "text"):
            again = zoo.from_hf(source).state_dict()
            assert all(torch.equal(t, again[n]) for n, t in ours.state_dict().items())


def test_refused():
    seeing = {"architectures": ["Qwen3_5ForConditionalGeneration"], "model_type": "qwen3_5"}
    assert "lacks 'text_config'" in refusal(seeing)
    assert "attn_output_gate=False is not supported" in refusal({**seeing, "text_config": {"attn_output_gate": False}})
    assert "num_experts=4 is not supported, only 0" in refusal({**FOUND, "num_experts": 4})


@pytest.mark.parametrize("size", ["0.8b", "9b"])
def test_sizes(size):
    """As many parameters as transformers' class of that config."""
    with torch.device("meta"):
        ours = zoo.create_model(f"qwen3_5-{size}")
        theirs = Qwen3_5ForCausalLM(Qwen3_5TextConfig(**ours.config.published))
    assert ours.n_parameters() == sum(p.numel() for p in theirs.parameters())
    assert abs(ours.n_parameters() / {"0.8b": 0.75e9, "9b": 8.95e9}[size] - 1) < 0.01
