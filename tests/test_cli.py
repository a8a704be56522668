"""The `zoo` command: what it prints, and how it says no."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from zoo.cli import main

RECIPE = """
task: {name: mqar, vocab_size: 64, seq_len: 16, n_pairs: 2}
model: {d_model: 16}
train: {steps: 4, batch_size: 4, eval_every: 2, eval_rows: 8, test_rows: 8}
variants:
  convolution: {model.pattern: short_conv mlp}
  attention: {model.pattern: mha mlp}
"""


@pytest.fixture
def zoo(tmp_path, monkeypatch, capsys):
    """Runs the command in an empty folder: (exit status, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)
    Path("small.yaml").write_text(RECIPE)
    Path("one.yaml").write_text(RECIPE.split("variants")[0].replace("d_model: 16", "d_model: 16, pattern: short_conv"))
    threads = torch.get_num_threads()

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(list(arguments))
        torch.set_num_threads(threads)
        return (ended.value.code, *capsys.readouterr())

    return run


@pytest.mark.parametrize("what", ["mixers", "models", "tasks", "objectives", "recipes"])
def test_list(zoo, what):
    status, out, err = zoo("list", what)
    assert (status, err) == (0, "")
    as_json = json.loads(zoo("list", what, "--json")[1])
    assert [line.split()[0] for line in out.splitlines()] == [entry["name"] for entry in as_json]
    assert all(entry["about"] for entry in as_json)
    assert len(json.loads(zoo("list", what, as_json[0]["name"], "--json")[1])) == 1


def test_show(zoo):
    status, out, _ = zoo("show", "mqar", "vocab_size=64", "seq_len=16", "n_pairs=2")
    assert status == 0
    assert out.strip()
    assert zoo("show", "small.yaml", "task.n_pairs=1")[0] == 0
    assert zoo("show", "sudoku-4x4", "--row", "3", "--split", "test")[0] == 0
    assert zoo("show", "mqar", "--picture", "row.png")[:2] == (0, "row.png\n")
    assert Path("row.png").read_bytes().startswith(b"\x89PNG")


def test_train_eval_compare(zoo):
    status, out, err = zoo("train", "one.yaml", "train.lr=1e-3", "--quiet")
    assert (status, err) == (0, "")
    assert out.startswith("runs/one: finished at step 4")
    status, out, _ = zoo("eval", "runs/one", "task.n_pairs=1", "--split", "test", "--json")
    assert status == 0
    assert json.loads(out)["n"] == 8
    assert "accuracy: " in zoo("eval", "runs/one")[1]
    status, out, _ = zoo("compare", "runs", "--report", "report.html")
    assert status == 0
    assert "one" in out
    assert Path("report.html").stat().st_size > 1000
    assert json.loads(zoo("compare", "runs/one", "--json")[1])


def test_every_variant_is_trained_in_a_process_of_its_own(zoo):
    """One that fails fails the command, and keeps none of the others from being trained."""
    blocked = Path("runs/both/convolution/notes.txt")
    blocked.parent.mkdir(parents=True)
    blocked.write_text("mine")
    status, out, _ = zoo("train", "small.yaml", "out=runs/both", "train.threads=1", "--quiet")
    assert status == 2
    assert "zoo compare runs/both" in out
    assert sorted(p.name for p in blocked.parent.iterdir()) == [".lock", "notes.txt"]
    result = json.loads(Path("runs/both/attention/result.json").read_text())
    assert (result["name"], result["status"]) == ("attention", "finished")
    blocked.unlink()
    assert zoo("train", "small.yaml", "out=runs/both", "--variant", "convolution", "train.threads=1")[0] == 0


def test_doctor(zoo, monkeypatch):
    from zoo.training import doctor

    monkeypatch.setattr(doctor, "SIZES", (64,))
    status, out, _ = zoo("doctor")
    assert status == 0
    assert {"python", "torch", "cpu", "device", "fla", "compiler"} <= {line.split()[0] for line in out.splitlines()}
    facts = json.loads(zoo("doctor", "--json")[1])
    assert facts["matmul_gflops"]["cpu float32"]["64"] > 0
    assert all(p["available"] or p["why"] for p in facts["packages"].values())


WRONG = [
    (["shw"], "No such command 'shw'"),
    (["list"], "Missing argument"),
    (["list", "mixer"], "Unknown list 'mixer'. Did you mean 'mixers'?"),
    (["list", "mixers", "--jsn"], "--jsn"),
    (["show", "mqra"], "Unknown task 'mqra'. Did you mean 'mqar'?"),
    (["show", "mqar", "n_pairs"], "'n_pairs' is not an override: write key=value"),
    (["show", "mqar", "n_pairs=two"], "n_pairs"),
    (["show", "mqar", "--split", "tets"], "Unknown split 'tets'. Did you mean 'test'?"),
    (["show", "mqar", "--row", "-1"], "--row"),
    (["show", "mqar", "--picture", "row.xyz"], "no ending that names a picture format"),
    (["train"], "Missing argument"),
    (["train", "mqar-dmo"], "Unknown recipe 'mqar-dmo'. Did you mean 'mqar-demo'?"),
    (["train", "missing.yaml"], "neither a recipe file nor a run folder"),
    (["train", "small.yaml", "--variant", "atention"], "Unknown variant 'atention'. Did you mean 'attention'?"),
    (["train", "one.yaml", "trian.lr=1"], "Unknown option of experiment 'trian'. Did you mean 'train'?"),
    (["train", "one.yaml", "train.stepps=1"], "Unknown option of train 'stepps'. Did you mean 'steps'?"),
    (["train", "one.yaml", "train.steps=many"], "train: steps='many' is not allowed"),
    (["train", "one.yaml", "model.pattern=mhaa"], "Unknown mixer 'mhaa'. Did you mean 'mha'?"),
    (["train", "one.yaml", "model.pattern=mha(heads=2)"], "Unknown option of mha 'heads'"),
    (["train", "one.yaml", "model.pattern=mha(n_heads=3)"], "3"),
    (["train", "one.yaml", "model.d_model=17"], "d_model=17 is not allowed"),
    (["train", "one.yaml", "model.vocab_size=9"], "model.vocab_size=9 is too small"),
    (["train", "one.yaml", "task.seq_len=6"], "seq_len"),
    (["train", "one.yaml", "task=sudku"], "Unknown task 'sudku'. Did you mean 'sudoku'?"),
    (["train", "one.yaml", "objective=next"], "Unknown objective 'next'"),
    (["train", "one.yaml", "train.device=cuda:7"], "device='cuda:7' is not allowed"),
    (["train", "one.yaml", "--resume"], "no checkpoint to resume from"),
    (["train", "one.yaml", "--resume", "--fresh"], "give one of them"),
    (["train", "small.yaml", "model.pattern=mhaa"], "Unknown mixer 'mhaa'"),
    (["eval", "runs/none"], "There is no run folder runs/none"),
    (["eval", "."], "holds no checkpoint"),
    (["compare", "runs/none"], "runs/none"),
]


@pytest.mark.parametrize(("arguments", "told"), WRONG, ids=[" ".join(w[0]) for w in WRONG])
def test_wrong_use_is_one_line_and_status_2(zoo, arguments, told):
    status, out, err = zoo(*arguments)
    assert (status, out) == (2, "")
    assert told in err
    assert err.startswith("zoo: ")
    assert err.count("\n") == 1
    assert not Path("runs").exists()


def test_a_damaged_run_is_one_line_and_status_2(zoo):
    zoo("train", "one.yaml", "--quiet", "train.threads=1")
    for path in Path("runs/one/checkpoints").glob("*/weights.safetensors"):
        path.write_bytes(b"garbage")
    status, out, err = zoo("eval", "runs/one")
    assert (status, out) == (2, "")
    assert "weights.safetensors is truncated, 7 of" in err
    status, _, err = zoo("train", "one.yaml", "train.lr=0.5", "train.threads=1")
    assert status == 2
    assert "different train.lr (0.003 there, 0.5 now)" in err


def test_not_finite_is_one_line_and_status_1(zoo):
    status, out, err = zoo("train", "one.yaml", "train.lr=1e30", "train.clip=null", "--quiet", "train.threads=1")
    assert (status, out) == (1, "")
    assert err.startswith("zoo: ")
    assert err.count("\n") == 1
    assert "lower train.lr" in err


def test_help(zoo):
    status, out, _ = zoo()
    assert status == 0
    for command in ("list", "show", "train", "eval", "compare", "doctor"):
        assert command in out
        assert zoo(command, "--help")[0] == 0


def test_as_a_module_outside_the_checkout(tmp_path):
    """A real process: no traceback, and a `tasks.py` of one's own in the way of nothing."""
    root = str(Path(__file__).resolve().parents[1])
    code = f"import sys; sys.path.append({root!r}); sys.argv = ['zoo', 'train', 'nothing']; import runpy; "
    code += "runpy.run_module('zoo', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("zoo: Unknown recipe 'nothing'.")
    assert done.stderr.count("\n") == 1
