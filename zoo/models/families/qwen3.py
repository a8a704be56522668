"""Qwen3, dense (Yang et al. 2025, arXiv 2505.09388): Llama's layer with normed queries and keys."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from zoo.models.published.config import Published, attention_word, stack, word
from zoo.models.published.family import Family, families
from zoo.models.published.layers import attention_maps, glu_maps, step_maps, token_maps
from zoo.models.published.maps import Map

DEFAULTS: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": 128,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "max_window_layers": 28,
}


def qwen_attention(p: Published, window: int | None) -> str:
    """Attention of Qwen3, over a window where one is given."""
    return attention_word(
        p,
        window,
        bias=p("attention_bias", False),
        qk_norm=True,
        norm_eps=p.number("rms_norm_eps", 1e-6),
        **p.rope(),
    )


def sliding_window(p: Published) -> int | None:
    """The window of layers that have one; None where the config switches windows off."""
    window = p("sliding_window", None)
    return window if p("use_sliding_window", False) else None


def stack_options(p: Published, layers: list[str]) -> dict[str, Any]:
    """The options of a model of Qwen3's kind."""
    p.only("hidden_act", "silu")
    return {
        "pattern": stack(layers),
        "d_model": p("hidden_size"),
        "vocab_size": p("vocab_size"),
        "norm_eps": p.number("rms_norm_eps", 1e-6),
        "tie_embeddings": p("tie_word_embeddings", False),
    }


def attention_step(p: Published, i: int) -> Iterator[Map]:
    """The weights of attention in layer i."""
    maps = attention_maps(*p.heads(), bias=p("attention_bias", False), qk_norm=True)
    return step_maps(2 * i, f"model.layers.{i}.", "self_attn", maps, norm="input_layernorm")


def _options(p: Published) -> dict[str, Any]:
    window, first = sliding_window(p), p("max_window_layers")
    windows = p.windows(window, lambda i: window is not None and i >= first)
    feed_forward = word("swiglu", d_hidden=p("intermediate_size"))
    return stack_options(p, [step for window in windows for step in (qwen_attention(p, window), feed_forward)])


def _weights(p: Published) -> Iterator[Map]:
    yield from token_maps(p)
    for i in range(p("num_hidden_layers")):
        yield from attention_step(p, i)
        yield from step_maps(2 * i + 1, f"model.layers.{i}.", "mlp", glu_maps(), norm="post_attention_layernorm")


def _size(width: int, hidden: int, n_layers: int, n_heads: int, tied: bool = False) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "intermediate_size": hidden,
        "num_hidden_layers": n_layers,
        "num_attention_heads": n_heads,
        "num_key_value_heads": 8,
        "tie_word_embeddings": tied,
        "rope_theta": 1000000.0,
        "max_position_embeddings": 40960,
    }


SIZES: dict[str, dict[str, Any]] = {
    "tiny": {**_size(64, 192, 2, 4, tied=True), "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 256},
    "0.6b": _size(1024, 3072, 28, 16, tied=True),
    "1.7b": _size(2048, 6144, 28, 16, tied=True),
    "4b": _size(2560, 9728, 36, 32, tied=True),
    "8b": _size(4096, 12288, 36, 32),
    "14b": _size(5120, 17408, 40, 40),
    "32b": _size(5120, 25600, 64, 64),
}

families.add(Family("qwen3", "Qwen3ForCausalLM", "qwen3", SIZES, _options, _weights, defaults=DEFAULTS))
