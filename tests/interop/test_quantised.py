"""Checkpoint folders in FP8 by blocks and in MXFP4: read as plain numbers, written in bfloat16, or refused."""

from __future__ import annotations

import json
import warnings
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import zoo
from zoo.cli import app
from zoo.core.errors import UsageWarning
from zoo.interop.hf import CONFIG, INDEX, WEIGHTS, _Folder, published_weights
from zoo.models.families import families

FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
MXFP4 = {"modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"], "quant_method": "mxfp4"}
KEPT = ("embed_tokens", "lm_head", "norm", ".gate.", "router")
"""What official checkpoints leave in bfloat16."""


def plain_folder(name, tmp_path, **options):
    """A checkpoint folder of a small model in bfloat16, and its weights."""
    torch.manual_seed(0)
    folder = zoo.to_hf(zoo.create_model(name, **options).bfloat16(), tmp_path / name)
    return folder, load_file(folder / WEIGHTS)


def keep(folder, weights, how):
    """Put quantised weights into a folder, and into its config how they are."""
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, "quantization_config": how}))


def fp8_folder(name, tmp_path, block=(128, 128), **how):
    """A folder in FP8, and what its weights stand for: the definition, one number at a time."""
    folder, weights = plain_folder(name, tmp_path)
    stored, expected = {}, {}
    for n, w in weights.items():
        stored[n] = expected[n] = w
        if w.ndim == 2 and not any(part in n for part in KEPT):
            rows, columns = (torch.arange(size) // min(b, size) for size, b in zip(w.shape, block, strict=True))
            scale = 2e-3 * torch.rand(int(rows[-1]) + 1, int(columns[-1]) + 1) + 1e-4
            stored[n] = (100 * torch.randn(w.shape)).to(torch.float8_e4m3fn)
            stored[f"{n}_scale_inv"] = scale
            expected[n] = stored[n].float() * scale[rows][:, columns]
    keep(folder, stored, {**FP8, "weight_block_size": list(block), **how})
    return folder, expected


def decoded(code):
    """A number of 4 bits by its definition: a sign, two bits of exponent (bias 1), one of mantissa."""
    sign, exponent, mantissa = -1.0 if code & 8 else 1.0, code >> 1 & 3, code & 1
    return sign * (2.0 ** (exponent - 1) * (1 + mantissa / 2) if exponent else mantissa / 2)


def mxfp4_folder(tmp_path, low=110, high=124):
    folder, weights = plain_folder("gpt_oss-tiny", tmp_path)
    stored, expected = dict(weights), dict(weights)
    table = torch.tensor([[decoded(byte & 15), decoded(byte >> 4)] for byte in range(256)], dtype=torch.float64)
    for n, w in weights.items():
        if n.endswith(("gate_up_proj", "down_proj")):
            experts, width, rows = w.shape
            blocks = torch.randint(256, (experts, rows, width // 32, 16), dtype=torch.uint8)
            scales = torch.randint(low, high, blocks.shape[:-1], dtype=torch.uint8)
            del stored[n]
            stored |= {f"{n}_blocks": blocks, f"{n}_scales": scales}
            numbers = table[blocks.int()].flatten(-2) * 2.0 ** (scales.double().unsqueeze(-1) - 127)
            expected[n] = numbers.flatten(-2).transpose(1, 2)
    keep(folder, stored, MXFP4)
    return folder, expected


def read(folder, **options):
    """The model of a folder, and the line that says what was done."""
    with pytest.warns(UsageWarning) as told:
        model = zoo.from_hf(folder, **options)
    (line,) = (str(w.message) for w in told)
    assert "\n" not in line
    return model, line


FORMS = {
    "deepseek_v3": lambda tmp_path: fp8_folder("deepseek_v3-tiny", tmp_path),
    "deepseek_v32": lambda tmp_path: fp8_folder("deepseek_v32-tiny", tmp_path, block=(16, 24), scale_fmt="ue8m0"),
    "kimi_k2": lambda tmp_path: fp8_folder("kimi_k2-tiny", tmp_path, block=(10, 128)),
    "qwen3": lambda tmp_path: fp8_folder("qwen3-tiny", tmp_path, block=(7, 9)),
    "llama3": lambda tmp_path: fp8_folder("llama3-tiny", tmp_path, block=(10**15, 10**30)),
    "gpt_oss": mxfp4_folder,
}


@pytest.mark.parametrize("name", FORMS)
def test_read_and_written_in_bfloat16(name, tmp_path):
    folder, expected = FORMS[name](tmp_path)
    n = sum(stored.endswith(("_scale_inv", "_scales")) for stored in load_file(folder / WEIGHTS))
    assert n >= 4
    model, line = read(folder)
    method = "mxfp4" if name == "gpt_oss" else "fp8"
    told = f"is quantised: {n} weights in {method} are dequantised to bfloat16, and will be written so."
    assert line == f"{folder} {told}"
    weights = published_weights(model)
    assert weights.keys() == expected.keys()
    assert all(torch.equal(w, expected[n].bfloat16()) for n, w in weights.items())
    back = zoo.to_hf(model, tmp_path / "back")
    assert "quantization_config" not in json.loads((back / CONFIG).read_text())
    with warnings.catch_warnings(action="error"):
        again = zoo.from_hf(back)
    assert again.config == model.config
    assert all(torch.equal(t, again.state_dict()[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize("outside", ["no key", "null", "the form"])
def test_the_text_part_of_a_model_that_sees(outside, tmp_path):
    """Its config may say inside of `text_config` how the weights are quantised, or beside it."""
    folder, expected = fp8_folder("qwen3_5-tiny", tmp_path)
    stored, text = load_file(folder / WEIGHTS), json.loads((folder / CONFIG).read_text())
    inner = {n.replace("model.", "model.language_model.", 1): w for n, w in stored.items()}
    save_file({**inner, "model.visual.pos_embed.weight": torch.ones(2)}, folder / WEIGHTS)
    seeing = {"architectures": ["Qwen3_5ForConditionalGeneration"], "model_type": "qwen3_5", "vision_config": {}}
    if outside != "no key":
        seeing["quantization_config"] = text.pop("quantization_config") if outside == "the form" else None
    (folder / CONFIG).write_text(json.dumps({**seeing, "text_config": text}))
    model, line = read(folder)
    assert "weights in fp8 are dequantised to bfloat16" in line
    weights = published_weights(model)
    assert weights.keys() == expected.keys()
    assert all(torch.equal(w, expected[n].bfloat16()) for n, w in weights.items())


@pytest.mark.parametrize("name", ["deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_another_dtype_is_computed_at_once(name, dtype, tmp_path):
    """Not by way of bfloat16, which has fewer digits than float8 times a factor."""
    folder, expected = FORMS[name](tmp_path)
    model, line = read(folder, dtype=dtype)
    assert f"are dequantised to {str(dtype).removeprefix('torch.')}," in line
    assert all(torch.equal(w, expected[n].to(dtype)) for n, w in published_weights(model).items())


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("deepseek_v3-671b", {**FP8, "scale_fmt": "ue8m0"}),
        ("deepseek_v32-671b", {**FP8, "scale_fmt": "ue8m0"}),
        ("kimi_k2-1t", FP8),
        ("gpt_oss-120b", MXFP4),
    ],
)
def test_official_configs(name, how):
    """A published config is that of the same model whether it says how the weights are quantised or not."""
    family, size = families.of(name)
    config = family.published(size)
    quantised = {**config, "quantization_config": how}
    assert families.of_config(quantised) is family
    assert family.model_options(quantised) == family.model_options(config)


def test_largest_and_smallest_exponents(tmp_path):
    folder, expected = mxfp4_folder(tmp_path, low=0, high=252)
    weights = published_weights(read(folder)[0])
    assert all(torch.equal(w, expected[n].bfloat16()) for n, w in weights.items())


def test_by_the_command(tmp_path):
    folder, expected = fp8_folder("deepseek_v3-tiny", tmp_path)
    with pytest.warns(UsageWarning, match="are dequantised to bfloat16"):
        result = CliRunner().invoke(app, ["import", str(folder), str(tmp_path / "own")])
    assert result.exit_code == 0, result.output
    weights = published_weights(zoo.load(tmp_path / "own"))
    assert all(torch.equal(w, expected[n].bfloat16()) for n, w in weights.items())


def refusal(folder):
    with warnings.catch_warnings(action="error"), pytest.raises(zoo.UsageError) as error:
        zoo.from_hf(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fmt": "e5m2"}, "(method 'fp8') and fmt='e5m2' is not supported, only 'e4m3'."),
        ({"activation_scheme": "static"}, "and activation_scheme='static' is not supported, only 'dynamic'."),
        ({"expert_dtype": "fp4"}, "and expert_dtype='fp4' is not supported, only 'fp8'."),
        ({"weight_block_size": None}, "and weight_block_size=None is not supported."),
        ({"weight_block_size": [0, 128]}, "weight_block_size is no pair of whole numbers from 1"),
        ({"weight_block_size": 128}, "The config of DeepseekV3ForCausalLM cannot be understood"),
        ({"modules_to_convert": ["lm_head"]}, "and modules_to_convert=['lm_head'] is not supported."),
        ({"quant_method": "mxfp4"}, "(method 'mxfp4') is not supported: take the weights in bfloat16"),
        ({"quant_method": "awq"}, "(method 'awq') is not supported: take the weights in bfloat16"),
        ({"weight_block_size": [64, 128]}, "torch.float32 (1, 1): these are no weights of quantization_config"),
    ],
)
def test_other_options_are_refused(changes, message, tmp_path):
    folder, _ = fp8_folder("deepseek_v3-tiny", tmp_path)
    config = json.loads((folder / CONFIG).read_text())
    config["quantization_config"] |= changes
    (folder / CONFIG).write_text(json.dumps(config))
    assert message in refusal(folder)


def test_other_tensors_are_refused(tmp_path):
    folder, _ = fp8_folder("deepseek_v3-tiny", tmp_path)
    weights, name = load_file(folder / WEIGHTS), "model.layers.0.self_attn.o_proj.weight"
    for changes, message in (
        ({f"{name}_scale_inv": None}, f"{name} is torch.float8_e4m3fn: quantised weights are not supported"),
        ({name: None}, f"1 weights are not expected: {name}_scale_inv"),
        ({name: weights[name].bfloat16()}, f"{name} torch.bfloat16 (64, 64), {name}_scale_inv torch.float32"),
        ({f"{name}_scale_inv": torch.ones(1, 1).bfloat16()}, f"{name}_scale_inv torch.bfloat16 (1, 1): these are no"),
        ({f"{name}_scale_inv": torch.ones(1)}, f"{name}_scale_inv torch.float32 (1,): these are no weights of"),
    ):
        keep(folder, {n: w for n, w in {**weights, **changes}.items() if w is not None}, FP8)
        assert message in refusal(folder)
    folder, _ = mxfp4_folder(tmp_path)
    weights, name = load_file(folder / WEIGHTS), "model.layers.0.mlp.experts.down_proj"
    for changes, message in (
        ({f"{name}_scales": weights[f"{name}_scales"][:, 1:]}, f"{name}_scales torch.uint8 (8, 63, 2): these are no"),
        ({f"{name}_blocks": weights[f"{name}_blocks"][..., 1:]}, "these are no weights of quantization_config"),
        ({f"{name}_scales": None}, f"weights are missing: {name}"),
    ):
        changed = {n: w.contiguous() for n, w in {**weights, **changes}.items() if w is not None}
        keep(folder, changed, MXFP4)
        assert message in refusal(folder)


def test_one_weight_is_dequantised_at_a_time(tmp_path, monkeypatch):
    """Of what is read from shards, one weight is alive at a time, of two tensors, and maybe the one before it."""
    folder, expected = mxfp4_folder(tmp_path)
    weights = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    places = {}
    for i, name in enumerate(weights):
        places[name] = f"model-{i % 3}.safetensors"
    for file in set(places.values()):
        save_file({n: w for n, w in weights.items() if places[n] == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"weight_map": places}))
    alive, read_one = weakref.WeakValueDictionary(), _Folder.__getitem__
    most = 0

    def watched(self, name):
        nonlocal most
        alive[name] = tensor = read_one(self, name)
        most = max(most, len(alive))
        return tensor

    monkeypatch.setattr(_Folder, "__getitem__", watched)
    model, _ = read(folder)
    assert most <= 4
    assert not alive
    assert all(torch.equal(w, expected[n].bfloat16()) for n, w in published_weights(model).items())
