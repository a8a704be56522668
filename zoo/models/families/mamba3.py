"""Mamba-3 (Lahoti et al. 2026, arXiv 2603.15569): a stack of the one mixer, no feed-forward layers.

Configs are those of flash-linear-attention. For the authors' own checkpoints see `mamba_ssm`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from zoo.models.published.config import Published, stack, word
from zoo.models.published.family import Family, families
from zoo.models.published.layers import linear_maps, step_maps, token_maps
from zoo.models.published.maps import Map, same

DEFAULTS: dict[str, Any] = {
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "head_dim": 64,
    "state_size": 128,
    "n_groups": 1,
    "expand": 2,
    "rope_fraction": 0.5,
    "A_floor": 1e-4,
    "is_outproj_norm": False,
    "is_mimo": False,
    "mimo_rank": 4,
    "norm_eps": 1e-5,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
}


def mixer(p: Published, **inner: Any) -> str:
    """The word of a layer; `inner` is beside what the config says."""
    return word(
        "mamba3",
        d_state=p("state_size"),
        expand=p.number("expand"),
        head_dim=p("head_dim"),
        n_groups=p("n_groups"),
        rank=_rank(p),
        rope_fraction=p.number("rope_fraction"),
        A_floor=p.number("A_floor"),
        out_norm=p("is_outproj_norm"),
        norm_eps=p.number("norm_eps"),
        **inner,
    )


def mixer_maps(p: Published) -> Iterator[Map]:
    """Its weights."""
    yield from linear_maps("in_proj", "in_proj")
    names = ["dt_bias", "B_bias", "C_bias", "B_norm.weight", "C_norm.weight", "D"]
    names += ["mimo_x", "mimo_z", "mimo_o"] if _rank(p) > 1 else []
    for name in [*names, "norm.weight"] if p("is_outproj_norm") else names:
        yield same(name, name)
    yield from linear_maps("out_proj", "out_proj")


def _rank(p: Published) -> int:
    rank = p("mimo_rank")
    return rank if p("is_mimo") else 1


def _options(p: Published) -> dict[str, Any]:
    p.only("hidden_act", "silu")
    p.only("use_bias", False)
    if p("is_mimo"):
        p.only("mimo_rank", *range(2, 1025), default=4)  # of rank 1 the weights of several values would be left over
    p.only("num_heads", int(p("expand") * p("hidden_size")) // p("head_dim"))
    p.ignore("residual_in_fp32", "rescale_prenorm_residual", "chunk_size", "dt_min", "dt_max", "dt_init_floor")
    return {
        "pattern": stack([mixer(p)] * p("num_hidden_layers")),
        "d_model": p("hidden_size"),
        "vocab_size": p("vocab_size"),
        "norm_eps": p.number("norm_eps"),
        "tie_embeddings": p("tie_word_embeddings"),
    }


def _weights(p: Published) -> Iterator[Map]:
    yield from token_maps(p, embedding="backbone.embeddings.weight", norm="backbone.norm_f.weight")
    for i in range(p("num_hidden_layers")):
        yield from step_maps(i, f"backbone.layers.{i}.", "mixer", mixer_maps(p), norm="norm")


SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 96, "num_hidden_layers": 2, "head_dim": 32, "state_size": 32, "vocab_size": 256},
    "1.3b": {},
}

MAMBA3 = Family("mamba3", "Mamba3ForCausalLM", "mamba3", SIZES, _options, _weights, DEFAULTS)
families.add(MAMBA3)
