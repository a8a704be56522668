"""Nemotron-H (NVIDIA 2025, arXiv 2504.03624), Nemotron Nano 2 (2508.14444) and Nemotron 3: one mixer a layer.

`hybrid_override_pattern` has a letter a layer: M Mamba-2, * attention without positions, - a perceptron with squared
ReLU, E experts of that kind, in "3-super" in a latent width. As in transformers' one-pass form, Mamba-2's steps are at
least `time_step_min`; NVIDIA's own code and transformers' single steps do not hold them there.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from zoo.core.errors import UsageError
from zoo.models.families.mamba2 import step_limit
from zoo.models.published.config import ACTIVATIONS, Published, attention_word, stack, word
from zoo.models.published.family import Family, families
from zoo.models.published.layers import attention_maps, mamba2_maps, mlp_maps, moe_maps, step_maps, token_maps
from zoo.models.published.maps import Map

DEFAULTS = {
    "vocab_size": 131072,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 21504,
    "mlp_bias": False,
    "ssm_state_size": 128,
    "mamba_num_heads": 128,
    "mamba_head_dim": 64,
    "n_groups": 8,
    "conv_kernel": 4,
    "time_step_min": 0.001,
    "use_bias": False,
    "use_conv_bias": True,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 7688,
    "moe_shared_expert_intermediate_size": 7688,
    "routed_scaling_factor": 1.0,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
}
LETTERS = {"linear_attention": "M", "mamba": "M", "full_attention": "*", "attention": "*", "mlp": "-", "moe": "E"}


def _letters(p: Published) -> str:
    """The kinds of the layers, a letter each."""
    text = p("hybrid_override_pattern", "ME*-")
    letters = "".join(LETTERS.get(kind, "?") for kind in p("layers_block_type", [])) or text
    if strange := set(letters) - set(LETTERS.values()):
        raise UsageError(f"{p.architecture} with a layer {min(strange)!r} is not supported, only M, *, - and E.")
    return letters


def _check(p: Published, letters: str, eps: float) -> None:
    """Refuse what transformers has a key for and does not do, or does with biases that experts lack."""
    p.only("num_hidden_layers", len(letters))
    p.only("mamba_hidden_act", "silu")
    p.only("n_shared_experts", 1)
    for key in ("tie_word_embeddings", "attention_bias", "mamba_proj_bias"):
        p.only(key, False)
    if "E" in letters:
        p.only("mlp_bias", False)
    if step_limit(p):
        raise UsageError(f"{p.architecture} with time_step_limit={p('time_step_limit')!r} is not supported: no limits.")
    for key in ("rms_norm_eps", "norm_eps"):
        p.only(key, eps)
    p.only("attention_head_dim", p("head_dim"))
    p.only("num_query_groups", p("num_key_value_heads", p("num_attention_heads")))
    p.ignore("num_logits_to_keep", "use_mamba_kernels", "chunk_size", "residual_in_fp32", "mamba_ssm_cache_dtype")
    p.ignore("expand", "time_step_max", "time_step_floor", "time_step_rank", "rescale_prenorm_residual")
    p.ignore("time_step_scale", "time_step_init_scheme")
    p.ignore("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "moe_shared_expert_overlap")
    p.ignore("num_nextn_predict_layers", "mtp_layers_block_type", "mtp_hybrid_override_pattern")


def _options(p: Published) -> dict[str, Any]:
    letters, eps, width = _letters(p), p.number("layer_norm_epsilon", 1e-5), p("hidden_size")
    _check(p, letters, eps)
    activation = p.choice("mlp_hidden_act", ACTIVATIONS, "relu2")
    words = {
        "M": word(
            "mamba2",
            d_state=p("ssm_state_size"),
            expand=p("mamba_num_heads") * p("mamba_head_dim") / width,
            head_dim=p("mamba_head_dim"),
            n_groups=p("n_groups"),
            conv_size=p("conv_kernel"),
            dt_limit=(p.number("time_step_min"), None),
            norm_eps=eps,
            bias=p("use_bias"),
            conv_bias=p("use_conv_bias"),
        ),
        "*": attention_word(p, rope=False),
        "-": word("mlp", d_hidden=p("intermediate_size"), activation=activation, bias=p("mlp_bias")),
        "E": word(
            "moe",
            n_experts=p("n_routed_experts"),
            top_k=p("num_experts_per_tok"),
            d_hidden=p("moe_intermediate_size"),
            d_latent=p("moe_latent_size", None),
            activation=activation,
            gated=False,
            router="sigmoid",
            normalize=p("norm_topk_prob"),
            scale=p.number("routed_scaling_factor"),
            n_groups=p("n_group"),
            top_groups=p("topk_group"),
            n_shared=1,
            d_shared=p("moe_shared_expert_intermediate_size"),
            balance="bias",
        ),
    }
    return {
        "pattern": stack([words[letter] for letter in letters]),
        "d_model": width,
        "vocab_size": p("vocab_size"),
        "norm_eps": eps,
    }


def _weights(p: Published) -> Iterator[Map]:
    yield from token_maps(p, embedding="backbone.embeddings.weight", norm="backbone.norm_f.weight")
    d_inner, keys = p("mamba_num_heads") * p("mamba_head_dim"), p("n_groups") * p("ssm_state_size")
    latent = ("fc1_latent_proj", "fc2_latent_proj") if p("moe_latent_size", None) else None
    for i, letter in enumerate(_letters(p)):
        if letter == "M":
            maps = mamba2_maps(d_inner, keys, p("conv_kernel"), bias=p("use_bias"), conv_bias=p("use_conv_bias"))
        elif letter == "*":
            maps = attention_maps(*p.heads())
        elif letter == "-":
            maps = mlp_maps(bias=p("mlp_bias"))
        else:
            correction = "gate.e_score_correction_bias"
            n_experts = p("n_routed_experts")
            maps = moe_maps(n_experts, shared="shared_experts", correction=correction, gated=False, latent=latent)
        yield from step_maps(i, f"backbone.layers.{i}.", "mixer", maps, norm="norm")


def _surplus(p: Published, names: Collection[str]) -> list[str]:
    return [name for name in names if name.startswith("mtp.")]  # layers that predict further tokens


_TAIL = "M-M-M-M-M-"
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hybrid_override_pattern": "ME*-",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "mamba_num_heads": 4,
        "mamba_head_dim": 32,
        "n_groups": 2,
        "ssm_state_size": 32,
        "n_routed_experts": 4,
        "moe_intermediate_size": 64,
        "moe_shared_expert_intermediate_size": 128,
        "vocab_size": 256,
    },
    "4b": {
        "hybrid_override_pattern": "M-M-M-M*-" + 3 * "M-M-M-M-M*-" + _TAIL,
        "hidden_size": 3072,
        "intermediate_size": 12288,
        "mamba_num_heads": 112,
    },
    "8b": {"hybrid_override_pattern": "M-M-M-M*-" + 3 * "M-M-M-M-M*-" + _TAIL},
    "47b": {
        "hybrid_override_pattern": "M-M-M-M-M-M-M-M-M*-M-M-M-M-M-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-"
        "M-M-M-M-M-M-M---MM---M-M*-" + _TAIL,
        "hidden_size": 8192,
        "intermediate_size": 30720,
        "num_attention_heads": 64,
        "mamba_num_heads": 256,
        "ssm_state_size": 256,
    },
    "56b": {
        "hybrid_override_pattern": "M-M-M-M*-" + 9 * "M-M-M-M-M*-" + _TAIL,
        "hidden_size": 8192,
        "intermediate_size": 32768,
        "num_attention_heads": 64,
        "mamba_num_heads": 256,
        "ssm_state_size": 256,
    },
    "nano-9b-v2": {
        "hybrid_override_pattern": "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-",
        "hidden_size": 4480,
        "intermediate_size": 15680,
        "num_attention_heads": 40,
        "mamba_head_dim": 80,
    },
    "nano-12b-v2": {
        "hybrid_override_pattern": 6 * "M-M-M-M*-" + "M-M-M-M-",
        "hidden_size": 5120,
        "intermediate_size": 20480,
        "num_attention_heads": 40,
        "mamba_head_dim": 80,
    },
    "3-nano-30b": {
        "hybrid_override_pattern": 5 * "MEMEM*E" + "MEMEMEM*EMEMEMEME",
        "hidden_size": 2688,
        "num_key_value_heads": 2,
        "mamba_num_heads": 64,
        "n_routed_experts": 128,
        "num_experts_per_tok": 6,
        "moe_intermediate_size": 1856,
        "moe_shared_expert_intermediate_size": 3712,
        "routed_scaling_factor": 2.5,
    },
    "3-super-120b": {
        "hybrid_override_pattern": "MEMEMEM*EMEMEMEM*EMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*"
        "EMEMEMEM*EMEMEMEME",
        "num_key_value_heads": 2,
        "n_routed_experts": 512,
        "num_experts_per_tok": 22,
        "moe_intermediate_size": 2688,
        "moe_shared_expert_intermediate_size": 5376,
        "moe_latent_size": 1024,
        "routed_scaling_factor": 5.0,
    },
}

families.add(
    Family(
        "nemotron_h",
        "NemotronHForCausalLM",
        "nemotron_h",
        SIZES,
        _options,
        _weights,
        DEFAULTS,
        surplus=_surplus,
    )
)
