"""Mamba and Mamba-2 in their authors' own form, against the same weights in that of transformers."""

from __future__ import annotations

import json

import pytest
import torch
from published import LOGITS, perturbed, refusal
from safetensors.torch import load_file
from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM

import zoo

MAMBA = {"d_model": 36, "n_layer": 3, "vocab_size": 61, "ssm_cfg": {}, "pad_vocab_size_multiple": 8}
MAMBA |= {"rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True}
MAMBA2 = {
    **MAMBA,
    "d_intermediate": 0,
    "ssm_cfg": {"layer": "Mamba2", "headdim": 6, "d_state": 10, "ngroups": 4, "dt_limit": [0.0, 0.4]},
    "attn_layer_idx": [],
    "attn_cfg": {},
    "pad_vocab_size_multiple": 16,
    "tie_embeddings": True,
}
SIZES = {"hidden_size": 36, "num_hidden_layers": 3, "vocab_size": 64, "tie_word_embeddings": True}
OF_MIXER = {"num_heads": 12, "head_dim": 6, "state_size": 10, "n_groups": 4, "time_step_limit": (0.0, 0.4)}
BIASED = {"d_conv": 3, "d_state": 7, "expand": 3, "dt_rank": 5, "bias": True, "conv_bias": False, "dt_init": "constant"}


def mamba(**options):
    return MambaForCausalLM(MambaConfig(**{**SIZES, **options}))


def mamba2(**options):
    return Mamba2ForCausalLM(Mamba2Config(**{**SIZES, **OF_MIXER, **options}))


@pytest.mark.parametrize(
    ("config", "theirs"),
    [
        (MAMBA, mamba()),
        (
            {**MAMBA, "ssm_cfg": BIASED},
            mamba(conv_kernel=3, state_size=7, expand=3, time_step_rank=5, use_bias=True, use_conv_bias=False),
        ),
        (MAMBA2, mamba2()),
        ({**MAMBA2, "tie_embeddings": False}, mamba2(tie_word_embeddings=False)),
    ],
    ids=["mamba", "mamba, its options", "mamba2", "mamba2, untied"],
)
def test_the_authors_form(config, theirs, tmp_path):
    """Their keys, their name of the embedding, a vocabulary that is rounded up."""
    perturbed(theirs).save_pretrained(tmp_path / "theirs")
    weights = load_file(tmp_path / "theirs" / "model.safetensors")
    weights["backbone.embedding.weight"] = weights.pop("backbone.embeddings.weight")
    weights.setdefault("lm_head.weight", weights["backbone.embedding.weight"])
    (tmp_path / "authors").mkdir()
    torch.save(weights, tmp_path / "authors" / "pytorch_model.bin")
    (tmp_path / "authors" / "config.json").write_text(json.dumps(config))
    ours = zoo.from_hf(tmp_path / "authors")
    tokens = torch.randint(61, (2, 37))
    with torch.no_grad():
        assert (ours(tokens)[0] - theirs(tokens, use_cache=False).logits).abs().max() < LOGITS
    again = zoo.from_hf(zoo.to_hf(ours, tmp_path / "ours"))
    assert json.loads((tmp_path / "ours" / "config.json").read_text()) == config
    assert all(torch.equal(t, again.state_dict()[name]) for name, t in ours.state_dict().items())


@pytest.mark.parametrize(
    ("option", "told"),
    [
        ({"attn_layer_idx": [1], "attn_cfg": {"num_heads": 3}}, "causal=False is not supported, only True"),
        ({"attn_layer_idx": [1], "attn_cfg": {"num_heads": 3, "causal": True, "mlp_dim": 8}}, "mlp_dim=8 is not"),
        ({"rms_norm": False}, "rms_norm=False is not supported"),
        ({"ssm_cfg": {"layer": "Mamba4"}}, "layer='Mamba4' is not supported, only 'Mamba1' or 'Mamba2' or 'Mamba3'"),
        ({"ssm_cfg": {"layer": "Mamba3", "d_conv": 4}}, "conv_kernel=4 is not supported"),
        ({"ssm_cfg": {"layer": "Mamba2", "d_ssm": 40}}, "d_ssm=40 is not supported"),
        ({"ssm_cfg": {"headdim": 6}}, "head_dim=6 is not supported"),
        ({"norm": "group"}, "norm='group' is not supported"),
    ],
)
def test_options_that_are_refused(option, told):
    assert f"MambaLMHeadModel with {told}" in refusal({**MAMBA2, **option})
