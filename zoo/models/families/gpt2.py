"""GPT-2 (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"): learned positions, layer norms.

Its checkpoints hold matrices with their inputs along the rows. The first ones leave `transformer.` out of the names and
hold masks; both forms are read, and the later one is written.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from zoo.models.published.config import ACTIVATIONS, Published, stack, word
from zoo.models.published.family import Family, families
from zoo.models.published.layers import step_maps, token_maps
from zoo.models.published.maps import Map, same, transposed

DEFAULTS: dict[str, Any] = {
    "vocab_size": 50257,
    "n_positions": 1024,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "tie_word_embeddings": True,
}


def _options(p: Published) -> dict[str, Any]:
    p.only("scale_attn_weights", True)
    for key in ("scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "add_cross_attention"):
        p.only(key, False)
    p.ignore("n_ctx", "n_special", "predict_special_tokens", "output_past")  # of old releases, said elsewhere or unused
    p.ignore(
        "summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels", "summary_first_dropout"
    )
    attention = word("mha", n_heads=p("n_head"), rope=False, bias=True)
    activation = p.choice("activation_function", ACTIVATIONS, "gelu_new")
    feed_forward = word("mlp", d_hidden=p("n_inner", 4 * p("n_embd")), activation=activation)
    return {
        "pattern": stack([attention, feed_forward] * p("n_layer")),
        "d_model": p("n_embd"),
        "vocab_size": p("vocab_size"),
        "norm": "layernorm",
        "norm_eps": p.number("layer_norm_epsilon", 1e-5),
        "positions": "learned",
        "max_len": p("n_positions"),
        "tie_embeddings": p("tie_word_embeddings"),
    }


def _weights(p: Published) -> Iterator[Map]:
    top = "transformer."
    yield from token_maps(p, embedding=f"{top}wte.weight", norm=f"{top}ln_f.weight", norm_bias=f"{top}ln_f.bias")
    yield same("positions.weight", f"{top}wpe.weight")
    for i in range(p("n_layer")):
        layer = f"{top}h.{i}."
        yield from step_maps(2 * i, layer, "attn", _two("c_attn", "c_proj"), norm="ln_1", norm_bias=True)
        yield from step_maps(2 * i + 1, layer, "mlp", _two("c_fc", "c_proj"), norm="ln_2", norm_bias=True)


def _two(first: str, last: str) -> Iterator[Map]:
    """The projections of a mixer into it and out of it."""
    for ours, theirs in (("in_proj", first), ("out_proj", last)):
        yield transposed(f"{ours}.weight", f"{theirs}.weight")
        yield same(f"{ours}.bias", f"{theirs}.bias")


SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"vocab_size": 256, "n_positions": 256, "n_embd": 64, "n_layer": 2, "n_head": 4},
    "124m": {},
    "355m": {"n_embd": 1024, "n_layer": 24, "n_head": 16},
    "774m": {"n_embd": 1280, "n_layer": 36, "n_head": 20},
    "1.5b": {"n_embd": 1600, "n_layer": 48, "n_head": 25},
}

families.add(
    Family(
        "gpt2",
        "GPT2LMHeadModel",
        "gpt2",
        SIZES,
        _options,
        _weights,
        defaults=DEFAULTS,
        ignored=(r"^(transformer\.)?h\.\d+\.attn\.(masked_)?bias$",),
    )
)
