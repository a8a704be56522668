"""Published configs: every key is neutral, settled by the architecture, or refused; in every family alike."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import zoo
from zoo.interop.hf import CONFIG, WEIGHTS
from zoo.models.config import ModelConfig
from zoo.models.families import families
from zoo.models.published.keys import NEUTRAL, is_neutral

REAL = Path(__file__).parents[2] / "shared/data/real"
TINY = zoo.list_models("*-tiny")
LATER_RWKV = {
    "architectures": ["Rwkv7ForCausalLM"],
    "model_type": "rwkv7",
    "a_low_rank_dim": 16,
    "decay_low_rank_dim": 16,
    "gate_low_rank_dim": 32,
    "v_low_rank_dim": 16,
    "context_length": 512,
    "embedding_layer_norm_fused": False,
    "head_size": 16,
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "rwkv_source_sha256": "ac1ae23d",
    "vocab_size": 256,
}
MAMBA_SSM = {"d_model": 64, "n_layer": 2, "vocab_size": 250, "ssm_cfg": {"layer": "Mamba2"}, "rms_norm": True}
FLAME = {
    "architectures": ["Mamba2ForCausalLM"],
    "model_type": "mamba2",
    "fuse_cross_entropy": True,
    "fuse_norm": True,
    "attn_mode": "chunk",
    "head_dim": 16,
    "hidden_size": 64,
    "n_groups": 1,
    "norm_eps": 1e-6,
    "num_heads": 8,
    "num_hidden_layers": 2,
    "vocab_size": 256,
}


def configs() -> dict[str, dict]:
    """A config of every family, as it is written."""
    found = {name: dict(zoo.create_model(name).config.published) for name in TINY}
    return found | {"rwkv7_later": LATER_RWKV, "mamba_ssm": MAMBA_SSM, "flame": FLAME}


CONFIGS = configs()


def options(config: dict) -> dict:
    read = families.of_config(config).model_options(config)
    read.pop("published")
    return read


def refusal(config: dict) -> str:
    with pytest.raises(zoo.UsageError) as error:
        options(config)
    assert str(error.value).isprintable()
    return str(error.value)


NEUTRAL_KEYS = {
    **dict.fromkeys(sorted(NEUTRAL - {"architectures", "model_type"}), "x"),
    "unsloth_fixed": True,
    "unsloth_version": "2025.3.19",
    "_attn_implementation_autoset": True,
    "_attn_implementation": "sdpa",
    "attn_implementation": "eager",
    "transformers.js_config": {"dtype": "q4"},
    "image_token_id": 5,
    "eos_token_id": [1, 2],
    "initializer_range": 0.5,
    "attention_probs_dropout_prob": 0.1,
    "router_z_loss_coef": 0.1,
    "fuse_swiglu": True,
    "_commit_hash": "abc",
}


@pytest.mark.parametrize("name", CONFIGS)
def test_neutral_keys_change_nothing_and_others_are_refused(name):
    config = CONFIGS[name]
    read = families.of_config(config).read(config)
    families.of_config(config).options(read)
    mine = {k for k in NEUTRAL_KEYS if k in read._read}  # to which the family gives a meaning
    neutral = {k: v for k, v in NEUTRAL_KEYS.items() if k not in config and k not in mine}
    assert len(neutral) > 100
    assert options({**config, **neutral}) == options(config)
    for made_up, value in (("quite_new", 1), ("attention_twist", True), ("qk_norms", "both"), ("new_scale", 0.5)):
        assert f"{made_up}={value!r} is not supported" in refusal({**config, made_up: value})


SETTLED = {  # families in which a key says what their architecture has anyway, and a value that it cannot have
    "use_qk_norm": (True, False, ("qwen3-tiny", "qwen3_moe-tiny", "qwen3_next-tiny", "gemma3-tiny", "lfm2-tiny")),
    "activation": ("swiglu", "geglu", ("llama3-tiny", "qwen3-tiny", "falcon_h1-tiny", "lfm2-tiny", "llada-tiny")),
    "hidden_act": ("relu2", "silu", ("nemotron_h-tiny",)),
    "rope_interleaved": (False, True, ("llama3-tiny", "qwen3-tiny", "gpt_oss-tiny")),
    "num_layers": (2, 3, ("llama3-tiny", "qwen3-tiny", "mamba-tiny")),
    "d_model": (64, 65, ("llama3-tiny", "qwen3-tiny")),
    "norm_type": ("rmsnorm", "layernorm", ("llama3-tiny", "qwen3-tiny")),
    "is_causal": (True, False, ("llama3-tiny", "gpt2-tiny")),
    "is_encoder_decoder": (False, True, ("llama3-tiny", "mamba2-tiny", "gpt2-tiny")),
    "qkv_bias": (False, True, ("llama3-tiny", "qwen3_moe-tiny")),
    "layer_norm_eps": (1e-5, 1e-6, ("llama3-tiny",)),
    "norm_eps": (1e-5, 1e-6, ("mamba2-tiny", "mamba-tiny")),
    "mamba_d_head": (32, 33, ("falcon_h1-tiny",)),
    "use_moe": (True, False, ("qwen3_moe-tiny", "gpt_oss-tiny")),
}


@pytest.mark.parametrize(("key", "name"), [(key, name) for key, (_, _, names) in SETTLED.items() for name in names])
def test_settled_keys(key, name):
    right, wrong, _ = SETTLED[key]
    config = CONFIGS[name]
    changed = {"layer_norm_epsilon": 1e-5} if key == "norm_eps" else {}
    assert options({**config, **changed, key: right}) == options(config)
    assert key in refusal({**config, **changed, key: wrong})


def test_windows_that_are_off():
    config = CONFIGS["llama3-tiny"]
    assert options({**config, "sliding_window": 64, "use_sliding_window": False}) == options(config)
    assert "may change the windows" in refusal({**config, "sliding_window": 64})
    assert "may change the windows" in refusal({**config, "sliding_window": 64, "use_sliding_window": True})


@pytest.mark.parametrize("name", ["mamba2-tiny", "nemotron_h-tiny", "falcon_h1-tiny"])
def test_limits_that_float32_cannot_reach_are_none(name):
    config = CONFIGS[name]
    for high in (float("inf"), 1e308, 3.4028234663852886e38):
        assert options({**config, "time_step_limit": [0.0, high]}) == options(config)
    if name != "nemotron_h-tiny":
        assert options({**config, "time_step_limit": [0.0, 1e37]}) != options(config)
    gemma = CONFIGS["gemma3-tiny"]
    assert options({**gemma, "final_logit_softcapping": 1e300}) == options(gemma)


def test_falcon_h1_without_its_width():
    config = {k: v for k, v in CONFIGS["falcon_h1-tiny"].items() if k != "mamba_d_ssm"}
    assert options({**config, "mamba_d_head": 32}) == options(CONFIGS["falcon_h1-tiny"])


def test_epsilon_of_flash_linear_attention():
    assert options(FLAME)["norm_eps"] == 1e-6
    assert "layer_norm_epsilon" not in FLAME


@pytest.mark.parametrize("name", TINY)
def test_a_changed_value_changes_the_model_or_is_refused(name):
    """No key that a family reads is passed over: another value makes another model, is refused, or is neutral."""
    config = CONFIGS[name]
    family = families.of_config(config)
    full = {**family.defaults, **config}
    quiet = set()
    for key, value in full.items():
        if is_neutral(key) or key in ("architectures", "model_type"):
            continue
        for other in (o for o in others(value) if o != value):
            try:
                changed = options({**config, key: other})
                maps = [m.theirs for m in family.maps({**config, key: other})]
            except zoo.UsageError:
                continue
            if changed == options(config) and maps == [m.theirs for m in family.maps(config)]:
                quiet.add(key)
    assert quiet == QUIET.get(name.removesuffix("-tiny"), set())


def others(value):
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int | float):
        return [value + 2, value * 4]
    if isinstance(value, str):
        return [value + "x"]
    return [[], ["x"]] if isinstance(value, list | tuple) else []


QUIET = {  # keys that count only beside others (windows that are on, experts that are off, ...)
    "deepseek_v3": {"num_nextn_predict_layers"},  # of weights that are left aside
    "deepseek_v32": {"num_nextn_predict_layers"},
    "glm_dsa": {"num_nextn_predict_layers"},
    "glm4_moe": {"num_nextn_predict_layers"},
    "kimi_k2": {"num_nextn_predict_layers"},
    "qwen3_5": {"decoder_sparse_step"},  # of experts that are not there
    "falcon_h1": {"mamba_expand", "mamba_norm_before_gate"},  # of a config without a width; of one with that norm
    "hrm": {"expansion", "seq_len"},  # rounded up to the same; attention reads any length
    "trm": {"expansion", "puzzle_emb_len", "seq_len", "H_layers"},
    "jamba": {"attn_layer_period"},  # longer than the model is deep
    "kimi_linear": {"linear_head_dim", "linear_conv_kernel_dim", "linear_num_heads"},  # said elsewhere too
    "lfm2": {"block_multiple_of"},
    "llada": {"mlp_ratio"},
    "mamba3": {"mimo_rank"},  # of a layer with one value a head
    "mdlm": {"cond_dim"},  # of shapes alone
    "qwen2": {"max_window_layers", "sliding_window"},
    "qwen3": {"sliding_window", "max_window_layers"},
    "qwen3_moe": {"sliding_window", "intermediate_size"},
    "qwen3_next": {"intermediate_size"},
}


# mamba_ssm's configs name no class, and those of the last have no class without a head
HEADS = [n for n in CONFIGS if n not in ("mamba_ssm", "trm-tiny", "hrm-tiny", "llada-tiny", "mdlm-tiny")]


@pytest.mark.parametrize("name", HEADS)
def test_the_stack_without_its_head(name, tmp_path):
    """Names without the prefix, the class of the stack, and no head: tied, or refused by what is lacking."""
    config = CONFIGS[name]
    family = families.of_config(config)
    torch.manual_seed(0)
    model = zoo.create_model(ModelConfig(**family.model_options(config))).eval()
    folder = zoo.to_hf(model, tmp_path / "model")
    weights = load_file(folder / WEIGHTS)
    top = next(n for n in weights if "emb" in n or "wte" in n).split(".")[0] + "."
    bare = {n.removeprefix(top): t for n, t in weights.items() if n.startswith(top)}
    assert len(weights) - len(bare) == (not model.config.tie_embeddings)
    save_file(bare, folder / WEIGHTS)
    assert family.bare_name.endswith("Model")
    (folder / CONFIG).write_text(
        json.dumps({**json.loads((folder / CONFIG).read_text()), "architectures": [family.bare_name]})
    )
    if model.config.tie_embeddings:
        again = zoo.from_hf(folder)
        tokens = torch.arange(12)[None]
        assert torch.equal(again(tokens)[0], model(tokens)[0])
        assert again.config == model.config
    else:
        with pytest.raises(
            zoo.UsageError, match=r"without its head: it lacks \S*head\S*, which the config does not tie"
        ):
            zoo.from_hf(folder)


def test_a_later_form_of_rwkv7(tmp_path):
    from zoo.interop.rwkv import from_authors, to_authors

    torch.manual_seed(0)
    model = zoo.create_model(ModelConfig(**families.of_config(LATER_RWKV).model_options(LATER_RWKV))).eval()
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    folder = zoo.to_hf(model, tmp_path / "model")
    weights = load_file(folder / WEIGHTS)
    assert weights["model.blocks.1.att.v1.weight"].shape == (16, 64)
    assert {"model.embeddings.weight", "model.blocks.0.ln0.weight", "model.ln_out.bias", "head.weight"} <= set(weights)
    tokens = torch.arange(20)[None]
    for again in (zoo.from_hf(folder), from_authors(to_authors(model))):
        assert torch.equal(again(tokens)[0], model(tokens)[0])


@pytest.mark.skipif(not REAL.is_dir(), reason=f"the configs of {REAL} are not there")
@pytest.mark.parametrize(
    ("folder", "family", "parameters"),
    [
        ("aic_480B", "qwen3_moe", 480_154_875_392),
        ("aic_Ultra-550B-A55B-BF16", "nemotron_h", 549_308_968_960),
        ("manual__HuggingFaceTB--SmolLM2-135M", "llama3", 134_515_008),
        ("manual__distilgpt2", "gpt2", 81_912_576),
        ("var2__codestral-verbatim", "mamba2", 7_285_403_648),
    ],
)
def test_real_configs(folder, family, parameters):
    with pytest.raises(zoo.UsageError) as error:
        zoo.from_hf(REAL / folder)
    assert f"is supported (family {family}, {parameters:,} parameters), but holds no weights" in str(error.value)
