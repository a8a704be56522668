"""Checkpoint folders: every family there and back, and everything that is refused."""

from __future__ import annotations

import json
import os
import random
import weakref
import zipfile
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import zoo
from zoo.core.errors import UsageError
from zoo.interop._weights import written
from zoo.interop.hf import CONFIG, INDEX, PICKLED, PICKLED_INDEX, WEIGHTS, _Folder, published_weights
from zoo.models.families import families
from zoo.parameters import rules_of

TINY = zoo.list_models("*-tiny")


@pytest.fixture
def folder(tmp_path):
    """A checkpoint folder of a small model."""
    torch.manual_seed(0)
    return zoo.to_hf(zoo.create_model("llama3-tiny"), tmp_path / "model")


def edit(folder, **changes):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **changes}))


def refusal(source):
    with pytest.raises(zoo.UsageError) as error:
        zoo.from_hf(source)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", TINY)
def test_every_family_comes_back(name, tmp_path):
    torch.manual_seed(0)
    model = zoo.create_model(name).eval()
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    again = zoo.from_hf(zoo.to_hf(model, tmp_path / "model", shard_bytes=100_000))
    assert again.config == model.config
    theirs = again.state_dict()
    assert theirs.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in model.state_dict().items())
    tokens = torch.arange(20)[None] % model.config.vocab_size
    assert torch.equal(model(tokens)[0], again(tokens)[0])


def test_a_family_cannot_be_written_once_it_is_changed(tmp_path):
    model = zoo.create_model(
        "llama3-tiny", pattern=zoo.swap(zoo.create_model("llama3-tiny").config.pattern, {"swiglu": "geglu"})
    )
    with pytest.raises(zoo.UsageError, match="This model is no LlamaForCausalLM any more: pattern="):
        zoo.to_hf(model, tmp_path / "model")
    with pytest.raises(zoo.UsageError, match="Only a model of a family"):
        zoo.to_hf(zoo.create_model("lstm", d_model=16, vocab_size=4), tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_folder_with_files_is_left_alone(folder):
    before = (folder / WEIGHTS).read_bytes()
    with pytest.raises(zoo.UsageError, match="is not empty: nothing was written"):
        zoo.to_hf(zoo.create_model("llama3-tiny"), folder)
    assert (folder / WEIGHTS).read_bytes() == before


def test_dtypes(folder):
    assert zoo.from_hf(folder, dtype=torch.bfloat16).embedding.weight.dtype == torch.bfloat16
    weights = load_file(folder / WEIGHTS)
    save_file({k: v.half() if "norm" in k else v for k, v in weights.items()}, folder / WEIGHTS)
    model = zoo.from_hf(folder)  # each weight keeps its own
    assert (model.norm.weight.dtype, model.embedding.weight.dtype) == (torch.float16, torch.float32)


def test_pickled_weights(folder, tmp_path):
    expected = zoo.from_hf(folder).state_dict()
    weights = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    for zipped in (True, False):
        torch.save(weights, folder / PICKLED, _use_new_zipfile_serialization=zipped)
        assert all(torch.equal(t, expected[n]) for n, t in zoo.from_hf(folder).state_dict().items())
    torch.save({"w": print}, folder / PICKLED)
    assert "cannot be read" in refusal(folder)
    for value in (torch.eye(3).to_sparse(), torch.ones(3, device="meta"), 3):
        torch.save({"w": value}, folder / PICKLED)
        assert "is not a mapping of names to dense tensors" in refusal(folder)


def archive(path, content: bytes, method: int) -> None:
    with zipfile.ZipFile(path, "w", method) as made:
        made.writestr("archive/data.pkl", content)
        made.writestr("archive/version", "3\n")


def test_pickled_weights_that_would_expand(folder, monkeypatch):
    """More than the file's bytes are never taken: not by packing, not by views, not by objects."""
    (folder / WEIGHTS).unlink()
    path = folder / PICKLED
    archive(path, b"\x80\x02" + b"]" * 30_000_000, zipfile.ZIP_DEFLATED)
    assert "it is a compressed archive of more than 30,000,002 bytes, and torch.save writes none" in refusal(folder)
    many = torch.ones(1).as_strided((10**5, 10**5), (0, 0))
    for zipped in (True, False):
        torch.save({"w": many}, path, _use_new_zipfile_serialization=zipped)
        assert "bytes and would expand to 40,000,000,000" in refusal(folder)
    monkeypatch.setattr("zoo.interop._weights.MOST_STEPS", 1000)
    archive(path, b"\x80\x02" + b"]" * 2000 + b".", zipfile.ZIP_STORED)
    assert "its pickle has more than 1,000 steps" in refusal(folder)
    path.write_bytes(b"\x80\x02" + b"]" * 2000 + b".")
    assert "its pickle has more than 1,000 steps" in refusal(folder)
    torch.save({"w": torch.ones(7)}, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes().replace(b"K\x07", b"\x8a\x06" + (2**40).to_bytes(6, "little")))
    assert "cannot be read" in refusal(folder)


def test_shards_of_pickled_weights(folder):
    expected = zoo.from_hf(folder).state_dict()
    weights = list(load_file(folder / WEIGHTS).items())
    (folder / WEIGHTS).unlink()
    places = {}
    for i, part in enumerate((weights[:5], weights[5:]), 1):
        file = f"pytorch_model-{i:05d}-of-00002.bin"
        torch.save(dict(part), folder / file)
        places |= dict.fromkeys(dict(part), file)
    (folder / PICKLED_INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    assert all(torch.equal(t, expected[n]) for n, t in zoo.from_hf(folder).state_dict().items())
    (folder / PICKLED_INDEX).write_text(json.dumps({"weight_map": {**places, "model.norm.weight": "../up.bin"}}))
    assert "is not an index of weights in files beside it" in refusal(folder)
    (folder / PICKLED_INDEX).unlink()
    told = refusal(folder)
    assert "is supported (family llama3, 115,008 parameters), but holds no weights: none of model.safetensors" in told
    assert "It does hold pytorch_model-00001-of-00002.bin, pytorch_model-00002-of-00002.bin." in told


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantization_config": {"quant_method": "mxfp4"}}, "quantization_config (method 'mxfp4')"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "quantization (method 'mlx', 4 bits)"),
        ({"quantization_config": {"group_size": 64, "bits": 4}}, "quantization_config (method 'mlx', 4 bits)"),
        (
            {"quantization_config": {"config_groups": {}, "format": "pack-quantized"}},
            "quantization_config (method 'compressed-tensors', pack-quantized format)",
        ),
        ({"compression_config": {"config_groups": {"a": {}}}}, "compression_config (method 'compressed-tensors')"),
        ({"quantization_config": {"quant_algo": "NVFP4"}}, "quantization_config (method 'modelopt')"),
        ({"quantization_config": {"load_in_4bit": True}}, "quantization_config (method 'bitsandbytes')"),
        ({"quantization_config": {"bits": 4, "desc_act": False}}, "quantization_config (method 'gptq', 4 bits)"),
        ({"quantization_config": {"new": 4}}, "quantization_config (method 'unknown')"),
    ],
)
def test_quantised_configs_are_named_for_what_they_are(folder, changes, message):
    edit(folder, **changes)
    (folder / WEIGHTS).unlink()  # the config is judged first
    told = "is not supported: take the weights in bfloat16, float16 or float32."
    assert f"LlamaForCausalLM with {message} {told}" in refusal(folder)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (
            "hf_quant_config.json",
            {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8"}},
            "is quantised by ModelOpt (hf_quant_config.json: quant_algo='NVFP4')",
        ),
        ("quantize_config.json", {"bits": 4, "group_size": 128}, "is quantised by GPTQ (quantize_config.json: bits=4)"),
        ("quant_config.json", {"w_bit": 4, "zero_point": True}, "is quantised by AWQ (quant_config.json: w_bit=4)"),
    ],
)
def test_files_of_tools_that_quantise(folder, file, content, message):
    (folder / file).write_text(json.dumps(content))
    assert message in refusal(folder)
    (folder / file).write_text(json.dumps({"quantization": {"quant_algo": None, "kv_cache_quant_algo": "FP8"}}))
    assert zoo.from_hf(folder)


STRANGE = [-1, 0, 0.5, -1e300, 1e300, 10**9, 10**18, 10**30, True, "", "x", [], [1], {}, {"a": 1}]
STRANGE += ["y" * 10**5, [0] * 10**5]


@pytest.mark.parametrize("name", TINY)
def test_strange_values(name, tmp_path):
    """A key at any value, in any family: a model, or one line, at once."""
    folder = tmp_path / "model"
    folder.mkdir()
    config = dict(zoo.create_model(name).config.published)
    family = families.of_config(config)
    read = family.read(config)
    family.options(read)
    keys = sorted(read._read | set(config) | {"num_nextn_predict_layers"})
    generator = random.Random(name)
    for key in generator.sample(keys, min(15, len(keys))):
        (folder / CONFIG).write_text(json.dumps({**config, key: generator.choice(STRANGE)}))
        told = refusal(folder)  # it holds no weights
        assert told.isprintable()
        assert len(told) < 2000


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("mdlm-tiny", {"cond_dim": -1e300}),
        ("deepseek_v3-tiny", {"num_nextn_predict_layers": 0.5}),
        ("hrm-tiny", {"L_cycles": 10**9}),
        ("hrm-tiny", {"L_cycles": 9999, "H_cycles": 9999}),
        ("trm-tiny", {"halt_max_steps": 10**9}),
        ("nemotron_h-tiny", {"hybrid_override_pattern": "M*" * 10**5}),
        ("qwen3_moe-tiny", {"num_experts": 10_000, "num_hidden_layers": 10_000}),
        ("gpt_oss-tiny", {"intermediate_size": 10**10}),
        ("qwen3_next-tiny", {"linear_num_key_heads": 10**10, "linear_num_value_heads": 10**10}),
        ("gpt2-tiny", {"n_positions": 10**12}),
        ("lfm2_moe-tiny", {"layer_types": ["conv"] * 20_000}),
    ],
)
def test_what_would_never_end_is_refused(name, changes, folder):
    config = dict(zoo.create_model(name).config.published)
    (folder / CONFIG).write_text(json.dumps({**config, **changes}))
    told = refusal(folder)
    bounds = ("cannot be understood", "only up to", "cannot be made", "are allowed", "should be at most")
    assert any(part in told for part in bounds), told


def test_options_that_are_refused_by_name(folder):
    for changes, message in [
        (
            {"architectures": ["MixtralForCausalLM"]},
            "Unknown architecture 'MixtralForCausalLM'. Available: BambaFor",
        ),
        (
            {"architectures": "MixtralForCausalLM"},
            "Unknown architecture 'MixtralForCausalLM'. Available: BambaFor",
        ),
        ({"num_hidden_layers": 0}, "The config of LlamaForCausalLM cannot be understood: ValueError: it has no layers"),
        ({"intermediate_size": 10**30}, "is not allowed: it should be at most 16,777,216"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config (method 'gptq') is not supported"),
        ({"hidden_act": "relu"}, "LlamaForCausalLM with hidden_act='relu' is not supported, only 'silu'"),
        ({"hidden_acts": "relu"}, "LlamaForCausalLM with hidden_acts='relu' is not supported"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type='dynamic' is not supported"),
        ({"hidden_size": None}, "The config of LlamaForCausalLM lacks 'hidden_size'"),
    ]:
        before = (folder / CONFIG).read_text()
        edit(folder, **changes)
        assert message in refusal(folder)
        (folder / CONFIG).write_text(before)


def test_what_is_neither_a_model_nor_a_folder(tmp_path):
    with pytest.raises(zoo.UsageError, match="from_hf takes a model of transformers or a folder, not a NoneType"):
        zoo.from_hf(None)
    with pytest.raises(zoo.UsageError, match=r"dtype=torch\.int8 is not allowed: it should be one of"):
        zoo.from_hf(tmp_path, dtype=torch.int8)
    with pytest.raises(zoo.UsageError, match="to_hf takes a model of the zoo, not a Linear"):
        zoo.to_hf(torch.nn.Linear(2, 2), tmp_path / "out")


@pytest.mark.parametrize("device", ["nope", "cpu:", "cuda:99", 99])
def test_devices_that_are_not_there(folder, device):
    with pytest.raises(zoo.UsageError) as error:
        zoo.from_hf(folder, device=device)
    assert str(error.value).startswith(f"device='{device}' is not available here: ")
    assert "\n" not in str(error.value)


def test_folders_that_cannot_be_written(tmp_path, monkeypatch):
    model = zoo.create_model("llama3-tiny")
    (tmp_path / "file").write_text("")
    with pytest.raises(zoo.UsageError, match=r"file/model cannot be written: Not a directory\.$"):
        zoo.to_hf(model, tmp_path / "file/model")
    with pytest.raises(zoo.UsageError, match=r"x cannot be written: File name too long\.$"):
        zoo.to_hf(model, tmp_path / ("x" * 300))
    monkeypatch.setattr("zoo.interop.hf.WEIGHTS", "gone/model.safetensors")
    with pytest.raises(zoo.UsageError, match=r"model cannot be written: .*No such file[^\n]*$"):
        zoo.to_hf(model, tmp_path / "model")


def test_weights_that_do_not_fit_are_listed(folder):
    weights = load_file(folder / WEIGHTS)
    norm = weights.pop("model.norm.weight")
    save_file({**weights, "model.extra": norm}, folder / WEIGHTS)
    message = refusal(folder)
    assert "1 weights are missing: model.norm.weight" in message
    assert "1 weights are not expected: model.extra" in message
    save_file({**weights, "model.norm.weight": norm[:-2]}, folder / WEIGHTS)
    assert "model.norm.weight (62,) for norm.weight (64,)" in refusal(folder)
    save_file({**weights, "model.norm.weight": norm.to(torch.float8_e4m3fn)}, folder / WEIGHTS)
    assert "model.norm.weight is torch.float8_e4m3fn: quantised weights are not supported" in refusal(folder)
    save_file({**weights, "model.norm.weight": norm, "lm_head.weight": torch.ones(256, 64)}, folder / WEIGHTS)
    assert "lm_head.weight is not model.embed_tokens.weight, though the config ties them" in refusal(folder)


def test_folders_that_cannot_be_read(folder, tmp_path):
    assert "There is no folder" in refusal(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "holds no config.json" in refusal(tmp_path / "empty")
    (folder / WEIGHTS).write_bytes(b"junk")
    assert "cannot be read" in refusal(folder)
    (folder / WEIGHTS).unlink()
    assert "holds no weights" in refusal(folder)
    (folder / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": "../secret.safetensors"}}))
    assert "is not an index of weights" in refusal(folder)
    (folder / CONFIG).write_text("[1]")
    assert "is not a mapping" in refusal(folder)
    assert "takes a model of transformers or a folder, not a Linear" in refusal(torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    "place", ["..", "", ".", "sub/a.safetensors", "/etc/passwd", "a\0.safetensors", 5, None, "model"]
)
def test_an_index_names_files_beside_it_alone(folder, place):
    (folder / WEIGHTS).unlink()
    (folder / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": place}}))
    assert "is not an index of weights in files beside it" in refusal(folder)


def test_links_are_followed(folder, tmp_path):
    """The hub's cache is made of them."""
    cache = tmp_path / "cache"
    cache.mkdir()
    for file in (CONFIG, WEIGHTS):
        (cache / file).symlink_to(folder / file)
    expected = zoo.from_hf(folder).state_dict()
    assert all(torch.equal(t, expected[n]) for n, t in zoo.from_hf(cache).state_dict().items())


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, PICKLED])
def test_pipes_are_not_waited_for(folder, name):
    (folder / (CONFIG if name == CONFIG else WEIGHTS)).unlink()
    os.mkfifo(folder / name)
    assert f"{name} cannot be read: it is no file but a pipe" in refusal(folder)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"rms_norm_eps": NaN}', '{"hidden_size": ' + "9" * 10_000 + "}", "\xff", ""]
)
def test_damaged_configs(folder, text):
    (folder / CONFIG).write_bytes(text.encode("latin-1"))
    assert "config.json:1: this is no " in refusal(folder)


def test_large_configs_are_not_read(folder, monkeypatch):
    monkeypatch.setattr("zoo.interop.hf.MOST_JSON", 10)
    assert "it has more than 10 bytes" in refusal(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": "64"},
        {"hidden_size": [64]},
        {"num_attention_heads": 0},
        {"num_hidden_layers": 2.5},
        {"rope_scaling": 3},
        {"rms_norm_eps": {"__float__": ["Infinity"]}},
        {"quantization_config": "int4"},
    ],
)
def test_values_of_wrong_types(folder, changes):
    edit(folder, **changes)
    assert "The config of LlamaForCausalLM cannot be understood" in refusal(folder)


def test_nothing_large_is_made_of_an_untrusted_config(folder):
    edit(folder, hidden_size=1_000_000, intermediate_size=4_000_000)
    assert "have other shapes than the config says" in refusal(folder)
    edit(folder, hidden_size=64, intermediate_size=192, num_hidden_layers=10**9)
    assert "num_hidden_layers=1000000000 is not supported, only up to 10000" in refusal(folder)


def test_infinities(folder):
    config = {"time_step_limit": [0.0, float("inf")]}
    edit(folder, **config)
    assert "time_step_limit=[0.0, inf]" in refusal(folder)
    edit(folder, time_step_limit=[0.0, {"__float__": "Infinity"}])
    assert "time_step_limit=[0.0, inf]" in refusal(folder)


def test_parts_of_other_sizes_with_the_right_sum(folder):
    weights = load_file(folder / WEIGHTS)
    q, k = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.k_proj.weight"
    save_file({**weights, q: weights[k].clone(), k: weights[q].clone()}, folder / WEIGHTS)
    assert f"{q} (32, 64), {k} (64, 64)" in refusal(folder)


def test_messages_hold_nothing_that_a_terminal_obeys(folder):
    weights = load_file(folder / WEIGHTS)
    save_file({**weights, "model.\033[2J\n": torch.ones(2)}, folder / WEIGHTS)
    assert "1 weights are not expected: model.\\x1b[2J\\n." in refusal(folder)
    edit(folder, **{"bell\a": 1})
    assert "with bell\\x07=1 is not supported" in refusal(folder)


def test_one_file_goes_before_an_index(folder):
    (folder / INDEX).write_text("{}")
    assert zoo.from_hf(folder)


def test_weights_that_an_index_lacks(tmp_path):
    folder = zoo.to_hf(zoo.create_model("llama3-tiny"), tmp_path / "model", shard_bytes=100_000)
    index = json.loads((folder / INDEX).read_text())
    del index["weight_map"]["model.norm.weight"]
    (folder / INDEX).write_text(json.dumps(index))
    assert "the index lacks 1 weights of the shards: model.norm.weight" in refusal(folder)


def test_weights_are_held_once(tmp_path, monkeypatch):
    """Of what is read, one tensor is alive at a time, and maybe the one before it."""
    folder = zoo.to_hf(zoo.create_model("llama3-tiny"), tmp_path / "model", shard_bytes=100_000)
    alive, read = weakref.WeakValueDictionary(), _Folder.__getitem__
    most = 0

    def watched(self, name):
        nonlocal most
        alive[name] = tensor = read(self, name)
        most = max(most, len(alive))
        return tensor

    monkeypatch.setattr(_Folder, "__getitem__", watched)
    model = zoo.from_hf(folder)
    assert 1 <= most <= 2
    assert not alive
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in model.parameters())


def test_one_shard_is_made_at_a_time(tmp_path, monkeypatch):
    made, saved = [], []

    def watched(*arguments):
        for name, tensor in written(*arguments):
            made.append(name)
            yield name, tensor

    def save(shard, path, **options):
        saved.extend(shard)
        assert made == saved
        assert sum(tensor.nbytes for tensor in shard.values()) <= 100_000

    monkeypatch.setattr("zoo.interop.hf.written", watched)
    monkeypatch.setattr("zoo.interop.hf.save_file", save)
    model = zoo.create_model("llama3-tiny")
    zoo.to_hf(model, tmp_path / "model", shard_bytes=100_000)
    monkeypatch.undo()
    assert saved == list(published_weights(model))


class InMemory(torch.nn.Module):
    """Stands for a model of transformers."""

    def __init__(self, model):
        super().__init__()
        self.weights, self.config = published_weights(model), self
        self.to_dict = lambda: model.config.published

    def state_dict(self):
        return self.weights


InMemory.__name__ = "LlamaForCausalLM"


def test_a_model_in_memory_is_copied():
    theirs = InMemory(zoo.create_model("llama3-tiny"))
    before = {name: t.clone() for name, t in theirs.weights.items()}
    ours = zoo.from_hf(theirs)
    with torch.no_grad():
        for p in ours.parameters():
            p.zero_()
    assert all(torch.equal(t, before[name]) for name, t in theirs.weights.items())
    theirs.weights["model.norm.weight"] = theirs.weights["model.norm.weight"].to("meta")
    assert "1 have none: model.norm.weight" in refusal(theirs)


def test_what_parameters_tell_the_optimizer_stays(tmp_path):
    model = zoo.from_hf(zoo.to_hf(zoo.create_model("rwkv7-tiny"), tmp_path / "model"))
    mixer = model.backbone.steps[0].mixers[0]
    rules = rules_of(model)
    assert rules[id(mixer.w0)].lr_scale == 2.0
    assert not rules[id(mixer.r_k)].weight_decay


def test_a_family_that_places_not_every_weight_is_refused_there_and_back(tmp_path, monkeypatch):
    model = zoo.create_model("llama3-tiny")
    whole = zoo.to_hf(model, tmp_path / "whole")
    (llama,) = (f for f in families.all() if f.name == "llama3")

    def some(p):
        return (m for m in llama.weights(p) if not any("steps.1" in slot for slot in m.ours))

    monkeypatch.setitem(families.registry._classes, "llama3", replace(llama, weights=some))
    left = r"The family of LlamaForCausalLM has no map in its `weights` for backbone\.steps\.1\."
    with pytest.raises(UsageError, match=left):
        zoo.to_hf(model, tmp_path / "model")
    assert not (tmp_path / "model").exists()
    with pytest.raises(UsageError, match="not expected"):
        zoo.from_hf(whole)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            lambda m: replace(m, write=lambda t: t.split([64, 100])),
            r"The map in `weights` from backbone\.steps\.0\.mixers\.0\.in_proj\.weight \(\d+, 64\) to "
            r"model\.layers\.0\.self_attn\.q_proj\.weight, .* does not fit: split_with_sizes",
        ),
        (
            lambda m: replace(m, write=lambda t: [t]),
            r"from backbone\.steps\.0\.mixers\.0\.in_proj\.weight .* does not fit: it gives 1 tensors",
        ),
        (
            lambda m: replace(m, ours=("backbone.steps.0.mixers.0.in_prj.weight",)),
            r"for backbone\.steps\.0\.mixers\.0\.in_prj\.weight, which the model does not have\. Did you mean '",
        ),
        (lambda m: replace(m, theirs=m.theirs[:1] * len(m.theirs)), r"several maps in its `weights` for .*q_proj"),
    ],
)
def test_a_map_that_does_not_fit_is_named(tmp_path, monkeypatch, change, told):
    model = zoo.create_model("llama3-tiny")
    (llama,) = (f for f in families.all() if f.name == "llama3")

    def changed(p):
        return (change(m) if "backbone.steps.0.mixers.0.in_proj.weight" in m.ours else m for m in llama.weights(p))

    monkeypatch.setitem(families.registry._classes, "llama3", replace(llama, weights=changed))
    with pytest.raises(UsageError, match=told) as refusal:
        zoo.to_hf(model, tmp_path / "model")
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "model").exists()


def test_a_lost_shard(tmp_path):
    folder = zoo.to_hf(zoo.create_model("llama3-tiny"), tmp_path / "model", shard_bytes=100_000)
    next(folder.glob("model-00002*")).unlink()
    assert "cannot be read" in refusal(folder)


def test_the_text_part_of_a_model_that_sees(tmp_path):
    """Its config lies in another, its weights have one more name, and the rest is left aside."""
    folder = zoo.to_hf(zoo.create_model("qwen3_5-tiny"), tmp_path / "text")
    expected = zoo.from_hf(folder)
    weights, text = load_file(folder / WEIGHTS), json.loads((folder / CONFIG).read_text())
    inner = {n.replace("model.", "model.language_model.", 1): w for n, w in weights.items()}
    save_file({**inner, "model.visual.pos_embed.weight": torch.ones(2)}, folder / WEIGHTS)
    seeing = {"architectures": ["Qwen3_5ForConditionalGeneration"], "model_type": "qwen3_5", "vision_config": {}}
    del text["architectures"]
    (folder / CONFIG).write_text(json.dumps({**seeing, "text_config": text}))
    model = zoo.from_hf(folder)
    assert model.config == expected.config
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in expected.state_dict().items())
    (folder / CONFIG).write_text(json.dumps(seeing))
    assert "The config of Qwen3_5ForConditionalGeneration lacks 'text_config'" in refusal(folder)


def test_all_experts_in_one_tensor(tmp_path):
    """As the published checkpoints of Qwen3.5 hold them; they are written one by one, as transformers does."""
    folder = zoo.to_hf(zoo.create_model("qwen3_5_moe-tiny"), tmp_path / "one by one")
    expected, weights = zoo.from_hf(folder), load_file(folder / WEIGHTS)
    together = {n: w for n, w in weights.items() if ".experts." not in n}
    for i in range(4):
        layer = f"model.layers.{i}.mlp.experts."
        gate, up, down = ([weights[f"{layer}{e}.{k}_proj.weight"] for e in range(4)] for k in ("gate", "up", "down"))
        together[f"{layer}gate_up_proj"] = torch.cat([torch.stack(gate), torch.stack(up)], 1)
        together[f"{layer}down_proj"] = torch.stack(down)
    save_file(together, folder / WEIGHTS)
    model = zoo.from_hf(folder)
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in expected.state_dict().items())
    assert published_weights(model).keys() == weights.keys()
    save_file({**together, "model.layers.0.mlp.experts.down_proj": torch.ones(4, 32, 64)}, folder / WEIGHTS)
    assert "mlp.experts.down_proj (4, 32, 64) for backbone.steps.1.mixers.0.down_proj" in refusal(folder)


@pytest.mark.parametrize("name", ["llama3-tiny", "gpt_oss-tiny", "mdlm-tiny"])
def test_meta_reads_no_weight(name, tmp_path, monkeypatch):
    """A folder of any size: the model has its shapes and dtypes, and says where numbers are needed."""
    folder = zoo.to_hf(zoo.create_model(name).to(torch.bfloat16), tmp_path / "model", shard_bytes=50_000)
    monkeypatch.setattr(_Folder, "__getitem__", lambda *_: pytest.fail("a weight was read"))
    monkeypatch.setattr(zoo.interop._weights, "total_memory", lambda: 1)
    model = zoo.from_hf(folder, device="meta")
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}
    assert model.n_parameters() == zoo.create_model(name).n_parameters()
    for use, told in [
        (lambda: zoo.to_hf(model, tmp_path / "back"), "to_hf needs weights"),
        (lambda: zoo.save(model, tmp_path / "back"), "save needs weights"),
        (lambda: model.generate([[1]], max_new_tokens=1), "generate needs weights" if model.causal else "causal=True"),
    ]:
        with pytest.raises(zoo.UsageError, match=told):
            use()
    assert not (tmp_path / "back").exists()


def test_meta_refuses_what_a_device_would(folder):
    weights = load_file(folder / WEIGHTS)
    weights["model.norm.weight"] = torch.ones(3)
    save_file(weights, folder / WEIGHTS)
    with pytest.raises(zoo.UsageError, match=r"model\.norm\.weight"):
        zoo.from_hf(folder, device="meta")


def test_more_weights_than_memory(folder, monkeypatch):
    monkeypatch.setattr(zoo.interop._weights, "total_memory", lambda: 400_000)
    with pytest.raises(zoo.UsageError) as error:
        zoo.from_hf(folder)
    assert str(error.value) == (
        "The weights of this LlamaForCausalLM take 0 GiB, and cpu has 0 GiB: "
        'device="meta" gives the model without numbers, its names and shapes checked, '
        "dtype=torch.bfloat16 takes 2 bytes a weight."
    )
    assert zoo.from_hf(folder, dtype=torch.bfloat16).n_parameters() == 115_008
