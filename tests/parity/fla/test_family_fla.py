"""Whole models of flash-linear-attention, its kernels run by Triton's interpreter, which takes most of the time."""

from __future__ import annotations

import json

import pytest
import torch
from fla.models.delta_net import DeltaNetConfig, DeltaNetForCausalLM
from fla.models.gated_deltanet import GatedDeltaNetConfig, GatedDeltaNetForCausalLM
from fla.models.gla import GLAConfig, GLAForCausalLM
from fla.models.hgrn2 import HGRN2Config, HGRN2ForCausalLM
from fla.models.mamba import MambaConfig, MambaForCausalLM
from fla.models.mamba2 import Mamba2Config, Mamba2ForCausalLM
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
STACKS = {  # of one mixer, whose classes have the names of those of transformers
    "mamba": (MambaConfig, MambaForCausalLM, {"state_size": 5}),
    "mamba2": (Mamba2Config, Mamba2ForCausalLM, {"head_dim": 8, "state_size": 6}),
}
MODELS_AND_STACKS = {**MODELS, **STACKS}
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 61, "intermediate_size": 40}


def small(name, **options):
    config, _, sizes = MODELS_AND_STACKS[name]
    common = {key: size for key, size in SIZES.items() if name in MODELS or key != "intermediate_size"}
    return config(**{**common, **sizes, **options})


def made(name, **options):
    return perturbed(MODELS_AND_STACKS[name][1](small(name, **options)))


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
        ("mamba", {"dt_rank": 3, "use_bias": True, "use_conv_bias": False, "norm_eps": 1e-3}),
        ("mamba", {"conv_kernel": 3, "expand": 3, "tie_word_embeddings": True}),
        # of one group: without a GPU their layer gives B and C of several groups to other heads than their kernels do
        ("mamba2", {"dt_limit": (0.0, 0.4), "use_bias": True, "use_conv_bias": False}),
        ("mamba2", {"conv_kernel": 3, "norm_eps": 1e-3, "tie_word_embeddings": True}),
    ],
    ids=str,
)
def test_models(name, options, tmp_path):
    check(made(name, **options), tmp_path, length=20, cuts=(1, 7, 8, 15))


@pytest.mark.parametrize("name", MODELS_AND_STACKS)
def test_configs_as_they_are_written(name, tmp_path):
    theirs = made(name)
    config = json.loads(theirs.config.to_json_string(use_diff=False))
    check_config({**config, "architectures": [type(theirs).__name__]}, tmp_path)


@pytest.mark.parametrize("name", MODELS)
def test_default_configs_have_as_many_weights(name):
    """The sizes "1.3b" are their defaults."""
    config, model, _ = MODELS[name]
    with torch.device("meta"):
        theirs, ours = model(config()), zoo.create_model(f"{name}-1.3b")
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())


@pytest.mark.parametrize("name", STACKS)
def test_a_config_of_few_keys_has_the_defaults_of_their_library(name):
    """As a person writes one for its training code: what it leaves out is not what transformers would give."""
    config, model, _ = STACKS[name]
    written = {"model_type": name, "hidden_size": 128, "fuse_norm": True, "num_hidden_layers": 3}
    with torch.device("meta"):
        theirs = model(config(**written))
        ours = zoo.create_model(zoo.models.families.families.of_config(written).model_options(written))
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
        ("mamba2", {"norm_before_gate": True}, "norm_before_gate=True is not supported, only False"),
        ("mamba2", {"D_has_hdim": True}, "D_has_hdim=True is not supported, only False"),
        ("mamba2", {"rmsnorm": False}, "rmsnorm=False is not supported, only True"),
    ],
)
def test_what_is_refused(name, changes, message):
    model = MODELS_AND_STACKS[name][1]
    published = {**small(name).to_dict(), "architectures": [model.__name__], **changes}
    assert message in refusal(published)
