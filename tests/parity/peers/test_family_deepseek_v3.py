"""DeepSeek-V3 and Kimi K2 whole."""

from __future__ import annotations

import json
import re

import pytest
import torch
from published import check, perturbed, refusal
from safetensors.torch import load_file, save_file
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

import zoo
from zoo.interop.hf import CONFIG, WEIGHTS
from zoo.models.families import families

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
KIMI = {**YARN, "beta_fast": 1.0, "beta_slow": 1.0}


def model(**options):
    config = DeepseekV3Config(**{**SIZES, **options}, experts_implementation="eager")
    return perturbed(DeepseekV3ForCausalLM(config))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tie_word_embeddings": True, "attention_bias": True, "n_shared_experts": 2, "rope_interleave": False},
        {"q_lora_rank": None, "n_group": 1, "topk_group": 1, "norm_topk_prob": False, "first_k_dense_replace": 0},
        {"rope_parameters": YARN, "routed_scaling_factor": 1.3, "first_k_dense_replace": 3},
        {"rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.2}, "n_group": 2, "topk_group": 1},
        {"rope_parameters": {**YARN, "mscale": None, "mscale_all_dim": None}, "rms_norm_eps": 1e-3},
    ],
)
def test_deepseek_v3(options, tmp_path):
    check(model(**options), tmp_path)


def edit(folder, **changes):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **changes}))
    return {**config, **changes}


def test_kimi_k2(tmp_path):
    """Its configs name the class of DeepSeek-V3 and a model_type of their own, which transformers does not know."""
    theirs = model(rope_parameters=KIMI, n_group=1, topk_group=1, routed_scaling_factor=2.827)
    check(theirs, tmp_path)
    config = edit(tmp_path / "theirs", model_type="kimi_k2")
    assert families.of_config(config).name == "kimi_k2"
    ours, tokens = zoo.from_hf(tmp_path / "theirs"), torch.arange(20)[None]
    torch.testing.assert_close(ours(tokens)[0], theirs(tokens).logits, atol=1e-5, rtol=0)
    assert json.loads((zoo.to_hf(ours, tmp_path / "kimi") / CONFIG).read_text()) == config


def predicting(tmp_path, layer=3, marked=True):
    """A checkpoint folder that also holds a layer that predicts a token further on, and the model of the others."""
    theirs = model()
    theirs.save_pretrained(tmp_path)
    weights = load_file(tmp_path / WEIGHTS)
    extra = {n.replace("layers.2.", f"layers.{layer}."): w.clone() for n, w in weights.items() if ".layers.2." in n}
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(3)  # as in checkpoints of Kimi K2
    if marked:
        extra[f"model.layers.{layer}.eh_proj.weight"] = torch.ones(36, 72)
        extra[f"model.layers.{layer}.shared_head.norm.weight"] = torch.ones(36)
    save_file({**weights, **extra}, tmp_path / WEIGHTS, metadata={"format": "pt"})
    return theirs


def test_layers_that_predict_further_tokens_are_left_aside(tmp_path):
    theirs, tokens = predicting(tmp_path), torch.arange(20)[None]
    torch.testing.assert_close(zoo.from_hf(tmp_path)(tokens)[0], theirs(tokens).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("layer", "marked"), [(3, False), (4, True)])
def test_other_layers_are_not(tmp_path, layer, marked):
    predicting(tmp_path, layer, marked)
    with pytest.raises(zoo.UsageError, match=rf"weights are not expected: model\.layers\.{layer}\."):
        zoo.from_hf(tmp_path)


def test_a_layer_of_the_model_is_never_left_aside(tmp_path):
    predicting(tmp_path)
    edit(tmp_path, num_hidden_layers=2)
    with pytest.raises(zoo.UsageError, match=r"weights are not expected: model\.layers\.2\."):
        zoo.from_hf(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"q_lora_rank": None, "attention_bias": True}, "attention_bias=True needs q_lora_rank"),
        ({"topk_method": "greedy"}, "topk_method='greedy' is not supported, only 'noaux_tc'"),
        ({"scoring_func": "softmax"}, "scoring_func='softmax' is not supported, only 'sigmoid'"),
        ({"moe_layer_freq": 2}, "moe_layer_freq=2 is not supported, only 1"),
        ({"num_key_value_heads": 1}, "num_key_value_heads=1 is not supported, only 5"),
    ],
)
def test_refused(options, message):
    assert re.search(message, refusal({**SIZES, "architectures": ["DeepseekV3ForCausalLM"], **options}))
