"""MiniMax-Text-01 and M1 (MiniMax 2025, arXiv 2501.08313): lightning attention, and softmax in every eighth layer.

Every layer adds to the normed stream, so that each norm stands after a sum: the first follows the embedding, and the
last is the one before the head. Softmax attention rotates the first `rotary_dim` channels of a head (half of them), as
in the authors' code; transformers rotates all of them. Configs come in the keys of transformers (`MiniMaxForCausalLM`)
and in those of the authors, of which weights have the same names.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from zoo.core.errors import UsageError
from zoo.models.published.config import Published, attention_word, stack, word
from zoo.models.published.family import Family, families
from zoo.models.published.layers import attention_maps, moe_maps, step_maps, token_maps
from zoo.models.published.maps import Map, joined, same

DEFAULTS: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "num_experts_per_tok": 2,
    "num_local_experts": 8,
}
FULL, LINEAR = "full_attention", "linear_attention"
FACTORS = {  # on the stream and on what is added to it, in the keys of transformers and of the authors
    FULL: (("full_attn_alpha_factor", "full_attn_beta_factor"), "layernorm_full_attention"),
    LINEAR: (("linear_attn_alpha_factor", "linear_attn_beta_factor"), "layernorm_linear_attention"),
    "mlp": (("mlp_alpha_factor", "mlp_beta_factor"), "layernorm_mlp"),
}
TABLES = (r"self_attn\.(slope_rate|query_decay|key_decay|diagonal_decay)$",)
"""Names in checkpoints of decays, which follow from the config."""


def _kinds(p: Published) -> list[str]:
    """The kind of attention of every layer."""
    if (given := p("attn_type_list", None)) is None:
        return p.kinds(lambda i: FULL if (i + 1) % 2 else LINEAR, FULL, LINEAR)
    if strange := set(given) - {0, 1}:
        raise UsageError(f"{p.architecture} with {min(strange)!r} in attn_type_list is not supported: 0 or 1.")
    kinds = [FULL if kind else LINEAR for kind in given]
    p.only("num_hidden_layers", len(kinds))
    return p.kinds(kinds.__getitem__, FULL, LINEAR)


def _factors(p: Published, part: str) -> dict[str, float | None]:
    """The step options of a part of a layer: factors on the stream and on what is added to it."""
    keys, theirs = FACTORS[part]
    given = [p.number(key, p(f"{theirs}_{name}", 1)) for key, name in zip(keys, ("alpha", "beta"), strict=True)]
    scales = zip(("residual_scale", "out_scale"), given, strict=True)
    return {option: None if factor == 1 else factor for option, factor in scales}


def _options(p: Published) -> dict[str, Any]:
    p.only("hidden_act", "silu")
    p.only("postnorm", True)
    if shared := p("shared_intermediate_size", 0):  # of one expert, or a list with one for every layer
        p.only("shared_intermediate_size", [0] * len(shared) if isinstance(shared, list) else 0)
    p.ignore("block_size", "shared_moe_mode")  # a way to compute; of a shared expert
    n_heads, _, head_dim = p.heads()
    share = p.rope_fraction(head_dim, default=p("rotary_dim", head_dim) / head_dim)
    p.only("rotary_dim", int(share * head_dim))
    words = {
        FULL: attention_word(
            p,
            p("sliding_window", None),
            rope_fraction=share,
            **p.rope(base=1000000.0),
            **_factors(p, FULL),
        ),
        LINEAR: word(
            "linear_attention",
            n_heads=n_heads,
            feature_dim=head_dim,
            value_dim=head_dim,
            feature_map="silu",
            value_silu=True,
            decay="lightning",
            norm_heads=False,
            norm_eps=1e-6,  # rms_norm_eps is that of the other norms
            gate=True,
            **_factors(p, LINEAR),
        ),
    }
    moe = word(
        "moe",
        n_experts=p("num_local_experts"),
        top_k=p("num_experts_per_tok"),
        d_hidden=p("intermediate_size"),
        **_factors(p, "mlp"),
    )
    return {
        "pattern": stack([step for kind in _kinds(p) for step in (words[kind], moe)]),
        "d_model": p("hidden_size"),
        "vocab_size": p("vocab_size"),
        "placement": "post",
        "embedding_norm": True,
        "norm_eps": p.number("rms_norm_eps", 1e-5),
        "tie_embeddings": p("tie_word_embeddings", False),
    }


def _lightning_maps(n_heads: int, head_dim: int) -> Iterator[Map]:
    """One lightning attention: its queries, keys and values lie head by head."""
    width = n_heads * head_dim
    qkv, gate = torch.arange(4 * width, device="cpu").split([3 * width, width])
    index = torch.cat([qkv.view(n_heads, 3, head_dim).transpose(0, 1).flatten(), gate])
    yield joined("in_proj.weight", ["qkv_proj.weight", "output_gate.weight"], [3 * width, width], index=index)
    yield same("norm.weight", "norm.weight")
    yield same("out_proj.weight", "out_proj.weight")


def _weights(p: Published) -> Iterator[Map]:
    n_heads, n_kv_heads, head_dim = p.heads()
    attention = {
        FULL: list(attention_maps(n_heads, n_kv_heads, head_dim)),
        LINEAR: list(_lightning_maps(n_heads, head_dim)),
    }
    moe = list(moe_maps(p("num_local_experts"), names=("w1", "w3", "w2")))
    kinds = _kinds(p)
    yield from token_maps(p, norm=None)
    yield same("embedding_norm.weight", "model.layers.0.input_layernorm.weight")
    for i, kind in enumerate(kinds):
        layer, last = f"layers.{i}", i + 1 == len(kinds)
        after = "norm" if last else f"layers.{i + 1}.input_layernorm"
        middle = f"{layer}.post_attention_layernorm"
        yield from step_maps(2 * i, "model.", f"{layer}.self_attn", attention[kind], norm=None, norm_out=middle)
        yield from step_maps(2 * i + 1, "model.", f"{layer}.block_sparse_moe", moe, norm=None, norm_out=after)


SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
        "layer_types": [LINEAR, LINEAR, LINEAR, FULL],
        "full_attn_alpha_factor": 1.5,
        "linear_attn_alpha_factor": 1.5,
        "mlp_alpha_factor": 1.5,
        "vocab_size": 256,
    },
    "456b": {  # Text-01, and M1, which was trained on from it
        "vocab_size": 200064,
        "hidden_size": 6144,
        "intermediate_size": 9216,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "head_dim": 128,
        "num_local_experts": 32,
        "layer_types": [LINEAR if (i + 1) % 8 else FULL for i in range(80)],
        "full_attn_alpha_factor": 3.5565588200778455,
        "linear_attn_alpha_factor": 3.5565588200778455,
        "mlp_alpha_factor": 3.5565588200778455,
        "max_position_embeddings": 10240000,
        "rope_theta": 10000000,
        "rotary_dim": 64,
    },
}

families.add(Family("minimax", "MiniMaxForCausalLM", "minimax", SIZES, _options, _weights, DEFAULTS, ignored=TABLES))
for name, architecture in (("minimax_text_01", "MiniMaxText01ForCausalLM"), ("minimax_m1", "MiniMaxM1ForCausalLM")):
    families.add(Family(name, architecture, name, {}, _options, _weights, DEFAULTS, ignored=TABLES))
