"""Gated linear attention (Yang et al. 2024, arXiv 2312.06635) in flash-linear-attention's format.

Sizes: of the models that its authors trained on SlimPajama.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from zoo.models.published.config import Published, word
from zoo.models.published.family import Family, families
from zoo.models.published.fla import fla_maps, fla_options, names
from zoo.models.published.layers import linear_maps
from zoo.models.published.maps import Map, joined, same

RANK = 16  # of the decay's projection, in their code alone


def _sizes(p: Published) -> tuple[int, int]:
    """Widths of keys and of values."""
    width = p("hidden_size", 2048)
    return round(width * p("expand_k", 0.5)), round(width * p("expand_v", 1.0))


def _options(p: Published) -> dict[str, Any]:
    heads = p("num_heads", 4)
    p.only("num_kv_heads", heads)
    for key in ("feature_map", "clamp_min"):
        p.only(key, None)
    p.only("use_short_conv", False)
    p.only("use_gk", True)
    p.only("use_gv", False)
    p.ignore("conv_size")
    mixer = word(
        "gla",
        n_heads=heads,
        expand_k=p.number("expand_k", 0.5),
        expand_v=p.number("expand_v", 1.0),
        gate=p("use_output_gate", True),
        norm_eps=p.number("norm_eps", 1e-6),
    )
    return fla_options(p, lambda i: mixer)


def _mixer_maps(p: Published) -> Iterator[Map]:
    keys, values = _sizes(p)
    gate = p("use_output_gate", True)
    first = [*names("q", "k", "v"), "gk_proj.0.weight", *(names("g") if gate else [])]
    yield joined("in_proj.weight", first, [keys, keys, values, RANK, *([values] if gate else [])])
    yield from linear_maps("decay_up", "gk_proj.1", bias=True)
    fused = gate and p("fuse_norm", True)
    yield same("norm.weight", "g_norm_swish_gate.weight" if fused else "g_norm.weight")
    yield from linear_maps("out_proj", "o_proj")


def _weights(p: Published) -> Iterator[Map]:
    return fla_maps(p, lambda i: _mixer_maps(p))


SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128, "vocab_size": 256},
    "340m": {"hidden_size": 1024, "num_hidden_layers": 24},
    "1.3b": {},
    "2.7b": {"hidden_size": 2560, "num_hidden_layers": 32},
}

families.add(Family("gla", "GLAForCausalLM", "gla", SIZES, _options, _weights))
