"""Mamba and Mamba-2 as their authors keep them (state-spaces/mamba on GitHub and the hub).

Their config.json names no architecture and has keys of its own; `ssm_cfg` says which of the two mixers it is, and
its options. Weights are named as in transformers, but for the embedding, whose rows `pad_vocab_size_multiple` rounds
up. Sizes are those of `mamba` and `mamba2`. Layers of attention and of feed-forward in between are not supported.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from zoo.models.families.mamba import MAMBA
from zoo.models.families.mamba2 import MAMBA2
from zoo.models.published.config import Published
from zoo.models.published.family import Family, families
from zoo.models.published.maps import Map, renamed

DEFAULTS = {"Mamba1": {"d_state": 16}, "Mamba2": {"d_state": 128, "headdim": 64, "ngroups": 1}}
KEYS = {
    "d_state": "state_size",
    "expand": "expand",
    "d_conv": "conv_kernel",
    "bias": "use_bias",
    "conv_bias": "use_conv_bias",
    "dt_rank": "time_step_rank",
    "headdim": "head_dim",
    "ngroups": "n_groups",
    "dt_limit": "time_step_limit",
}


def _translated(p: Published) -> tuple[Family, Published]:
    """The family that it is in the form of transformers, and its config there."""
    p.only("rms_norm", True)
    p.only("d_intermediate", 0)
    p.only("attn_layer_idx", [])
    p.ignore("residual_in_fp32", "fused_add_norm", "attn_cfg")
    given = dict(p("ssm_cfg", {}))
    layer = Published(given, p.architecture).only("layer", "Mamba1", "Mamba2")
    ssm = Published(given, p.architecture, DEFAULTS[layer])
    ssm.ignore("layer", "A_init_range", "dt_min", "dt_max", "dt_init", "dt_scale", "dt_init_floor")
    ssm.ignore("chunk_size", "use_fast_path", "use_mem_eff_path")
    keys = {theirs: value for ours, theirs in KEYS.items() if (value := ssm(ours, None)) is not None}
    ssm.refuse_unread()
    multiple = p("pad_vocab_size_multiple", 8)
    config = {
        "hidden_size": p("d_model"),
        "num_hidden_layers": p("n_layer"),
        "vocab_size": -(-p("vocab_size") // multiple) * multiple,
        "tie_word_embeddings": p("tie_embeddings", True),
        **keys,
    }
    family = MAMBA if layer == "Mamba1" else MAMBA2
    return family, Published(config, p.architecture, family.defaults)


def _options(p: Published) -> dict[str, Any]:
    family, translated = _translated(p)
    options = family.options(translated)
    translated.refuse_unread()
    return options


def _weights(p: Published) -> Iterator[Map]:
    family, translated = _translated(p)
    for m in family.weights(translated):
        yield renamed(m, lambda name: name.replace("backbone.embeddings.", "backbone.embedding."))


families.add(Family("mamba_ssm", "MambaLMHeadModel", "", {}, _options, _weights, marker="ssm_cfg"))
