"""SmolLM3 (Bakouch et al. 2025, Hugging Face): Llama's layer; in every fourth, attention has no positions."""

from __future__ import annotations

from typing import Any

from zoo.models.families.llama3 import weights
from zoo.models.families.qwen3 import sliding_window, stack_options
from zoo.models.published.config import Published, attention_word, word
from zoo.models.published.family import Family, families

DEFAULTS: dict[str, Any] = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "no_rope_layer_interval": 4,
    "tie_word_embeddings": True,
}


def _rotated(p: Published) -> list[bool]:
    """Whether the attention of each layer has rotary positions, as `no_rope_layers` says, which is 1 where it has."""
    n_layers, period = p("num_hidden_layers"), p.whole("no_rope_layer_interval")
    told = list(p("no_rope_layers", None) or [int((i + 1) % period != 0) for i in range(n_layers)])
    if len(told) != n_layers or not all(each in (0, 1) for each in told):
        raise ValueError(f"no_rope_layers is no list of 0 or 1 for each of {n_layers} layers")
    return [bool(each) for each in told]


def _options(p: Published) -> dict[str, Any]:
    rotated, window = _rotated(p), sliding_window(p)
    p.ignore("max_window_layers")
    feed_forward = word("swiglu", d_hidden=p("intermediate_size"), bias=p("mlp_bias", False))
    rope = p.rope(base=2000000.0)
    layers = []
    for own, each in zip(rotated, p.windows(window, lambda i: window is not None and not rotated[i]), strict=True):
        turned = rope if own else {"rope": False}
        attention = attention_word(p, each, bias=p("attention_bias", False), **turned)
        layers += [attention, feed_forward]
    return stack_options(p, layers)


SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 256,
        "pad_token_id": None,  # the default is beyond this vocabulary
    },
    "3b": {"max_position_embeddings": 65536, "rope_theta": 5000000.0},
}

families.add(Family("smollm3", "SmolLM3ForCausalLM", "smollm3", SIZES, _options, weights, DEFAULTS))
