"""`zoo.save` and `zoo.load` of any model; the same folder from the command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import zoo
from zoo.cli import main


def _saved(folder, spec="gqa swiglu mamba2", **options) -> Path:
    torch.manual_seed(1)
    return zoo.save(zoo.create_model(spec, **{"d_model": 32, "vocab_size": 16, **options}), folder)


@pytest.mark.parametrize("spec", ["qwen3_moe-tiny", "hrm-tiny", "llada-tiny", "swapped", "own", "series"])
def test_a_model_comes_back_to_the_bit(tmp_path, spec):
    if spec == "own":
        options = {"residual": "mhc(streams=2)", "positions": "learned", "max_len": 9, "head_bias": True}
        model = zoo.create_model(
            "2*(gla(norm='layernorm') moe(n_experts=2, top_k=1, normalize=False))", vocab_size=7, **options
        )
    elif spec == "series":
        model = zoo.create_model("cfc swiglu", inputs=3, outputs=2, d_model=16)
    elif spec == "swapped":
        model = zoo.swap(zoo.create_model("llama3-tiny"), {"gqa": "mla"}, layers=[1])
    else:
        model = zoo.create_model(spec)
    if spec == "qwen3_moe-tiny":
        model = model.bfloat16()
        model.norm.float()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    again = zoo.load(zoo.save(model, tmp_path / "folders" / "model"))
    after = again.state_dict()
    assert again.config == model.config
    assert not again.training
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) and before[n].dtype == after[n].dtype for n in before)
    assert [p.name for p in (tmp_path / "folders").iterdir()] == ["model"]  # nothing temporary is left


@pytest.mark.parametrize("residual", ["plain", "mhc(streams=2)"])
def test_a_backbone_comes_back_to_the_bit(tmp_path, capsys, residual):
    backbone = zoo.create_backbone("2*(cfc swiglu)", d_model=16, residual=residual)
    again = zoo.load(zoo.save(backbone, tmp_path / "b"))
    x = torch.randn(2, 5, 16)
    assert torch.equal(again(x)[0], backbone.eval()(x)[0])
    assert again.config == backbone.config
    with pytest.raises(zoo.UsageError, match="save takes a model of create_model or create_backbone"):
        zoo.save(zoo.create_model("gqa", d_model=16, vocab_size=8).backbone, tmp_path / "part")
    for words in (["generate", "--tokens", "1"], ["export", str(tmp_path / "out")]):
        with pytest.raises(SystemExit):
            main([words[0], str(tmp_path / "b"), *words[1:]])
        assert "holds a backbone, which has neither inputs nor a head" in capsys.readouterr().err


def test_nothing_is_overwritten_and_nothing_half_written(tmp_path, monkeypatch):
    folder = _saved(tmp_path / "m")
    there = {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(zoo.UsageError, match="is not empty: nothing was written"):
        _saved(folder)
    assert there == {p.name: p.read_bytes() for p in folder.iterdir()}
    (tmp_path / "empty").mkdir()
    _saved(tmp_path / "empty")
    monkeypatch.setattr("zoo.training.saving.write_bytes", lambda *a: (_ for _ in ()).throw(OSError(28, "No space")))
    with pytest.raises(zoo.UsageError, match="cannot be written: No space"):
        _saved(tmp_path / "full")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "m"]
    with pytest.raises(zoo.UsageError, match="save takes a model of create_model"):
        zoo.save(torch.nn.Linear(2, 2), tmp_path / "linear")


def _edit(**changes):
    def edit(folder: Path) -> None:
        data = json.loads((folder / "model.json").read_text())
        for key, value in changes.items():
            data["model"][key] = value
        (folder / "model.json").write_text(json.dumps(data))

    return edit


def _write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def _cut(folder: Path) -> None:
    (folder / "weights.safetensors").write_bytes((folder / "weights.safetensors").read_bytes()[:-8])


def _flip(folder: Path) -> None:
    data = bytearray((folder / "weights.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "weights.safetensors").write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (_cut, "weights.safetensors has .* bytes instead of"),
        (_flip, "the content of weights.safetensors has changed"),
        (lambda folder: (folder / "weights.safetensors").unlink(), "weights.safetensors is missing"),
        (_write("model.json", b"{"), "it is no JSON"),
        (_write("model.json", b"[]"), "is something else"),
        (_write("model.json", b'{"format": 2}'), "has format 2; this version reads format 1"),
        (_edit(d_model=64), r"embedding.weight is \(16, 32\) in weights.safetensors and \(16, 64\) in the model"),
        (_edit(vocab_size=2**31), "in weights.safetensors and"),
        (_edit(pattern="gqaa"), "Did you mean 'gqa'"),
        (_edit(widht=3), "Unknown option of model 'widht'"),
    ],
)
def test_a_damaged_folder_is_refused_in_one_line(tmp_path, damage, told):
    folder = _saved(tmp_path / "m")
    damage(folder)
    with pytest.raises(zoo.UsageError, match=told) as error:
        zoo.load(folder)
    assert "\n" not in str(error.value)


def test_a_word_of_a_file_of_ones_own_is_named(tmp_path):
    folder = _saved(tmp_path / "m")
    data = json.loads((folder / "model.json").read_text())
    data["imports"] = [{"kind": "mixer", "name": "hebb", "path": "hebb.py", "sha256": None}]
    (folder / "model.json").write_text(json.dumps(data))
    with pytest.raises(zoo.UsageError, match=r"needs the mixer 'hebb' of hebb.py: set ZOO_IMPORT=hebb.py"):
        zoo.load(folder)


def test_other_folders_are_named_for_what_they_are(tmp_path):
    folder = zoo.to_hf(zoo.create_model("llama3-tiny"), tmp_path / "hf")
    with pytest.raises(zoo.UsageError, match=r"published checkpoint: zoo.from_hf reads it"):
        zoo.load(folder)
    with pytest.raises(zoo.UsageError, match=r"chooses from a run: .* holds one saved model"):
        zoo.load(_saved(tmp_path / "m"), "last")


@pytest.mark.parametrize(
    ("words", "status", "told"),
    [
        (["generate", "m", "--tokens", "1 2 3", "-n", "4", "--json"], 0, '"prompt": [1, 2, 3]'),
        (["generate", "m", "--tokens", "1", "--which", "last"], 2, "holds one model"),
        (["generate", "m", "--example", "1"], 2, "has no task: --example needs a run folder"),
        (["eval", "m"], 2, "holds a saved model, which has no task: to score it on a task, train it"),
    ],
)
def test_the_command_reads_a_saved_model(tmp_path, monkeypatch, capsys, words, status, told):
    monkeypatch.chdir(tmp_path)
    _saved("m", "gqa swiglu")
    with pytest.raises(SystemExit) as done:
        main(words)
    out, err = capsys.readouterr()
    assert (done.value.code or 0) == status
    assert told in (out if status == 0 else err)
