"""DeepSeek-V3.2 (DeepSeek-AI 2025, arXiv 2512.02556): DeepSeek-V3 with sparse attention, every layer its own indexer.

Like transformers we compute the indexer's scores in full precision, without the published kernels' rotation by a
Hadamard matrix, which changes none of them, and rounding to 8 bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from zoo.models.families.deepseek_v3 import (
    DEFAULTS,
    TINY,
    YARN,
    extra_layers,
    latent_maps,
    mla_options,
    model_maps,
    model_options,
    moe_word,
)
from zoo.models.published.config import Published, word
from zoo.models.published.family import Family, families
from zoo.models.published.maps import Map, joined, same, within


def sparse_options(p: Published, **more: Any) -> dict[str, Any]:
    """The options of `dsa`, some of them given."""
    n_layers, dense = p("num_hidden_layers"), p("first_k_dense_replace")
    p.only("mlp_layer_types", ["dense"] * min(dense, n_layers) + ["sparse"] * (n_layers - dense))
    p.only("layer_types", ["indexed_attention"] * n_layers)
    p.ignore("num_nextn_predict_layers", "mlp_bias")  # their feed-forward never has a bias
    p("q_lora_rank")  # the indexer's queries come from there
    indexer = {"index_heads": p("index_n_heads"), "index_dim": p("index_head_dim")}
    return {**mla_options(p), "top_k": p("index_topk"), **indexer, **more}


def _options(p: Published) -> dict[str, Any]:
    return model_options(p, word("dsa", **sparse_options(p)), moe_word(p))


def sparse_maps(p: Published, *, indexer: bool = True) -> Iterator[Map]:
    """The weights of one `dsa`, with an indexer of its own or without."""
    yield from within("attention.", "", latent_maps(p))
    if indexer:
        yield from within("", "indexer.", _indexer_maps(p))


def _weights(p: Published) -> Iterator[Map]:
    return model_maps(p, lambda i: sparse_maps(p))


def _indexer_maps(p: Published) -> Iterator[Map]:
    yield same("index_q.weight", "wq_b.weight")
    sizes = p("index_head_dim"), p("index_n_heads")
    yield joined("index_proj.weight", ["wk.weight", "weights_proj.weight"], sizes)
    yield same("index_norm.weight", "k_norm.weight")
    yield same("index_norm.bias", "k_norm.bias")


SIZES: dict[str, dict[str, Any]] = {
    "tiny": {**TINY, "index_topk": 16, "index_n_heads": 4, "index_head_dim": 16},
    "671b": {"rope_theta": 10000, "rope_scaling": YARN},
}

families.add(
    Family(
        "deepseek_v32",
        "DeepseekV32ForCausalLM",
        "deepseek_v32",
        SIZES,
        _options,
        _weights,
        {
            **DEFAULTS,
            "max_position_embeddings": 163840,
            "index_topk": 2048,
            "index_n_heads": 64,
            "index_head_dim": 128,
        },
        surplus=extra_layers,
    )
)
