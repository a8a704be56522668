"""RWKV-7 "Goose" (Peng et al. 2025, arXiv 2503.14456): time mixing and channel mixing, a layer norm on the embedding.

The hub's format, `RWKV7ForCausalLM`, is that of flash-linear-attention; the authors' own is `zoo.interop.rwkv`'s.
`Rwkv7ForCausalLM` is a later format (2026), with the authors' names; it is read, and written back, too.
Sizes: of the World and G1 models.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from zoo.models.published.config import Published, stack, word
from zoo.models.published.family import Family, families
from zoo.models.published.layers import linear_maps, step_maps, token_maps
from zoo.models.published.maps import Map, renamed, reshaped, same, transposed

FUSED_NORM_EPS = 1e-6  # of the kernel that normalises with `fuse_norm`
OF_THE_TRAINING = ("attn_mode", "fuse_cross_entropy", "fuse_linear_cross_entropy", "use_l2warp")
LOW_RANKS = {f"{x}{i}" for x in "wavg" for i in (1, 2)}
SHIFTS = ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g")


def _options(p: Published) -> dict[str, Any]:
    width, n, head_dim, eps = _width(p), _n_layers(p), _head_dim(p), p.number("norm_eps", 1e-5)
    p.only("attn", None)
    p.only("hidden_act", "sqrelu")
    p.only("norm_bias", True)
    p.only("value_dim", width, [width] * n)
    p.ignore(*OF_THE_TRAINING)
    ratio = p("hidden_ratio", 4)
    pattern = layers(
        n,
        head_dim=head_dim,
        d_hidden=p("intermediate_size", -(-int(width * ratio) // 32) * 32),
        decay_rank=p("decay_low_rank_dim", 64),
        rate_rank=p("a_low_rank_dim", 64),
        value_rank=p("v_low_rank_dim", 16),
        gate_rank=p("gate_low_rank_dim", 128),
        norm_eps=head_dim * eps,
        kappa_eps=FUSED_NORM_EPS if p("fuse_norm", True) else 0.0,
    )
    return {
        "pattern": pattern,
        "d_model": width,
        "vocab_size": p("vocab_size", 32000),
        "norm": "layernorm",
        "norm_eps": eps,
        "embedding_norm": p("norm_first", True),
        "tie_embeddings": p("tie_word_embeddings", False),
    }


def layers(n: int, *, d_hidden: int, **mixer: Any) -> str:
    """The pattern of n layers with these options."""
    return stack([word("rwkv7", **mixer), word("rwkv_channel_mix", d_hidden=d_hidden)] * n)


def _width(p: Published) -> int:
    return p("hidden_size", 2048)


def _n_layers(p: Published) -> int:
    return p("num_hidden_layers", 24)


def _head_dim(p: Published) -> int:
    """`num_heads` counts only where `head_dim` is null, and published configs may have it wrong."""
    heads = p("num_heads", 0)
    return p("head_dim", _width(p) // heads if heads and "head_dim" in p.config else 64)


def _weights(p: Published) -> Iterator[Map]:
    yield from token_maps(p, embedding="model.embeddings.weight", norm_bias="model.norm.bias")
    if p("norm_first", True):
        yield from linear_maps("embedding_norm", "model.layers.0.pre_norm", bias=True)
    feed_forward = [same(name, name) for name in ("x_k", "key.weight", "value.weight")]
    for i in range(_n_layers(p)):
        layer, mixer = f"model.layers.{i}.", _mixer_maps(_width(p), first=i == 0)
        yield from step_maps(2 * i, layer, "attn", mixer, norm="attn_norm", norm_bias=True)
        yield from step_maps(2 * i + 1, layer, "ffn", feed_forward, norm="ffn_norm", norm_bias=True)


def _mixer_maps(width: int, *, first: bool) -> Iterator[Map]:
    yield _shift_map(width)
    for name in ("k_k", "k_a", "r_k"):
        yield same(name, name)
    for ours, theirs in (("receptance", "r_proj"), ("key", "k_proj"), ("value", "v_proj"), ("output", "o_proj")):
        yield from linear_maps(ours, theirs)
    yield from linear_maps("ln_x", "g_norm", bias=True)
    for low_rank in "wag" if first else "wagv":
        yield transposed(f"{low_rank}1", f"{low_rank}_lora.lora.0.weight")
        yield transposed(f"{low_rank}2", f"{low_rank}_lora.lora.2.weight")
        if low_rank != "g":
            yield same(f"{low_rank}0", f"{low_rank}_lora.lora.2.bias")


def authors_maps(width: int, n_layers: int, *, norm_first: bool = True) -> Iterator[Map]:
    """How the weights lie in the authors' files."""

    def vectors(*names: str) -> Iterator[Map]:
        return (reshaped(name, name, (width,), (1, 1, width)) for name in names)

    def mixer(first: bool) -> Iterator[Map]:
        low_ranks = "wag" if first else "wagv"
        yield from vectors(*SHIFTS, "k_k", "k_a", *(f"{x}0" for x in low_ranks if x != "g"))
        for name in ("r_k", *(f"{x}{i}" for x in low_ranks for i in (1, 2))):
            yield same(name, name)
        for name in ("receptance", "key", "value", "output"):
            yield from linear_maps(name, name)
        yield from linear_maps("ln_x", "ln_x", bias=True)

    def feed_forward() -> Iterator[Map]:
        yield from vectors("x_k")
        for name in ("key", "value"):
            yield from linear_maps(name, name)

    yield from linear_maps("embedding", "emb")
    if norm_first:
        yield from linear_maps("embedding_norm", "blocks.0.ln0", bias=True)
    for i in range(n_layers):
        block = f"blocks.{i}."
        yield from step_maps(2 * i, block, "att", mixer(first=i == 0), norm="ln1", norm_bias=True)
        yield from step_maps(2 * i + 1, block, "ffn", feed_forward(), norm="ln2", norm_bias=True)
    yield from linear_maps("norm", "ln_out", bias=True)
    yield from linear_maps("head", "head")


# ---- `Rwkv7ForCausalLM`: the authors' names behind `model.`, low ranks as linear layers


def _later_options(p: Published) -> dict[str, Any]:
    width, n, head_dim = p("hidden_size"), p("num_hidden_layers"), p("head_size", 64)
    p.only("num_attention_heads", width // head_dim)
    p.only("wkv_state_dtype", "float32")
    p.only("rescale_every", 0)
    p.only("hidden_act", "sqrelu")
    ranks = {key: max(32, round(f * width**0.5 / 32) * 32) for key, f in (("d", 2.5), ("v", 1.7), ("g", 5.0))}
    return {
        "pattern": layers(
            n,
            head_dim=head_dim,
            d_hidden=p("intermediate_size", 4 * width),
            decay_rank=p("decay_low_rank_dim", ranks["d"]),
            rate_rank=p("a_low_rank_dim", ranks["d"]),
            value_rank=p("v_low_rank_dim", ranks["v"]),
            gate_rank=p("gate_low_rank_dim", ranks["g"]),
            norm_eps=p.number("group_norm_epsilon", 64e-5),
            kappa_eps=0.0,
        ),
        "d_model": width,
        "vocab_size": p("vocab_size", 65536),
        "norm": "layernorm",
        "norm_eps": p.number("layer_norm_epsilon", 1e-5),
        "embedding_norm": not p("embedding_layer_norm_fused", False),
        "tie_embeddings": p.only("tie_word_embeddings", False),
    }


def _later_weights(p: Published) -> Iterator[Map]:
    norm_first = not p("embedding_layer_norm_fused", False)
    for m in authors_maps(p("hidden_size"), p("num_hidden_layers"), norm_first=norm_first):
        name = m.theirs[0]
        if name.rpartition(".")[2] in LOW_RANKS:
            yield transposed(m.ours[0], f"model.{name}.weight")
        elif name == "head.weight":
            yield m
        else:
            yield renamed(m, lambda name: "model." + name.replace("emb.", "embeddings.", 1))


def _shift_map(width: int) -> Map:
    """Checkpoints of the first version hold all shares of the step before in one tensor."""

    def read(*each: Tensor) -> Sequence[Tensor]:
        return torch.cat([x.reshape(-1, width) for x in each]).unbind(0)

    def write(*each: Tensor) -> Sequence[Tensor]:
        return [x.reshape(1, 1, width) for x in each]

    return Map(SHIFTS, SHIFTS, read, write, forms=(Map(SHIFTS, ("x_x",), read, write),))


def _size(n_layers: int, width: int, decay: int, value: int, gate: int) -> dict[str, Any]:
    """With the ranks of the decay, the values and the gate; that of the rate is the decay's."""
    return {
        "num_hidden_layers": n_layers,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "head_dim": 64,
        "decay_low_rank_dim": decay,
        "a_low_rank_dim": decay,
        "v_low_rank_dim": value,
        "gate_low_rank_dim": gate,
        "vocab_size": 65536,
        "fuse_norm": False,
    }


SIZES: dict[str, dict[str, Any]] = {
    "tiny": {**_size(2, 64, 16, 16, 32), "head_dim": 16, "vocab_size": 256},
    "0.1b": _size(12, 768, 64, 32, 128),
    "0.4b": _size(24, 1024, 64, 32, 128),
    "1.5b": _size(24, 2048, 96, 64, 256),
    "2.9b": _size(32, 2560, 96, 64, 320),
    "7.2b": _size(32, 4096, 128, 96, 480),
    "13.3b": _size(61, 4096, 192, 128, 384),
}

families.add(Family("rwkv7", "RWKV7ForCausalLM", "rwkv7", SIZES, _options, _weights))
families.add(Family("rwkv7_later", "Rwkv7ForCausalLM", "rwkv7", {}, _later_options, _later_weights))
