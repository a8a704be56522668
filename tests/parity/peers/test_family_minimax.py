"""MiniMax whole: the class of transformers, and the authors' configs."""

from __future__ import annotations

import json

import pytest
import torch
from published import LOGITS, check, check_config, perturbed, refusal
from transformers import MiniMaxConfig, MiniMaxForCausalLM
from transformers.models.glm4_moe.modeling_glm4_moe import apply_rotary_pos_emb
from transformers.models.minimax import modeling_minimax

import zoo
from zoo.interop.hf import CONFIG, WEIGHTS

DECAYS = r"(slope_rate|query_decay|key_decay|diagonal_decay)$"  # buffers that follow from the config
SIZES = {
    "hidden_size": 36,
    "intermediate_size": 22,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "num_local_experts": 5,
    "vocab_size": 61,
    "experts_implementation": "eager",  # their grouped matmul wants rows of 16 bytes
}
KINDS = ["linear_attention", "linear_attention", "full_attention", "linear_attention"]
FACTORS = {
    "full_attn_alpha_factor": 1.7,
    "full_attn_beta_factor": 0.6,
    "linear_attn_alpha_factor": 1.3,
    "linear_attn_beta_factor": 0.8,
    "mlp_alpha_factor": 2.1,
    "mlp_beta_factor": 0.9,
}
FOUND = {  # every key of the config.json of MiniMax-Text-01-hf, but for the sizes
    "architectures": ["MiniMaxForCausalLM"],
    "attention_dropout": 0.0,
    "block_size": 256,
    "bos_token_id": None,
    "eos_token_id": None,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "layer_types": KINDS,
    "max_position_embeddings": 10240000,
    "model_type": "minimax",
    "num_experts_per_tok": 2,
    "output_router_logits": False,
    "postnorm": True,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000000,
    "rotary_dim": 10,
    "router_aux_loss_coef": 0.001,
    "router_jitter_noise": 0.0,
    "shared_intermediate_size": 0,
    "shared_moe_mode": "sigmoid",
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.53.0",
    "use_cache": True,
    **FACTORS,
    **SIZES,
}
AUTHORS = {"full_attn": "layernorm_full_attention", "linear_attn": "layernorm_linear_attention", "mlp": "layernorm_mlp"}


def theirs(**options):
    return perturbed(MiniMaxForCausalLM(MiniMaxConfig(**{**SIZES, **options})), unpublished=DECAYS)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"layer_types": KINDS, **FACTORS},
        {"layer_types": KINDS, "block_size": 7, "tie_word_embeddings": True, "rms_norm_eps": 1e-3, "head_dim": None},
        {"layer_types": KINDS, "sliding_window": 5, "num_experts_per_tok": 3, "num_key_value_heads": 6},
        {"layer_types": KINDS[1:] + KINDS[:1], "rope_parameters": {"rope_type": "default", "rope_theta": 50.0}},
    ],
)
def test_minimax(options, tmp_path):
    check(theirs(**options), tmp_path, unpublished=DECAYS)


@pytest.mark.parametrize("changes", [{}, {"layer_types": ...}, {"shared_intermediate_size": [0], "rotary_dim": ...}])
def test_configs_as_published(changes, tmp_path):
    found = {k: v for k, v in {**FOUND, **changes}.items() if v is not ...}
    check_config(found, tmp_path, unpublished=DECAYS)


def test_part_of_a_head_rotated(tmp_path, monkeypatch):
    """As the authors' code, which rotates the first `rotary_dim` channels; transformers ignores that key, and is given
    GLM's rotation here."""

    def frequencies(config, **options):
        return 10000000 ** -(torch.arange(0, 4, 2) / 4), 1.0

    monkeypatch.setattr(modeling_minimax, "apply_rotary_pos_emb", apply_rotary_pos_emb)
    rotary = modeling_minimax.MiniMaxRotaryEmbedding
    monkeypatch.setattr(rotary, "compute_default_rope_parameters", staticmethod(frequencies))
    check_config({**FOUND, "rotary_dim": 4}, tmp_path, unpublished=DECAYS)


@pytest.mark.parametrize("name", ["MiniMaxText01ForCausalLM", "MiniMaxM1ForCausalLM"])
def test_configs_of_the_authors(name, tmp_path):
    """Their keys for the same model, over the same weights; written back as found."""
    peer = theirs(layer_types=KINDS, **FACTORS)
    peer.save_pretrained(tmp_path / "found")
    model_type = {"MiniMaxText01ForCausalLM": "minimax_text_01", "MiniMaxM1ForCausalLM": "minimax_m1"}[name]
    config = {k: v for k, v in FOUND.items() if k not in ("layer_types", *FACTORS)}
    config |= {f"{new}_{k}": FACTORS[f"{old}_{k}_factor"] for old, new in AUTHORS.items() for k in ("alpha", "beta")}
    config |= {"architectures": [name], "model_type": model_type, "attn_type_list": [0, 0, 1, 0], "rope_theta": 1000000}
    (tmp_path / "found" / CONFIG).write_text(json.dumps(config))
    ours = zoo.from_hf(tmp_path / "found")
    tokens = torch.randint(61, (2, 37), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert (ours(tokens)[0] - peer(tokens, use_cache=False).logits).abs().max() < LOGITS
    zoo.to_hf(ours, tmp_path / "back")
    assert json.loads((tmp_path / "back" / CONFIG).read_text()) == config
    assert (tmp_path / "back" / WEIGHTS).exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"postnorm": False}, "postnorm=False is not supported, only True"),
        ({"shared_intermediate_size": 8}, "shared_intermediate_size=8 is not supported, only 0"),
        ({"shared_intermediate_size": [0, 8]}, "shared_intermediate_size=[0, 8] is not supported, only [0, 0]"),
        ({"attn_type_list": [0, 1, 2, 0]}, "with 2 in attn_type_list is not supported: 0 or 1"),
        ({"attn_type_list": [0, 1]}, "num_hidden_layers=4 is not supported, only 2"),
        ({"layer_types": ["conv"] * 4}, "a layer of type 'conv' is not supported"),
        ({"rotary_dim": 4, "partial_rotary_factor": 1.0}, "rotary_dim=4 is not supported, only 10"),
        ({"rotary_dim": 5}, "rotates 5, an odd number"),
    ],
)
def test_refused(changes, message):
    assert message in refusal({**FOUND, **changes})


def test_sizes():
    """As many parameters as transformers' class of that config, and as are told of Text-01."""
    with torch.device("meta"):
        ours = zoo.create_model("minimax-456b")
        peer = MiniMaxForCausalLM(MiniMaxConfig(**ours.config.published))
    assert ours.n_parameters() == sum(p.numel() for p in peer.parameters())
    assert ours.n_parameters() == pytest.approx(456e9, rel=1e-3)
