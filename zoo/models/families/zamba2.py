"""Zamba2 (Glorioso et al. 2024, arXiv 2411.15242): Mamba-2, with one or two transformer blocks that many layers share.

    2*(mamba2 ... shared("block0", gqa geglu, ...) mamba2) ...

A block reads the stream and the embedding side by side; its result is projected by a layer of each use, and added to
what the next Mamba-2 layer reads. Each use has adapters of its own.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import Any

from zoo.models.published.config import Published, stack, word
from zoo.models.published.family import Family, families
from zoo.models.published.layers import attention_maps, linear_maps, mamba2_maps, step_maps, token_maps
from zoo.models.published.maps import Map, joined, parts, same, within

DEFAULTS: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 2560,
    "num_hidden_layers": 54,
    "mamba_d_state": 64,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_ngroups": 1,
    "n_mamba_heads": 8,
    "time_step_min": 0.001,
    "add_bias_linear": False,
    "num_attention_heads": 32,
    "num_mem_blocks": 1,
    "use_shared_attention_adapter": False,
    "adapter_rank": 128,
    "use_mem_rope": False,
    "rms_norm_eps": 1e-5,
}
MAMBA, SHARED = ("linear_attention", "mamba"), "hybrid"
"""What configs call the layers, now and before."""
SHARING = (6, 12, 18, 24, 30, 36, 42, 47, 51)  # the layers that share blocks, where a config does not say


def _shares(p: Published) -> list[bool]:
    """Which layers use a shared block."""
    key = "layers_block_type" if p("layers_block_type", None) else "layer_types"
    kinds = p.kinds(lambda i: SHARED if i in SHARING else MAMBA[0], SHARED, *MAMBA, key=key)
    return [kind == SHARED for kind in kinds]


def _uses(p: Published) -> list[int]:
    """The layers that use a shared block; use i is of block i modulo `num_mem_blocks`."""
    return [i for i, shares in enumerate(_shares(p)) if shares]


def _heads(p: Published) -> tuple[int, int, int]:
    """Numbers of heads and of heads of keys and values, and the width of a head, of attention over 2 D channels."""
    n_heads = p("num_attention_heads")
    return n_heads, p("num_key_value_heads", n_heads), 2 * p("hidden_size") // n_heads


def _block(p: Published, number: int) -> str:
    """The text of a shared block at any of its uses."""
    n_heads, n_kv_heads, head_dim = _heads(p)
    rank, rope = p("adapter_rank"), p.rope(context=4096)
    attention = word(
        "gqa",
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        scale=(head_dim / 2) ** -0.5,
        adapter_rank=rank if p("use_shared_attention_adapter") else None,
        **(rope if p("use_mem_rope") else {"rope": False}),
    )
    width = p("intermediate_size", 4 * p("hidden_size"))
    feed_forward = word("geglu", d_hidden=width, bias=p("add_bias_linear"), adapter_rank=rank, residual_scale=0.0)
    options = 'inject="wide", enters="next", out_proj=True'
    return f'shared("block{number}", {attention} {feed_forward}, {options})'


def _options(p: Published) -> dict[str, Any]:
    d, (n_heads, _, head_dim), d_inner = p("hidden_size"), _heads(p), int(p("mamba_expand") * p("hidden_size"))
    p.only("hidden_act", "gelu")
    p.only("use_conv_bias", True)
    p.only("use_shared_mlp_adapter", True)
    p.only("use_long_context", False)
    if p("use_shared_attention_adapter"):
        p.only("num_key_value_heads", n_heads)
    for key, settled in (
        ("attention_hidden_size", 2 * d),
        ("attention_head_dim", head_dim),
        ("head_dim", head_dim),
        ("kv_channels", d // n_heads),
        ("num_query_groups", n_heads),
        ("mamba_headdim", d_inner // p("n_mamba_heads")),
        ("hybrid_layer_ids", _uses(p)),
    ):
        p.only(key, settled)
    p.ignore("time_step_max", "time_step_floor", "chunk_size")
    recurrent = word(
        "mamba2",
        d_state=p("mamba_d_state"),
        expand=p.number("mamba_expand"),
        head_dim=d_inner // p("n_mamba_heads"),
        n_groups=p("mamba_ngroups"),
        conv_size=p("mamba_d_conv"),
        dt_limit=(p.number("time_step_min"), None),
        bias=p("add_bias_linear"),
    )
    blocks = iter(_block(p, i % p.whole("num_mem_blocks")) for i in range(len(_uses(p))))
    layers = [f"{next(blocks)} {recurrent}" if shares else recurrent for shares in _shares(p)]
    return {
        "pattern": stack(layers),
        "d_model": d,
        "vocab_size": p("vocab_size"),
        "norm_eps": p.number("rms_norm_eps"),
        "tie_embeddings": p("tie_word_embeddings", True),
    }


def _block_maps(p: Published, uses: list[int]) -> Iterator[Map]:
    """The weights of a shared block; `uses` are the numbers of its uses among those of all blocks."""
    attention, feed_forward = "body.steps.0.", "body.steps.1."
    yield same(f"{attention}norm_in.weight", "input_layernorm.weight")
    yield from within(f"{attention}mixers.0.", "self_attn.", attention_maps(*_heads(p)))
    yield same(f"{feed_forward}norm_in.weight", "pre_ff_layernorm.weight")
    of_gate = [f"{feed_forward}mixers.0.{name}_proj" for name in ("gate", "up")]
    for kind in ("weight", "bias") if p("add_bias_linear") else ("weight",):
        yield parts([f"{name}.{kind}" for name in of_gate], f"feed_forward.gate_up_proj.{kind}")
    yield from linear_maps(f"{feed_forward}mixers.0.down_proj", "feed_forward.down_proj", bias=p("add_bias_linear"))
    for i, use in enumerate(uses):
        adapter = f"feed_forward.gate_up_proj_adapter_list.{use}."
        yield same(f"{feed_forward}mixers.0.adapters.down.{i}.weight", f"{adapter}0.weight")
        yield same(f"{feed_forward}mixers.0.adapters.up.{i}.0.weight", f"{adapter}1.weight")
        if p("use_shared_attention_adapter"):
            adapters = [f"self_attn.linear_{name}_adapter_list.{use}." for name in "qkv"]
            yield joined(f"{attention}mixers.0.adapters.down.{i}.weight", [f"{name}0.weight" for name in adapters])
            for part, name in enumerate(adapters):
                yield same(f"{attention}mixers.0.adapters.up.{i}.{part}.weight", f"{name}1.weight")


def _weights(p: Published) -> Iterator[Map]:
    yield from token_maps(p, norm="model.final_layernorm.weight", tied=True)
    d_inner, keys = int(p("mamba_expand") * p("hidden_size")), p("mamba_ngroups") * p("mamba_d_state")
    step = 0
    for i, shares in enumerate(_shares(p)):
        layer = f"model.layers.{i}."
        if shares:
            yield same(f"backbone.steps.{step}.out_proj.weight", f"{layer}linear.weight")
            layer, step = f"{layer}mamba_decoder.", step + 1
        maps = mamba2_maps(d_inner, keys, p("mamba_d_conv"), bias=p("add_bias_linear"), conv_bias=True)
        yield from step_maps(step, layer, "mamba", maps, norm="input_layernorm")
        step += 1
    layers, n = _uses(p), p.whole("num_mem_blocks")
    for block, first in enumerate(layers[:n]):
        maps = _block_maps(p, list(range(block, len(layers), n)))
        yield from within(f"backbone.shared.{block}.", f"model.layers.{first}.shared_transformer.", maps)


def _again(p: Published, names: Collection[str]) -> Iterable[str]:
    """The weights of blocks under the names of later uses, where a checkpoint holds them once more."""
    again = {f"layers.{i}.shared_transformer" for i in _uses(p)[p.whole("num_mem_blocks") :]}
    return [name for name in names if ".".join(name.removeprefix("model.").split(".")[:3]) in again]


_PUBLISHED: dict[str, Any] = {"adapter_rank": 128, "rms_norm_eps": 1e-5, "tie_word_embeddings": True}


def _kinds(n_layers: int, uses: Collection[int]) -> list[str]:
    """The kinds of all layers, those numbered in `uses` with a shared block."""
    return [SHARED if i in uses else MAMBA[1] for i in range(n_layers)]


SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 64,
        "num_hidden_layers": 5,
        "layers_block_type": _kinds(5, (1, 2, 4)),
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_mem_blocks": 2,
        "adapter_rank": 8,
        "use_shared_attention_adapter": True,
        "use_mem_rope": True,
        "mamba_d_state": 32,
        "n_mamba_heads": 4,
        "vocab_size": 256,
    },
    "1.2b": {
        **_PUBLISHED,
        "hidden_size": 2048,
        "num_hidden_layers": 38,
        "layers_block_type": _kinds(38, range(5, 38, 6)),
        "mamba_d_state": 128,
        "n_mamba_heads": 64,
        "use_shared_attention_adapter": True,
        "use_mem_rope": True,
    },
    "2.7b": {
        **_PUBLISHED,
        "layers_block_type": _kinds(54, SHARING),
        "n_mamba_heads": 80,
        "num_mem_blocks": 2,
    },
    "7b": {
        **_PUBLISHED,
        "hidden_size": 3584,
        "num_hidden_layers": 81,
        "layers_block_type": _kinds(81, (6, *range(11, 81, 6))),
        "mamba_ngroups": 2,
        "n_mamba_heads": 112,
        "num_mem_blocks": 2,
        "use_mem_rope": True,
    },
}

families.add(Family("zamba2", "Zamba2ForCausalLM", "zamba2", SIZES, _options, _weights, DEFAULTS, surplus=_again))
