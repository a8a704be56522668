"""LFM2 (Liquid AI 2025, arXiv 2511.23404): gated short convolutions, some of them replaced by attention, and SwiGLU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from zoo.models.published.config import Published, attention_word, stack, word
from zoo.models.published.family import Family, families
from zoo.models.published.layers import attention_maps, conv_maps, glu_maps, linear_maps, step_maps, token_maps
from zoo.models.published.maps import Map

PROJECTIONS = ("w1", "w3", "w2")
DEFAULTS: dict[str, Any] = {
    "vocab_size": 65536,
    "hidden_size": 2560,
    "intermediate_size": 12288,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 128000,
    "norm_eps": 1e-5,
    "conv_L_cache": 3,
    "block_multiple_of": 256,
    "block_auto_adjust_ff_dim": True,
}


def tied(p: Published) -> bool:
    """Whether the head has the embedding's weights; `tie_embedding` is an older name of the key."""
    tie = p("tie_embedding", p("tie_word_embeddings", True))
    p.only("tie_word_embeddings", tie)
    return tie


def mixers(p: Published, kinds: list[str]) -> list[str]:
    """The convolution or attention of every layer."""
    n_heads, *_ = p.heads()
    p.only("use_pos_enc", True)
    p.only("theta", p("rope_theta", 1000000.0))
    for key in ("conv_dim", "conv_dim_out", "block_dim"):
        p.only(key, p("hidden_size"))
    p.only("num_heads", n_heads)
    attention = attention_word(
        p,
        qk_norm=True,
        norm_eps=p.number("norm_eps"),
        **p.rope(base=1000000.0),
    )
    conv = word("gated_short_conv", conv_size=p("conv_L_cache"), bias=p("conv_bias", False))
    return [conv if kind == "conv" else attention for kind in kinds]


def stack_options(p: Published, mixers: list[str], feed_forwards: list[str]) -> dict[str, Any]:
    """The options of a model of LFM2's kind."""
    return {
        "pattern": stack([step for pair in zip(mixers, feed_forwards, strict=True) for step in pair]),
        "d_model": p("hidden_size"),
        "vocab_size": p("vocab_size"),
        "norm_eps": p.number("norm_eps"),
        "tie_embeddings": tied(p),
    }


def mixer_steps(p: Published, kinds: list[str]) -> Iterator[Map]:
    """The weights of convolutions and attention, and those that are in no layer."""
    bias = p("conv_bias", False)
    yield from token_maps(p, norm="model.embedding_norm.weight", tied=tied(p))
    for i, kind in enumerate(kinds):
        layer = f"model.layers.{i}."
        if kind == "conv":
            conv = [
                *conv_maps(p("hidden_size"), p("conv_L_cache"), bias=bias, name="conv"),
                *linear_maps("in_proj", "in_proj", bias=bias),
                *linear_maps("out_proj", "out_proj", bias=bias),
            ]
            yield from step_maps(2 * i, layer, "conv", conv, norm="operator_norm")
        else:
            names, norms = ("q_proj", "k_proj", "v_proj", "out_proj"), ("q_layernorm", "k_layernorm")
            attention = attention_maps(*p.heads(), qk_norm=True, names=names, norms=norms)
            yield from step_maps(2 * i, layer, "self_attn", attention, norm="operator_norm")


def _kinds(p: Published) -> list[str]:
    attention = p("full_attn_idxs", None)
    default = lambda i: "full_attention" if attention is None or i in attention else "conv"  # noqa: E731
    return p.kinds(default, "conv", "full_attention")


def _d_hidden(p: Published) -> int:
    """The inner width of SwiGLU: by default two thirds of the given one, rounded up."""
    width = p("block_ff_dim", p("intermediate_size"))
    factor, multiple = p("block_ffn_dim_multiplier", 1.0), p("block_multiple_of")
    if not p("block_auto_adjust_ff_dim"):
        return width
    return -(-int(factor * int(2 * width / 3)) // multiple) * multiple


def _options(p: Published) -> dict[str, Any]:
    p.only("block_use_swiglu", True)
    p.only("block_norm_eps", p("norm_eps"))
    p.ignore("block_mlp_init_scale", "block_out_init_scale", "block_use_xavier_init", "conv_use_xavier_init")
    swiglu = word("swiglu", d_hidden=_d_hidden(p))
    return stack_options(p, mixers(p, _kinds(p)), [swiglu] * p("num_hidden_layers"))


def _weights(p: Published) -> Iterator[Map]:
    yield from mixer_steps(p, _kinds(p))
    for i in range(p("num_hidden_layers")):
        maps = glu_maps(names=PROJECTIONS)
        yield from step_maps(2 * i + 1, f"model.layers.{i}.", "feed_forward", maps, norm="ffn_norm")


def _size(width: int, inner: int) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "block_ff_dim": inner,
        "num_hidden_layers": 16,
        "num_attention_heads": width // 64,
        "full_attn_idxs": [2, 5, 8, 10, 12, 14],
    }


SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 192,
        "block_auto_adjust_ff_dim": False,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "full_attn_idxs": [1],
        "vocab_size": 256,
    },
    "350m": _size(1024, 6656),
    "700m": _size(1536, 10240),
    "1.2b": _size(2048, 12288),
    "2.6b": {
        "hidden_size": 2048,
        "intermediate_size": 10752,
        "block_auto_adjust_ff_dim": False,
        "num_hidden_layers": 30,
        "full_attn_idxs": [2, 5, 9, 13, 17, 21, 24, 27],
    },
}

families.add(Family("lfm2", "Lfm2ForCausalLM", "lfm2", SIZES, _options, _weights, DEFAULTS))
