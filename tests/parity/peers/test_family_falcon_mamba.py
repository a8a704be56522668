"""Falcon Mamba whole."""

from __future__ import annotations

import pytest
import torch
from published import check, check_config, perturbed, refusal
from transformers import FalconMambaConfig, FalconMambaForCausalLM

import zoo

SIZES = {"hidden_size": 36, "num_hidden_layers": 3, "state_size": 5, "vocab_size": 61}
FOUND = {  # every key of a config.json, but for the sizes
    "architectures": ["FalconMambaForCausalLM"],
    "bos_token_id": 0,
    "conv_kernel": 4,
    "eos_token_id": 11,
    "expand": 2,
    "hidden_act": "silu",
    "initializer_range": 0.1,
    "intermediate_size": 72,
    "layer_norm_epsilon": 1e-05,
    "mixer_rms_eps": 1e-06,
    "model_type": "falcon_mamba",
    "pad_token_id": 11,
    "rescale_prenorm_residual": False,
    "residual_in_fp32": True,
    "tie_word_embeddings": False,
    "time_step_floor": 0.0001,
    "time_step_init_scheme": "random",
    "time_step_max": 0.1,
    "time_step_min": 0.001,
    "time_step_rank": 7,
    "time_step_scale": 1.0,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.0.dev0",
    "use_bias": False,
    "use_cache": True,
    "use_conv_bias": True,
    "use_falcon_mambapy": False,
    **SIZES,
}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_bias": True, "use_conv_bias": False, "tie_word_embeddings": False, "conv_kernel": 3},
        {"time_step_rank": 5, "expand": 3, "mixer_rms_eps": 1e-2, "layer_norm_epsilon": 1e-3},
    ],
)
def test_falcon_mamba(options, tmp_path):
    check(perturbed(FalconMambaForCausalLM(FalconMambaConfig(**{**SIZES, **options}))), tmp_path)


@pytest.mark.parametrize("changes", [{}, {"mixer_rms_eps": 1e-3, "time_step_rank": "auto"}])
def test_a_config_as_published(changes, tmp_path):
    check_config({**FOUND, **changes}, tmp_path)


def test_refused():
    assert "hidden_act='gelu' is not supported, only 'silu'" in refusal({**FOUND, "hidden_act": "gelu"})
    assert "intermediate_size=70 is not supported, only 72" in refusal({**FOUND, "intermediate_size": 70})


def test_sizes():
    with torch.device("meta"):
        ours = zoo.create_model("falcon_mamba-7b")
        theirs = FalconMambaForCausalLM(FalconMambaConfig(**ours.config.published))
    assert ours.n_parameters() == 7_272_665_088 == sum(p.numel() for p in theirs.parameters())
