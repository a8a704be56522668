"""LLaDA, a language model by masked diffusion (Nie et al. 2025, arXiv 2502.09992): Llama that looks both ways.

The config keys are OLMo's, from whose code the authors' has grown. `embedding_size` counts the embeddings, of which
`vocab_size` may use fewer. Of the published vocabulary the token 126336 is the mask.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from zoo.models.published.config import Published, stack, word
from zoo.models.published.family import Family, families
from zoo.models.published.layers import attention_maps, glu_maps, step_maps
from zoo.models.published.maps import Map, same

DEFAULTS: dict[str, Any] = {
    "d_model": 768,
    "n_heads": 12,
    "n_layers": 12,
    "mlp_ratio": 4,
    "activation_type": "swiglu",
    "block_type": "sequential",
    "block_group_size": 1,
    "rope": False,
    "rope_theta": 10000.0,
    "layer_norm_type": "default",
    "layer_norm_with_affine": True,
    "rms_norm_eps": 1e-5,
    "vocab_size": 50257,
    "embedding_size": 50304,
    "weight_tying": True,
}
OF_THE_TRAINING = ("embedding_dropout", "residual_dropout", "init_cutoff_factor", "init_device", "init_fn", "init_std")
UNUSED = ("alibi_bias_max", "attention_layer_norm_with_affine", "max_sequence_length", "train_max_sequence_length")


def _heads(p: Published) -> tuple[int, int, int]:
    """Numbers of heads and of heads of keys and values, and the width of a head."""
    n_heads, shared = p("n_heads"), p("multi_query_attention", None)
    if shared is None:
        n_kv_heads = p("n_kv_heads", n_heads)
    else:
        n_kv_heads = p.only("n_kv_heads", 1 if shared else n_heads)
    return n_heads, n_kv_heads, p("d_model") // n_heads


def _options(p: Published) -> dict[str, Any]:
    p.only("block_type", "llama")
    p.only("block_group_size", 1)
    p.only("activation_type", "silu")
    p.only("layer_norm_type", "rms")
    p.only("layer_norm_with_affine", True)
    p.only("rope", True)
    for key in ("alibi", "attention_layer_norm", "include_bias", "bias_for_layer_norm"):
        p.only(key, False)
    p.ignore(*OF_THE_TRAINING, *UNUSED, "rope_full_precision", "flash_attention", "precision", "mlp_ratio")
    n_heads, n_kv_heads, head_dim = _heads(p)
    width, bias = p("d_model"), p("include_qkv_bias", False)
    attention = word(
        "gqa",
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        bias=bias,
        out_bias=False if bias else None,
        rope_base=p.number("rope_theta"),
        rope_interleaved=False,
    )
    feed_forward = word("swiglu", d_hidden=p("mlp_hidden_size", p("mlp_ratio") * width))
    return {
        "pattern": stack([attention, feed_forward] * p("n_layers")),
        "d_model": width,
        "vocab_size": p("embedding_size", p("vocab_size")),
        "causal": False,
        "norm_eps": p.number("rms_norm_eps"),
        "tie_embeddings": p("weight_tying"),
        "embedding_scale": width**0.5 if p("input_emb_norm", False) else 1.0,
        "logit_scale": width**-0.5 if p("scale_logits", False) else 1.0,
    }


def _weights(p: Published) -> Iterator[Map]:
    top, tied = "model.transformer.", p("weight_tying")
    head, blocks = f"{top}ff_out.weight", f"{top}blocks."
    yield same("embedding.weight", f"{top}wte.weight", copies=(head,) if tied else ())
    yield same("norm.weight", f"{top}ln_f.weight")
    if not tied:
        yield same("head.weight", head)
    names = ("q_proj", "k_proj", "v_proj", "attn_out")
    for i in range(p("n_layers")):
        attention = attention_maps(*_heads(p), bias=p("include_qkv_bias", False), out_bias=False, names=names)
        yield from step_maps(2 * i, blocks, str(i), attention, norm=f"{i}.attn_norm")
        feed_forward = glu_maps(names=("ff_proj", "up_proj", "ff_out"))
        yield from step_maps(2 * i + 1, blocks, str(i), feed_forward, norm=f"{i}.ff_norm")


def _size(n_layers: int, width: int, n_heads: int, n_kv_heads: int, hidden: int, vocab: int) -> dict[str, Any]:
    return {
        "block_type": "llama",
        "activation_type": "silu",
        "layer_norm_type": "rms",
        "rope": True,
        "n_layers": n_layers,
        "d_model": width,
        "n_heads": n_heads,
        "n_kv_heads": n_kv_heads,
        "mlp_hidden_size": hidden,
        "vocab_size": vocab,
        "embedding_size": None,  # as many as the vocabulary has
        "weight_tying": False,
    }


SIZES: dict[str, dict[str, Any]] = {
    "tiny": _size(2, 64, 4, 2, 192, vocab=256),
    "8b": {**_size(32, 4096, 32, 32, 12288, vocab=126464), "rope_theta": 500000.0, "mask_token_id": 126336},
}

families.add(Family("llada", "LLaDAModelLM", "llada", SIZES, _options, _weights, DEFAULTS))
