"""Mamba, Mamba-2 and Mamba-3 as their authors keep them (state-spaces/mamba on GitHub and the hub).

Their config.json names no architecture and has keys of its own; `ssm_cfg` says which of the three mixers it is, and
its options. The layers `attn_layer_idx` are attention with the options `attn_cfg` (mamba2attn-2.7b), and each layer has
SwiGLU of `d_intermediate` after it, unless that is 0. The embedding's rows are rounded up by
`pad_vocab_size_multiple`. Sizes are those of `mamba`, `mamba2` and `mamba3`. Mamba-3 takes its rate of decay by
`A_activation="heavy_tail"`: models of this class have had that layer only since it does.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from zoo.models.families import mamba, mamba2, mamba3
from zoo.models.published.config import Published, stack, word
from zoo.models.published.family import Family, families
from zoo.models.published.layers import conv_maps, linear_maps, step_maps, token_maps
from zoo.models.published.maps import Map, parts

DEFAULTS = {
    "Mamba1": {"d_state": 16},
    "Mamba2": {"d_state": 128, "headdim": 64, "ngroups": 1},
    "Mamba3": {"d_state": 128, "headdim": 64, "ngroups": 1},
}
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
    **{name: name for name in ("rope_fraction", "A_floor", "is_outproj_norm", "is_mimo", "mimo_rank")},
}
OF_THE_TRAINING = ("A_init_range", "dt_min", "dt_max", "dt_init", "dt_scale", "dt_init_floor", "dropout", "n_layer")
COMPUTING = ("chunk_size", "use_fast_path", "use_mem_eff_path", "fuse_pregate_headwise_norm")
FAMILIES = {"Mamba1": mamba.MAMBA, "Mamba2": mamba2.MAMBA2, "Mamba3": mamba3.MAMBA3}
MIXER_MAPS = {"Mamba1": mamba.mixer_maps, "Mamba2": mamba2.mixer_maps, "Mamba3": mamba3.mixer_maps}


def _recurrent(p: Published) -> tuple[str, Published]:
    """Which mixer it is, and the config of a model of one such layer in the form of transformers."""
    given = dict(p("ssm_cfg", {}))
    layer = Published(given, p.architecture).only("layer", *FAMILIES)
    ssm = Published(given, p.architecture, DEFAULTS[layer])
    ssm.ignore("layer", *OF_THE_TRAINING, *COMPUTING)
    keys = {theirs: value for ours, theirs in KEYS.items() if (value := ssm(ours, None)) is not None}
    ssm.refuse_unread()
    one = {"hidden_size": p("d_model"), "num_hidden_layers": 1, "vocab_size": 1, "tie_word_embeddings": True, **keys}
    return layer, Published(one, p.architecture, FAMILIES[layer].defaults)


def _attention(p: Published) -> Published:
    """The options of the layers that are attention."""
    return Published(dict(p("attn_cfg", {})), p.architecture, {"qkv_proj_bias": True, "out_proj_bias": True})


def _heads(p: Published, a: Published) -> tuple[int, int, int]:
    """Numbers of heads and of heads of keys and values, and the width of a head."""
    n_heads = a("num_heads")
    return n_heads, a("num_heads_kv", n_heads), a("head_dim", p("d_model") // n_heads)


def _attention_word(p: Published) -> str:
    a = _attention(p)
    a.only("causal", True, default=False)
    a.only("mlp_dim", 0)
    n_heads, n_kv_heads, head_dim = _heads(p, a)
    rotated = a("rotary_emb_dim", 0)
    rope = {
        "rope_fraction": rotated / head_dim,
        "rope_base": float(a("rotary_emb_base", 10000.0)),
        "rope_interleaved": a("rotary_emb_interleaved", False),
    }
    made = word(
        "gqa",
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        scale=a("softmax_scale", None),
        bias=a("qkv_proj_bias"),
        out_bias=a("out_proj_bias"),
        conv_size=a("d_conv", 0) or None,
        **(rope if rotated else {"rope": False}),
    )
    a.refuse_unread()
    return made


def _attention_maps(p: Published) -> Iterator[Map]:
    a = _attention(p)
    n_heads, n_kv_heads, head_dim = _heads(p, a)
    yield from linear_maps("in_proj", "in_proj", bias=a("qkv_proj_bias"))
    if a("d_conv", 0):
        yield from conv_maps((n_heads + 2 * n_kv_heads) * head_dim, a("d_conv"), bias=True)
    yield from linear_maps("out_proj", "out_proj", bias=a("out_proj_bias"))


def _attends(p: Published) -> list[bool]:
    """Which layers are attention."""
    places = p("attn_layer_idx", [])
    return [i in places for i in range(p("n_layer"))]


def _d_hidden(p: Published) -> int:
    """Width of the feed-forward layers, 0 where there are none."""
    return -(-p("d_intermediate", 0) // 128) * 128


def _options(p: Published) -> dict[str, Any]:
    p.only("rms_norm", True)
    p.ignore("residual_in_fp32", "fused_add_norm", "attn_cfg")
    layer, one = _recurrent(p)
    options = FAMILIES[layer].options(one)
    one.refuse_unread()
    recurrent = mamba3.mixer(one, A_activation="heavy_tail") if layer == "Mamba3" else options["pattern"]
    attends = _attends(p)
    attention = _attention_word(p) if any(attends) else ""
    feed_forward = [word("swiglu", d_hidden=_d_hidden(p))] if _d_hidden(p) else []
    multiple = p("pad_vocab_size_multiple", 8)
    return {
        **options,
        "pattern": stack([w for attend in attends for w in (attention if attend else recurrent, *feed_forward)]),
        "vocab_size": -(-p("vocab_size") // multiple) * multiple,
        "tie_embeddings": p("tie_embeddings", True),
    }


def _weights(p: Published) -> Iterator[Map]:
    layer, one = _recurrent(p)
    ends = Published({"tie_word_embeddings": p("tie_embeddings", True)}, p.architecture)
    yield from token_maps(ends, embedding="backbone.embedding.weight", norm="backbone.norm_f.weight")
    each = 2 if _d_hidden(p) else 1
    for i, attends in enumerate(_attends(p)):
        place = f"backbone.layers.{i}."
        mixer = _attention_maps(p) if attends else MIXER_MAPS[layer](one)
        yield from step_maps(each * i, place, "mixer", mixer, norm="norm")
        if _d_hidden(p):
            feed_forward = [
                parts(["up_proj.weight", "gate_proj.weight"], "fc1.weight"),
                *linear_maps("down_proj", "fc2"),
            ]
            yield from step_maps(2 * i + 1, place, "mlp", feed_forward, norm="norm2")


families.add(Family("mamba_ssm", "MambaLMHeadModel", "", {}, _options, _weights, marker="ssm_cfg"))
