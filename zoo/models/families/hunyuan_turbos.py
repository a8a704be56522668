"""Hunyuan-TurboS, the base of Hunyuan T1 (Tencent 2025, arXiv 2505.15431): attention, Mamba-2 and experts.

Neither weights nor a config are public, so config keys and weight names here are ours. Published: 560B parameters, 56B
of them active; 128 layers, of which 57 Mamba-2, 7 grouped-query attention and 64 experts, in blocks AMF and MF; 1
shared and 32 routed experts, 2 of which a token has. Reported by others: width 5120, 64 heads with 8 of keys and
values, 16 groups in Mamba-2, SwiGLU. The counts of layers leave experts after each mixer, so an AMF block is A F M F.

Inferred: where the 7 blocks stand (evenly), heads of width / n_heads, rotary positions with the base 10000, a softmax
over experts with its chosen weights normalised, tied embeddings of Hunyuan-Large's vocabulary; and what the two numbers
of parameters leave over: Mamba-2 as wide as the stream (twice that would make 61B active) with 64 states a head,
experts 17024 wide.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from zoo.core.errors import UsageError
from zoo.models.published.config import Published, attention_word, stack, word
from zoo.models.published.family import Family, families
from zoo.models.published.layers import attention_maps, mamba2_maps, moe_maps, step_maps, token_maps
from zoo.models.published.maps import Map


def _letters(p: Published) -> str:
    """The kinds of the layers: A attention, M Mamba-2, F experts."""
    letters = p("hybrid_pattern")
    if strange := set(letters) - set("AMF"):
        raise UsageError(f"{p.architecture} with a layer {min(strange)!r} is not supported, only A, M and F.")
    return letters


def _options(p: Published) -> dict[str, Any]:
    p.only("hidden_act", "silu")
    width, eps, letters = p("hidden_size"), p.number("rms_norm_eps", 1e-5), _letters(p)
    p.only("num_hidden_layers", len(letters))
    words = {
        "A": attention_word(p, **p.rope()),
        "M": word(
            "mamba2",
            d_state=p("mamba_d_state"),
            expand=p("mamba_num_heads") * p("mamba_head_dim") / width,
            head_dim=p("mamba_head_dim"),
            n_groups=p("mamba_n_groups"),
            conv_size=p("mamba_d_conv", 4),
            norm_eps=eps,
        ),
        "F": word(
            "moe",
            n_experts=p("num_experts"),
            top_k=p("num_experts_per_tok"),
            d_hidden=p("moe_intermediate_size"),
            n_shared=p("num_shared_experts", 1),
        ),
    }
    return {
        "pattern": stack([words[letter] for letter in letters]),
        "d_model": width,
        "vocab_size": p("vocab_size"),
        "norm_eps": eps,
        "tie_embeddings": p("tie_word_embeddings", True),
    }


def _weights(p: Published) -> Iterator[Map]:
    yield from token_maps(p, tied=True)
    d_inner, keys = p("mamba_num_heads") * p("mamba_head_dim"), p("mamba_n_groups") * p("mamba_d_state")
    for i, letter in enumerate(_letters(p)):
        if letter == "A":
            maps = attention_maps(*p.heads())
        elif letter == "M":
            maps = mamba2_maps(d_inner, keys, p("mamba_d_conv", 4), bias=False, conv_bias=True)
        else:
            maps = moe_maps(p("num_experts"), shared="shared_experts" if p("num_shared_experts", 1) else None)
        yield from step_maps(i, f"model.layers.{i}.", "mixer", maps, norm="norm")


SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hybrid_pattern": "AFMFMF",
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "mamba_n_groups": 2,
        "mamba_d_state": 32,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "vocab_size": 256,
    },
    "560b": {
        "hybrid_pattern": 7 * ("AFMF" + 7 * "MF") + "MF",
        "hidden_size": 5120,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "mamba_num_heads": 80,
        "mamba_head_dim": 64,
        "mamba_n_groups": 16,
        "mamba_d_state": 64,
        "num_experts": 32,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 17024,
        "vocab_size": 129024,
    },
}

families.add(Family("hunyuan_turbos", "HunYuanTurboSForCausalLM", "hunyuan_turbos", SIZES, _options, _weights))
