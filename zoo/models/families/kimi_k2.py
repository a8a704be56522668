"""Kimi K2 (Kimi Team 2025, arXiv 2507.20534): DeepSeek-V3 with half the heads and more experts, ungrouped."""

from __future__ import annotations

from zoo.models.families import deepseek_v3
from zoo.models.published.family import Family, families

SIZES = {
    "tiny": {**deepseek_v3.TINY, "num_attention_heads": 2, "num_key_value_heads": 2, "n_group": 1, "topk_group": 1},
    "1t": {
        **deepseek_v3.DEFAULTS,
        "num_attention_heads": 64,
        "num_key_value_heads": 64,
        "n_routed_experts": 384,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 2.827,
        "vocab_size": 163840,
        "max_position_embeddings": 131072,
        "num_nextn_predict_layers": 0,
        "rope_theta": 50000.0,
        "rope_scaling": {**deepseek_v3.YARN, "factor": 32.0, "beta_fast": 1.0, "beta_slow": 1.0},
    },
}

families.add(
    Family(
        "kimi_k2",
        "DeepseekV3ForCausalLM",
        "kimi_k2",
        SIZES,
        deepseek_v3.options,
        deepseek_v3.weights,
        deepseek_v3.DEFAULTS,
        ignored=deepseek_v3.TABLES,
        surplus=deepseek_v3.extra_layers,
    )
)
