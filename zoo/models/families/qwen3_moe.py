"""Qwen3 with experts (Yang et al. 2025, arXiv 2505.09388): 128 experts of which a token has 8, none shared."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from zoo.models.families.qwen3 import attention_step, qwen_attention, sliding_window, stack_options
from zoo.models.published.config import Published, word
from zoo.models.published.family import Family, families
from zoo.models.published.layers import glu_maps, moe_maps, step_maps, token_maps
from zoo.models.published.maps import Map

DEFAULTS: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 24,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "decoder_sparse_step": 1,
    "moe_intermediate_size": 768,
    "num_experts_per_tok": 8,
    "norm_topk_prob": False,
}


def _n_experts(p: Published) -> int:
    return p("num_experts", p("num_local_experts", 128))


def _sparse(p: Published) -> list[bool]:
    """Which layers have experts."""
    dense, period, n_experts = p("mlp_only_layers", ()), p("decoder_sparse_step"), _n_experts(p)
    return [n_experts > 0 and i not in dense and (i + 1) % period == 0 for i in range(p("num_hidden_layers"))]


def _options(p: Published) -> dict[str, Any]:
    p.ignore("max_window_layers")  # a window is one of all layers here
    attention, dense = qwen_attention(p, sliding_window(p)), word("swiglu", d_hidden=p("intermediate_size"))
    experts = {
        "n_experts": _n_experts(p),
        "top_k": p("num_experts_per_tok"),
        "d_hidden": p("moe_intermediate_size"),
        "normalize": p("norm_topk_prob"),
    }
    sparse = _sparse(p)
    moe = word("moe", **experts) if any(sparse) else ""
    return stack_options(p, [step for s in sparse for step in (attention, moe if s else dense)])


def _weights(p: Published) -> Iterator[Map]:
    yield from token_maps(p)
    for i, sparse in enumerate(_sparse(p)):
        feed_forward = moe_maps(_n_experts(p)) if sparse else glu_maps()
        yield from attention_step(p, i)
        yield from step_maps(2 * i + 1, f"model.layers.{i}.", "mlp", feed_forward, norm="post_attention_layernorm")


_A3B: dict[str, Any] = {
    "head_dim": 128,
    "num_hidden_layers": 48,
    "norm_topk_prob": True,
    "rope_theta": 1000000.0,
    "max_position_embeddings": 40960,
}
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "moe_intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "vocab_size": 256,
        "tie_word_embeddings": True,
    },
    "30b-a3b": _A3B,
    "235b-a22b": {
        **_A3B,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "moe_intermediate_size": 1536,
        "num_hidden_layers": 94,
        "num_attention_heads": 64,
    },
}

families.add(Family("qwen3_moe", "Qwen3MoeForCausalLM", "qwen3_moe", SIZES, _options, _weights, defaults=DEFAULTS))
