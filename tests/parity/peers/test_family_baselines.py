"""The plain baselines whole: Llama 2, Mistral, Qwen2, SmolLM3, OLMo 3 and Gemma 2."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from published import check, check_config, perturbed, refusal

import zoo
from zoo.models.families import families

SIZES: dict[str, Any] = {
    "hidden_size": 36,
    "intermediate_size": 50,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 61,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
KINDS = ["full_attention", "sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
PLAIN = {"rope_type": "default", "rope_theta": 50.0}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("Mistral", {"sliding_window": 7, "head_dim": 10}),
    "qwen2": ("Qwen2", {}),
    "smollm3": ("SmolLM3", {}),
    "olmo3": ("Olmo3", {"sliding_window": 7}),
    "gemma2": ("Gemma2", {"sliding_window": 7, "head_dim": 10, "query_pre_attn_scalar": 9}),
}


def config_of(name: str, **options: Any) -> Any:
    kind, more = MODELS[name]
    return getattr(transformers, f"{kind}Config")(**{**SIZES, **more, **options})


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mistral", {}),
        ("mistral", {"sliding_window": None, "rope_parameters": PLAIN, "tie_word_embeddings": True}),
        ("mistral", {"head_dim": None, "rms_norm_eps": 1e-3, "rope_parameters": {**YARN, "rope_theta": 500.0}}),
        ("qwen2", {}),
        ("qwen2", {"tie_word_embeddings": True, "rms_norm_eps": 1e-3, "num_key_value_heads": 6}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 1, "layer_types": KINDS, "rope_parameters": PLAIN}),
        ("smollm3", {}),
        ("smollm3", {"no_rope_layers": [0, 1, 1, 0, 1], "attention_bias": True, "tie_word_embeddings": False}),
        ("smollm3", {"no_rope_layer_interval": 2, "mlp_bias": True, "rope_parameters": PLAIN, "rms_norm_eps": 1e-3}),
        ("smollm3", {"use_sliding_window": True, "sliding_window": 7, "num_key_value_heads": 6}),
        ("olmo3", {}),
        ("olmo3", {"num_key_value_heads": None, "attention_bias": True, "tie_word_embeddings": True}),
        ("olmo3", {"layer_types": KINDS, "rms_norm_eps": 1e-3}),
        (
            "olmo3",
            {
                "rope_parameters": {"full_attention": {**YARN, "rope_theta": 500.0}, "sliding_attention": PLAIN},
                "max_position_embeddings": 64,
            },
        ),
        ("gemma2", {}),
        ("gemma2", {"attn_logit_softcapping": 0.5, "final_logit_softcapping": 2.0, "attention_bias": True}),
        ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None, "tie_word_embeddings": False}),
        ("gemma2", {"layer_types": KINDS, "rope_parameters": PLAIN, "rms_norm_eps": 1e-3, "num_key_value_heads": 6}),
    ],
)
def test_whole(name, options, tmp_path):
    """Logits in one pass, in chunks and token by token, gradients, and every weight there and back."""
    made = getattr(transformers, f"{MODELS[name][0]}ForCausalLM")
    eager = {"attn_implementation": "eager"}  # their other forms do not cap scores
    check(perturbed(made(config_of(name, **eager, **options))), tmp_path)


FOUND: dict[str, dict[str, Any]] = {  # every key of a config.json, as they are found, but for the sizes
    "mistral": {
        "architectures": ["MistralForCausalLM"],
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_position_embeddings": 32768,
        "model_type": "mistral",
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "sliding_window": 6,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.34.0.dev0",
        "use_cache": True,
    },
    "qwen2": {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_position_embeddings": 32768,
        "max_window_layers": 2,
        "model_type": "qwen2",
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 4,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.43.1",
        "use_cache": True,
        "use_mrope": False,
        "use_sliding_window": False,
    },
    "smollm3": {
        "architectures": ["SmolLM3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "layer_types": ["full_attention"] * 5,
        "max_position_embeddings": 65536,
        "max_window_layers": 28,
        "mlp_bias": False,
        "model_type": "smollm3",
        "no_rope_layer_interval": 4,
        "no_rope_layers": [1, 1, 1, 0, 1],
        "pretraining_tp": 2,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 5000000.0,
        "sliding_window": None,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.54.0.dev0",
        "use_cache": False,
        "use_sliding_window": False,
    },
    "olmo3": {
        "architectures": ["Olmo3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "layer_types": ["sliding_attention"] * 3 + ["full_attention", "sliding_attention"],
        "max_position_embeddings": 65536,
        "model_type": "olmo3",
        "rms_norm_eps": 1e-06,
        "rope_scaling": {
            "attention_factor": 1.2079441541679836,
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": 8.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "yarn",
        },
        "rope_theta": 500000,
        "sliding_window": 6,
        "tie_word_embeddings": False,
        "transformers_version": "4.57.0",
        "use_cache": False,
    },
    "gemma2": {
        "architectures": ["Gemma2ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_logit_softcapping": 50.0,
        "cache_implementation": "hybrid",
        "final_logit_softcapping": 30.0,
        "head_dim": 10,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "initializer_range": 0.02,
        "max_position_embeddings": 8192,
        "model_type": "gemma2",
        "query_pre_attn_scalar": 10,
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0,
        "sliding_window": 6,
        "sliding_window_size": 6,
        "torch_dtype": "float32",
        "transformers_version": "4.42.0.dev0",
        "use_cache": True,
    },
}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        *((name, {}) for name in FOUND),
        ("mistral", {"sliding_window": None, "rope_theta": 1000000.0, "head_dim": 8}),
        ("mistral", {"sliding_window": ..., "rope_theta": ...}),
        ("qwen2", {"use_sliding_window": True, "rope_theta": ..., "tie_word_embeddings": ...}),
        ("smollm3", {"no_rope_layers": ..., "layer_types": ..., "rope_theta": ..., "tie_word_embeddings": False}),
        ("olmo3", {"layer_types": ..., "rope_scaling": ..., "rope_theta": ..., "rms_norm_eps": ...}),
        ("gemma2", {"attn_logit_softcapping": None, "hidden_activation": ..., "rope_theta": 50.0}),
    ],
)
def test_configs_as_published(name, changes, tmp_path):
    config = {**SIZES, **FOUND[name], **changes}
    check_config({k: v for k, v in config.items() if v is not ...}, tmp_path, attention="eager")


def test_llama2_is_read_as_llama3(tmp_path):
    """Its configs name the same class."""
    ours = zoo.create_model("llama2-tiny")
    assert families.of_config(ours.config.published).name == "llama3"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(zoo.to_hf(ours, tmp_path / "model"))
    tokens = torch.arange(30)[None]
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens)[0], theirs(tokens).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("mistral", {"attention_bias": True}, "attention_bias=True is not supported, only False"),
        ("mistral", {"layer_types": KINDS}, "layer_types="),
        ("mistral", {"hidden_act": "gelu"}, "hidden_act='gelu' is not supported, only 'silu'"),
        ("qwen2", {"attention_bias": False}, "attention_bias=False is not supported"),
        ("qwen2", {"use_mrope": True}, "use_mrope=True is not supported"),
        ("qwen2", {"layer_types": KINDS}, "needs a sliding_window"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers is no list of 0 or 1 for each of 5 layers"),
        ("smollm3", {"no_rope_layers": [1, 0, 1, 2, 1]}, "no_rope_layers is no list of 0 or 1 for each of 5 layers"),
        ("smollm3", {"no_rope_layers": ..., "no_rope_layer_interval": 0}, "no_rope_layer_interval is no whole number"),
        ("smollm3", {"layer_types": KINDS}, "needs a sliding_window"),
        ("olmo3", {"layer_types": KINDS[:3]}, "has 5 layers, but layer_types tells of 3"),
        ("olmo3", {"sliding_window": None}, "needs a sliding_window"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True is not supported"),
        ("gemma2", {"hidden_activation": "gelu"}, "hidden_activation='gelu' is not supported"),
    ],
)
def test_refused(name, changes, message):
    assert message in refusal({k: v for k, v in {**SIZES, **FOUND[name], **changes}.items() if v is not ...})


PUBLISHED = {
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "mistral-7b": 7_241_732_096,
    "mistral-7b-v0.3": 7_248_023_552,
    "mistral-nemo-12b": 12_247_782_400,
    "mistral-small-24b": 23_572_403_200,
    "qwen2-0.5b": 494_032_768,
    "qwen2-1.5b": 1_543_714_304,
    "qwen2-3b": 3_085_938_688,
    "qwen2-7b": 7_615_616_512,
    "qwen2-14b": 14_770_033_664,
    "qwen2-32b": 32_763_876_352,
    "qwen2-72b": 72_706_203_648,
    "smollm3-3b": 3_075_098_624,
    "olmo3-7b": 7_298_011_136,
    "olmo3-32b": 32_233_522_176,
    "gemma2-2b": 2_614_341_888,
    "gemma2-9b": 9_241_705_984,
    "gemma2-27b": 27_227_128_320,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes(name):
    """As many parameters as the published checkpoint has, and as transformers' class of that config."""
    with torch.device("meta"):
        ours = zoo.create_model(name)
        config = transformers.AutoConfig.for_model(**ours.config.published)
        theirs = transformers.AutoModelForCausalLM.from_config(config)
    assert ours.n_parameters() == PUBLISHED[name] == sum(p.numel() for p in theirs.parameters())
