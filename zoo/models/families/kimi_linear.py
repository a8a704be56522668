"""Kimi Linear (Kimi Team 2025, arXiv 2510.26692): three layers of Kimi Delta Attention to one of latent attention.

Latent attention has no positions. All but the first feed-forwards are experts as in DeepSeek-V3.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from zoo.models.families.deepseek_v3 import latent_maps, latent_options
from zoo.models.published.config import Published, stack, word
from zoo.models.published.family import Family, families
from zoo.models.published.layers import conv_parts_maps, glu_maps, moe_maps, step_maps, token_maps
from zoo.models.published.maps import Map, also_named, joined, reshaped, same, within

DEFAULTS: dict[str, Any] = {
    "vocab_size": 163840,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "moe_intermediate_size": 1024,
    "num_hidden_layers": 27,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "routed_scaling_factor": 2.446,
    "topk_group": 1,
    "rms_norm_eps": 1e-5,
    "first_k_dense_replace": 1,
    "linear_head_dim": 128,
    "linear_num_heads": 32,
    "linear_conv_kernel_dim": 4,
}


def _linear(p: Published) -> Published:
    """What published configs say of the recurrent layers, counting layers from 1."""
    return Published(p("linear_attn_config", {}), f"linear_attn_config of {p.architecture}")


def _recurrent(p: Published) -> list[bool]:
    """Which layers are recurrent."""
    names, linear = ("full_attention", "linear_attention"), _linear(p)
    full, recurrent = linear("full_attn_layers", None), linear("kda_layers", None)
    if full is None or recurrent is None:
        kinds = p.kinds(lambda i: names[i == 0 or i % 4 > 0], *names)
    else:
        kinds = p.kinds(lambda i: names[1] if i + 1 in recurrent else names[0] if i + 1 in full else "unknown", *names)
    return [kind == names[1] for kind in kinds]


def _sparse(p: Published) -> list[bool]:
    """Which layers have experts."""
    names, first = ("dense", "sparse"), p("first_k_dense_replace")
    return [kind == names[1] for kind in p.kinds(lambda i: names[i >= first], *names, key="mlp_layer_types")]


def _sizes(p: Published) -> tuple[int, int, int]:
    """Number of heads, their width and that of the convolution, in recurrent layers."""
    linear = _linear(p)
    sizes = (
        linear("num_heads", p("linear_num_heads")),
        linear("head_dim", p("linear_head_dim")),
        linear("short_conv_kernel_size", p("linear_conv_kernel_dim")),
    )
    linear.ignore("full_attn_layers", "kda_layers")
    linear.refuse_unread()
    return sizes


def _n_experts(p: Published) -> int:
    return p("num_experts", p("num_local_experts", 256))


def _options(p: Published) -> dict[str, Any]:
    p.only("hidden_act", "silu")
    p.only("mla_use_nope", True)
    p.only("moe_layer_freq", 1)
    p.only("moe_router_activation_func", "sigmoid")
    p.only("use_grouped_topk", True)
    p.only("num_nextn_predict_layers", 0)
    p.only("tie_word_embeddings", False)
    p.ignore("model_max_length", "head_dim", "rope_theta", "rope_scaling")  # there are no positions
    heads, d_head, conv_size = _sizes(p)
    eps = p.number("rms_norm_eps")
    recurrent = word("kda", n_heads=heads, head_dim=d_head, conv_size=conv_size, norm_eps=eps)
    attention = word("mla", **latent_options(p), rope=False)
    moe = word(
        "moe",
        n_experts=_n_experts(p),
        top_k=p("num_experts_per_token", p("num_experts_per_tok", 8)),
        d_hidden=p("moe_intermediate_size"),
        n_shared=p("num_shared_experts", p("n_shared_experts", 1)),
        router="sigmoid",
        normalize=p("moe_renormalize", p("norm_topk_prob", True)),
        scale=p.number("routed_scaling_factor"),
        n_groups=p("num_expert_group", p("n_group", 1)),
        top_groups=p("topk_group"),
        balance="bias",
    )
    dense = word("swiglu", d_hidden=p("intermediate_size"))
    kinds = zip(_recurrent(p), _sparse(p), strict=True)
    return {
        "pattern": stack([w for r, s in kinds for w in (recurrent if r else attention, moe if s else dense)]),
        "d_model": p("hidden_size"),
        "vocab_size": p("vocab_size"),
        "norm_eps": eps,
    }


def _recurrent_maps(p: Published) -> Iterator[Map]:
    """One layer of Kimi Delta Attention."""
    heads, width, _ = _sizes(p)
    names = [f"{name}_proj.weight" for name in ("q", "k", "v", "b", "f_a", "g_a")]
    yield joined("in_proj.weight", names, [heads * width] * 3 + [heads, width, width])
    yield from conv_parts_maps([heads * width] * 3)
    yield reshaped("A_log", "A_log", (heads,), (1, 1, heads, 1))
    yield same("dt_bias", "dt_bias")
    for ours, theirs in (
        ("decay_up", "f_b_proj"),
        ("gate_up", "g_b_proj"),
        ("norm", "o_norm"),
        ("out_proj", "o_proj"),
    ):
        yield same(f"{ours}.weight", f"{theirs}.weight")


def _sparse_maps(p: Published) -> Iterator[Map]:
    """The experts of a layer."""
    names, bias = ("w1", "w3", "w2"), "gate.e_score_correction_bias"
    yield from moe_maps(_n_experts(p), names=names, correction=bias)
    yield from within("shared.", "shared_experts.", glu_maps())


def _weights(p: Published) -> Iterator[Map]:
    yield from token_maps(p)
    moe = list(_sparse_maps(p))
    for i, (recurrent, sparse) in enumerate(zip(_recurrent(p), _sparse(p), strict=True)):
        layer, norm = f"model.layers.{i}.", "post_attention_layernorm"
        mixer = _recurrent_maps(p) if recurrent else latent_maps(p)
        yield from step_maps(2 * i, layer, "self_attn", mixer, norm="input_layernorm")
        if sparse:
            yield from step_maps(2 * i + 1, layer, "block_sparse_moe", moe, norm=norm)
        else:  # which transformers writes under the name of the experts
            dense = step_maps(2 * i + 1, layer, "mlp", glu_maps(), norm=norm)
            yield from also_named(dense, lambda name: name.replace(".mlp.", ".block_sparse_moe."))


SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 192,
        "moe_intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
        "num_experts": 4,
        "num_experts_per_token": 2,
        "linear_attn_config": {
            "full_attn_layers": [4],
            "head_dim": 16,
            "kda_layers": [1, 2, 3],
            "num_heads": 4,
            "short_conv_kernel_size": 4,
        },
        "vocab_size": 256,
        "pad_token_id": None,  # the default is beyond this vocabulary
    },
    "48b-a3b": {
        "linear_attn_config": {
            "full_attn_layers": [4, 8, 12, 16, 20, 24, 27],
            "head_dim": 128,
            "kda_layers": [i for i in range(1, 27) if i % 4],
            "num_heads": 32,
            "short_conv_kernel_size": 4,
        },
    },
}

families.add(Family("kimi_linear", "KimiLinearForCausalLM", "kimi_linear", SIZES, _options, _weights, DEFAULTS))
