"""MDLM, a masked diffusion language model (Sahoo et al. 2024, arXiv 2406.07524): a transformer with nothing of time.

The authors' network (`models/dit.py`, the hub's `MDLM`) shifts, scales and gates its layers by the time of diffusion,
but the published models are run with `time_conditioning` off, at time zero throughout. The shifts, scales and gates are
then constants, and the network is a plain transformer with other weights, which is the model here. So, as for no other
family, reading a checkpoint computes: norms are scaled and shifted and output projections gated, in float32, and the
logits agree up to rounding. What is written is a model of theirs in which time changes nothing, and reads back bit for
bit; its gates are one and its scales zero. A model that listens to the time is refused. Sizes: of the hub's `mdlm-owt`,
whose 170M parameters make 162M.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.models.published.config import Published, stack, word
from zoo.models.published.family import Family, families
from zoo.models.published.layers import linear_maps
from zoo.models.published.maps import Map, same

DEFAULTS: dict[str, Any] = {
    "vocab_size": 50258,
    "hidden_dim": 768,
    "cond_dim": 129,
    "n_blocks": 12,
    "n_heads": 12,
    "time_conditioning": False,
}
FREQUENCIES = 256  # half cosines, half sines of the time
TOP = "backbone."
TIME = [f"{TOP}sigma_map.mlp.{name}" for name in ("0.weight", "0.bias", "2.weight", "2.bias")]
CHANGED = ("adaLN_modulation.weight", "adaLN_modulation.bias")  # these and what they change, in the order of a block
BLOCK = (*CHANGED, "norm1.weight", "attn_out.weight", "norm2.weight", "mlp.2.weight", "mlp.2.bias")
LAST = (*CHANGED, "norm_final.weight")


def _options(p: Published) -> dict[str, Any]:
    p.only("time_conditioning", False)
    p.whole("cond_dim")  # of weights alone
    layer = [
        word("mha", n_heads=p("n_heads"), rope_interleaved=False),
        word("mlp", activation="gelu_tanh"),
    ]
    return {
        "pattern": stack(layer * p("n_blocks")),
        "d_model": p("hidden_dim"),
        "vocab_size": p("vocab_size"),
        "causal": False,
        "norm": "layernorm",
        "norm_eps": 1e-5,
        "head_bias": True,
    }


def _weights(p: Published) -> Iterator[Map]:
    yield same("embedding.weight", f"{TOP}vocab_embed.embedding")
    yield same("head.weight", f"{TOP}output_layer.linear.weight")
    yield same("head_bias", f"{TOP}output_layer.linear.bias")
    for i in range(p("n_blocks")):
        block, attention, feed_forward = f"{TOP}blocks.{i}.", f"{_mixer(2 * i)}in_proj", f"{_mixer(2 * i + 1)}in_proj"
        yield same(f"{attention}.weight", f"{block}attn_qkv.weight")
        yield from linear_maps(feed_forward, f"{block}mlp.0", bias=True)
    yield _changed(p)


def _mixer(step: int) -> str:
    return f"backbone.steps.{step}.mixers.0."


def _changed(p: Published) -> Map:
    """Everything that the time changes, and what it is changed by, which all blocks share."""
    blocks, width, time = range(p("n_blocks")), p("hidden_dim"), p("cond_dim")
    ours, theirs = [], list(TIME)
    for i in blocks:
        for step, names in ((2 * i, ("out_proj.weight",)), (2 * i + 1, ("out_proj.weight", "out_proj.bias"))):
            ours += [f"backbone.steps.{step}.norm_in.{name}" for name in ("weight", "bias")]
            ours += [f"{_mixer(step)}{name}" for name in names]
        theirs += [f"{TOP}blocks.{i}.{name}" for name in BLOCK]
    ours += ["norm.weight", "norm.bias"]
    theirs += [f"{TOP}output_layer.{name}" for name in LAST]

    def read(*given: Tensor) -> Sequence[Tensor]:
        rest, found = iter([t.float() for t in given]), []
        w_in, b_in, w_out, b_out = islice(rest, len(TIME))
        at_zero = F.silu(w_in[:, : FREQUENCIES // 2].sum(1) + b_in)  # where cosines are one and sines zero
        condition = F.silu(w_out @ at_zero + b_out)
        for _ in blocks:
            weight, bias, norm1, attention, norm2, mlp, mlp_bias = islice(rest, len(BLOCK))
            shift1, scale1, gate1, shift2, scale2, gate2 = (weight @ condition + bias).chunk(6)
            found += [norm1 * (1 + scale1), shift1, gate1[:, None] * attention]
            found += [norm2 * (1 + scale2), shift2, gate2[:, None] * mlp, gate2 * mlp_bias]
        weight, bias, norm = rest
        shift, scale = (weight @ condition + bias).chunk(2)
        return [t.to(given[0].dtype) for t in (*found, norm * (1 + scale), shift)]

    def write(*given: Tensor) -> Sequence[Tensor]:
        zeros, zero, one = given[0].new_zeros, given[0].new_zeros(width), given[0].new_ones(width)
        rest, found = iter(given), [zeros(time, FREQUENCIES), zeros(time), zeros(time, time), zeros(time)]
        for _ in blocks:
            norm1, shift1, attention, norm2, shift2, mlp, mlp_bias = islice(rest, 7)
            bias = torch.cat([shift1, zero, one, shift2, zero, one])
            found += [zeros(6 * width, time), bias, norm1, attention, norm2, mlp, mlp_bias]
        norm, shift = rest
        return [*found, zeros(2 * width, time), torch.cat([shift, zero]), norm]

    return Map(tuple(ours), tuple(theirs), read, write)


SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"vocab_size": 256, "hidden_dim": 64, "cond_dim": 16, "n_blocks": 2, "n_heads": 4},
    "small": {"cond_dim": 128},
}

families.add(Family("mdlm", "MDLM", "mdlm", SIZES, _options, _weights, DEFAULTS, ignored=(r"rotary_emb\.inv_freq$",)))
