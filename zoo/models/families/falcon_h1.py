"""Falcon-H1 (Zuo et al. 2025, arXiv 2507.22448): attention and Mamba-2 side by side, summed, then SwiGLU.

Maximal update parametrisation stays in the model as factors: on the embedding, the logits, the keys, the inputs and
outputs of the three mixers, the gate, and the five parts of Mamba-2's projection. Sizes are those whose config could
be had; the factors of 1.5B, 3B, 7B and 34B stand in their config.json alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from zoo.models.families.mamba2 import step_limit
from zoo.models.published.config import Published, attention_word, stack, word
from zoo.models.published.family import Family, families
from zoo.models.published.layers import attention_maps, glu_maps, mamba2_maps, step_maps, token_maps
from zoo.models.published.maps import Map

DEFAULTS = {
    "vocab_size": 128000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "mamba_d_ssm": 1024,
    "mamba_n_heads": 128,
    "mamba_n_groups": 1,
    "mamba_d_state": 256,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_conv_bias": True,
    "mamba_proj_bias": False,
    "mamba_norm_before_gate": True,
    "mamba_rms_norm": False,
    "projectors_bias": False,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
}


def _d_ssm(p: Published) -> int:
    d_head = p("mamba_d_head", "auto")
    if "mamba_d_ssm" not in p.config and d_head != "auto":
        return d_head * p("mamba_n_heads")
    return p("mamba_d_ssm", int(p("mamba_expand") * p("hidden_size")))


def _factor(value: float) -> float | None:
    """A step's factor, None for 1."""
    return None if value == 1 else float(value)


def _options(p: Published) -> dict[str, Any]:
    p.only("hidden_act", "silu")
    p.only("mamba_use_mlp", True)
    p.only("layers_block_type", ["hybrid"] * p("num_hidden_layers"))
    p.ignore("num_logits_to_keep", "mamba_chunk_size", "mlp_expansion_factor", "expansion_factor", "add_bos_token")
    *_, head_dim = p.heads()
    key_factor, eps = p.number("key_multiplier", 1.0), p.number("rms_norm_eps", 1e-5)
    gate_factor, down_factor = p("mlp_multipliers", (1.0, 1.0))
    of_parts = tuple(map(float, p("ssm_multipliers", (1.0,) * 5)))
    attention = attention_word(
        p,
        scale=None if key_factor == 1 else key_factor * head_dim**-0.5,
        bias=p("attention_bias"),
        **p.rope(context=8192),
        in_scale=_factor(p("attention_in_multiplier", 1.0)),
        out_scale=_factor(p("attention_out_multiplier", 1.0)),
    )
    d_ssm, width = _d_ssm(p), p("hidden_size")
    v = d_ssm // p("mamba_n_heads")
    p.only("mamba_d_head", "auto", v)
    mamba = word(
        "mamba2",
        d_state=p("mamba_d_state"),
        expand=d_ssm / width,
        head_dim=v,
        n_groups=p("mamba_n_groups"),
        conv_size=p("mamba_d_conv"),
        dt_limit=step_limit(p),
        part_scales=None if of_parts == (1.0,) * 5 else of_parts,
        rms_norm=p("mamba_rms_norm"),
        norm_before_gate=p("mamba_norm_before_gate") and p("mamba_rms_norm"),
        norm_eps=eps,
        bias=p("mamba_proj_bias"),
        out_bias=None if p("projectors_bias") == p("mamba_proj_bias") else p("projectors_bias"),
        conv_bias=p("mamba_conv_bias"),
        in_scale=_factor(p("ssm_in_multiplier", 1.0)),
        out_scale=_factor(p("ssm_out_multiplier", 1.0)),
    )
    feed_forward = word(
        "swiglu",
        d_hidden=p("intermediate_size"),
        bias=p("mlp_bias"),
        gate_scale=float(gate_factor),
        out_scale=_factor(down_factor),
    )
    return {
        "pattern": stack([f"({attention} | {mamba})", feed_forward] * p("num_hidden_layers")),
        "d_model": width,
        "vocab_size": p("vocab_size"),
        "norm_eps": eps,
        "embedding_scale": p.number("embedding_multiplier", 1.0),
        "logit_scale": p.number("lm_head_multiplier", 1.0),
        "tie_embeddings": p("tie_word_embeddings"),
    }


def _weights(p: Published) -> Iterator[Map]:
    yield from token_maps(p, norm="model.final_layernorm.weight")
    keys = p("mamba_n_groups") * p("mamba_d_state")
    for i in range(p("num_hidden_layers")):
        layer = f"model.layers.{i}."
        attention = attention_maps(*p.heads(), bias=p("attention_bias"))
        yield from step_maps(2 * i, layer, "self_attn", attention, norm="input_layernorm")
        mamba = mamba2_maps(
            _d_ssm(p),
            keys,
            p("mamba_d_conv"),
            bias=p("mamba_proj_bias"),
            out_bias=p("projectors_bias"),
            conv_bias=p("mamba_conv_bias"),
            norm=p("mamba_rms_norm"),
        )
        yield from step_maps(2 * i, layer, "mamba", mamba, norm=None, mixer=1)
        feed_forward = glu_maps(bias=p("mlp_bias"))
        yield from step_maps(2 * i + 1, layer, "feed_forward", feed_forward, norm="pre_ff_layernorm")


_COMMON = {
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "mamba_n_heads": 24,
    "mamba_norm_before_gate": False,
    "rope_theta": 1e11,
}
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        **_COMMON,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "head_dim": 16,
        "mamba_d_ssm": 96,
        "mamba_n_heads": 3,
        "mamba_d_state": 32,
        "vocab_size": 256,
        "embedding_multiplier": 2.0,
        "lm_head_multiplier": 0.5,
        "key_multiplier": 0.5,
        "ssm_in_multiplier": 1.25,
        "ssm_multipliers": [0.7, 0.5, 0.7, 1.0, 0.7],
        "mlp_multipliers": [0.9, 0.6],
    },
    "90m": {
        **_COMMON,
        "hidden_size": 512,
        "intermediate_size": 768,
        "num_hidden_layers": 24,
        "mamba_d_ssm": 768,
        "mamba_d_head": 32,
        "mamba_d_state": 64,
        "vocab_size": 32768,
        "max_position_embeddings": 262144,
        "embedding_multiplier": 0.11083984375,
        "lm_head_multiplier": 0.078125,
        "tie_word_embeddings": True,
    },
    "0.5b": {
        **_COMMON,
        "hidden_size": 1024,
        "intermediate_size": 2048,
        "num_hidden_layers": 36,
        "mamba_d_ssm": 1536,
        "mamba_d_head": 64,
        "mamba_d_state": 128,
        "vocab_size": 32784,
        "max_position_embeddings": 16384,
        "embedding_multiplier": 5.656854249492381,
        "lm_head_multiplier": 0.0390625,
        "key_multiplier": 0.39062499999999994,
        "attention_out_multiplier": 0.9375,
        "ssm_in_multiplier": 1.25,
        "ssm_out_multiplier": 0.23570226039551587,
        "ssm_multipliers": [0.3535533905932738, 0.25, 0.3535533905932738, 0.5, 0.3535533905932738],
        "mlp_multipliers": [0.8838834764831844, 0.5859375],
    },
}

families.add(Family("falcon_h1", "FalconH1ForCausalLM", "falcon_h1", SIZES, _options, _weights, DEFAULTS))
