"""Mamba (Gu and Dao 2023, arXiv 2312.00752): a stack of the one mixer, no feed-forward layers.

Configs are those of transformers, or of flash-linear-attention, which has a class of the same name with other keys.
For the authors' own checkpoints, of which those with -hf are copies in the form of transformers, see `mamba_ssm`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from zoo.models.published.config import Published, stack, word
from zoo.models.published.family import Family, families
from zoo.models.published.fla import is_fla
from zoo.models.published.layers import mamba_maps, step_maps, token_maps
from zoo.models.published.maps import Map

DEFAULTS = {
    "hidden_size": 768,
    "num_hidden_layers": 32,
    "state_size": 16,
    "expand": 2,
    "conv_kernel": 4,
    "use_bias": False,
    "use_conv_bias": True,
    "vocab_size": 50280,
    "tie_word_embeddings": True,
}

OF_FLA = {"hidden_size": 2048, "num_hidden_layers": 48, "vocab_size": 32000, "tie_word_embeddings": False}
"""What flash-linear-attention gives to keys that a config leaves out, where it is not the same."""


def read_as(p: Published) -> Published:
    """The config with the defaults of the library whose keys it has."""
    return p.with_defaults(**OF_FLA) if is_fla(p) else p


def norm_eps(p: Published) -> float:
    """Epsilon of the norms, which flash-linear-attention calls by another name."""
    eps = p.number("layer_norm_epsilon", p("norm_eps", 1e-5))
    p.only("norm_eps", eps)
    return eps


def options(p: Published, **inner: Any) -> dict[str, Any]:
    """The options of a model of Mamba's kind; `inner` is for the mixer, beside what the config says."""
    p = read_as(p)
    p.only("hidden_act", "silu")
    p.only("rms_norm", True)
    p.only("intermediate_size", int(p("expand") * p("hidden_size")))
    # ways to compute, inits, and what the -hf checkpoints carry of the authors' own config
    p.ignore("residual_in_fp32", "fused_add_norm", "rescale_prenorm_residual", "use_mambapy", "use_associative_scan")
    p.ignore("time_step_min", "time_step_max", "time_step_floor", "time_step_scale", "time_step_init_scheme")
    p.ignore("d_model", "n_layer", "d_inner", "dt_rank", "ssm_cfg", "pad_vocab_size_multiple")
    if is_fla(p):
        p.ignore("dt_min", "dt_max", "dt_scale", "dt_init_scheme", "dt_init_floor", "use_l2warp")
    rank = p("dt_rank" if is_fla(p) else "time_step_rank", "auto")
    mixer = word(
        "mamba",
        d_state=p("state_size"),
        expand=p.number("expand"),
        dt_rank=math.ceil(p("hidden_size") / 16) if rank == "auto" else rank,
        conv_size=p("conv_kernel"),
        bias=p("use_bias"),
        conv_bias=p("use_conv_bias"),
        **inner,
    )
    return {
        "pattern": stack([mixer] * p("num_hidden_layers")),
        "d_model": p("hidden_size"),
        "vocab_size": p("vocab_size"),
        "norm_eps": norm_eps(p),
        "tie_embeddings": p("tie_word_embeddings"),
    }


def weights(p: Published) -> Iterator[Map]:
    """Where the weights of a model of Mamba's kind lie."""
    p = read_as(p)
    yield from token_maps(p, embedding="backbone.embeddings.weight", norm="backbone.norm_f.weight")
    for i in range(p("num_hidden_layers")):
        yield from step_maps(i, f"backbone.layers.{i}.", "mixer", mixer_maps(p), norm="norm")


def mixer_maps(p: Published) -> Iterator[Map]:
    """Where those of a layer's mixer lie, by their names in it."""
    d_inner = int(p("expand") * p("hidden_size"))
    return mamba_maps(d_inner, p("conv_kernel"), bias=p("use_bias"), conv_bias=p("use_conv_bias"))


def _size(n_layers: int, d_model: int) -> dict[str, Any]:
    return {"hidden_size": d_model, "num_hidden_layers": n_layers}


SIZES: dict[str, dict[str, Any]] = {
    "tiny": {**_size(2, 96), "vocab_size": 256},
    "130m": _size(24, 768),
    "370m": _size(48, 1024),
    "790m": _size(48, 1536),
    "1.4b": _size(48, 2048),
    "2.8b": _size(64, 2560),
}

MAMBA = Family("mamba", "MambaForCausalLM", "mamba", SIZES, options, weights, DEFAULTS)
families.add(MAMBA)
