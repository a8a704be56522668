"""Qwen3-Next (Qwen Team 2025): three gated DeltaNets to one gated attention layer, experts after each.

Attention rotates a quarter of each head, and every norm but that of the recurrent layers has weights 1 + w. Checkpoints
hold the recurrent layers' rows group by group, a group being a head of keys with its heads of values, and the layer
that predicts further tokens under `mtp.`; like transformers, we leave the latter aside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from zoo.models.published.config import Published, stack, word
from zoo.models.published.family import Family, families
from zoo.models.published.layers import attention_maps, conv_maps, glu_maps, moe_maps, step_maps, token_maps
from zoo.models.published.maps import Map, joined, same

DEFAULTS: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 48,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "max_position_embeddings": 32768,
    "full_attention_interval": 4,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "decoder_sparse_step": 1,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "num_experts_per_tok": 10,
    "num_experts": 512,
    "norm_topk_prob": True,
}


def _recurrent(p: Published) -> list[bool]:
    """Which layers are recurrent."""
    names, interval = ("full_attention", "linear_attention"), p("full_attention_interval")
    return [kind == names[1] for kind in p.kinds(lambda i: names[(i + 1) % interval > 0], *names)]


def _sparse(p: Published) -> list[bool]:
    """Which layers have experts."""
    dense, period, n_experts = p("mlp_only_layers", ()), p("decoder_sparse_step"), p("num_experts")
    return [n_experts > 0 and i not in dense and (i + 1) % period == 0 for i in range(p("num_hidden_layers"))]


def recurrent_sizes(p: Published) -> tuple[int, int, int, int]:
    """Numbers of heads of keys and of values, and their widths, in recurrent layers."""
    return (
        p("linear_num_key_heads"),
        p("linear_num_value_heads"),
        p("linear_key_head_dim"),
        p("linear_value_head_dim"),
    )


def options(p: Published) -> dict[str, Any]:
    """The options of a model of Qwen3-Next's kind."""
    p.only("hidden_act", "silu")
    eps, (n_heads, n_kv_heads, head_dim) = p.number("rms_norm_eps", 1e-6), p.heads()
    attention = word(
        "gqa",
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        bias=p("attention_bias", False),
        qk_norm=True,
        norm_zero_centred=True,
        norm_eps=eps,
        gate="channel",
        rope_fraction=p.rope_fraction(head_dim, default=0.25),
        **p.rope(),
    )
    n_keys, n_values, d_key, d_value = recurrent_sizes(p)
    recurrent = word(
        "gated_deltanet",
        n_heads=n_keys,
        n_v_heads=n_values,
        head_dim=d_key,
        expand_v=d_value / d_key,
        conv_size=p("linear_conv_kernel_dim"),
        norm_eps=eps,
    )
    sparse = _sparse(p)
    p.ignore("moe_intermediate_size", "norm_topk_prob", "num_experts_per_tok", "shared_expert_intermediate_size")
    p.ignore("intermediate_size")
    dense = "" if all(sparse) else word("swiglu", d_hidden=p("intermediate_size"))
    moe = _experts(p) if any(sparse) else ""
    kinds = zip(_recurrent(p), sparse, strict=True)
    return {
        "pattern": stack([w for r, s in kinds for w in (recurrent if r else attention, moe if s else dense)]),
        "d_model": p("hidden_size"),
        "vocab_size": p("vocab_size"),
        "norm": "rmsnorm_zero_centred",
        "norm_eps": eps,
        "tie_embeddings": p("tie_word_embeddings", False),
    }


def _experts(p: Published) -> str:
    """The mixture of experts."""
    return word(
        "moe",
        n_experts=p("num_experts"),
        top_k=p("num_experts_per_tok"),
        d_hidden=p("moe_intermediate_size"),
        normalize=p("norm_topk_prob"),
        n_shared=1,
        d_shared=p("shared_expert_intermediate_size"),
        shared_gate=True,
    )


def _recurrent_maps(p: Published) -> Iterator[Map]:
    """One gated DeltaNet: its queries, keys, values, beta, a and gates out of groups."""
    groups, heads, d_key, d_value = recurrent_sizes(p)
    values = heads // groups * d_value
    sizes = [2 * (groups * d_key + heads * d_value), 2 * heads]
    first, second = torch.arange(sum(sizes), device="cpu").split(sizes)
    q, k, v, z = first.view(groups, -1).split([d_key, d_key, values, values], 1)
    beta, a = second.view(groups, 2, -1).unbind(1)
    index = torch.cat([rows.flatten() for rows in (q, k, v, beta, a, z)])
    yield joined("in_proj.weight", ["in_proj_qkvz.weight", "in_proj_ba.weight"], sizes, index=index)
    yield from conv_maps(2 * groups * d_key + heads * d_value, p("linear_conv_kernel_dim"), bias=False)
    for name in ("A_log", "dt_bias", "norm.weight", "out_proj.weight"):
        yield same(name, name)


def weights(p: Published, recurrent_maps: Callable[[Published], Iterator[Map]] = _recurrent_maps) -> Iterator[Map]:
    """Where the weights of a model of Qwen3-Next's kind lie; `recurrent_maps` are those of one gated DeltaNet."""
    yield from token_maps(p)
    moe = list(
        moe_maps(
            p("num_experts"),
            shared="shared_expert",
            shared_gate="shared_expert_gate.weight",
            whole=("experts.gate_up_proj", "experts.down_proj"),
        )
    )
    for i, (recurrent, sparse) in enumerate(zip(_recurrent(p), _sparse(p), strict=True)):
        layer = f"model.layers.{i}."
        attention = attention_maps(*p.heads(), bias=p("attention_bias", False), qk_norm=True, gate=True)
        part, mixer = ("linear_attn", recurrent_maps(p)) if recurrent else ("self_attn", attention)
        yield from step_maps(2 * i, layer, part, mixer, norm="input_layernorm")
        feed_forward = moe if sparse else glu_maps()
        yield from step_maps(2 * i + 1, layer, "mlp", feed_forward, norm="post_attention_layernorm")


SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "vocab_size": 256,
    },
    "80b-a3b": {"intermediate_size": 5120, "rope_theta": 10000000, "max_position_embeddings": 262144},
}

families.add(
    Family(
        "qwen3_next",
        "Qwen3NextForCausalLM",
        "qwen3_next",
        SIZES,
        options,
        weights,
        DEFAULTS,
        ignored=(r"^mtp\.",),
    )
)
