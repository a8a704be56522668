"""What a training leaves behind."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch

import zoo
from zoo.core.run_files import read_metrics, read_whole_config
from zoo.training.evaluation import decode_rate, evaluate_run
from zoo.training.events import MISSING, Events
from zoo.training.loop import Trainer
from zoo.training.recipes import read_experiment
from zoo.training.train import train

RESULT_KEYS = {
    "name", "status", "task", "model", "objective", "train", "seed", "steps", "tokens", "seconds", "seconds_to_target",
    "compile_seconds", "validation", "test", "n_parameters", "state_bytes", "context_length", "flops_per_token",
    "tokens_per_second", "decode_tokens_per_second", "peak_memory_bytes", "machine", "versions", "backends",
    "precision", "commit",
}  # fmt: skip
LINE_KEYS = {"step", "split", "seconds", "tokens", "loss", "accuracy", "exact", "lr", "tokens_per_second"}


def test_run_folder(recipe):
    result = zoo.train(recipe, quiet=True)
    run = Path("runs/small")
    assert result.path == run
    [events] = [p.name for p in run.glob("events.out.tfevents.*")]
    names = {".lock", "config.yaml", "metrics.jsonl", "result.json", events, "checkpoints"}
    assert {p.name for p in run.iterdir()} == names
    written = json.loads((run / "result.json").read_text())
    assert written == result.data
    assert written.keys() >= RESULT_KEYS
    assert written["tokens"] == 40 * 4 * 16
    assert written["test"]["n"] == written["validation"]["n"] == 8
    assert written["peak_memory_bytes"] >= written["baseline_memory_bytes"] > 0
    lines = read_metrics(run)
    assert all(line.keys() >= LINE_KEYS for line in lines)
    assert [line["step"] for line in lines if line["split"] == "train"] == [5, 10, 15, 20, 25, 30, 35, 40]
    assert [line["step"] for line in lines if line["split"] == "validation"] == [10, 20, 30, 40]
    assert [line["split"] for line in lines].count("test") == 1
    seconds = [line["seconds"] for line in lines]
    assert seconds == sorted(seconds)
    steps = {int(p.name[5:]) for p in (run / "checkpoints").iterdir()}
    assert {35, 40, written["best_step"]} <= steps
    assert len(steps) <= 4  # the latest two and the best of each
    config = read_whole_config(run)
    assert config["model"]["vocab_size"] == 64
    assert config["train"]["lr"] == 3e-3


def test_load_gives_the_weights_that_were_scored(recipe):
    result = train(recipe, quiet=True)
    again = evaluate_run("runs/small")
    for figure in ("loss", "accuracy", "exact"):
        assert again[figure] == pytest.approx(result.metrics["validation"][figure], rel=1e-6)
    best, last = zoo.load("runs/small"), zoo.load("runs/small/checkpoints/step_40")
    assert not best.training
    assert sum(p.numel() for p in last.parameters()) == result.data["n_parameters"]
    logits, _ = best(torch.zeros(1, 4, dtype=torch.int64))
    assert logits.shape == (1, 4, 64)


def test_evaluate_another_task(recipe):
    train(recipe, quiet=True)
    score = evaluate_run("runs/small", {"task.n_pairs": 1, "train.test_rows": 5}, split="test", which="last")
    assert (score["n"], score["split"], list(score["slices"]["n_pairs"])) == (5, "test", ["1"])
    with pytest.raises(zoo.UsageError, match=r"Unknown key of an evaluation 'model.d_model'"):
        evaluate_run("runs/small", {"model.d_model": 32})
    with pytest.raises(zoo.UsageError, match=r"Unknown split 'tset'. Did you mean 'test'"):
        evaluate_run("runs/small", split="tset")
    with pytest.raises(zoo.UsageError, match=r"vocab_size=64 is too small"):
        evaluate_run("runs/small", {"task.vocab_size": 100})


def test_target_ends_the_training(recipe):
    result = train(recipe, {"train.target": {"metric": "loss", "value": 100.0}}, quiet=True)
    assert (result.status, result.data["steps"]) == ("target", 10)
    assert 0 < result.data["seconds_to_target"] <= result.data["seconds"]
    assert train(recipe, {"train.target": {"metric": "loss", "value": 100.0}}, quiet=True).status == "target"


def test_best_weights_are_those_of_validation(recipe):
    """A learning rate that grows too large: an early evaluation stays the best."""
    rising = {"train.lr": 10.0, "train.warmup_steps": 40, "train.ema": None, "train.metric": "loss"}
    result = train(recipe, rising, quiet=True)
    lines = [line for line in read_metrics(result.path) if line["split"] == "validation"]
    best = min(lines, key=lambda line: line["loss"])
    assert result.data["best_step"] == best["step"] < 40
    assert result.metrics["validation"]["loss"] == best["loss"]


@pytest.mark.parametrize(
    "overrides", [{"train.metric": "acuracy"}, {"train.target": {"metric": "acuracy", "value": 1}}]
)
def test_unknown_metric(recipe, overrides):
    with pytest.raises(zoo.UsageError, match=r"Unknown metric 'acuracy'. Did you mean 'accuracy'\?"):
        train(recipe, overrides, quiet=True)


def test_unavailable_device(recipe):
    if not torch.backends.mps.is_available():
        with pytest.raises(zoo.UsageError, match="device='mps' is not available here"):
            train(recipe, {"train.device": "mps"}, quiet=True)
        assert not Path("runs").exists()


def test_it_learns(recipe):
    result = train(
        recipe,
        {
            "train.steps": 300,
            "task.n_pairs": 1,
            "task.vocab_size": 32,
            "model.pattern": "short_conv lstm mlp",
            "model.d_model": 32,
            "model.dropout": 0.0,
            "train.batch_size": 16,
            "train.eval_every": 100,
            "train.lr": 1e-2,
        },
        quiet=True,
    )
    losses = [line["loss"] for line in read_metrics(result.path) if line["split"] == "train"]
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize(
    ("task", "model"),
    [
        ({"name": "sudoku", "size": 4}, {"pattern": "mha mlp", "causal": False, "positions": "learned"}),
        ({"name": "sudoku", "size": 4}, {"pattern": "lstm mlp"}),
        ({"name": "maze", "size": 9}, {"pattern": "mha mlp"}),
    ],
    ids=["in place", "generated", "maze"],
)
def test_fill_in_tasks(recipe, task, model):
    experiment = read_experiment(
        {"task": task, "model": {"d_model": 16, **model}, "train": {"steps": 3, "batch_size": 2, "eval_rows": 4}},
        {"train.test_rows": 4, "out": "runs/puzzle"},
    )
    result = train(experiment, quiet=True)
    assert result.metrics["test"]["n"] == 4
    assert (result.data["decode_tokens_per_second"] is None) == (model.get("causal") is False)


@pytest.mark.parametrize(("max_len", "measured"), [(2, False), (3, False), (4, True), (64, True), (65, True)])
def test_speed_of_decoding_within_learned_positions(max_len, measured):
    model = zoo.create_model("mha", d_model=16, vocab_size=8, positions="learned", max_len=max_len)
    rate = decode_rate(model, max_len)
    assert (rate is not None and rate > 0) == measured


def test_bfloat16(recipe):
    result = train(recipe, {"train.precision": "bfloat16", "model.pattern": "mha mlp"}, quiet=True)
    assert result.data["precision"] == "bfloat16"
    assert all(p.dtype == torch.float32 for p in result.load().parameters())


@pytest.mark.slow
def test_compiled(recipe):
    plain = train(recipe, {"out": "plain", "model.dropout": 0.0}, quiet=True)
    compiled = train(recipe, {"out": "compiled", "model.dropout": 0.0, "train.compile": True}, quiet=True)
    assert compiled.data["compile_seconds"] > 0.1
    assert compiled.metrics["validation"]["loss"] == pytest.approx(plain.metrics["validation"]["loss"], rel=1e-3)


@pytest.mark.slow
def test_compilation_leaves_no_trace_in_what_experts_count(recipe, monkeypatch):
    """Its warming-up pass is none of training's."""
    seen = []
    original = Trainer._compile

    def compiling(self):
        original(self)
        seen.extend(m.load.sum().item() for m in self.mixers if hasattr(m, "load"))

    monkeypatch.setattr(Trainer, "_compile", compiling)
    train(recipe, {"model.pattern": 'mha moe(balance="bias")', "train.compile": True, "train.steps": 2}, quiet=True)
    assert seen == [0]


def test_experts_are_balanced_and_logged(recipe):
    result = train(recipe, {"model.pattern": 'mha moe(balance="both", bias_rate=0.01)'}, quiet=True)
    lines = [line for line in read_metrics(result.path) if line["split"] == "train"]
    assert all(0.125 <= line["moe_0_max_load"] <= 0.5 for line in lines)
    assert all(0 < line["moe_0_load_entropy"] <= 1 for line in lines)
    name = "backbone.steps.1.mixers.0.e_score_correction_bias"
    assert result.load().state_dict()[name].any()


def test_tensorboard_reads_the_events(recipe):
    result = train(recipe, quiet=True)
    lines = [line for line in read_metrics(result.path) if line["split"] == "validation"]
    assert scalars_of(result.path, "validation/loss") == [(line["step"], line["loss"]) for line in lines]


def scalars_of(folder, tag):
    """What TensorBoard itself reads under a tag: steps and values."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return [(e.step, pytest.approx(e.value, rel=1e-6)) for e in events.Scalars(tag)]


@pytest.mark.parametrize("earlier", ["one file each start", "none", "the one file of earlier versions"])
def test_a_resumed_run_has_no_step_twice_in_tensorboard(recipe, monkeypatch, earlier):
    """The process is killed seven steps after its last checkpoint, between a record and the next."""
    original = Trainer._log

    def logging(self, update):
        original(self, update)
        if self.at.step == 25:
            raise SystemExit

    options = {"train.checkpoint_every": 18, "train.eval_every": 20, "train.metric": "loss", "train.lr": 1e-9}
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_log", logging)
        with pytest.raises(SystemExit):
            train(recipe, options, quiet=True)
    run = Path("runs/small")
    for path in run.glob("events.*"):
        if earlier == "none":
            path.unlink()
        elif earlier == "the one file of earlier versions":
            path.rename(run / "events.out.tfevents.zoo")
    train(recipe, options, resume=True, quiet=True)
    assert len(list(run.glob("events.*"))) == (2 if earlier == "one file each start" else 1)
    for split in ("train", "validation", "test"):
        lines = [line for line in read_metrics(run) if line["split"] == split]
        assert scalars_of(run, f"{split}/accuracy") == [(line["step"], line["accuracy"]) for line in lines]


def test_values_beyond_float32_are_written(tmp_path):
    values = {"a": -0.0, "b": math.nan, "c": math.inf, "d": 1e300, "e": 2**62, "g": True}
    events = Events(tmp_path, [], print)
    events.add({"step": 0, "split": "train", "seconds": 0.0, "loss": 1.5, "text": "left out", "lr": None})
    events.add({"step": 300_000, "split": "validation", "seconds": 12.25, **values})
    events.close()
    assert scalars_of(tmp_path, "train/loss") == [(0, 1.5)]
    found = [scalars_of(tmp_path, f"validation/{key}")[0][1].expected for key in values]
    assert str(found[:4]) == "[-0.0, nan, inf, inf]"
    assert found[4:] == [2**62, 1]


def test_without_tensorboard_a_run_says_so_once(recipe, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "torch.utils.tensorboard", None)
        train(recipe, {"train.steps": 10})
        first = capsys.readouterr().err.splitlines()
        assert [line for line in first if "TensorBoard" in line] == [MISSING]
    run = Path("runs/small")
    assert not list(run.glob("events.*"))
    train(recipe, {"train.steps": 10}, fresh=True)
    assert "TensorBoard" not in capsys.readouterr().err
    assert list(run.glob("events.*"))
    train(recipe, {"train.steps": 10}, fresh=True, quiet=True)
    assert len(list(run.glob("events.*"))) == 1


def test_lines_where_there_is_no_terminal(recipe, capsys):
    train(recipe)
    said = capsys.readouterr()
    assert len(said.err.splitlines()) == 4
    assert said.err.splitlines()[0].startswith("small  step 10/40  loss ")
    train(recipe, {"out": "quiet"}, quiet=True)
    assert capsys.readouterr() == ("", "")
