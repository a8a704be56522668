"""Bamba (IBM, Princeton, CMU and UIUC 2024): Mamba-2, with attention in a few layers, and SwiGLU after each.

Attention rotates half of each head.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from zoo.models.families.mamba2 import step_limit
from zoo.models.published.config import Published, attention_word, stack, word
from zoo.models.published.family import Family, families
from zoo.models.published.layers import attention_maps, glu_maps, mamba2_maps, step_maps, token_maps
from zoo.models.published.maps import Map

RECURRENT: dict[str, Any] = {
    "mamba_n_heads": 128,
    "mamba_n_groups": 1,
    "mamba_d_state": 256,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_conv_bias": True,
    "mamba_proj_bias": False,
}
DEFAULTS: dict[str, Any] = {
    "vocab_size": 128000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    **RECURRENT,
}


def recurrent_word(p: Published, out_scale: float | None = None) -> str:
    """`mamba2` of configs whose keys for it begin with `mamba_`."""
    d_inner = int(p("mamba_expand") * p("hidden_size"))
    width = d_inner // p("mamba_n_heads")
    p.only("mamba_d_head", "auto", width)
    p.ignore("mamba_chunk_size")
    return word(
        "mamba2",
        d_state=p("mamba_d_state"),
        expand=p.number("mamba_expand"),
        head_dim=width,
        n_groups=p("mamba_n_groups"),
        conv_size=p("mamba_d_conv"),
        dt_limit=step_limit(p),
        norm_eps=p.number("rms_norm_eps"),
        bias=p("mamba_proj_bias"),
        conv_bias=p("mamba_conv_bias"),
        out_scale=out_scale,
    )


def recurrent_maps(p: Published) -> Iterator[Map]:
    """The weights of that word."""
    d_inner, keys = int(p("mamba_expand") * p("hidden_size")), p("mamba_n_groups") * p("mamba_d_state")
    return mamba2_maps(d_inner, keys, p("mamba_d_conv"), bias=p("mamba_proj_bias"), conv_bias=p("mamba_conv_bias"))


def _attends(p: Published) -> list[bool]:
    """Which layers are attention."""
    places = p("attn_layer_indices", [])
    return [i in places for i in range(p("num_hidden_layers"))]


def _options(p: Published) -> dict[str, Any]:
    p.only("hidden_act", "silu")
    p.only("partial_rotary_factor", 0.5)
    *_, head_dim = p.heads()
    share = p.rope_fraction(head_dim, default=0.5)
    p.only("attn_rotary_emb", int(head_dim * share))
    attention = attention_word(
        p,
        bias=p("attention_bias", False),
        rope_fraction=share,
        **p.rope(context=262144),
    )
    recurrent = recurrent_word(p)
    feed_forward = word("swiglu", d_hidden=p("intermediate_size"), bias=p("mlp_bias", False))
    return {
        "pattern": stack([w for attends in _attends(p) for w in (attention if attends else recurrent, feed_forward)]),
        "d_model": p("hidden_size"),
        "vocab_size": p("vocab_size"),
        "norm_eps": p.number("rms_norm_eps"),
        "tie_embeddings": p("tie_word_embeddings", False),
    }


def _weights(p: Published) -> Iterator[Map]:
    yield from token_maps(p, norm="model.final_layernorm.weight")
    for i, attends in enumerate(_attends(p)):
        layer = f"model.layers.{i}."
        attention = attention_maps(*p.heads(), bias=p("attention_bias", False))
        part, maps = ("self_attn", attention) if attends else ("mamba", recurrent_maps(p))
        yield from step_maps(2 * i, layer, part, maps, norm="input_layernorm")
        feed_forward = glu_maps(bias=p("mlp_bias", False))
        yield from step_maps(2 * i + 1, layer, "feed_forward", feed_forward, norm="pre_ff_layernorm")


SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "attn_layer_indices": [1],
        "mamba_n_heads": 4,
        "mamba_d_state": 32,
        "vocab_size": 256,
    },
    "9b": {"vocab_size": 128256, "attn_layer_indices": [9, 18, 27], "mamba_d_head": 64, "mamba_d_state": 128},
}

families.add(Family("bamba", "BambaForCausalLM", "bamba", SIZES, _options, _weights, DEFAULTS))
