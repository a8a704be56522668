"""DeepSeek-V3 (DeepSeek-AI 2024, arXiv 2412.19437): multi-head latent attention, experts balanced by a bias alone.

The first `first_k_dense_replace` layers have a dense feed-forward. Kimi K2 (Kimi Team 2025, arXiv 2507.20534) is the
same model in other sizes. Checkpoints also hold the layers that predict further tokens, numbered after the others;
like transformers, we leave those aside.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

from zoo.core.errors import UsageError
from zoo.models.published.config import Published, stack, word
from zoo.models.published.family import Family, families
from zoo.models.published.layers import glu_maps, mla_maps, moe_maps, step_maps, token_maps
from zoo.models.published.maps import Map

# ---- what DeepSeek-V2 and the families after it have in common

TABLES = (r"rotary_emb\.inv_freq$",)
"""Names in checkpoints of frequencies, which follow from the config."""


def mla_options(p: Published, *, interleaved: bool = True) -> dict[str, Any]:
    """The options of `mla`, and of words that extend it.

    Args:
        interleaved: whether neighbouring channels are rotated as pairs.
    """
    rope = p.rope()
    if rope.get("rope_scaling") == "yarn":
        scaling = p("rope_scaling", {}) or p("rope_parameters", {})
        rope["rope_mscale"] = scaling.get("mscale_all_dim") or None
    p.only("head_dim", p("qk_rope_head_dim"))
    return {**latent_options(p), **rope, "rope_interleaved": interleaved}


def latent_options(p: Published) -> dict[str, Any]:
    """Those that are not about positions."""
    heads, rank, bias = p("num_attention_heads"), p("q_lora_rank", None), p("attention_bias", False)
    own, turning = p("qk_nope_head_dim"), p("qk_rope_head_dim")
    p.only("num_key_value_heads", heads)
    p.only("qk_head_dim", own + turning)
    if bias and rank is None:  # a bias on the latent and none on the queries beside it
        raise UsageError(f"{p.architecture} with attention_bias=True needs q_lora_rank.")
    return {
        "n_heads": heads,
        "q_rank": rank,
        "kv_rank": p("kv_lora_rank"),
        "nope_dim": own,
        "rope_dim": turning,
        "v_dim": p("v_head_dim"),
        "norm_eps": 1e-6,  # rms_norm_eps is that of the other norms
        "bias": bias,
    }


def latent_maps(p: Published) -> Iterator[Map]:
    """The weights of one `mla`."""
    sizes = p("qk_nope_head_dim"), p("qk_rope_head_dim"), p("v_head_dim")
    ranks = p("q_lora_rank", None), p("kv_lora_rank")
    return mla_maps(p("num_attention_heads"), *ranks, *sizes, bias=p("attention_bias", False))


def model_options(p: Published, attention: str | Sequence[str], moe: str) -> dict[str, Any]:
    """The model of layers of a word of attention, or one for each, and a dense or sparse feed-forward."""
    p.only("hidden_act", "silu")
    p.only("moe_layer_freq", 1)
    p.ignore("ep_size")
    n_layers, dense = p("num_hidden_layers"), p("first_k_dense_replace")
    swiglu = word("swiglu", d_hidden=p("intermediate_size"))
    mixers = [attention] * n_layers if isinstance(attention, str) else attention
    return {
        "pattern": stack([w for i, mixer in enumerate(mixers) for w in (mixer, swiglu if i < dense else moe)]),
        "d_model": p("hidden_size"),
        "vocab_size": p("vocab_size"),
        "norm_eps": p.number("rms_norm_eps"),
        "tie_embeddings": p("tie_word_embeddings", False),
    }


def model_maps(p: Published, attention: Callable[[int], Iterable[Map]], *, correction: bool = True) -> Iterator[Map]:
    """The weights of such a model, with shared experts where it has any.

    Args:
        attention: of the word of attention of layer i, relative to it.
        correction: whether a bias joins in the choice of experts.
    """
    yield from token_maps(p)
    bias = "gate.e_score_correction_bias" if correction else None
    shared = "shared_experts" if p("n_shared_experts", 0) else None
    sparse = list(moe_maps(p("n_routed_experts"), shared=shared, correction=bias))
    for i in range(p("num_hidden_layers")):
        layer = f"model.layers.{i}."
        yield from step_maps(2 * i, layer, "self_attn", attention(i), norm="input_layernorm")
        feed_forward = glu_maps() if i < p("first_k_dense_replace") else sparse
        yield from step_maps(2 * i + 1, layer, "mlp", feed_forward, norm="post_attention_layernorm")


# ---- DeepSeek-V3

DEFAULTS: dict[str, Any] = {
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "n_shared_experts": 1,
    "n_routed_experts": 256,
    "routed_scaling_factor": 2.5,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "qk_nope_head_dim": 128,
    "n_group": 8,
    "topk_group": 4,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 3,
    "norm_topk_prob": True,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "num_nextn_predict_layers": 1,
}


def moe_word(p: Published) -> str:
    """The mixture of experts."""
    p.only("topk_method", "noaux_tc")
    p.only("scoring_func", "sigmoid")
    p.ignore("aux_loss_alpha", "seq_aux")  # of a loss that this router does not have
    return balanced_experts(p)


def balanced_experts(p: Published) -> str:
    """Experts chosen by sigmoids and a bias that balances them, of configs that name no other way."""
    return word(
        "moe",
        n_experts=p("n_routed_experts"),
        top_k=p("num_experts_per_tok"),
        d_hidden=p("moe_intermediate_size"),
        n_shared=p("n_shared_experts"),
        router="sigmoid",
        normalize=p("norm_topk_prob"),
        scale=p.number("routed_scaling_factor"),
        n_groups=p("n_group"),
        top_groups=p("topk_group"),
        balance="bias",
    )


def extra_layers(p: Published, names: Collection[str]) -> Iterator[str]:
    """The names of the weights that predict further tokens: of layers after the last that have an `eh_proj`."""
    last = p("num_hidden_layers")
    for i in range(last, last + p("num_nextn_predict_layers")):
        prefix = f"model.layers.{i}."
        if f"{prefix}eh_proj.weight" in names:
            yield from (name for name in names if name.startswith(prefix))


def options(p: Published) -> dict[str, Any]:
    """The options of a model of the classes of DeepSeek-V3."""
    p.ignore("num_nextn_predict_layers", "num_mtp_layers")
    attention = word("mla", **mla_options(p, interleaved=p("rope_interleave", True)))
    return model_options(p, attention, moe_word(p))


def weights(p: Published) -> Iterator[Map]:
    """The weights of a model of the classes of DeepSeek-V3."""
    return model_maps(p, lambda i: latent_maps(p))


YARN = {
    "type": "yarn",
    "factor": 40,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
TINY: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "vocab_size": 256,
    "num_nextn_predict_layers": 0,
}
SIZES: dict[str, dict[str, Any]] = {
    "tiny": TINY,
    "671b": {**DEFAULTS, "max_position_embeddings": 163840, "rope_theta": 10000, "rope_scaling": YARN},
}

families.add(
    Family(
        "deepseek_v3",
        "DeepseekV3ForCausalLM",
        "deepseek_v3",
        SIZES,
        options,
        weights,
        DEFAULTS,
        ignored=TABLES,
        surplus=extra_layers,
    )
)
