"""LongCat-Flash (Meituan 2025, arXiv 2509.01322): latent attention and dense layers twice, experts across them.

    mla shortcut(moe, swiglu mla swiglu)

The experts read what the first dense layer reads, normed alike, and are added after the second. Some of them return
their input. Both latents of `mla` are scaled. Layers that predict further tokens (`model.mtp.`) are left aside, and so
are the weights that transformers, unlike the published checkpoint, holds for the experts that have none.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import Any

from zoo.models.families.deepseek_v3 import latent_maps, mla_options
from zoo.models.published.config import Published, stack, word
from zoo.models.published.family import Family, families
from zoo.models.published.layers import glu_maps, moe_maps, step_maps, token_maps
from zoo.models.published.maps import Map, within


def _options(p: Published) -> dict[str, Any]:
    p.only("hidden_act", "silu")
    p.only("attention_method", "MLA")
    p.only("mla_scale_q_lora", True)
    p.only("mla_scale_kv_lora", True)
    p.only("zero_expert_type", "identity")
    p.only("router_bias", False)
    p.only("norm_topk_prob", False)
    n_layers = p("num_layers")
    p.only("num_hidden_layers", 2 * n_layers, n_layers)
    attention = word("mla", **mla_options(p), scale_latents=True)
    dense = word("swiglu", d_hidden=p("ffn_hidden_size"))
    experts = word(
        "moe",
        n_experts=p("n_routed_experts"),
        n_zero_experts=p("zero_expert_num", 0),
        top_k=p("moe_topk"),
        d_hidden=p("expert_ffn_hidden_size"),
        normalize=False,
        scale=p.number("routed_scaling_factor"),
        balance="bias",
    )
    return {
        "pattern": stack([attention, f"shortcut({experts}, {dense} {attention} {dense})"] * n_layers),
        "d_model": p("hidden_size"),
        "vocab_size": p("vocab_size"),
        "norm_eps": p.number("rms_norm_eps"),
        "tie_embeddings": p("tie_word_embeddings", False),
    }


def _weights(p: Published) -> Iterator[Map]:
    yield from token_maps(p)
    attention, dense = list(latent_maps(p)), list(glu_maps())
    bias = "router.e_score_correction_bias"
    experts = list(moe_maps(p("n_routed_experts"), router="router.classifier", correction=bias))
    for i in range(p("num_layers")):
        layer, body = f"model.layers.{i}.", f"{2 * i + 1}.body.steps"
        for half, (first, second) in enumerate(((f"{2 * i}", f"{body}.0"), (f"{body}.1", f"{body}.2"))):
            yield from step_maps(first, layer, f"self_attn.{half}", attention, norm=f"input_layernorm.{half}")
            yield from step_maps(second, layer, f"mlps.{half}", dense, norm=f"post_attention_layernorm.{half}")
        yield from within(f"backbone.steps.{2 * i + 1}.branch.mixers.0.", f"{layer}mlp.", experts)


def _unused(p: Published, names: Collection[str]) -> Iterator[str]:
    """Weights that transformers holds for experts which return their input."""
    real = p("n_routed_experts")
    numbers = range(real, real + p("zero_expert_num", 0))
    for name in names:
        expert = re.fullmatch(r"model\.layers\.\d+\.mlp\.experts\.(\d+)\.(gate|up)_proj\.weight", name)
        if expert and int(expert[1]) in numbers:
            yield name


DEFAULTS: dict[str, Any] = {
    "vocab_size": 131072,
    "hidden_size": 6144,
    "num_layers": 28,
    "num_attention_heads": 64,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e7,
    "ffn_hidden_size": 12288,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "moe_topk": 12,
    "n_routed_experts": 512,
    "zero_expert_num": 256,
    "expert_ffn_hidden_size": 2048,
    "routed_scaling_factor": 6.0,
}
SIZES = {
    "tiny": {
        "hidden_size": 64,
        "ffn_hidden_size": 128,
        "expert_ffn_hidden_size": 64,
        "num_layers": 1,
        "num_attention_heads": 4,
        "q_lora_rank": 32,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "head_dim": 8,
        "v_head_dim": 16,
        "n_routed_experts": 8,
        "zero_expert_num": 4,
        "moe_topk": 3,
        "vocab_size": 256,
        "rope_theta": 10000.0,
    },
    "560b": DEFAULTS,
}

families.add(
    Family(
        "longcat_flash",
        "LongcatFlashForCausalLM",
        "longcat_flash",
        SIZES,
        _options,
        _weights,
        DEFAULTS,
        ignored=(r"^model\.mtp\.",),
        surplus=_unused,
    )
)
