"""LFM2 with experts (Liquid AI 2025, arXiv 2511.23404): 32 of which a token has 4, in all but the first layers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from zoo.models.families import lfm2
from zoo.models.published.config import Published, word
from zoo.models.published.family import Family, families
from zoo.models.published.layers import glu_maps, moe_maps, step_maps
from zoo.models.published.maps import Map

DEFAULTS: dict[str, Any] = {
    "vocab_size": 65536,
    "hidden_size": 2048,
    "intermediate_size": 7168,
    "moe_intermediate_size": 1792,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 128000,
    "norm_eps": 1e-5,
    "conv_L_cache": 3,
    "num_dense_layers": 2,
    "num_experts_per_tok": 4,
    "num_experts": 32,
    "use_expert_bias": True,
    "routed_scaling_factor": 1.0,
    "norm_topk_prob": True,
}


def _kinds(p: Published) -> list[str]:
    p("layer_types")  # has no default
    return p.kinds(str, "conv", "full_attention")


def _options(p: Published) -> dict[str, Any]:
    moe = word(
        "moe",
        n_experts=p("num_experts"),
        top_k=p("num_experts_per_tok"),
        d_hidden=p("moe_intermediate_size"),
        router="sigmoid",
        normalize=p("norm_topk_prob"),
        normalize_eps=1e-6 if p("norm_topk_prob") else None,
        scale=p.number("routed_scaling_factor"),
        balance="bias" if p("use_expert_bias") else "loss",
    )
    dense = word("swiglu", d_hidden=p("intermediate_size"))
    feed_forwards = [dense if i < p("num_dense_layers") else moe for i in range(p("num_hidden_layers"))]
    return lfm2.stack_options(p, lfm2.mixers(p, _kinds(p)), feed_forwards)


def _weights(p: Published) -> Iterator[Map]:
    yield from lfm2.mixer_steps(p, _kinds(p))
    bias = "expert_bias" if p("use_expert_bias") else None
    moe = list(moe_maps(p("num_experts"), names=lfm2.PROJECTIONS, correction=bias))
    for i in range(p("num_hidden_layers")):
        maps = glu_maps(names=lfm2.PROJECTIONS) if i < p("num_dense_layers") else moe
        yield from step_maps(2 * i + 1, f"model.layers.{i}.", "feed_forward", maps, norm="ffn_norm")


def _kinds_with(attention: tuple[int, ...], n_layers: int) -> list[str]:
    return ["full_attention" if i in attention else "conv" for i in range(n_layers)]


SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 192,
        "moe_intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "layer_types": _kinds_with((1,), 3),
        "num_dense_layers": 1,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "vocab_size": 256,
    },
    "8b-a1b": {"num_hidden_layers": 24, "layer_types": _kinds_with((2, 6, 10, 14, 18, 21), 24)},
}

families.add(Family("lfm2_moe", "Lfm2MoeForCausalLM", "lfm2_moe", SIZES, _options, _weights, DEFAULTS))
