"""OLMo Hybrid (Allen Institute for AI 2026): three gated DeltaNets to one attention layer.

Attention layers and their feed-forwards are normed as in OLMo 2: on their outputs, and over all heads' queries and
keys at once. The others are normed before. The published models have no positions: `rope_theta` is null.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from zoo.models.published.config import Published, stack, word
from zoo.models.published.family import Family, families
from zoo.models.published.layers import attention_maps, conv_parts_maps, glu_maps, step_maps, token_maps
from zoo.models.published.maps import Map, also_named, joined, same

DEFAULTS: dict[str, Any] = {
    "vocab_size": 100352,
    "hidden_size": 3840,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 30,
    "max_position_embeddings": 65536,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "linear_a_log_min": 0.0,
    "linear_a_log_max": 16.0,
    "linear_dt_min": 0.001,
    "linear_dt_max": 0.1,
    "linear_conv_kernel_dim": 4,
    "linear_allow_neg_eigval": True,
}


def _kinds(p: Published) -> list[str]:
    names, first = ("full_attention", "linear_attention"), min(p("num_hidden_layers"), 4) - 1
    return p.kinds(lambda i: names[i % 4 < first], *names)


def _sizes(p: Published) -> tuple[int, int, int, int]:
    """Numbers of heads of keys and of values, and their widths, in recurrent layers."""
    heads = p("num_attention_heads")
    keys = p("linear_num_key_heads", heads)
    d_key = p("linear_key_head_dim", int(0.75 * p("hidden_size") / keys))
    return keys, p("linear_num_value_heads", heads), d_key, p("linear_value_head_dim", 2 * d_key)


def _positions(p: Published) -> dict[str, Any]:
    """The options of rotary positions, or of none."""
    theta = p("rope_theta", None)  # a null here or there means none, nothing at all means the default
    return p.rope() if dict(p("rope_parameters", {})).get("rope_theta", theta) else {"rope": False}


def _options(p: Published) -> dict[str, Any]:
    p.only("hidden_act", "silu")
    p.ignore("linear_dt_init_floor")
    eps, (n_heads, n_kv_heads, head_dim) = p.number("rms_norm_eps"), p.heads()
    attention = word(
        "gqa",
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        bias=p("attention_bias", False),
        qk_norm=True,
        qk_norm_over="all",
        norm_eps=eps,
        placement="output",
        **_positions(p),
    )
    n_keys, n_values, d_key, d_value = _sizes(p)
    recurrent = word(
        "gated_deltanet",
        n_heads=n_keys,
        n_v_heads=n_values,
        head_dim=d_key,
        expand_v=d_value / d_key,
        conv_size=p("linear_conv_kernel_dim"),
        allow_neg_eigval=p("linear_allow_neg_eigval"),
        A_init_range=(p.number("linear_a_log_min"), p.number("linear_a_log_max")),
        dt_init_range=(p.number("linear_dt_min"), p.number("linear_dt_max")),
        norm_eps=1e-5,  # rms_norm_eps is that of the other norms
    )
    width = p("intermediate_size")
    layers = {
        "full_attention": (attention, word("swiglu", d_hidden=width, placement="output")),
        "linear_attention": (recurrent, word("swiglu", d_hidden=width)),
    }
    return {
        "pattern": stack([step for kind in _kinds(p) for step in layers[kind]]),
        "d_model": p("hidden_size"),
        "vocab_size": p("vocab_size"),
        "norm_eps": eps,
        "tie_embeddings": p("tie_word_embeddings", False),
    }


def _recurrent_maps(p: Published) -> Iterator[Map]:
    """One gated DeltaNet."""
    n_keys, n_values, d_key, d_value = _sizes(p)
    keys, values = n_keys * d_key, n_values * d_value
    names = [f"{name}_proj.weight" for name in "qkvbag"]
    yield joined("in_proj.weight", names, [keys, keys, values, n_values, n_values, values])
    yield from (replace(m, recut=True) for m in conv_parts_maps([keys, keys, values]))  # transformers: in equal parts
    yield same("A_log", "A_log")
    yield same("dt_bias", "dt_bias")
    yield same("norm.weight", "o_norm.weight")
    yield same("out_proj.weight", "o_proj.weight")


def _layer_maps(p: Published, i: int, kind: str) -> Iterator[Map]:
    """Layer i, whose norms transformers names in two ways."""
    layer = f"model.layers.{i}."
    if kind == "linear_attention":
        yield from step_maps(2 * i, layer, "linear_attn", _recurrent_maps(p), norm="attention_layer_norm")
        yield from step_maps(2 * i + 1, layer, "mlp", glu_maps(), norm="feedforward_layer_norm")
        return
    norms = "post_attention_layernorm", "post_feedforward_layernorm"
    attention = attention_maps(*p.heads(), bias=p("attention_bias", False), qk_norm=True)
    steps = step_maps(2 * i, layer, "self_attn", attention, norm=None, norm_out=norms[0])
    yield from also_named(steps, lambda name: name.replace(norms[0], "feedforward_layer_norm"))
    yield from step_maps(2 * i + 1, layer, "mlp", glu_maps(), norm=None, norm_out=norms[1])


def _weights(p: Published) -> Iterator[Map]:
    yield from token_maps(p)
    for i, kind in enumerate(_kinds(p)):
        yield from _layer_maps(p, i, kind)


SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "vocab_size": 256,
        "pad_token_id": None,  # the default is beyond this vocabulary
    },
    "7b": {"rope_theta": None, "rope_parameters": None},
}

families.add(Family("olmo_hybrid", "OlmoHybridForCausalLM", "olmo_hybrid", SIZES, _options, _weights, DEFAULTS))
