"""DeltaNet (Yang et al. 2024, arXiv 2406.06484) in flash-linear-attention's format.

Sizes: of the models that its authors trained on SlimPajama.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from zoo.models.published.config import Published, word
from zoo.models.published.family import Family, families
from zoo.models.published.fla import fla_maps, fla_options, names
from zoo.models.published.layers import conv_parts_maps, linear_maps
from zoo.models.published.maps import Map, joined, same


def _options(p: Published) -> dict[str, Any]:
    p.only("use_beta", True)
    p.only("use_output_norm", True)
    mixer = word(
        "deltanet",
        n_heads=p("num_heads", 16),
        expand_k=p.number("expand_k", 1.0),
        expand_v=p.number("expand_v", 1.0),
        conv_size=p("conv_size", 4) if p("use_short_conv", True) else 0,
        qk_activation=p("qk_activation", "silu"),
        qk_norm=p("qk_norm", "l2"),
        gate=p("use_gate", False),
        allow_neg_eigval=p("allow_neg_eigval", False),
        norm_eps=p.number("norm_eps", 1e-6),
    )
    p.ignore("conv_size")
    return fla_options(p, lambda i: mixer)


def _mixer_maps(p: Published) -> Iterator[Map]:
    width = p("hidden_size", 2048)
    keys, values = round(width * p("expand_k", 1.0)), round(width * p("expand_v", 1.0))
    gate = ["g"] if p("use_gate", False) else []
    sizes = [keys, keys, values, p("num_heads", 16), *([values] if gate else [])]
    yield joined("in_proj.weight", names("q", "k", "v", "b", *gate), sizes)
    if p("use_short_conv", True):
        yield from conv_parts_maps([keys, keys, values])
    yield same("norm.weight", "o_norm.weight")
    yield from linear_maps("out_proj", "o_proj")


def _weights(p: Published) -> Iterator[Map]:
    return fla_maps(p, lambda i: _mixer_maps(p))


SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_heads": 2,
        "intermediate_size": 128,
        "vocab_size": 256,
    },
    "340m": {"hidden_size": 1024, "num_hidden_layers": 24, "num_heads": 8},
    "1.3b": {},
}

families.add(Family("deltanet", "DeltaNetForCausalLM", "delta_net", SIZES, _options, _weights))
