"""What the models of flash-linear-attention have in common: a mixer and a gated perceptron a layer, each behind a norm.

Their folders, such as its training code flame writes them, have a `config.json` with these keys and the names below.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from zoo.models.published.config import Published, stack, word
from zoo.models.published.layers import glu_maps, step_maps, token_maps
from zoo.models.published.maps import Map


def is_fla(p: Published) -> bool:
    """Whether a config of a class that transformers has too has the keys of flash-linear-attention."""
    return "layer_norm_epsilon" not in p.config and bool({"norm_eps", "fuse_norm"} & p.config.keys())


def fla_options(p: Published, mixer: Callable[[int], str], *, n_layers: int = 24) -> dict[str, Any]:
    """The model options of a config, `mixer(i)` being the word of layer i."""
    n, width = p("num_hidden_layers", n_layers), p("hidden_size", 2048)
    p.only("hidden_act", "swish")
    p.only("elementwise_affine", True)
    for key in ("attn", "attnres_block_size"):  # other layers in between; residuals over blocks
        p.only(key, None)
    hidden = word("swiglu", d_hidden=fla_hidden(p, width))
    return {
        "pattern": stack([part for i in range(n) for part in (mixer(i), hidden)]),
        "d_model": width,
        "vocab_size": p("vocab_size", 32000),
        "norm_eps": p.number("norm_eps", 1e-6),
        "tie_embeddings": p("tie_word_embeddings", False),
    }


def fla_hidden(p: Published, width: int) -> int:
    """Inner width of the gated perceptrons: two thirds of `hidden_ratio` D, rounded up to a multiple of 256."""
    return p("intermediate_size", -(-int(width * p("hidden_ratio", 4) * 2 / 3) // 256) * 256)


def fla_maps(p: Published, mixer: Callable[[int], Iterable[Map]], *, n_layers: int = 24) -> Iterator[Map]:
    """Where the weights lie, `mixer(i)` being those of layer i's mixer."""
    yield from token_maps(p, embedding="model.embeddings.weight")
    for i in range(p("num_hidden_layers", n_layers)):
        layer = f"model.layers.{i}."
        yield from step_maps(2 * i, layer, "attn", mixer(i), norm="attn_norm")
        yield from step_maps(2 * i + 1, layer, "mlp", glu_maps(), norm="mlp_norm")


def names(*parts: str) -> list[str]:
    """The weights of projections q, k and so on."""
    return [f"{part}_proj.weight" for part in parts]
