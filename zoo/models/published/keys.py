"""Keys of published configs that no family reads: which change nothing, and which an architecture settles itself.

A key that is left over is one of three. *Neutral*: whatever its value, the logits of a whole sequence in full precision
are the same (how weights were drawn, how the model was trained, how text is generated, what a tool left behind).
*Settled*: it names a property that the model, as read, has or has not, so that only that value can stand there.
Anything else is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple

from zoo.core.readers import shown
from zoo.pattern import Word, parse

NEUTRAL = frozenset(
    name
    for line in (
        # what it is called, where it comes from, and what it is saved and run with
        "architectures model_type auto_map custom_pipelines name_or_path tokenizer_class tokenizer_name language",
        "transformers_version transformers.js_config dtype torch_dtype torchscript use_bfloat16 tf_legacy_loss",
        "processor_class",
        "license library_name pipeline_tag base_model base_model_name_or_path optimum_version is_llama_config",
        "keys_to_ignore_at_inference trust_remote_code source_model original_model_id framework_version",
        # how outputs are given
        "use_cache output_attentions output_hidden_states output_scores output_logits output_router_logits return_dict",
        "use_return_dict return_dict_in_generate chunk_size_feed_forward num_logits_to_keep logits_to_keep",
        # heads for other tasks
        "id2label label2id num_labels _num_labels problem_type task_specific_params finetuning_task classifier_bias",
        "classifier_activation classifier_pooling summary_type summary_use_proj summary_activation score_bias",
        "summary_proj_to_labels summary_first_dropout summary_last_dropout label_names",
        # how text is generated; older configs hold it all
        "is_decoder max_length min_length max_new_tokens min_new_tokens do_sample early_stopping num_beams top_k top_p",
        "num_beam_groups diversity_penalty temperature min_p typical_p epsilon_cutoff eta_cutoff penalty_alpha",
        "repetition_penalty encoder_repetition_penalty length_penalty no_repeat_ngram_size bad_words_ids sequence_bias",
        "encoder_no_repeat_ngram_size num_return_sequences remove_invalid_values renormalize_logits constraints",
        "exponential_decay_length_penalty suppress_tokens begin_suppress_tokens forced_decoder_ids force_words_ids",
        "prefix cache_implementation cache_config generation_config guidance_scale watermarking_config stop_strings",
        "max_time max_matching_ngram_size prompt_lookup_num_tokens num_assistant_tokens assistant_confidence_threshold",
        # how long the texts were; where a length matters, a family reads it
        "max_position_embeddings max_seq_len max_seq_length max_sequence_length seq_length model_max_length",
        "context_length model_length train_max_sequence_length n_ctx n_positions",
        # training
        "gradient_checkpointing use_gradient_checkpointing router_jitter_noise neftune_noise_alpha label_smoothing",
        "label_smoothing_factor embedding_init_range use_l2warp pretraining_tp tensor_parallel expert_parallel ep_size",
        # ways to compute the same
        "use_flash_attn use_flash_attention use_flash_attention_2 flash_attention use_sdpa use_kernels attn_mode",
        "use_mamba_kernels use_mambapy use_associative_scan use_fast_path use_mem_eff_path per_layer_config",
        "use_fused_rms_norm use_fused_swiglu use_fused_rope use_fused_cross_entropy residual_in_fp32 fused_add_norm",
        "rescale_prenorm_residual experts_implementation mamba_ssm_cache_dtype mamba_ssm_dtype tf_padding_side",
    )
    for name in line.split()
)
PATTERNS = re.compile(
    r"\w*_token_ids?"  # which ids have a meaning
    r"|unsloth_\w+|mlx_\w+|peft_\w+|onnx_\w+|vllm_\w+|sglang_\w+|axolotl_\w+|llama_?factory_\w+|megatron_\w+"
    r"|\w*(sha256|commit_hash|revision)"
    r"|_?(attn|attention|experts|moe)_impl(ementation)?(_\w+)?"
    r"|_name_or_path|_from_auto|_from_pipeline|_auto_class|_diffusers_version|_from_model_config|_output_attentions"
    r"|initializer_\w+|init_(std|range|method|fn|device|scale|type|cutoff_factor|distribution\w*)"
    r"|\w*(dropout|drop_?out|layerdrop|pdrop|drop_path)(_prob|_p|_rate|_ratio)?"
    r"|\w*(aux|balance|balancing|z)_loss\w*"
    r"|fuse_\w+"
)

CHANGES = {  # what another value would change, of keys that are common and of no family here
    r"(use_)?(qk_norm|qk_layernorm|query_key_norm)": "norms of queries and keys",
    r"\w*(qkv|attention|attn|mlp|ffn)_bias|use_bias|bias": "biases",
    r"(use_)?alibi\w*|position_embedding_type|positional_embedding\w*|pos_enc\w*": "the positions",
    r"rope_\w+|rotary_\w+|partial_rotary_factor|mrope_\w*|use_mrope|original_max_position_embeddings": "the positions",
    r"use_parallel_residual|parallel_attn|parallel_attention|parallel_residual": "feed-forward beside the attention",
    r"\w*sliding_window\w*|attention_window\w*|window_size|attention_chunk_size|max_window_layers": "the windows",
    r"\w*soft_?cap\w*": "caps of scores",
    r"\w*scal(e|ing)\w*|\w*multiplier\w*": "factors",
    r"add_cross_attention|cross_attention\w*|is_encoder_decoder|tie_encoder_decoder|encoder\w*": "a second input",
    r"pruned_heads|prune_heads": "heads that are gone",
    r"\w*(_eps|epsilon)": "the norms",
    r"\w*(norm|normalization)(_type|_position)?|use_post_norm|\w*_norm": "the norms",
    r"(hidden_|mlp_|ffn_)?act(ivation)?\w*": "the activation",
    r"\w*experts\w*|moe_\w+|router_\w+": "the experts",
    r"layer_types|layers_block_type|block_types|attn_layer\w*|attn": "the kinds of the layers",
    r"(text|vision|audio|image|video)_config|vision_\w+|audio_\w+": "parts that see or hear",
    r"lora_\w+|adapter\w*": "adapters on the weights",
    r"mtp_\w*|num_nextn_predict_layers|n_future_tokens": "layers that predict further tokens",
}

SYNONYMS = (
    {"num_hidden_layers", "num_layers", "n_layers", "n_layer"},
    {"hidden_size", "d_model", "n_embd", "model_dim", "dim", "embedding_dim", "hidden_dim"},
    {"num_attention_heads", "n_heads", "n_head", "num_heads"},
    {"num_key_value_heads", "n_kv_heads", "num_kv_heads", "num_query_groups", "multi_query_group_num"},
    {"intermediate_size", "ffn_hidden_size", "ffn_dim", "n_inner", "mlp_hidden_size"},
    {"num_experts", "n_routed_experts", "num_local_experts", "n_experts"},
    {"num_experts_per_tok", "num_experts_per_token", "moe_topk", "experts_per_token", "moe_top_k"},
    {"rope_theta", "rotary_emb_base", "rotary_base", "theta"},
)
"""Keys with one meaning: one that is not read has to say what the one that is read says."""


class Facts(NamedTuple):
    """A model as read: its options, and the words of its layers."""

    options: Mapping[str, Any]
    words: list[Word]

    def of(self, option: str, *names: str) -> set[Any]:
        """The values of an option of those words that have it, or of those of some names."""
        configs = [w.config for w in self.words if not names or w.name in names]
        return {getattr(c, option) for c in configs if hasattr(c, option)}


ATTENTION = ("mha", "mqa", "gqa", "swa", "mla", "dsa")
FEED_FORWARD = ("swiglu", "geglu", "glu", "mlp", "moe")
NORMS = {"rmsnorm": {"rmsnorm", "rms", "rms_norm"}, "layernorm": {"layernorm", "layer_norm", "ln", "default"}}


def _activations(facts: Facts) -> set[Any]:
    found: set[Any] = set()
    for word in facts.words:
        if word.name in ("swiglu", "moe") and getattr(word.config, "activation", "silu") == "silu":
            found |= {"swiglu", "silu", "swish"}
        elif word.name == "geglu":
            tanh = getattr(word.config, "approximate", False)
            found |= {"gelu_pytorch_tanh", "gelu_new"} if tanh else {"gelu"}
            found.add("geglu")
        elif word.name in ("mlp", "moe"):
            name = word.config.activation  # type: ignore[attr-defined]
            found |= {theirs for theirs, ours in ACTIVATIONS.items() if ours == name}
    return found


ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu_squared",
    "silu": "silu",
    "swish": "silu",
}
"""Their names of activations to ours."""


def _any(option: str, *names: str) -> Callable[[Facts], set[Any]]:
    return lambda facts: {any(facts.of(option, *names))}


def _windows(facts: Facts) -> set[Any]:
    return {w for w in facts.of("window", "swa") if w is not None}


def _causal(facts: Facts) -> set[Any]:
    return {facts.options.get("causal", True)}


def _rope(facts: Facts) -> set[Any]:
    return {any(facts.of("rope", *ATTENTION))}


def _norm(facts: Facts) -> set[Any]:
    kind = str(facts.options.get("norm", "rmsnorm"))
    return next(names for ours, names in NORMS.items() if kind.startswith(ours))


WINDOWS = ("sliding_window", "max_window_layers")
SETTLED: dict[str, Callable[[Facts], Collection[Any]]] = {
    **dict.fromkeys(
        ("use_qk_norm", "qk_norm", "qk_layernorm", "use_qk_layernorm", "add_qk_norm"), _any("qk_norm", *ATTENTION)
    ),
    **dict.fromkeys(
        ("attention_bias", "qkv_bias", "use_qkv_bias", "add_qkv_bias", "attention_qkv_bias", "attn_bias"),
        _any("bias", *ATTENTION),
    ),
    **dict.fromkeys(("mlp_bias", "ffn_bias", "use_mlp_bias", "add_ffn_bias"), _any("bias", *FEED_FORWARD)),
    **dict.fromkeys(("use_rope", "rope", "use_rotary", "rotary", "use_pos_enc"), _rope),
    **dict.fromkeys(
        ("rope_interleaved", "rope_interleave", "rotary_interleaved"), _any("rope_interleaved", *ATTENTION)
    ),
    **dict.fromkeys(("is_causal", "causal", "use_causal_mask"), _causal),
    **dict.fromkeys(("is_encoder_decoder", "add_cross_attention", "tie_encoder_decoder"), lambda facts: {False}),
    **dict.fromkeys(
        ("use_parallel_residual", "parallel_attn", "parallel_residual", "use_alibi", "alibi"), lambda facts: {False}
    ),
    **dict.fromkeys(
        ("activation", "activation_function", "activation_type", "hidden_act", "hidden_activation", "mlp_hidden_act"),
        _activations,
    ),
    **dict.fromkeys(
        ("norm_eps", "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "layernorm_epsilon", "rms_norm_epsilon"),
        lambda facts: {facts.options.get("norm_eps", 1e-5)},
    ),
    **dict.fromkeys(("normalization", "normalization_type", "norm_type", "layer_norm_type"), _norm),
    "rms_norm": lambda facts: {"rms" in _norm(facts)},
    **dict.fromkeys(
        ("tie_word_embeddings", "tie_embeddings", "tie_embedding", "weight_tying", "tied_embeddings"),
        lambda facts: {facts.options.get("tie_embeddings", False)},
    ),
    "use_sliding_window": lambda facts: {bool(_windows(facts))},
    "sliding_window": _windows,
    "use_moe": lambda facts: {any(w.name == "moe" for w in facts.words)},
}
"""What a model as read says of a key: the values that may stand there."""


def is_neutral(key: str) -> bool:
    """Whether no value of a key changes what a model computes."""
    return key in NEUTRAL or PATTERNS.fullmatch(key) is not None


def refused(
    config: Mapping[str, Any], read: Collection[str], options: Mapping[str, Any] | None
) -> Iterator[tuple[str, str]]:
    """The keys of a config that nobody has read and that may change the result: each with its value, and what of it.

    Args:
        options: of the model that was read; None for a part of a config, in which only neutral keys may be left over.
    """
    left = {k: v for k, v in config.items() if k not in read and v is not None and not is_neutral(k)}
    facts = Facts(options, list(parse(options["pattern"]).words())) if left and options is not None else None
    for key, value in sorted(left.items()):
        said = [config[k] for names in SYNONYMS if key in names for k in names & set(read) if config.get(k) is not None]
        if key in WINDOWS and config.get("use_sliding_window") is False:
            continue
        if said:
            allowed: Collection[Any] = said
        elif facts is not None and key in SETTLED:
            allowed = SETTLED[key](facts)
        elif value in (False, [], {}):
            continue  # off
        else:
            allowed = ()
        if not any(value == a and isinstance(value, bool) == isinstance(a, bool) for a in allowed):
            yield f"{shown(key)}={_brief(value)}", _why(key)


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _why(key: str) -> str:
    found = next((told for pattern, told in CHANGES.items() if re.fullmatch(pattern, key)), None)
    return found or ""
