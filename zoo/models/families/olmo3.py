"""OLMo 3 (OLMo Team 2025, arXiv 2512.13961): norms on outputs alone, three windowed layers for each that sees all.

As in OLMo 2, queries and keys are normed over all heads at once. The positions of windowed layers are never scaled.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from zoo.models.families.qwen3 import stack_options
from zoo.models.published.config import Published, attention_word, word
from zoo.models.published.family import Family, families
from zoo.models.published.layers import attention_maps, glu_maps, step_maps, token_maps
from zoo.models.published.maps import Map

DEFAULTS: dict[str, Any] = {
    "vocab_size": 50304,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "sliding_window": 4096,
}


def _attention(p: Published, window: int | None) -> str:
    if window is None:
        rope = p.rope(kind="full_attention", base=500000.0)
    else:
        rope = p.rope(kind="sliding_attention", base=500000.0, scaling=None)
    return attention_word(
        p,
        window,
        bias=p("attention_bias", False),
        qk_norm=True,
        qk_norm_over="all",
        norm_eps=p.number("rms_norm_eps"),
        placement="output",
        **rope,
    )


def _options(p: Published) -> dict[str, Any]:
    p.ignore("rope_theta", "rope_scaling")  # of layers that may not be there
    windows = p.windows(p("sliding_window", None), lambda i: bool((i + 1) % 4))
    feed_forward = word("swiglu", d_hidden=p("intermediate_size"), placement="output")
    return stack_options(p, [step for window in windows for step in (_attention(p, window), feed_forward)])


def _weights(p: Published) -> Iterator[Map]:
    yield from token_maps(p)
    for i in range(p("num_hidden_layers")):
        layer = f"model.layers.{i}."
        attention = attention_maps(*p.heads(), bias=p("attention_bias", False), qk_norm=True)
        yield from step_maps(2 * i, layer, "self_attn", attention, norm=None, norm_out="post_attention_layernorm")
        yield from step_maps(2 * i + 1, layer, "mlp", glu_maps(), norm=None, norm_out="post_feedforward_layernorm")


_PUBLISHED: dict[str, Any] = {
    "vocab_size": 100278,
    "max_position_embeddings": 65536,
    "rms_norm_eps": 1e-6,
    "rope_theta": 500000,
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 8192,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "attention_factor": 1.2079441541679836,
    },
}
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "vocab_size": 256,
        "sliding_window": 16,
    },
    "7b": _PUBLISHED,
    "32b": {
        **_PUBLISHED,
        "hidden_size": 5120,
        "intermediate_size": 27648,
        "num_hidden_layers": 64,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
    },
}

families.add(Family("olmo3", "Olmo3ForCausalLM", "olmo3", SIZES, _options, _weights, DEFAULTS))
