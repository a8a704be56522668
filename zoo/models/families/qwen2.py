"""Qwen2 and Qwen2.5, dense (Yang et al. 2024, arXiv 2407.10671, 2412.15115): Llama with biases on q, k and v."""

from __future__ import annotations

from functools import partial
from typing import Any

from zoo.models.families.llama3 import weights
from zoo.models.families.qwen3 import sliding_window, stack_options
from zoo.models.published.config import Published, attention_word, word
from zoo.models.published.family import Family, families

DEFAULTS: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "max_window_layers": 28,
}


def _options(p: Published) -> dict[str, Any]:
    p.only("mlp_bias", False)
    window, first = sliding_window(p), p("max_window_layers")
    layers = []
    for each in p.windows(window, lambda i: window is not None and i >= first):
        attention = attention_word(p, each, bias=True, out_bias=False, **p.rope())
        layers += [attention, word("swiglu", d_hidden=p("intermediate_size"))]
    return stack_options(p, layers)


def _size(
    width: int, hidden: int, n_layers: int, n_heads: int, n_kv_heads: int, *, tied: bool = False, **others: Any
) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "intermediate_size": hidden,
        "num_hidden_layers": n_layers,
        "num_attention_heads": n_heads,
        "num_key_value_heads": n_kv_heads,
        "tie_word_embeddings": tied,
        "rope_theta": 1000000.0,
        **others,
    }


_LARGE: dict[str, Any] = {"vocab_size": 152064, "rms_norm_eps": 1e-6}
SIZES: dict[str, dict[str, Any]] = {  # of Qwen2.5
    "tiny": _size(64, 192, 2, 4, 2, tied=True, vocab_size=256),
    "0.5b": _size(896, 4864, 24, 14, 2, tied=True),
    "1.5b": _size(1536, 8960, 28, 12, 2, tied=True),
    "3b": _size(2048, 11008, 36, 16, 2, tied=True),
    "7b": _size(3584, 18944, 28, 28, 4, **_LARGE),
    "14b": _size(5120, 13824, 48, 40, 8, **{**_LARGE, "rms_norm_eps": 1e-5}),
    "32b": _size(5120, 27648, 64, 40, 8, **{**_LARGE, "rms_norm_eps": 1e-5}),
    "72b": _size(8192, 29568, 80, 64, 8, **{**_LARGE, "rms_norm_eps": 1e-5}),
}

families.add(
    Family("qwen2", "Qwen2ForCausalLM", "qwen2", SIZES, _options, partial(weights, bias=True, out_bias=False), DEFAULTS)
)
