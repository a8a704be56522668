"""HGRN2 (Qin et al. 2024, arXiv 2404.07904) in flash-linear-attention's format.

There the lower bounds of all layers belong to the model, here to the first layer's mixer. `norm_eps` is that of
the norms between layers alone: the norm inside a mixer has 1e-5, whatever a config says (version 0.6.0).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from zoo.models.published.config import Published, word
from zoo.models.published.family import Family, families
from zoo.models.published.fla import fla_maps, fla_options, names
from zoo.models.published.layers import conv_parts_maps, linear_maps
from zoo.models.published.maps import Map, joined, same


def _head_dim(p: Published) -> int:
    """`num_heads` counts only where `expand_ratio` is null."""
    heads = p("num_heads", 0)
    return p("expand_ratio", p("hidden_size", 2048) // heads if heads and "expand_ratio" in p.config else 128)


def _options(p: Published) -> dict[str, Any]:
    bounds = p("use_lower_bound", True)
    if bounds and p("num_hidden_layers", 24) == 1:
        bounds = False  # the first layer has none, and one layer holds no logits
    mixer = word(
        "hgrn2",
        head_dim=_head_dim(p),
        lower_bounds="learned" if bounds else "none",
        conv_size=p("conv_size", 4) if p("use_short_conv", False) else 0,
    )
    p.ignore("conv_size")
    return fla_options(p, lambda i: mixer)


def _mixer_maps(p: Published) -> Iterator[Map]:
    width = p("hidden_size", 2048)
    yield joined("in_proj.weight", names("q", "f", "i"), [width] * 3)
    if p("use_short_conv", False):
        yield from conv_parts_maps([width] * 3, names=[f"{x}_conv1d" for x in "qfi"])
    yield same("norm.weight", "g_norm.weight")
    yield from linear_maps("out_proj", "o_proj")


def _weights(p: Published) -> Iterator[Map]:
    if p("use_lower_bound", True) and p("num_hidden_layers", 24) > 1:
        yield same("backbone.steps.0.mixers.0.logits", "model.lower_bounds")
    yield from fla_maps(p, lambda i: _mixer_maps(p))


SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "expand_ratio": 16,
        "intermediate_size": 128,
        "vocab_size": 256,
    },
    "1.3b": {},
}

families.add(Family("hgrn2", "HGRN2ForCausalLM", "hgrn2", SIZES, _options, _weights))
