"""Jamba (Lieber et al. 2024, arXiv 2403.19887): seven Mamba layers to one of attention, experts in every second layer.

Attention has no positions; Mamba norms its step sizes, B and C. "mini" is Jamba v0.1, whose sizes 1.5 Mini has too,
"large" 1.5 Large (arXiv 2408.12570).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from zoo.models.published.config import Published, attention_word, stack, word
from zoo.models.published.family import Family, families
from zoo.models.published.layers import attention_maps, glu_maps, mamba_maps, moe_maps, step_maps, token_maps
from zoo.models.published.maps import Map

DEFAULTS = {
    "vocab_size": 65536,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_experts": 16,
    "num_experts_per_tok": 2,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
    "attn_layer_period": 8,
    "attn_layer_offset": 4,
    "mamba_d_state": 16,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_conv_bias": True,
    "mamba_proj_bias": False,
    "tie_word_embeddings": False,
}


def _is(p: Published, kind: str, layer: int) -> bool:
    """Whether a layer is of a kind, "attn" or "expert"."""
    return layer % p(f"{kind}_layer_period") == p(f"{kind}_layer_offset")


def _has_experts(p: Published, layer: int) -> bool:
    return _is(p, "expert", layer) and p("num_experts") > 1


def _options(p: Published) -> dict[str, Any]:
    p.only("hidden_act", "silu")
    p.only("mamba_inner_layernorms", True)
    p.ignore("num_logits_to_keep", "calc_logits_for_entire_prompt", "n_ctx")
    p.ignore("use_mamba_kernels", "use_mambapy", "use_associative_scan")
    rank, eps = p("mamba_dt_rank", "auto"), p.number("rms_norm_eps", 1e-6)
    attention = attention_word(p, rope=False)
    mamba = word(
        "mamba",
        d_state=p("mamba_d_state"),
        expand=p.number("mamba_expand"),
        dt_rank=math.ceil(p("hidden_size") / 16) if rank == "auto" else rank,
        conv_size=p("mamba_d_conv"),
        inner_norm=True,
        norm_eps=eps,
        bias=p("mamba_proj_bias"),
        conv_bias=p("mamba_conv_bias"),
    )
    dense = word("swiglu", d_hidden=p("intermediate_size"))
    experts = word(
        "moe",
        n_experts=p("num_experts"),
        top_k=p("num_experts_per_tok"),
        d_hidden=p("intermediate_size"),
        normalize=False,
    )
    layers = []
    for i in range(p("num_hidden_layers")):
        layers.append(attention if _is(p, "attn", i) else mamba)
        layers.append(experts if _has_experts(p, i) else dense)
    return {
        "pattern": stack(layers),
        "d_model": p("hidden_size"),
        "vocab_size": p("vocab_size"),
        "norm_eps": eps,
        "tie_embeddings": p("tie_word_embeddings"),
    }


def _weights(p: Published) -> Iterator[Map]:
    yield from token_maps(p, norm="model.final_layernorm.weight")
    d_inner, norms = int(p("mamba_expand") * p("hidden_size")), ("dt_layernorm", "b_layernorm", "c_layernorm")
    for i in range(p("num_hidden_layers")):
        layer = f"model.layers.{i}."
        if _is(p, "attn", i):
            yield from step_maps(2 * i, layer, "self_attn", attention_maps(*p.heads()), norm="input_layernorm")
        else:
            bias, conv_bias = p("mamba_proj_bias"), p("mamba_conv_bias")
            mamba = mamba_maps(d_inner, p("mamba_d_conv"), bias=bias, conv_bias=conv_bias, norms=norms)
            yield from step_maps(2 * i, layer, "mamba", mamba, norm="input_layernorm")
        feed_forward = moe_maps(p("num_experts"), router="router") if _has_experts(p, i) else glu_maps()
        yield from step_maps(2 * i + 1, layer, "feed_forward", feed_forward, norm="pre_ff_layernorm")


SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts": 4,
        "attn_layer_period": 4,
        "attn_layer_offset": 2,
        "vocab_size": 256,
    },
    "mini": {},
    "large": {
        "hidden_size": 8192,
        "intermediate_size": 24576,
        "num_hidden_layers": 72,
        "num_attention_heads": 64,
    },
}

families.add(Family("jamba", "JambaForCausalLM", "jamba", SIZES, _options, _weights, DEFAULTS))
