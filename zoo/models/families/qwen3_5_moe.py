"""Qwen3.5 with experts (Qwen Team 2026): after every mixer of Qwen3.5 some of many experts, and one that all share.

Published checkpoints hold the experts of a layer in two tensors, other copies one by one; either is read, and the
latter is written, as transformers does.
"""

from __future__ import annotations

from typing import Any

from zoo.models.families import qwen3_5, qwen3_next
from zoo.models.published.config import Published
from zoo.models.published.family import Family, families

DEFAULTS: dict[str, Any] = {
    **{key: value for key, value in qwen3_5.DEFAULTS.items() if key != "intermediate_size"},
    "hidden_size": 2048,
    "num_hidden_layers": 40,
    "num_key_value_heads": 2,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "num_experts_per_tok": 8,
    "num_experts": 256,
    "norm_topk_prob": True,
}


def _options(p: Published) -> dict[str, Any]:
    p.whole("num_experts")
    p.only("norm_topk_prob", True)
    p.only("mlp_only_layers", [])
    p.only("decoder_sparse_step", 1)
    return qwen3_5.options(p)


_PUBLISHED = {"max_position_embeddings": 262144, "rope_theta": 10000000}
SIZES: dict[str, dict[str, Any]] = {
    "tiny": qwen3_next.SIZES["tiny"],
    "35b-a3b": _PUBLISHED,
    "397b-a17b": {
        **_PUBLISHED,
        "hidden_size": 4096,
        "num_hidden_layers": 60,
        "num_attention_heads": 32,
        "linear_num_value_heads": 64,
        "moe_intermediate_size": 1024,
        "shared_expert_intermediate_size": 1024,
        "num_experts_per_tok": 10,
        "num_experts": 512,
    },
}

families.add(
    Family(
        "qwen3_5_moe",
        "Qwen3_5MoeForCausalLM",
        "qwen3_5_moe_text",
        SIZES,
        _options,
        qwen3_5.weights,
        DEFAULTS,
        ignored=qwen3_5.BESIDE_THE_TEXT,
        bare="Qwen3_5MoeTextModel",
        seeing="Qwen3_5MoeForConditionalGeneration",
    )
)
