"""GPT-OSS (OpenAI 2025, arXiv 2508.10925): attention with sinks, every other layer within a window, clamped experts.

Experts lie together, with gates and inputs in turn. Those of the official checkpoints are in MXFP4, and are dequantised
when they are read.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from zoo.models.published.config import Published, attention_word, stack, word
from zoo.models.published.family import Family, families
from zoo.models.published.layers import attention_maps, step_maps, token_maps
from zoo.models.published.maps import Map, joined, same, transposed

DEFAULTS: dict[str, Any] = {
    "num_hidden_layers": 36,
    "num_local_experts": 128,
    "vocab_size": 201088,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "head_dim": 64,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "num_experts_per_tok": 4,
    "sliding_window": 128,
    "max_position_embeddings": 131072,
    "attention_bias": True,
    "rope_parameters": {
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
    },
}


def _options(p: Published) -> dict[str, Any]:
    p.only("hidden_act", "silu")
    p.only("swiglu_alpha", 1.702)
    p.only("swiglu_limit", 7.0)
    p.ignore("experts_per_token", "initial_context_length")  # said elsewhere too
    rope = p.rope(base=150000.0)
    moe = word(
        "moe",
        n_experts=p("num_local_experts"),
        top_k=p("num_experts_per_tok"),
        d_hidden=p("intermediate_size"),
        activation="gpt_oss",
        bias=True,
        router_bias=True,
    )
    layers = []
    for window in p.windows(p("sliding_window", None), lambda i: i % 2 == 0):
        attention = attention_word(p, window, bias=p("attention_bias"), sinks=True, **rope)
        layers += [attention, moe]
    return {
        "pattern": stack(layers),
        "d_model": p("hidden_size"),
        "vocab_size": p("vocab_size"),
        "norm_eps": p.number("rms_norm_eps", 1e-5),
        "tie_embeddings": p("tie_word_embeddings", False),
    }


def _weights(p: Published) -> Iterator[Map]:
    yield from token_maps(p)
    for i in range(p("num_hidden_layers")):
        layer = f"model.layers.{i}."
        attention = [*attention_maps(*p.heads(), bias=p("attention_bias")), same("sinks", "sinks")]
        yield from step_maps(2 * i, layer, "self_attn", attention, norm="input_layernorm")
        yield from step_maps(2 * i + 1, layer, "mlp", _moe(p), norm="post_attention_layernorm")


def _moe(p: Published) -> Iterator[Map]:
    for name in ("weight", "bias"):
        yield same(f"router.{name}", f"router.{name}")
    in_turn = torch.arange(2 * p("intermediate_size")).view(-1, 2).T.flatten()  # gates first, then inputs
    yield transposed("up_proj", "experts.gate_up_proj", index=in_turn)
    yield joined("up_bias", ["experts.gate_up_proj_bias"], dim=-1, index=in_turn)
    yield transposed("down_proj", "experts.down_proj")
    yield same("down_bias", "experts.down_proj_bias")


SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "sliding_window": 16,
        "vocab_size": 256,
    },
    "20b": {"num_hidden_layers": 24, "num_local_experts": 32},
    "120b": {},
}

families.add(
    Family("gpt_oss", "GptOssForCausalLM", "gpt_oss", SIZES, _options, _weights, DEFAULTS, quantised=("mxfp4",))
)
