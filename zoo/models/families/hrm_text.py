"""HRM-Text (Sapient 2026, arXiv 2605.20613): a language model of two levels, each a stack of layers that runs again.

From the embedding h and z = 0 each of `H_cycles` cycles is z <- norm(L(z + h)), `L_cycles` times, then
h <- norm(H(h + z)); z goes on in the next cycle. Gradients pass through the last `L_bp_cycles` low passes of a cycle.
Published models read a prompt in both directions (`prefix_lm`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from zoo.core.errors import UsageError
from zoo.models.published.config import Published, stack, word
from zoo.models.published.family import Family, families
from zoo.models.published.layers import token_maps
from zoo.models.published.maps import Map, joined, parts, same, within
from zoo.pattern import Pattern, make_loop, parse

DEFAULTS: dict[str, Any] = {
    "vocab_size": 151808,
    "hidden_size": 1536,
    "intermediate_size": 4096,
    "num_hidden_layers": 16,
    "num_attention_heads": 12,
    "head_dim": 128,
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
}
NORM = "rmsnorm_plain"


def _n_layers(p: Published) -> int:
    """Layers of each level. transformers writes the caches of all passes as `num_hidden_layers`, and these apart."""
    total = p("num_hidden_layers")
    if (n := p("num_layers_per_stack", None)) is None:
        return total
    p.only("num_hidden_layers", n * p("H_cycles", 2) * (p("L_cycles", 3) + 1))
    return n


def _gradients(p: Published) -> tuple[int, ...] | None:
    """The low passes with gradients in each cycle; None for all."""
    n_high, n_low = p.whole("H_cycles", 2), p.whole("L_cycles", 3)
    given = [int(n) for n in p("L_bp_cycles", [2])]
    each = tuple(([1] * n_high + given)[-n_high:] if len(given) < n_high else given[:n_high])
    if not all(0 <= n <= n_low for n in each):
        told = f"L_bp_cycles={given} of L_cycles={n_low} is not supported: 0 to {n_low}"
        raise UsageError(f"{p.architecture} with {told}.")
    return None if all(n == n_low for n in each) else each


def _options(p: Published) -> dict[str, Any]:
    p.only("hidden_act", "silu")
    p.ignore("prefix_lm")
    n_heads, _, head_dim = p.heads()
    p.only("num_key_value_heads", n_heads)
    n_high, n_low = p.whole("H_cycles", 2), p.whole("L_cycles", 3)
    attention = word(
        "mha",
        n_heads=n_heads,
        head_dim=head_dim,
        gate="channel",
        norm=NORM,
        bias=p("attention_bias", False),
        **p.rope(context=2048),
    )
    layer = [attention, word("swiglu", d_hidden=p("intermediate_size"), bias=p("mlp_bias", False), norm=NORM)]
    level = stack(layer * _n_layers(p))
    low: dict[str, Any] = {"inject": "add", "start": "carried", "norm": NORM, "residual": True}
    if (learning := _gradients(p)) is not None:
        low["gradient"] = learning
    inner = make_loop(n_low, parse(level), low)
    outer = make_loop(n_high, Pattern((inner, *parse(level).nodes)), {"norm": NORM})
    scale = p("embedding_scale", None)
    return {
        "pattern": str(Pattern((outer,))),
        "d_model": p("hidden_size"),
        "vocab_size": p("vocab_size"),
        "norm": "none",  # before the head; the last cycle ends in one
        "norm_eps": p.number("rms_norm_eps", 1e-6),
        "embedding_scale": 1.0 / p.number("initializer_range") if scale is None else float(scale),
        "tie_embeddings": p("tie_word_embeddings", False),
    }


def _attention_maps(p: Published) -> Iterator[Map]:
    """One attention: checkpoints hold gates, queries, keys and values in one, and biases one by one."""
    n_heads, _, head_dim = p.heads()
    width = n_heads * head_dim
    index = torch.arange(4 * width, device="cpu").roll(-width)
    yield joined("in_proj.weight", ["attn.gqkv_proj.weight"], [4 * width], index=index)
    yield same("out_proj.weight", "attn.o_proj.weight")
    if p("attention_bias", False):
        yield joined("in_proj.bias", [f"self_attn.{name}_proj.bias" for name in ("q", "k", "v", "gate")])
        yield same("out_proj.bias", "attn.o_proj.bias")


def _dense_maps(p: Published) -> Iterator[Map]:
    yield parts(["gate_proj.weight", "up_proj.weight"], "mlp.gate_up_proj.weight")
    yield same("down_proj.weight", "mlp.down_proj.weight")
    if p("mlp_bias", False):
        for name in ("gate_proj.bias", "up_proj.bias", "down_proj.bias"):
            yield same(name, f"mlp.{name}")


def _weights(p: Published) -> Iterator[Map]:
    attention, dense = list(_attention_maps(p)), list(_dense_maps(p))
    yield from token_maps(p, norm=None)
    yield same("backbone.steps.0.body.steps.0.initial", "model.z_L_init")
    for level, place, first in (("L_module", "0.body.steps.0.body.steps", 0), ("H_module", "0.body.steps", 1)):
        for i in range(_n_layers(p)):
            for j, maps in enumerate((attention, dense)):
                ours = f"backbone.steps.{place}.{first + 2 * i + j}.mixers.0."
                yield from within(ours, f"model.{level}.layers.{i}.", maps)


SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "head_dim": 16,
        "vocab_size": 256,
        "embedding_scale": 1.0,
    },
    "1b": {
        "vocab_size": 65536,
        "num_layers_per_stack": 16,
        "num_hidden_layers": 128,
        "max_position_embeddings": 4096,
        "L_bp_cycles": [0, 3],
        "initializer_range": 0.025515518153991442,
        "embedding_scale": 39.191835884530846,
    },
}

families.add(Family("hrm_text", "HrmTextForCausalLM", "hrm_text", SIZES, _options, _weights, DEFAULTS))
