"""Gated DeltaNet (Yang et al. 2025, arXiv 2412.06464) in flash-linear-attention's format.

"1.3b" has the sizes of its default config, those of the paper's pure model.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from zoo.models.published.config import Published, word
from zoo.models.published.family import Family, families
from zoo.models.published.fla import fla_maps, fla_options, names
from zoo.models.published.layers import conv_parts_maps, linear_maps
from zoo.models.published.maps import Map, joined, same

N_LAYERS = 21


def _heads(p: Published) -> tuple[int, int, int, int]:
    """Heads of keys, their width, heads of values, their width."""
    heads, width = p("num_heads", 6), p("head_dim", 256)
    return heads, width, p("num_v_heads", heads), round(width * p("expand_v", 2.0))


def _options(p: Published) -> dict[str, Any]:
    heads, width, value_heads, _ = _heads(p)
    p.only("output_gate_activation", "swish", "silu")
    mixer = word(
        "gated_deltanet",
        n_heads=heads,
        head_dim=width,
        n_v_heads=None if value_heads == heads else value_heads,
        expand_v=p.number("expand_v", 2.0),
        conv_size=p("conv_size", 4) if p("use_short_conv", True) else 0,
        gate=p("use_gate", True),
        allow_neg_eigval=p("allow_neg_eigval", False),
        norm_eps=p.number("norm_eps", 1e-6),
    )
    p.ignore("conv_size")
    return fla_options(p, lambda i: mixer, n_layers=N_LAYERS)


def _mixer_maps(p: Published) -> Iterator[Map]:
    heads, width, value_heads, value_width = _heads(p)
    keys, values = heads * width, value_heads * value_width
    gate = ["g"] if p("use_gate", True) else []
    sizes = [keys, keys, values, value_heads, value_heads, *([values] if gate else [])]
    yield joined("in_proj.weight", names("q", "k", "v", "b", "a", *gate), sizes)
    if p("use_short_conv", True):
        yield from conv_parts_maps([keys, keys, values])
    for name in ("A_log", "dt_bias"):
        yield same(name, name)
    yield same("norm.weight", "o_norm.weight")
    yield from linear_maps("out_proj", "o_proj")


def _weights(p: Published) -> Iterator[Map]:
    return fla_maps(p, lambda i: _mixer_maps(p), n_layers=N_LAYERS)


SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_heads": 2,
        "head_dim": 24,
        "intermediate_size": 128,
        "vocab_size": 256,
    },
    "1.3b": {},
}

families.add(Family("gated_deltanet", "GatedDeltaNetForCausalLM", "gated_deltanet", SIZES, _options, _weights))
