"""Mamba-2 (Dao and Gu 2024, arXiv 2405.21060): a stack of the one mixer, no feed-forward layers.

"7b" is Mistral's Mamba-Codestral. Configs are those of transformers or of flash-linear-attention, as of `mamba`. For
the authors' own checkpoints see `mamba_ssm`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from zoo.models.families.mamba import OF_FLA, norm_eps
from zoo.models.published.config import LARGEST, Published, stack, word
from zoo.models.published.family import Family, families
from zoo.models.published.fla import is_fla
from zoo.models.published.layers import mamba2_maps, step_maps, token_maps
from zoo.models.published.maps import Map

DEFAULTS = {
    "hidden_size": 4096,
    "num_hidden_layers": 64,
    "head_dim": 64,
    "state_size": 128,
    "n_groups": 8,
    "expand": 2,
    "conv_kernel": 4,
    "use_bias": False,
    "use_conv_bias": True,
    "vocab_size": 32768,
    "tie_word_embeddings": False,
}


def step_limit(p: Published, key: str = "time_step_limit") -> tuple[float, float | None] | None:
    """Bounds of Mamba-2's step sizes, as `dt_limit` has them."""
    low, high = map(float, p(key, (0.0, math.inf)))
    if low <= 0 and high >= LARGEST:  # steps are positive, and in float32 no larger
        return None
    return low, None if high >= LARGEST else high


def _read_as(p: Published) -> Published:
    """The config with the defaults of the library whose keys it has."""
    return p.with_defaults(**OF_FLA, n_groups=1) if is_fla(p) else p


def _options(p: Published) -> dict[str, Any]:
    p = _read_as(p)
    p.only("hidden_act", "silu")
    p.only("rms_norm", True)
    d_inner = int(p("expand") * p("hidden_size"))
    p.only("intermediate_size", d_inner)
    p.only("num_heads", d_inner // p("head_dim"))
    # ways to compute, inits, and what former versions of transformers wrote and none reads
    p.ignore("residual_in_fp32", "rescale_prenorm_residual", "chunk_size", "time_step_rank")
    p.ignore("time_step_min", "time_step_max", "time_step_floor", "time_step_scale", "time_step_init_scheme")
    p.ignore("fused_add_norm")
    if is_fla(p):
        p.only("rmsnorm", True)
        p.only("norm_before_gate", False)
        p.only("D_has_hdim", False)
        p.ignore("dt_min", "dt_max", "dt_init_floor", "conv_init", "A_init_range", "use_l2warp")
    p.ignore("norm_before_gate")  # transformers does not read it
    eps = norm_eps(p)
    mixer = word(
        "mamba2",
        d_state=p("state_size"),
        expand=p.number("expand"),
        head_dim=p("head_dim"),
        n_groups=p("n_groups"),
        conv_size=p("conv_kernel"),
        bias=p("use_bias"),
        conv_bias=p("use_conv_bias"),
        norm_eps=eps,
        dt_limit=step_limit(p, "dt_limit" if is_fla(p) else "time_step_limit"),
    )
    return {
        "pattern": stack([mixer] * p("num_hidden_layers")),
        "d_model": p("hidden_size"),
        "vocab_size": p("vocab_size"),
        "norm_eps": eps,
        "tie_embeddings": p("tie_word_embeddings"),
    }


def _weights(p: Published) -> Iterator[Map]:
    p = _read_as(p)
    yield from token_maps(p, embedding="backbone.embeddings.weight", norm="backbone.norm_f.weight")
    for i in range(p("num_hidden_layers")):
        yield from step_maps(i, f"backbone.layers.{i}.", "mixer", mixer_maps(p), norm="norm")


def mixer_maps(p: Published) -> Iterator[Map]:
    """Where the weights of a layer's mixer lie, by their names in it."""
    d_inner, keys = int(p("expand") * p("hidden_size")), p("n_groups") * p("state_size")
    return mamba2_maps(d_inner, keys, p("conv_kernel"), bias=p("use_bias"), conv_bias=p("use_conv_bias"))


def _size(n_layers: int, d_model: int, vocab_size: int = 50288) -> dict[str, Any]:
    return {
        "hidden_size": d_model,
        "num_hidden_layers": n_layers,
        "num_heads": d_model // 32,
        "n_groups": 1,
        "vocab_size": vocab_size,
        "tie_word_embeddings": True,
    }


SIZES: dict[str, dict[str, Any]] = {
    "tiny": {**_size(4, 128, 256), "state_size": 64},
    "130m": _size(24, 768),
    "370m": _size(48, 1024),
    "780m": _size(48, 1536),
    "1.3b": _size(48, 2048),
    "2.7b": _size(64, 2560),
    "7b": {},
}

MAMBA2 = Family("mamba2", "Mamba2ForCausalLM", "mamba2", SIZES, _options, _weights, DEFAULTS)
families.add(MAMBA2)
