"""Gemma 2 (Gemma Team 2024, arXiv 2408.00118): a windowed layer, then one that sees all; scores and logits are capped.

transformers caps scores in its eager attention alone (`attn_implementation="eager"`).
"""

from __future__ import annotations

from functools import partial
from typing import Any

from zoo.models.families.gemma3 import stack_options, weights
from zoo.models.published.config import Published, attention_word
from zoo.models.published.family import Family, families

DEFAULTS: dict[str, Any] = {
    "vocab_size": 256000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0,
}


def _options(p: Published) -> dict[str, Any]:
    p.ignore("sliding_window_size")  # said in sliding_window too

    def attention(window: int | None) -> str:
        return attention_word(
            p,
            window,
            bias=p("attention_bias", False),
            scale=p("query_pre_attn_scalar") ** -0.5,
            softcap=p.limit("attn_logit_softcapping"),
            **p.rope(),
        )

    windows = p.windows(p("sliding_window", None), lambda i: bool((i + 1) % 2))
    return stack_options(p, [attention(window) for window in windows])


SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 256,
        "query_pre_attn_scalar": 16,
        "sliding_window": 16,
    },
    "2b": {},
    "9b": {
        "hidden_size": 3584,
        "intermediate_size": 14336,
        "num_hidden_layers": 42,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
    },
    "27b": {
        "hidden_size": 4608,
        "intermediate_size": 36864,
        "num_hidden_layers": 46,
        "num_attention_heads": 32,
        "num_key_value_heads": 16,
        "head_dim": 128,
        "query_pre_attn_scalar": 144,
    },
}

families.add(
    Family("gemma2", "Gemma2ForCausalLM", "gemma2", SIZES, _options, partial(weights, qk_norm=False), DEFAULTS)
)
