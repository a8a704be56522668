"""Granite 4.0 H (IBM 2025): Mamba-2, attention without positions in every tenth layer, factors at every branch.

After each comes SwiGLU, which all tokens share, and in most sizes experts beside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from zoo.models.families.bamba import RECURRENT, recurrent_maps, recurrent_word
from zoo.models.published.config import Published, attention_word, stack, word
from zoo.models.published.family import Family, families
from zoo.models.published.layers import attention_maps, step_maps, token_maps
from zoo.models.published.maps import Map, parts, same

DEFAULTS: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "shared_intermediate_size": 1024,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "rms_norm_eps": 1e-6,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "embedding_multiplier": 1.0,
    "logits_scaling": 1.0,
    "residual_multiplier": 1.0,
    "attention_multiplier": 1.0,
    **RECURRENT,
}
ATTENTION, MAMBA = ("full_attention", "attention"), ("linear_attention", "mamba")
"""What configs call the layers, now and before."""


def _attends(p: Published) -> list[bool]:
    """Which layers are attention."""
    key = "layers_block_type" if p("layers_block_type", None) else "layer_types"
    return [kind in ATTENTION for kind in p.kinds(lambda i: MAMBA[0], *ATTENTION, *MAMBA, key=key)]


def _options(p: Published) -> dict[str, Any]:
    p.only("hidden_act", "silu")
    p.only("normalization_function", "rmsnorm")
    factor = p.number("residual_multiplier")
    out_scale = None if factor == 1 else factor
    rotated = p.only("position_embedding_type", None, "nope", "rope") == "rope"
    rope = p.rope(context=2048)
    attention = attention_word(
        p,
        scale=p.number("attention_multiplier"),
        bias=p("attention_bias", False),
        out_scale=out_scale,
        **(rope if rotated else {"rope": False}),
    )
    recurrent, shared = recurrent_word(p, out_scale), p("shared_intermediate_size")
    p.ignore("intermediate_size", "num_experts_per_tok")  # of experts, of which there may be none
    if p("num_local_experts"):
        feed_forward = word(
            "moe",
            n_experts=p("num_local_experts"),
            top_k=p("num_experts_per_tok"),
            d_hidden=p("intermediate_size"),
            n_shared=1,
            d_shared=shared,
            out_scale=out_scale,
        )
    else:
        feed_forward = word("swiglu", d_hidden=shared, out_scale=out_scale)
    return {
        "pattern": stack([w for attends in _attends(p) for w in (attention if attends else recurrent, feed_forward)]),
        "d_model": p("hidden_size"),
        "vocab_size": p("vocab_size"),
        "norm_eps": p.number("rms_norm_eps"),
        "embedding_scale": p.number("embedding_multiplier"),
        "logit_scale": 1 / p.number("logits_scaling"),
        "tie_embeddings": p("tie_word_embeddings", False),
    }


def _feed_forward_maps(p: Published) -> Iterator[Map]:
    """The weights after a mixer, by their names in a layer."""
    ours = "shared." if p("num_local_experts") else ""
    if p("num_local_experts"):
        experts = {"router.weight": "router.layer", "up_proj": "input_linear", "down_proj": "output_linear"}
        for name, theirs in experts.items():
            yield same(name, f"block_sparse_moe.{theirs}.weight")
    yield parts([f"{ours}gate_proj.weight", f"{ours}up_proj.weight"], "shared_mlp.input_linear.weight")
    yield same(f"{ours}down_proj.weight", "shared_mlp.output_linear.weight")


def _weights(p: Published) -> Iterator[Map]:
    yield from token_maps(p)
    for i, attends in enumerate(_attends(p)):
        layer = f"model.layers.{i}."
        attention = attention_maps(*p.heads(), bias=p("attention_bias", False))
        part, maps = ("self_attn", attention) if attends else ("mamba", recurrent_maps(p))
        yield from step_maps(2 * i, layer, part, maps, norm="input_layernorm")
        norm = f"{i}.post_attention_layernorm"
        yield from step_maps(2 * i + 1, "model.layers.", str(i), _feed_forward_maps(p), norm=norm)


_PUBLISHED: dict[str, Any] = {
    "vocab_size": 100352,
    "num_hidden_layers": 40,
    "layer_types": [ATTENTION[1] if i % 10 == 5 else MAMBA[1] for i in range(40)],
    "rms_norm_eps": 1e-5,
    "embedding_multiplier": 12,
    "residual_multiplier": 0.22,
    "mamba_d_head": 64,
    "mamba_d_state": 128,
    "max_position_embeddings": 131072,
    "position_embedding_type": "nope",
    "tie_word_embeddings": True,
}
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 32,
        "shared_intermediate_size": 64,
        "num_hidden_layers": 3,
        "layer_types": [MAMBA[0], ATTENTION[0], MAMBA[0]],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
        "attention_multiplier": 0.25,
        "mamba_n_heads": 4,
        "mamba_d_state": 32,
        "vocab_size": 256,
    },
    "micro": {
        **_PUBLISHED,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "shared_intermediate_size": 8192,
        "num_key_value_heads": 8,
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "attention_multiplier": 0.015625,
        "logits_scaling": 8,
        "mamba_n_heads": 64,
    },
    "7b-a1b": {
        **_PUBLISHED,
        "hidden_size": 1536,
        "intermediate_size": 512,
        "shared_intermediate_size": 1024,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "num_local_experts": 64,
        "num_experts_per_tok": 6,
        "attention_multiplier": 0.0078125,
        "logits_scaling": 6,
        "mamba_n_heads": 48,
    },
}

families.add(
    Family("granite_hybrid", "GraniteMoeHybridForCausalLM", "granitemoehybrid", SIZES, _options, _weights, DEFAULTS)
)
