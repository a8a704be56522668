"""Qwen3.5, dense (Qwen Team 2026): Qwen3-Next without experts, its recurrent projections one by one.

Published models see too; their text part is read, out of `text_config` and `model.language_model.`, and written as the
text model that transformers has. The tower that sees and the layer that predicts further tokens are left aside.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from zoo.models.families import qwen3_next
from zoo.models.published.config import Published
from zoo.models.published.family import Family, families
from zoo.models.published.layers import conv_maps
from zoo.models.published.maps import Map, also_named, joined, same

DEFAULTS: dict[str, Any] = {
    "vocab_size": 248320,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 32768,
    "full_attention_interval": 4,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "decoder_sparse_step": 1,
    "num_experts": 0,
}


def options(p: Published) -> dict[str, Any]:
    """The options of a text model, dense or with experts."""
    p.only("attn_output_gate", True)
    p.ignore("mtp_num_hidden_layers", "mtp_use_dedicated_embeddings")
    return qwen3_next.options(p)


def _options(p: Published) -> dict[str, Any]:
    p.only("num_experts", 0)
    return options(p)


def _recurrent_maps(p: Published) -> Iterator[Map]:
    """One gated DeltaNet."""
    groups, heads, d_key, d_value = qwen3_next.recurrent_sizes(p)
    width = 2 * groups * d_key + heads * d_value
    names = [f"in_proj_{part}.weight" for part in ("qkv", "b", "a", "z")]
    yield joined("in_proj.weight", names, [width, heads, heads, heads * d_value])
    yield from conv_maps(width, p("linear_conv_kernel_dim"), bias=False)
    for name in ("A_log", "dt_bias", "norm.weight", "out_proj.weight"):
        yield same(name, name)


def weights(p: Published) -> Iterator[Map]:
    """Where the weights of a text model lie, alone or within a model that sees."""
    return also_named(qwen3_next.weights(p, _recurrent_maps), _within)


def _within(name: str) -> str:
    """The name of a weight in a checkpoint of a model that sees too."""
    return name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name


SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "vocab_size": 256,
    },
    "0.8b": {
        "hidden_size": 1024,
        "intermediate_size": 3584,
        "num_hidden_layers": 24,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "linear_num_value_heads": 16,
        "max_position_embeddings": 262144,
        "rope_theta": 10000000,
        "tie_word_embeddings": True,
    },
    "9b": {"max_position_embeddings": 262144, "rope_theta": 10000000},
}

BESIDE_THE_TEXT = (r"^mtp\.", r"^model\.visual\.")
"""Names in checkpoints of what predicts further tokens, and of what sees."""

families.add(
    Family(
        "qwen3_5",
        "Qwen3_5ForCausalLM",
        "qwen3_5_text",
        SIZES,
        _options,
        weights,
        DEFAULTS,
        ignored=BESIDE_THE_TEXT,
        bare="Qwen3_5TextModel",
        seeing="Qwen3_5ForConditionalGeneration",
    )
)
