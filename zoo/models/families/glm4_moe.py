"""GLM 4.5 and 4.6 (GLM-4.5 Team 2025, arXiv 2508.06471): half of each head rotated, a sigmoid router, shared experts.

The first layers are dense. The layer after the last in published checkpoints predicts further tokens and is left aside.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from zoo.models.families.deepseek_v3 import balanced_experts, extra_layers, model_maps
from zoo.models.published.config import Published, attention_word, stack, word
from zoo.models.published.family import Family, families
from zoo.models.published.layers import attention_maps
from zoo.models.published.maps import Map

DEFAULTS: dict[str, Any] = {
    "vocab_size": 151552,
    "hidden_size": 4096,
    "intermediate_size": 10944,
    "num_hidden_layers": 46,
    "num_attention_heads": 96,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "moe_intermediate_size": 1408,
    "num_experts_per_tok": 8,
    "n_shared_experts": 1,
    "n_routed_experts": 128,
    "routed_scaling_factor": 1.0,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
    "num_nextn_predict_layers": 1,
}


def _options(p: Published) -> dict[str, Any]:
    p.only("hidden_act", "silu")
    p.ignore("num_nextn_predict_layers", "num_mtp_layers")
    *_, head_dim = p.heads()
    eps = p.number("rms_norm_eps", 1e-5)
    qk_norm: dict[str, Any] = {"qk_norm": True, "norm_eps": eps} if p("use_qk_norm", False) else {}
    attention = attention_word(
        p,
        bias=p("attention_bias", False),
        out_bias=False,
        rope_fraction=p.rope_fraction(head_dim, default=0.5),
        **qk_norm,
        **p.rope(),
    )
    dense = word("swiglu", d_hidden=p("intermediate_size"))
    moe = balanced_experts(p)
    first, n_layers = p("first_k_dense_replace"), p("num_hidden_layers")
    return {
        "pattern": stack([step for i in range(n_layers) for step in (attention, dense if i < first else moe)]),
        "d_model": p("hidden_size"),
        "vocab_size": p("vocab_size"),
        "norm_eps": eps,
        "tie_embeddings": p("tie_word_embeddings", False),
    }


def _weights(p: Published) -> Iterator[Map]:
    options = {"bias": p("attention_bias", False), "out_bias": False, "qk_norm": p("use_qk_norm", False)}
    yield from model_maps(p, lambda i: attention_maps(*p.heads(), **options))


_GLM45: dict[str, Any] = {
    "hidden_size": 5120,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "num_hidden_layers": 92,
    "head_dim": 128,
    "n_routed_experts": 160,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 3,
    "use_qk_norm": True,
    "attention_bias": True,
    "rope_theta": 1000000.0,
}
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "moe_intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "use_qk_norm": True,
        "attention_bias": True,
        "vocab_size": 256,
    },
    "4.5-air": {"head_dim": 128, "attention_bias": True, "rope_theta": 1000000.0},
    "4.5": _GLM45,
    "4.6": {**_GLM45, "max_position_embeddings": 202752},
}

families.add(
    Family(
        "glm4_moe",
        "Glm4MoeForCausalLM",
        "glm4_moe",
        SIZES,
        _options,
        _weights,
        defaults=DEFAULTS,
        surplus=extra_layers,
    )
)
