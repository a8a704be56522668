"""DeepSeek-V2 (DeepSeek-AI 2024, arXiv 2405.04434): multi-head latent attention and experts balanced by a loss.

A token's experts come from its best groups of experts, each judged by its best one (V2), or from all of them (V2-Lite).
Transformers leaves the auxiliary loss (`aux_loss_alpha`, `seq_aux`) out.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from zoo.models.families.deepseek_v3 import TABLES, TINY, YARN, latent_maps, mla_options, model_maps, model_options
from zoo.models.published.config import Published, word
from zoo.models.published.family import Family, families
from zoo.models.published.maps import Map


def _moe(p: Published) -> str:
    limited = p.only("topk_method", "greedy", "group_limited_greedy") == "group_limited_greedy"
    p.ignore("n_group", "topk_group")  # not of "greedy"
    p.only("norm_topk_prob", False)
    p.only("scoring_func", "softmax")
    p.only("mlp_bias", False)
    n_groups = p("n_group") if limited else 1
    return word(
        "moe",
        n_experts=p("n_routed_experts"),
        top_k=p("num_experts_per_tok"),
        d_hidden=p("moe_intermediate_size"),
        n_shared=p("n_shared_experts"),
        normalize=False,
        scale=p.number("routed_scaling_factor"),
        n_groups=n_groups,
        top_groups=p("topk_group") if limited else 1,
        group_score="max" if n_groups > 1 else None,
        balance_loss=p.number("aux_loss_alpha", 0.001),
        balance_over="sequence" if p("seq_aux", True) else "batch",
    )


def _options(p: Published) -> dict[str, Any]:
    return model_options(p, word("mla", **mla_options(p)), _moe(p))


def _weights(p: Published) -> Iterator[Map]:
    return model_maps(p, lambda i: latent_maps(p), correction=False)


DEFAULTS: dict[str, Any] = {
    "vocab_size": 102400,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "moe_intermediate_size": 1407,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "n_shared_experts": 2,
    "n_routed_experts": 64,
    "routed_scaling_factor": 1.0,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "qk_nope_head_dim": 128,
    "first_k_dense_replace": 0,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
}

_PUBLISHED = {
    "num_experts_per_tok": 6,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 163840,
    "rope_theta": 10000,
    "rope_scaling": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
    "aux_loss_alpha": 0.001,
}
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {**TINY, "topk_method": "group_limited_greedy", "routed_scaling_factor": 2.0},
    "lite": {
        **_PUBLISHED,
        "hidden_size": 2048,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "q_lora_rank": None,
    },
    "236b": {
        **_PUBLISHED,
        "hidden_size": 5120,
        "intermediate_size": 12288,
        "moe_intermediate_size": 1536,
        "num_hidden_layers": 60,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "n_routed_experts": 160,
        "topk_method": "group_limited_greedy",
        "n_group": 8,
        "topk_group": 3,
        "routed_scaling_factor": 16.0,
    },
}

families.add(
    Family(
        "deepseek_v2",
        "DeepseekV2ForCausalLM",
        "deepseek_v2",
        SIZES,
        _options,
        _weights,
        DEFAULTS,
        ignored=TABLES,
    )
)
