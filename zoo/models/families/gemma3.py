"""Gemma 3, its text model (Gemma Team 2025, arXiv 2503.19786): five layers with a window for each that sees all.

Norms stand before and after every mixer and are zero-centred, those of queries and keys too; the two kinds of layers
have rotary positions of their own. Sizes from 4b on are the text models within published ones that also see.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from zoo.models.published.config import Published, attention_word, stack, word
from zoo.models.published.family import Family, families
from zoo.models.published.layers import attention_maps, glu_maps, step_maps, token_maps
from zoo.models.published.maps import Map

DEFAULTS: dict[str, Any] = {
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "sliding_window_pattern": 6,
}


def _attention(p: Published, window: int | None) -> str:
    if window is None:
        rope = p.rope(kind="full_attention", base=1e6)
    else:
        rope = p.rope(kind="sliding_attention", theta="rope_local_base_freq", scaling=None)
    return attention_word(
        p,
        window,
        bias=p("attention_bias", False),
        scale=p("query_pre_attn_scalar") ** -0.5,
        qk_norm=True,
        norm_zero_centred=True,
        norm_eps=p.number("rms_norm_eps", 1e-6),
        **rope,
    )


def stack_options(p: Published, attention: list[str]) -> dict[str, Any]:
    """The options of a model of Gemma's kind, given the attention of every layer."""
    p.only("hidden_activation", "gelu_pytorch_tanh")
    p.only("use_bidirectional_attention", False)
    feed_forward = word("geglu", d_hidden=p("intermediate_size"), approximate=True)
    return {
        "pattern": stack([step for each in attention for step in (each, feed_forward)]),
        "d_model": p("hidden_size"),
        "vocab_size": p("vocab_size"),
        "norm": "rmsnorm_zero_centred",
        "placement": "sandwich",
        "norm_eps": p.number("rms_norm_eps", 1e-6),
        "embedding_scale": p("hidden_size") ** 0.5,
        "logit_softcap": p.limit("final_logit_softcapping"),
        "tie_embeddings": p("tie_word_embeddings"),
    }


def _options(p: Published) -> dict[str, Any]:
    p.only("attn_logit_softcapping", None)
    p.ignore("cache_implementation", "_sliding_window_pattern", "rope_theta", "rope_scaling", "rope_local_base_freq")
    period = p("sliding_window_pattern")
    windows = p.windows(p("sliding_window", None), lambda i: bool((i + 1) % period))
    return stack_options(p, [_attention(p, window) for window in windows])


def weights(p: Published, *, qk_norm: bool = True) -> Iterator[Map]:
    """Where the weights of a model of Gemma's kind lie."""
    yield from token_maps(p)
    for i in range(p("num_hidden_layers")):
        layer = f"model.layers.{i}."
        attention = attention_maps(*p.heads(), bias=p("attention_bias", False), qk_norm=qk_norm)
        for step, part, maps, norm, norm_out in (
            (2 * i, "self_attn", attention, "input_layernorm", "post_attention_layernorm"),
            (2 * i + 1, "mlp", glu_maps(), "pre_feedforward_layernorm", "post_feedforward_layernorm"),
        ):
            yield from step_maps(step, layer, part, maps, norm=norm, norm_out=norm_out)


def _size(
    width: int, hidden: int, n_layers: int, n_heads: int, n_kv_heads: int, window: int, **others: Any
) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "intermediate_size": hidden,
        "num_hidden_layers": n_layers,
        "num_attention_heads": n_heads,
        "num_key_value_heads": n_kv_heads,
        "sliding_window": window,
        **others,
    }


_SHORT = {"vocab_size": 262144, "max_position_embeddings": 32768}
_LONG = {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        **_size(64, 192, 3, 4, 2, window=16, head_dim=16, vocab_size=256, query_pre_attn_scalar=16),
        "sliding_window_pattern": 3,
    },
    "270m": _size(640, 2048, 18, 4, 1, window=512, **_SHORT),
    "1b": _size(1152, 6912, 26, 4, 1, window=512, **_SHORT),
    "4b": _size(2560, 10240, 34, 8, 4, window=1024, **_LONG),
    "12b": _size(3840, 15360, 48, 16, 8, window=1024, **_LONG),
    "27b": _size(5376, 21504, 62, 32, 16, window=1024, head_dim=128, query_pre_attn_scalar=168, **_LONG),
}

families.add(
    Family("gemma3", "Gemma3ForCausalLM", "gemma3_text", SIZES, _options, weights, DEFAULTS, bare="Gemma3TextModel")
)
