"""Mistral (Jiang et al. 2023, arXiv 2310.06825): Llama's layer, in version 0.1 over a sliding window, later without."""

from __future__ import annotations

from typing import Any

from zoo.models.families.llama3 import weights
from zoo.models.families.qwen3 import stack_options
from zoo.models.published.config import Published, attention_word, word
from zoo.models.published.family import Family, families

DEFAULTS: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
}


def _options(p: Published) -> dict[str, Any]:
    p.only("attention_bias", False)
    p.only("mlp_bias", False)
    attention = attention_word(p, p("sliding_window", None), **p.rope())
    return stack_options(p, [attention, word("swiglu", d_hidden=p("intermediate_size"))] * p("num_hidden_layers"))


SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 256,
        "sliding_window": 16,
        "rms_norm_eps": 1e-5,
    },
    "7b": {"max_position_embeddings": 32768, "rms_norm_eps": 1e-5},
    "7b-v0.3": {
        "vocab_size": 32768,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000.0,
        "sliding_window": None,
    },
    "nemo-12b": {
        "vocab_size": 131072,
        "hidden_size": 5120,
        "num_hidden_layers": 40,
        "head_dim": 128,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000.0,
        "sliding_window": None,
    },
}
SIZES["small-24b"] = {
    **SIZES["nemo-12b"],
    "intermediate_size": 32768,
    "max_position_embeddings": 32768,
    "rope_theta": 100000000.0,
}

families.add(Family("mistral", "MistralForCausalLM", "mistral", SIZES, _options, weights, DEFAULTS))
