"""A family of one file: Helium, whose published weights are read and written."""

from collections.abc import Iterator
from typing import Any

from zoo.models.published.config import Published, stack, word
from zoo.models.published.family import Family, families
from zoo.models.published.layers import attention_maps, glu_maps, step_maps, token_maps
from zoo.models.published.maps import Map


def options(p: Published) -> dict[str, Any]:
    """The options of `ModelConfig` for a published config; a key that is never read here is refused by name."""
    p.only("hidden_act", "silu")
    p.only("attention_bias", False)
    n_heads, n_kv_heads, head_dim = p.heads()
    rope = {**p.rope(base=100000.0, context=4096), "rope_interleaved": True}  # neighbouring channels rotate
    attention = word("gqa", n_heads=n_heads, n_kv_heads=n_kv_heads, head_dim=head_dim, **rope)
    layer = [attention, word("swiglu", d_hidden=p("intermediate_size"), bias=p("mlp_bias", False))]
    return {
        "pattern": stack(layer * p("num_hidden_layers")),
        "d_model": p("hidden_size"),
        "vocab_size": p("vocab_size"),
        "norm_eps": p.number("rms_norm_eps", 1e-8),
        "tie_embeddings": p("tie_word_embeddings", False),
    }


def weights(p: Published) -> Iterator[Map]:
    """Where each weight lies in a checkpoint; the same maps are followed there and back."""
    yield from token_maps(p)
    for i in range(p("num_hidden_layers")):
        layer = f"model.layers.{i}."
        yield from step_maps(2 * i, layer, "self_attn", attention_maps(*p.heads()), norm="input_layernorm")
        feed_forward = glu_maps(bias=p("mlp_bias", False))
        yield from step_maps(2 * i + 1, layer, "mlp", feed_forward, norm="post_attention_layernorm")


SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 16,
        "vocab_size": 256,
    },
    "2b": {
        "hidden_size": 2560,
        "intermediate_size": 7040,
        "num_hidden_layers": 24,
        "num_attention_heads": 20,
        "num_key_value_heads": 20,
        "head_dim": 128,
        "vocab_size": 48000,
    },
}

families.add(Family("helium", "HeliumForCausalLM", "helium", SIZES, options, weights))
