"""Whole models of flash-linear-attention, its kernels run by Triton's interpreter, which takes most of the time."""

from __future__ import annotations

import json

import pytest
import torch
from fla.models.delta_net import DeltaNetConfig, DeltaNetForCausalLM
from fla.models.gated_deltanet import GatedDeltaNetConfig, GatedDeltaNetForCausalLM
from fla.models.gla import GLAConfig, GLAForCausalLM
from fla.models.hgrn2 import HGRN2Config, HGRN2ForCausalLM
from fla.models.rwkv6 import RWKV6Config, RWKV6ForCausalLM
from published import check, check_config, perturbed, refusal

import zoo

MODELS = {
    "gla": (GLAConfig, GLAForCausalLM, {"num_heads": 2}),
    "deltanet": (DeltaNetConfig, DeltaNetForCausalLM, {"num_heads": 2}),
    "gated_deltanet": (GatedDeltaNetConfig, GatedDeltaNetForCausalLM, {"num_heads": 2, "head_dim": 8}),
    "hgrn2": (HGRN2Config, HGRN2ForCausalLM, {"expand_ratio": 16}),
    "rwkv6": (RWKV6Config, RWKV6ForCausalLM, {"num_heads": 2, "proj_low_rank_dim": 5, "gate_low_rank_dim": 6}),
}
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 61, "intermediate_size": 40}


def made(name, **options):
    config, model, sizes = MODELS[name]
    return perturbed(model(config(**{**SIZES, **sizes, **options})))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gla", {"expand_k": 1.0, "fuse_norm": False, "tie_word_embeddings": True, "intermediate_size": None}),
        ("deltanet", {"use_gate": True, "allow_neg_eigval": True, "conv_size": 3, "fuse_norm": False}),
        ("deltanet", {"use_short_conv": False, "qk_norm": "sum", "qk_activation": "elu"}),
        ("gated_deltanet", {"num_v_heads": 4, "expand_v": 1.0, "allow_neg_eigval": True, "fuse_norm": False}),
        ("gated_deltanet", {"use_gate": False}),
        ("hgrn2", {"expand_ratio": None, "num_heads": 4, "num_hidden_layers": 3, "fuse_norm": False}),
        ("hgrn2", {"use_lower_bound": False, "use_short_conv": True, "tie_word_embeddings": True}),
        ("rwkv6", {}),
        ("rwkv6", {"expand_k": 1.0, "norm_first": False, "fuse_norm": False, "intermediate_size": None}),
    ],
    ids=str,
)
def test_models(name, options, tmp_path):
    check(made(name, **options), tmp_path, length=20, cuts=(1, 7, 8, 15))


@pytest.mark.parametrize("name", MODELS)
def test_configs_as_they_are_written(name, tmp_path):
    theirs = made(name)
    config = {**theirs.config.to_dict(), "architectures": [type(theirs).__name__]}
    check_config(json.loads(json.dumps(config)), tmp_path)


@pytest.mark.parametrize("name", MODELS)
def test_default_configs_have_as_many_weights(name):
    """The sizes "1.3b" are their defaults."""
    config, model, _ = MODELS[name]
    with torch.device("meta"):
        theirs, ours = model(config()), zoo.create_model(f"{name}-1.3b")
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("gla", {"num_kv_heads": 1}, "num_kv_heads=1 is not supported, only 2"),
        ("gla", {"feature_map": "relu"}, "feature_map='relu' is not supported"),
        ("gla", {"use_short_conv": True}, "use_short_conv=True is not supported"),
        ("gla", {"clamp_min": -3.0}, "clamp_min=-3.0 is not supported"),
        ("deltanet", {"use_beta": False}, "use_beta=False is not supported"),
        ("gated_deltanet", {"output_gate_activation": "sigmoid"}, "output_gate_activation='sigmoid' is not supported"),
        ("hgrn2", {"attn": {"layers": [1]}}, "attn={'layers': [1]} is not supported"),
        ("hgrn2", {"hidden_act": "powlu"}, "hidden_act='powlu' is not supported"),
        ("gla", {"attnres_block_size": 2}, "attnres_block_size=2 is not supported"),
        ("rwkv6", {"norm_bias": False}, "norm_bias=False is not supported"),
    ],
)
def test_what_is_refused(name, changes, message):
    config, model, sizes = MODELS[name]
    published = {**config(**{**SIZES, **sizes}).to_dict(), "architectures": [model.__name__], **changes}
    assert message in refusal(published)
