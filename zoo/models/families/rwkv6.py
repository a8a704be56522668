"""RWKV-6 "Finch" (Peng et al. 2024, arXiv 2404.05892) in flash-linear-attention's format.

Its layers have keys half as wide as the model, and four heads, by default. Sizes: its default config, and the authors'
World models with their heads of 64.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from zoo.models.published.config import Published, stack, word
from zoo.models.published.family import Family, families
from zoo.models.published.layers import linear_maps, step_maps, token_maps
from zoo.models.published.maps import Map, same, transposed

THEIRS, OURS = "rwkvg", "wkvrg"  # the orders of the five mixings


def _options(p: Published) -> dict[str, Any]:
    width, n, eps = p("hidden_size", 2048), p("num_hidden_layers", 24), p.number("norm_eps", 1e-5)
    p.only("attn", None)
    p.only("hidden_act", "sqrelu")
    p.only("norm_bias", True)
    heads = p("num_heads", 4)
    if width % heads:
        raise ValueError(f"num_heads={heads} does not divide hidden_size={width}")
    mixer = word(
        "rwkv6",
        head_dim=width // heads,
        expand_k=p.number("expand_k", 0.5),
        expand_v=p.number("expand_v", 1.0),
        mix_rank=p("proj_low_rank_dim", 32),
        decay_rank=p("gate_low_rank_dim", 64),
        norm_eps=eps,
    )
    hidden = p("intermediate_size", -(-int(width * p("hidden_ratio", 3.5)) // 32) * 32)
    return {
        "pattern": stack([mixer, word("rwkv_channel_mix", d_hidden=hidden, gate=True)] * n),
        "d_model": width,
        "vocab_size": p("vocab_size", 32000),
        "norm": "layernorm",
        "norm_eps": eps,
        "embedding_norm": p("norm_first", True),
        "tie_embeddings": p("tie_word_embeddings", False),
    }


def _mixer_maps(width: int) -> Iterator[Map]:
    order = torch.tensor([THEIRS.index(i) for i in OURS], device="cpu")
    back = order.argsort()
    yield same("time_maa_x", "x_proj.0.mu")
    shares = tuple(f"time_maa_{i}" for i in THEIRS)
    yield Map(shares, ("x_bias",), lambda x: x.unbind(0), lambda *each: [torch.stack(each)])
    yield Map(
        ("time_maa_w1",),
        ("x_proj.0.linear.weight",),
        lambda w: [w.view(5, -1, width)[order].flatten(0, 1).T],
        lambda w: [w.T.reshape(5, -1, width)[back].flatten(0, 1)],
    )
    yield Map(
        ("time_maa_w2",),
        ("x_proj.2.weight",),
        lambda w: [w.view(width, 5, -1).permute(1, 2, 0)[order]],
        lambda w: [w[back].permute(2, 0, 1).flatten(1)],
    )
    yield transposed("time_decay_w1", "w_proj.linear.lora.0.weight")
    yield transposed("time_decay_w2", "w_proj.linear.lora.2.weight")
    yield same("time_decay", "w_proj.linear.lora.2.bias")
    yield same("time_faaaa", "bonus")
    for name in ("receptance", "key", "value", "gate"):
        yield same(f"{name}.weight", f"{name[0]}_proj.linear.weight")
    yield from linear_maps("output", "o_proj")
    yield from linear_maps("ln_x", "g_norm", bias=True)


def _weights(p: Published) -> Iterator[Map]:
    yield from token_maps(p, embedding="model.embeddings.weight", norm_bias="model.norm.bias")
    if p("norm_first", True):
        yield from linear_maps("embedding_norm", "model.layers.0.pre_norm", bias=True)
    feed_forward = [same("value.weight", "value.weight")]
    for name in ("key", "receptance"):
        feed_forward += [same(f"{name}.weight", f"{name}.linear.weight"), same(f"x_{name[0]}", f"{name}.mu")]
    for i in range(p("num_hidden_layers", 24)):
        layer, mixer = f"model.layers.{i}.", _mixer_maps(p("hidden_size", 2048))
        yield from step_maps(2 * i, layer, "attn", mixer, norm="attn_norm", norm_bias=True)
        yield from step_maps(2 * i + 1, layer, "ffn", feed_forward, norm="ffn_norm", norm_bias=True)


def _world(n_layers: int, width: int) -> dict[str, Any]:
    low = 64 if width >= 4096 else 32
    return {
        "hidden_size": width,
        "num_hidden_layers": n_layers,
        "num_heads": width // 64,
        "expand_k": 1.0,
        "proj_low_rank_dim": low,
        "gate_low_rank_dim": 2 * low,
        "intermediate_size": int(3.5 * width) // 32 * 32,
        "vocab_size": 65536,
    }


SIZES: dict[str, dict[str, Any]] = {
    "tiny": {**_world(2, 64), "num_heads": 4, "proj_low_rank_dim": 8, "gate_low_rank_dim": 16, "vocab_size": 256},
    "1.3b": {},
    "1.6b": _world(24, 2048),
    "3b": _world(32, 2560),
    "7b": _world(32, 4096),
}

families.add(Family("rwkv6", "RWKV6ForCausalLM", "rwkv6", SIZES, _options, _weights))
