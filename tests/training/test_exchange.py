"""`zoo export` and `zoo import`: folders of models from one format into another, by the command and from Python."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import zoo
from zoo.cli import main
from zoo.interop.rwkv import to_authors
from zoo.training.exchange import export_model, import_model
from zoo.training.train import train

TASK = {"name": "mqar", "vocab_size": 256, "seq_len": 16, "n_pairs": 2}
TRAIN = {"steps": 2, "batch_size": 4, "eval_rows": 8, "test_rows": 8, "threads": 1}
ENDS = json.dumps({"eos_token_id": 5}).encode()


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A published folder `hf` in an empty working folder."""
    monkeypatch.chdir(tmp_path)
    folder = zoo.to_hf(zoo.create_model("llama3-tiny"), "hf")
    (folder / "generation_config.json").write_bytes(ENDS)
    return folder


def _command(*words, capsys):
    with pytest.raises(SystemExit) as done:
        main(list(words))
    out, err = capsys.readouterr()
    return done.value.code or 0, out, err


def test_there_and_back_to_the_byte(published, capsys):
    assert _command("import", "hf", "m", capsys=capsys) == (0, "m\n", "")
    assert _command("export", "m", "again", capsys=capsys) == (0, "again\n", "")
    names = ["config.json", "generation_config.json", "model.safetensors"]
    assert sorted(p.name for p in Path("again").iterdir()) == names
    assert all((published / name).read_bytes() == (Path("again") / name).read_bytes() for name in names)
    assert Path("m/generation_config.json").read_bytes() == ENDS
    assert sorted(p.name for p in Path().iterdir()) == ["again", "hf", "m"]  # nothing temporary is left
    one = _command("generate", "hf", "--tokens", "1 2", "-n", "8", capsys=capsys)
    assert _command("generate", "m", "--tokens", "1 2", "-n", "8", capsys=capsys) == one


def test_a_fine_tuned_model_of_a_larger_vocabulary_is_published(published, capsys):
    task = {**TASK, "vocab_size": 300}
    init = {"source": "hf", "resize_vocab": True}
    train({"task": task, "train": TRAIN, "init": init, "out": "r"}, quiet=True)
    assert _command("export", "r", "tuned", "--which", "last", capsys=capsys)[0] == 0
    tuned = zoo.from_hf("tuned")
    assert tuned.config.vocab_size == json.loads(Path("tuned/config.json").read_text())["vocab_size"] == 300
    trained = zoo.load("r", "last").state_dict()
    assert all(torch.equal(tensor, trained[name]) for name, tensor in tuned.state_dict().items())
    assert export_model("r", "copy", form="zoo") == Path("copy")
    assert torch.equal(zoo.load("copy").embedding.weight, zoo.load("r").embedding.weight)


def test_the_authors_file_of_rwkv7(published):
    pattern = "rwkv7(head_dim=64, norm_eps=0.00064) rwkv_channel_mix"
    model = zoo.create_model(pattern, d_model=64, vocab_size=16, norm="layernorm", embedding_norm=True)
    torch.save(to_authors(model), "authors.pth")
    assert torch.equal(zoo.load(import_model("authors.pth", "m")).embedding.weight, model.embedding.weight)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["export", "swapped", "x"], "no LlamaForCausalLM any more: pattern="),
        (["export", "own", "x"], "this is a pattern; --format zoo writes it as zoo.save does"),
        (["export", "own", "hf"], "own has no published format"),
        (["export", "hf", "own"], "own is not empty: nothing was written"),
        (["export", "own", "x", "--format", "gguf"], "Unknown format 'gguf'. Available: hf, zoo"),
        (["export", "own", "x", "--which", "last"], "which='last' chooses from a run: own holds one model"),
        (["export", "nothere", "x"], "There is no folder 'nothere'"),
        (["import", "nothere", "x"], "There is no folder 'nothere'"),
        (["import", "own", "x"], "own is a saved model of the zoo already: zoo export own x --format zoo copies it"),
        (["import", "hf/config.json", "x"], "cannot be imported: it should be a checkpoint folder"),
        (["import", "hf", "own"], "own is not empty: nothing was written"),
    ],
)
def test_what_cannot_be_converted_is_refused_by_name(published, capsys, words, told):
    zoo.save(zoo.swap(zoo.from_hf("hf"), {"gqa": "mla"}, layers=[0]), "swapped")
    zoo.save(zoo.create_model("gqa", d_model=16, vocab_size=8), "own")
    status, out, err = _command(*words, capsys=capsys)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert told in err
    assert not Path("x").exists()
    options = dict(zip(("form" if w == "--format" else "which" for w in words[3::2]), words[4::2], strict=True))
    convert = export_model if words[0] == "export" else import_model
    with pytest.raises(zoo.UsageError):
        convert(*words[1:3], **options)


def test_the_example_of_the_page_runs(published, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
    code = next(block for block in page.split("```python\n")[1:] if "zoo.save(" in block).split("```")[0]
    assert "14 weights kept, 4 new (backbone.steps.2.mixers.0.*), 2 left out" in code
    found: dict[str, object] = {}
    exec(code, found)
    assert str(found["swapped"].swapped).startswith("14 weights kept, 4 new (backbone.steps.2.mixers.0.*), 2 left out")
    assert torch.equal(zoo.load("saved").norm.weight, zoo.load("runs/swapped").norm.weight)
    assert zoo.load("runs/again").config.pattern == found["swapped"].config.pattern
