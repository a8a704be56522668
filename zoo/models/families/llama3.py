"""Llama 3 (Grattafiori et al. 2024, arXiv 2407.21783): grouped-query attention and SwiGLU, normed before each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from zoo.models.published.config import Published, attention_word, stack, word
from zoo.models.published.family import Family, families
from zoo.models.published.layers import attention_maps, glu_maps, step_maps, token_maps
from zoo.models.published.maps import Map


def options(p: Published) -> dict[str, Any]:
    """The options of a Llama."""
    p.only("hidden_act", "silu")
    attention = attention_word(
        p,
        bias=p("attention_bias", False),
        **p.rope(context=2048),
    )
    layer = [attention, word("swiglu", d_hidden=p("intermediate_size"), bias=p("mlp_bias", False))]
    return {
        "pattern": stack(layer * p("num_hidden_layers")),
        "d_model": p("hidden_size"),
        "vocab_size": p("vocab_size"),
        "norm_eps": p.number("rms_norm_eps", 1e-6),
        "tie_embeddings": p("tie_word_embeddings", False),
    }


def weights(p: Published, *, bias: bool | None = None, out_bias: bool | None = None) -> Iterator[Map]:
    """Where the weights of a Llama lie, with the biases of attention that are given or that its config has."""
    bias = p("attention_bias", False) if bias is None else bias
    yield from token_maps(p)
    for i in range(p("num_hidden_layers")):
        layer = f"model.layers.{i}."
        maps = attention_maps(*p.heads(), bias=bias, out_bias=out_bias)
        yield from step_maps(2 * i, layer, "self_attn", maps, norm="input_layernorm")
        feed_forward = glu_maps(bias=p("mlp_bias", False))
        yield from step_maps(2 * i + 1, layer, "mlp", feed_forward, norm="post_attention_layernorm")


SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 256,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
    },
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "max_position_embeddings": 8192,
    },
}
_SCALED = {
    "max_position_embeddings": 131072,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
SIZES["8b-3.1"] = {**SIZES["8b"], **_SCALED}
SIZES["70b"] = {
    **SIZES["8b"],
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}
SIZES["1b-3.2"] = {
    **SIZES["8b-3.1"],
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "head_dim": 64,
    "tie_word_embeddings": True,
    "rope_scaling": {**_SCALED["rope_scaling"], "factor": 32.0},  # type: ignore[dict-item]
}

families.add(
    Family("llama3", "LlamaForCausalLM", "llama", SIZES, options, weights, ignored=(r"rotary_emb\.inv_freq$",))
)
