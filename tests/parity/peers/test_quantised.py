"""Checkpoint folders in FP8 by blocks and in MXFP4, as transformers dequantises them on a CPU."""

from __future__ import annotations

import json

import pytest
import torch
from published import refusal
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import zoo
from zoo.interop.hf import CONFIG, WEIGHTS
from zoo.interop.quantised import Dequantised
from zoo.models.published.quantised import quantised

FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
MXFP4 = {"modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router"], "quant_method": "mxfp4"}
KEPT = ("embed_tokens", "lm_head", "norm", ".gate.", "router", "weights_proj")
WIDE = {  # sides of less than 128 or of whole blocks: others, transformers would cut in equal blocks, or refuse
    "hidden_size": 256,
    "intermediate_size": 384,
    "moe_intermediate_size": 128,
    "q_lora_rank": 128,
    "kv_lora_rank": 120,
    "qk_rope_head_dim": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
}


def in_fp8(name, tmp_path, **options):
    """A folder of a small model in FP8: as published but for its size."""
    torch.manual_seed(0)
    family, size = zoo.models.families.families.of(name)
    config = {**family.published(size), **options}
    model = zoo.create_model(zoo.models.config.ModelConfig(**family.model_options(config))).bfloat16()
    folder = zoo.to_hf(model, tmp_path / "found")
    weights = load_file(folder / WEIGHTS)
    for n, w in dict(weights).items():
        if w.ndim == 2 and not any(part in n for part in KEPT):
            grid = [-(-side // 128) for side in w.shape]
            scale = 1e-3 * torch.rand(grid) + 1e-4
            stored = (100 * torch.randn(w.shape)).to(torch.float8_e4m3fn)
            weights |= {n: stored, f"{n}_scale_inv": scale}
    return keep(folder, weights, FP8)


def in_mxfp4(tmp_path):
    torch.manual_seed(0)
    folder = zoo.to_hf(zoo.create_model("gpt_oss-tiny").bfloat16(), tmp_path / "found")
    weights = load_file(folder / WEIGHTS)
    for n, w in dict(weights).items():
        if n.endswith(("gate_up_proj", "down_proj")):
            experts, width, rows = w.shape
            blocks = torch.randint(256, (experts, rows, width // 32, 16), dtype=torch.uint8)
            scales = torch.randint(118, 124, blocks.shape[:-1], dtype=torch.uint8)
            del weights[n]
            weights |= {f"{n}_blocks": blocks, f"{n}_scales": scales}
    return keep(folder, weights, MXFP4)


def keep(folder, weights, how):
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, "quantization_config": how}))
    return folder


FORMS = {
    "deepseek_v3": lambda tmp_path: in_fp8("deepseek_v3-tiny", tmp_path, **WIDE),
    "deepseek_v32": lambda tmp_path: in_fp8("deepseek_v32-tiny", tmp_path, **WIDE),
    "qwen3": lambda tmp_path: in_fp8("qwen3-tiny", tmp_path, hidden_size=256, intermediate_size=384, head_dim=64),
    "gpt_oss": in_mxfp4,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", FORMS)
def test_the_same_numbers(name, dtype, tmp_path):
    """Every weight bit for bit as transformers has it in memory (there, some stay in bfloat16), and the logits."""
    folder = FORMS[name](tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, experts_implementation="eager").to(dtype).eval()
    ours = zoo.from_hf(folder, dtype=dtype)
    back = zoo.to_hf(ours, tmp_path / "back")
    again = AutoModelForCausalLM.from_pretrained(back, dtype=dtype, experts_implementation="eager").to(dtype).eval()
    state = again.state_dict()
    for n, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, state[n]), n
    tokens = torch.arange(12)[None] * 7 % 256
    with torch.no_grad():
        expected = theirs(tokens, use_cache=False).logits
        assert torch.equal(again(tokens, use_cache=False).logits, expected)
        if dtype is torch.float32:
            assert expected.std() > 0.1
            assert (ours(tokens)[0] - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_their_functions(dtype):
    """Every byte under every exponent; and matrices of float8."""
    blocks = torch.arange(256, dtype=torch.uint8).repeat(254).view(1, 254, 16, 16)
    scales = torch.arange(254, dtype=torch.uint8).view(1, 254, 1).expand(1, 254, 16).contiguous()
    stored = {"w_blocks": blocks, "w_scales": scales}
    how = quantised({"quantization_config": MXFP4})
    expected = convert_moe_packed_tensors(blocks, scales, dtype=dtype)
    assert torch.equal(Dequantised(stored, stored, how, dtype)["w"], expected)
    weight, scale = (100 * torch.randn(256, 384)).to(torch.float8_e4m3fn), torch.rand(2, 3)
    stored = {"w": weight, "w_scale_inv": scale}
    how = quantised({"quantization_config": FP8})
    expected = Fp8Dequantize(None)._dequantize_one(weight, scale, dtype)
    assert torch.equal(Dequantised(stored, stored, how, dtype)["w"], expected)


@pytest.mark.filterwarnings("ignore")
def test_a_model_in_memory(tmp_path):
    """transformers would quantise it again, so that digits would be lost."""
    folder = in_fp8("qwen3-tiny", tmp_path, hidden_size=256, intermediate_size=384, head_dim=64)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    with pytest.raises(zoo.UsageError, match="was read from quantised weights: give from_hf its checkpoint folder"):
        zoo.from_hf(theirs)


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "compressed-tensors", "fbgemm_fp8", "mxfp4"])
def test_other_methods_are_refused(method):
    config = {**zoo.create_model("deepseek_v3-tiny").config.published, "quantization_config": {"quant_method": method}}
    assert f"DeepseekV3ForCausalLM with quantization_config (method '{method}') is not supported" in refusal(config)
