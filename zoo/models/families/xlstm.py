"""xLSTM 7B (Beck et al. 2025, arXiv 2503.13427): mLSTM layers and SwiGLU, with the gates and the logits soft-capped.

`NX-AI/xLSTM-7b` writes its configs with keys of the code that it was trained by; of these, all that would change the
architecture have to be at its values. `tie_word_embeddings` and `add_out_norm` are never heeded by transformers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from zoo.models.published.config import Published, stack, word
from zoo.models.published.family import Family, families
from zoo.models.published.layers import glu_maps, linear_maps, step_maps, token_maps
from zoo.models.published.maps import Map, parts, same

OF_THE_KERNELS = (
    "chunkwise_kernel sequence_kernel step_kernel mode chunk_size return_last_states autocast_kernel_dtype "
    "inference_state_dtype max_inference_chunksize norm_reduction_force_float32 forward_backend_name step_backend_name "
    "add_forward_backend_padding lm_head_dtype gate_dtype"
)
OF_THE_TRAINING = (
    "init_distribution init_distribution_embed output_init_fn igate_bias_init_range force_bos_token_insert head_dim "
    "mlstm_round_up_to_multiple_of"
)


def _options(p: Published) -> dict[str, Any]:
    width, eps = _width(p), p.number("norm_eps", 1e-6)
    p.only("embedding_dim", width)
    p.only("use_bias", False)
    p.only("tie_word_embeddings", False)
    p.only("add_out_norm", True)
    p.only("add_post_blocks_norm", True)
    p.only("add_post_norm", False)
    p.only("add_qk_norm", False)
    p.only("eps", 1e-6)
    p.only("cell_norm_eps", eps)
    p.only("weight_mode", "single", "fused")  # of the names alone
    p.ignore(*OF_THE_KERNELS.split(), *OF_THE_TRAINING.split())
    keys, values = _inner(p)
    mixer = word(
        "mlstm",
        block="7b",
        n_heads=p("num_heads", 8),
        qk_factor=keys / width,
        v_factor=values / width,
        gate_cap=p.number("gate_soft_cap", 15.0),
        norm_eps=eps,
    )
    return {
        "pattern": stack([mixer, word("swiglu", d_hidden=_hidden(p))] * _n_layers(p)),
        "d_model": width,
        "vocab_size": p("vocab_size", 50304),
        "norm_eps": eps,
        "logit_softcap": p.limit("output_logit_soft_cap", 30.0),
    }


def _width(p: Published) -> int:
    return p("hidden_size", p("embedding_dim", 4096))


def _n_layers(p: Published) -> int:
    n = p("num_hidden_layers", p("num_blocks", 32))
    p.only("num_blocks", n)
    return n


def _inner(p: Published) -> tuple[int, int]:
    """The widths of q and k, and of v."""
    return int(_width(p) * p("qk_dim_factor", 0.5)), int(_width(p) * p("v_dim_factor", 1.0))


def _hidden(p: Published) -> int:
    """The width of the feed-forward layers, rounded up."""
    multiple = p("ffn_round_up_to_multiple_of", 64)
    return int((_width(p) * p("ffn_proj_factor", 2.667) + multiple - 1) // multiple * multiple)


def _weights(p: Published) -> Iterator[Map]:
    fused = p("weight_mode", "single") == "fused"
    yield from token_maps(p, embedding="backbone.embeddings.weight", norm="backbone.out_norm.weight")
    for i in range(_n_layers(p)):
        layer = f"backbone.blocks.{i}."
        yield from step_maps(2 * i, layer, "mlstm_layer", _mixer_maps(p, fused), norm="norm_mlstm")
        yield from step_maps(2 * i + 1, layer, "ffn", _feed_forward_maps(fused), norm="norm_ffn")


def _mixer_maps(p: Published, fused: bool) -> Iterator[Map]:
    for name in ("multihead_norm.weight", "out_proj.weight"):
        yield same(f"layer.{name}", name)
    inner, gates = ["q", "k", "v", "ogate_preact"], ["igate_preact", "fgate_preact"]
    names = [f"{n}.weight" for n in (*inner, *gates)] + [f"{n}.bias" for n in gates]
    ours = [f"layer.{name}" for name in names]
    if not fused:
        yield from map(same, ours, names)
        return
    keys, values = _inner(p)
    yield parts(ours[:4], "qkv_opreact.weight", [keys, keys, values, values])
    yield parts(ours[4:6], "ifgate_preact.weight")
    yield parts(ours[6:], "ifgate_preact.bias")


def _feed_forward_maps(fused: bool) -> Iterator[Map]:
    if fused:
        yield parts(["gate_proj.weight", "up_proj.weight"], "proj_up_gate_z.weight")
        yield from linear_maps("down_proj", "proj_down")
    else:
        yield from glu_maps(names=("proj_up_gate", "proj_up", "proj_down"))


SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 2, "num_heads": 2},
    "7b": {"vocab_size": 50304, "hidden_size": 4096, "num_hidden_layers": 32, "num_heads": 8},
}

families.add(Family("xlstm", "xLSTMForCausalLM", "xlstm", SIZES, _options, _weights))
