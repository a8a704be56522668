"""RecurrentGemma (Botev et al. 2024, arXiv 2404.07839): Griffin, two RG-LRU blocks to one of local attention.

As in Gemma, norms have weights 1 + w, the embedding is multiplied by sqrt(D), rounded to bfloat16, and the feed-forward
is a GeGLU of half the given width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from zoo.models.published.config import Published, stack, word
from zoo.models.published.family import Family, families
from zoo.models.published.layers import attention_maps, conv_maps, glu_maps, linear_maps, step_maps, token_maps
from zoo.models.published.maps import Map, same, stacked

DEFAULTS: dict[str, Any] = {
    "vocab_size": 256000,
    "hidden_size": 2560,
    "intermediate_size": 7680,
    "num_hidden_layers": 26,
    "num_attention_heads": 10,
    "attention_window_size": 2048,
    "conv1d_width": 4,
    "logits_soft_cap": 30.0,
    "rms_norm_eps": 1e-6,
    "block_types": ("recurrent", "recurrent", "attention"),
}


def _kinds(p: Published) -> list[str]:
    """The kind of every layer: `block_types` over and over."""
    given = p("block_types")
    return p.kinds(lambda i: given[i % len(given)], "recurrent", "attention")


def _options(p: Published) -> dict[str, Any]:
    width, eps = p("hidden_size"), p.number("rms_norm_eps")
    p.only("hidden_activation", "gelu_pytorch_tanh")
    p.only("embeddings_scale_by_sqrt_dim", True)
    p.only("head_dim", width // p("num_attention_heads"))
    p.ignore("w_init_variance_scale", "final_w_init_variance_scale", "_block_types")
    n_heads, n_kv_heads, head_dim = p.heads()
    attention = word(
        "swa",
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        window=p("attention_window_size"),
        bias=p("attention_bias", False),
        out_bias=True,
        rope_fraction=p.rope_fraction(head_dim, default=0.5),
        **p.rope(),
    )
    recurrent = word("rg_lru", expand=p("lru_width", width) / width, n_blocks=n_heads, conv_size=p("conv1d_width"))
    geglu = word("geglu", d_hidden=p("intermediate_size") // 2, bias=True, approximate=True)
    mixers = {"attention": attention, "recurrent": recurrent}
    return {
        "pattern": stack([step for kind in _kinds(p) for step in (mixers[kind], geglu)]),
        "d_model": width,
        "vocab_size": p("vocab_size"),
        "norm": "rmsnorm_zero_centred",
        "norm_eps": eps,
        "tie_embeddings": p("tie_word_embeddings", True),
        "embedding_scale": torch.tensor(width**0.5, dtype=torch.bfloat16, device="cpu").item(),
        "logit_softcap": p.limit("logits_soft_cap", 30.0),
    }


def _recurrent_maps(p: Published) -> Iterator[Map]:
    """One RG-LRU block."""
    for name in ("linear_x", "linear_y", "linear_out"):
        yield from linear_maps(name, name, bias=True)
    yield from conv_maps(p("lru_width", p("hidden_size")), p("conv1d_width"), bias=True, name="conv_1d")
    for kind in ("weight", "bias"):
        yield stacked(f"gate_{kind}", [f"rg_lru.{gate}_gate_{kind}" for gate in ("input", "recurrent")])
    yield same("decay", "rg_lru.recurrent_param")


def _weights(p: Published) -> Iterator[Map]:
    yield from token_maps(p, norm="model.final_norm.weight", tied=True)
    for i, kind in enumerate(_kinds(p)):
        layer = f"model.layers.{i}."
        attention = attention_maps(*p.heads(), bias=p("attention_bias", False), out_bias=True)
        mixer = attention if kind == "attention" else _recurrent_maps(p)
        yield from step_maps(2 * i, layer, "temporal_block", mixer, norm="temporal_pre_norm")
        yield from step_maps(2 * i + 1, layer, "mlp_block", glu_maps(bias=True), norm="channel_pre_norm")


SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "attention_window_size": 16,
        "vocab_size": 256,
    },
    "2b": {"intermediate_size": 15360, "num_key_value_heads": 1},
    "9b": {
        "hidden_size": 4096,
        "intermediate_size": 24576,
        "num_hidden_layers": 38,
        "num_attention_heads": 16,
        "num_key_value_heads": 1,
    },
}

families.add(
    Family(
        "recurrent_gemma",
        "RecurrentGemmaForCausalLM",
        "recurrent_gemma",
        SIZES,
        _options,
        _weights,
        DEFAULTS,
        ignored=(r"rotary_emb\.inv_freq$",),
    )
)
