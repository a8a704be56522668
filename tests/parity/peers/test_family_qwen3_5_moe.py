"""Qwen3.5 with experts, whole: the text model, and the text part of a model that sees too."""

from __future__ import annotations

import json

import pytest
import torch
from published import LOGITS, check, check_config, perturbed, refusal
from safetensors.torch import save_file
from transformers import (
    Qwen3_5MoeConfig,
    Qwen3_5MoeForCausalLM,
    Qwen3_5MoeForConditionalGeneration,
    Qwen3_5MoeTextConfig,
)

import zoo
from zoo.interop.hf import CONFIG, WEIGHTS

SIZES = {
    "hidden_size": 36,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "linear_num_key_heads": 3,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 6,
    "moe_intermediate_size": 22,
    "shared_expert_intermediate_size": 14,
    "num_experts": 7,
    "num_experts_per_tok": 3,
    "vocab_size": 61,
    "experts_implementation": "eager",  # their grouped matmul wants rows of 16 bytes
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
    "architectures": ["Qwen3_5MoeForCausalLM"],
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
    "model_type": "qwen3_5_moe_text",
    "mtp_num_hidden_layers": 1,
    "mtp_use_dedicated_embeddings": False,
    "output_router_logits": False,
    "partial_rotary_factor": 0.25,
    "rms_norm_eps": 1e-06,
    "rope_parameters": ROPE,
    "router_aux_loss_coef": 0.001,
    "tie_word_embeddings": False,
    "use_cache": True,
    **SIZES,
}
VISION = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 36}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tie_word_embeddings": True, "attention_bias": True, "rms_norm_eps": 1e-3, "layer_types": KINDS},
        {"rope_parameters": {**ROPE, "partial_rotary_factor": 0.5, "rope_theta": 50.0}, "num_experts_per_tok": 2},
    ],
)
def test_qwen3_5_moe(options, tmp_path):
    check(perturbed(Qwen3_5MoeForCausalLM(Qwen3_5MoeTextConfig(**{**SIZES, **options}))), tmp_path)


@pytest.mark.parametrize("changes", [{}, {"layer_types": ..., "full_attention_interval": 2}])
def test_configs_as_published(changes, tmp_path):
    check_config({k: v for k, v in {**FOUND, **changes}.items() if v is not ...}, tmp_path)


@pytest.mark.parametrize("tied", [True, False])
def test_the_text_part_of_a_model_that_sees(tied, tmp_path):
    """Published checkpoints hold all experts of a layer in two tensors, as transformers does in memory."""
    text = {**SIZES, "layer_types": KINDS, "tie_word_embeddings": tied}
    config = Qwen3_5MoeConfig(text_config=text, vision_config=VISION, tie_word_embeddings=tied)
    theirs = perturbed(Qwen3_5MoeForConditionalGeneration(config))
    theirs.config._experts_implementation = theirs.config.text_config._experts_implementation = "eager"
    theirs.save_pretrained(tmp_path / "seeing")
    held = {n: t.clone() for n, t in theirs.state_dict().items() if not (tied and n.startswith("lm_head"))}
    assert held["model.language_model.layers.0.mlp.experts.gate_up_proj"].shape == (7, 44, 36)
    save_file({**held, "mtp.fc.weight": torch.ones(3)}, tmp_path / "seeing" / WEIGHTS, metadata={"format": "pt"})
    ours = zoo.from_hf(tmp_path / "seeing")
    tokens = torch.randint(61, (2, 37), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(tokens, use_cache=False).logits
        assert (ours(tokens)[0] - expected).abs().max() < LOGITS
        zoo.to_hf(ours, tmp_path / "text")
        assert json.loads((tmp_path / "text" / CONFIG).read_text())["architectures"] == ["Qwen3_5MoeForCausalLM"]
        alone, told = Qwen3_5MoeForCausalLM.from_pretrained(
            tmp_path / "text", output_loading_info=True, experts_implementation="eager"
        )
        assert not told["missing_keys"]
        assert not told["unexpected_keys"]
        assert (alone(tokens, use_cache=False).logits - expected).abs().max() < LOGITS
        for source in (theirs, tmp_path / "text"):
            again = zoo.from_hf(source).state_dict()
            assert all(torch.equal(t, again[n]) for n, t in ours.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm_topk_prob": False}, "norm_topk_prob=False is not supported, only True"),
        ({"mlp_only_layers": [1]}, "mlp_only_layers=[1] is not supported, only []"),
        ({"decoder_sparse_step": 2}, "decoder_sparse_step=2 is not supported, only 1"),
        ({"num_experts": 0}, "num_experts is no whole number from 1"),
        ({"attn_output_gate": False}, "attn_output_gate=False is not supported, only True"),
    ],
)
def test_refused(changes, message):
    assert message in refusal({**FOUND, **changes})


@pytest.mark.parametrize(("size", "told"), [("35b-a3b", 34.66e9), ("397b-a17b", 397e9)])
def test_sizes(size, told):
    """As many parameters as transformers' class of that config, and as are told of the published model."""
    with torch.device("meta"):
        ours = zoo.create_model(f"qwen3_5_moe-{size}")
        theirs = Qwen3_5MoeForCausalLM(Qwen3_5MoeTextConfig(**ours.config.published))
    assert ours.n_parameters() == sum(p.numel() for p in theirs.parameters())
    assert ours.n_parameters() == pytest.approx(told, rel=0.01)
