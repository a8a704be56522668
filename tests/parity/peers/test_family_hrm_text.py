"""HRM-Text whole: two levels, with each number of cycles and of passes that pass gradients."""

from __future__ import annotations

import pytest
import torch
from published import LOGITS, check, check_config, perturbed, refusal
from transformers import HrmTextConfig, HrmTextForCausalLM

import zoo

SIZES = {
    "hidden_size": 36,
    "intermediate_size": 50,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "head_dim": 10,
    "vocab_size": 61,
    "embedding_scale": 1.5,
}
FOUND = {  # every key of the config.json of HRM-Text-1B, but for the sizes
    "H_cycles": 2,
    "L_bp_cycles": [0, 3],
    "L_cycles": 3,
    "architectures": ["HrmTextForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 6,
    "dtype": "bfloat16",
    "eos_token_id": 11,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 4096,
    "mlp_bias": False,
    "model_type": "hrm_text",
    "num_key_value_heads": 3,
    "num_layers_per_stack": 2,
    "pad_token_id": 5,
    "prefix_lm": True,
    "rms_norm_eps": 1e-06,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "tie_word_embeddings": False,
    "transformers_version": "5.9.0",
    "use_cache": True,
    **SIZES,
    "num_hidden_layers": 16,
}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"H_cycles": 3, "L_cycles": 2, "L_bp_cycles": [1, 2, 1], "tie_word_embeddings": True},
        {"H_cycles": 1, "L_cycles": 4, "L_bp_cycles": [4], "rms_norm_eps": 1e-3},
        {"L_bp_cycles": [1, 3, 2], "rope_parameters": {"rope_type": "default", "rope_theta": 50.0}},
        {"L_bp_cycles": [0, 3]},
        {"L_cycles": 2, "L_bp_cycles": [2, 2], "attention_bias": True, "mlp_bias": True},
    ],
)
def test_hrm_text(options, tmp_path):
    check(perturbed(HrmTextForCausalLM(HrmTextConfig(**{**SIZES, **options}))), tmp_path)


@pytest.mark.parametrize(
    "changes",
    [{}, {"num_layers_per_stack": ..., "num_hidden_layers": 2}, {"embedding_scale": ..., "initializer_range": 0.2}],
)
def test_configs_as_published(changes, tmp_path):
    check_config({k: v for k, v in {**FOUND, **changes}.items() if v is not ...}, tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported, only 'silu'"),
        ({"L_bp_cycles": [4]}, "L_bp_cycles=[4] of L_cycles=3 is not supported: 0 to 3"),
        ({"L_bp_cycles": [-1]}, "L_bp_cycles=[-1] of L_cycles=3 is not supported: 0 to 3"),
        ({"num_key_value_heads": 1}, "num_key_value_heads=1 is not supported, only 3"),
        ({"num_hidden_layers": 12}, "num_hidden_layers=12 is not supported, only 16"),
        ({"H_cycles": 0}, "H_cycles is no whole number from 1"),
    ],
)
def test_refused(changes, message):
    assert message in refusal({**FOUND, **changes})


def test_prompts_in_both_directions():
    """Their `token_type_ids`, and their cache behind a prompt; ours is `Context(prefix=...)`."""
    theirs = perturbed(HrmTextForCausalLM(HrmTextConfig(**SIZES)))
    ours = zoo.from_hf(theirs)
    tokens = torch.randint(61, (3, 17), generator=torch.Generator().manual_seed(1))
    prefix = torch.tensor([11, 5, 0])
    types = (torch.arange(11) < prefix[:, None]).long()
    with torch.no_grad():
        expected = theirs(tokens[:, :11], token_type_ids=types, use_cache=True)
        plain = theirs(tokens[:, :11]).logits
        found, state = ours(tokens[:, :11], ours.init_state(3), zoo.Context(prefix=prefix))
        assert (expected.logits - plain).abs().amax((1, 2))[:2].min() > 0.01
        assert (found - expected.logits).abs().max() < LOGITS
        for t in range(11, 17):
            expected = theirs(tokens[:, [t]], past_key_values=expected.past_key_values, use_cache=True)
            found, state = ours.step(tokens[:, t], state)
            assert (found - expected.logits[:, 0]).abs().max() < LOGITS


def test_size():
    """As many parameters as transformers' class of that config, and as the published model has."""
    with torch.device("meta"):
        ours = zoo.create_model("hrm_text-1b")
        theirs = HrmTextForCausalLM(HrmTextConfig(**ours.config.published))
    frozen = theirs.model.z_L_init.numel()  # a buffer of ours
    assert ours.n_parameters() + frozen == sum(p.numel() for p in theirs.parameters()) == 1_182_795_264
