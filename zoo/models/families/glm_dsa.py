"""GLM-5 (Zhipu AI 2026): DeepSeek-V3.2 in other sizes, whose indexer rotates neighbouring channels as pairs.

In GLM-5.2 most layers are "shared": they have no indexer and attend to the steps that a layer before has chosen
(arXiv 2603.12201). Layers that predict further tokens are numbered after the others and left aside.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from zoo.core.errors import UsageError
from zoo.models.families.deepseek_v3 import TINY, extra_layers, model_maps, model_options, moe_word
from zoo.models.families.deepseek_v32 import sparse_maps, sparse_options
from zoo.models.published.config import Published, word
from zoo.models.published.family import Family, families
from zoo.models.published.maps import Map

DEFAULTS: dict[str, Any] = {
    "vocab_size": 154880,
    "hidden_size": 6144,
    "intermediate_size": 12288,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 78,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "n_shared_experts": 1,
    "n_routed_experts": 256,
    "routed_scaling_factor": 2.5,
    "kv_lora_rank": 512,
    "q_lora_rank": 2048,
    "qk_rope_head_dim": 64,
    "v_head_dim": 256,
    "qk_nope_head_dim": 192,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 3,
    "norm_topk_prob": True,
    "max_position_embeddings": 202752,
    "rms_norm_eps": 1e-5,
    "num_nextn_predict_layers": 1,
    "index_topk": 2048,
    "index_n_heads": 32,
    "index_head_dim": 128,
}
FULL, SHARED = "full", "shared"


def _kinds(p: Published) -> list[str]:
    """Whether the indexer of every layer is its own, or that of a layer before."""
    period, offset = p("index_topk_freq", 1), p("index_skip_topk_offset", 2)
    if (pattern := p("index_topk_pattern", None)) is not None:
        given = [{"F": FULL, "S": SHARED}.get(kind, kind) for kind in pattern]
        p.only("num_hidden_layers", len(given))
    else:
        spared = [max(i - offset + 1, 0) % max(period, 1) for i in range(p("num_hidden_layers"))]
        given = [SHARED if each else FULL for each in spared]
    kinds = p.kinds(given.__getitem__, FULL, SHARED, key="indexer_types")
    if kinds[:1] == [SHARED]:
        raise UsageError(f"{p.architecture} with a first layer that shares an indexer is not supported: there is none.")
    return kinds


def _options(p: Published) -> dict[str, Any]:
    p.only("rope_interleave", True)
    p.only("indexer_rope_interleave", True)
    p.ignore("moe_router_dtype", "index_share_for_mtp_iteration")  # ways to compute; of layers that are left aside
    own = sparse_options(p, index_rope_interleaved=True)
    shared = {k: v for k, v in own.items() if not k.startswith("index_")}
    words = {FULL: word("dsa", **own), SHARED: word("dsa", **shared, indexer="shared")}
    return model_options(p, [words[kind] for kind in _kinds(p)], moe_word(p))


def _weights(p: Published) -> Iterator[Map]:
    kinds = _kinds(p)
    return model_maps(p, lambda i: sparse_maps(p, indexer=kinds[i] == FULL))


SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        **TINY,
        "num_hidden_layers": 3,
        "n_group": 1,
        "topk_group": 1,
        "index_topk": 16,
        "index_n_heads": 4,
        "index_head_dim": 16,
        "indexer_types": [FULL, SHARED, FULL],
    },
    "5-744b": {"rope_theta": 1000000},
    "5.2-744b": {
        "index_topk_freq": 4,
        "index_skip_topk_offset": 3,
        "max_position_embeddings": 1048576,
        "rope_theta": 8000000,
    },
}

families.add(
    Family(
        "glm_dsa",
        "GlmMoeDsaForCausalLM",
        "glm_moe_dsa",
        SIZES,
        _options,
        _weights,
        DEFAULTS,
        surplus=extra_layers,
    )
)
