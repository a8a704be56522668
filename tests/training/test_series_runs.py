"""Runs of real vectors: trained, killed, resumed, evaluated, shown and compared, through the command and Python."""

from __future__ import annotations

import json
import math

import pytest
import torch

import zoo
from zoo.cli import main
from zoo.core.options import Options
from zoo.objectives import create_objective
from zoo.report import load_runs, rows, write_report
from zoo.tasks import Batch, Task, create_task
from zoo.tasks.protocol import IGNORE
from zoo.training.evaluation import evaluate_run, held_out
from zoo.training.train_options import Target, TrainConfig

TASK = {"name": "oscillators", "n_steps": 16, "min_steps": 12, "gap_steps": [2, 4]}
BASE = {
    "task": TASK,
    "model": {"pattern": "cfc swiglu", "d_model": 16},
    "objective": "regression",
    "train": {"steps": 24, "batch_size": 8, "eval_every": 8, "eval_rows": 32, "test_rows": 48, "threads": 1},
}


def run_command(*arguments):
    with pytest.raises(SystemExit) as ended:
        main([str(a) for a in arguments])
    return ended.value.code or 0


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    zoo.train({**BASE, "out": str(folder / "cfc")}, quiet=True)
    zoo.train({**BASE, "out": str(folder / "gru")}, {"model.pattern": "gru"}, quiet=True)
    digits = {"task": {"name": "digits", "order": "rows"}, "objective": "classification"}
    zoo.train({**BASE, **digits, "out": str(folder / "digits")}, {"model.pattern": "gru"}, quiet=True)
    return folder


def test_the_best_weights_are_those_of_the_least_error(runs):
    result = json.loads((runs / "cfc" / "result.json").read_text())
    lines = [json.loads(line) for line in (runs / "cfc" / "metrics.jsonl").read_text().splitlines()]
    found = {line["step"]: line["mse"] for line in lines if line["split"] == "validation"}
    assert result["best_step"] == min(found, key=found.get)
    assert result["validation"]["mse"] == min(found.values())
    assert result["validation"]["mse_low"] < result["validation"]["mse"] < result["validation"]["mse_high"]
    assert result["test"]["mse_ratio"] == pytest.approx(result["test"]["mse"] / result["test"]["trivial_mse"])
    train = [line for line in lines if line["split"] == "train"]
    assert all(math.isfinite(line["mse"]) and "accuracy" not in line for line in train)
    assert result["tokens"] == 24 * 8 * 16, "steps are counted, not numbers"
    assert result["decode_tokens_per_second"] > 0
    assert set(result["test"]["slices"]["gap"]) <= {"2", "3", "4", "6", "8", "12"}
    model = result["model"]
    assert (model["inputs"], model["outputs"], model["vocab_size"]) == (3, 2, 0)
    assert not model["time_feature"], "cfc reads the times itself"
    assert json.loads((runs / "gru" / "result.json").read_text())["model"]["time_feature"]


def test_a_stopped_run_goes_on_to_the_same_bits(runs, tmp_path, monkeypatch):
    from zoo.training import loop

    original, stopped = loop.Trainer._step, []

    def stop_at_13(self, data):
        if self.at.step == 13 and not stopped:
            stopped.append(1)
            self._save()
            raise RuntimeError("killed")
        return original(self, data)

    monkeypatch.setattr(loop.Trainer, "_step", stop_at_13)
    made = {**BASE, "out": str(tmp_path / "run")}
    with pytest.raises(RuntimeError, match="killed"):
        zoo.train(made, quiet=True)
    result = zoo.train(made, quiet=True, resume=True)
    expected = zoo.load(runs / "cfc", "last").state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in zoo.load(result.path, "last").state_dict().items())
    assert result.data["test"] == json.loads((runs / "cfc" / "result.json").read_text())["test"]


def test_a_batch_in_parts_has_the_gradient_of_the_whole():
    task = create_task({**TASK, "gap_steps": (2, 4)})
    for name, made in (("regression", task), ("classification", create_task("digits", order="rows"))):
        objective = create_objective(name, made)
        torch.manual_seed(0)
        model = zoo.create_model(
            "gru", d_model=16, inputs=made.n_inputs, outputs=made.n_outputs or made.n_classes
        ).double()
        data = objective.encode(made.sample(7, split="train", seed=0))
        grads = []
        for parts in (1, 3):
            model.zero_grad()
            losses = []
            for update in objective.updates(model, data, {}, torch.Generator(), parts=parts):
                update.loss.backward()
                losses.append(update.loss.detach())
            grads.append([torch.stack(losses).sum(), *(p.grad.clone() for p in model.parameters())])
        for whole, split in zip(*grads, strict=True):
            torch.testing.assert_close(split, whole, rtol=1e-9, atol=1e-12)


def test_the_loss_is_the_squared_error_of_the_scored_steps_alone():
    task = create_task({**TASK, "gap_steps": (2, 4)})
    batch = task.sample(5, split="train", seed=0)
    model = zoo.create_model("gru", d_model=16, inputs=3, outputs=2)
    objective = create_objective("regression", task)
    (update,) = objective.updates(model, objective.encode(batch), {}, torch.Generator())
    said, _ = model(batch.inputs, None, zoo.Context(lengths=batch.lengths, timespans=batch.timespans))
    expected = (said - batch.targets)[batch.mask].square().mean()
    torch.testing.assert_close(update.loss, expected)
    answers, loss = objective.evaluate(model, batch)
    torch.testing.assert_close(loss, expected)
    per_row = [(answers[i] - batch.targets[i])[batch.mask[i]].square().mean() for i in range(5)]
    assert task.score(batch, answers)["mse"] == pytest.approx(torch.stack(per_row).mean().item(), rel=1e-6)
    assert update.figures()["mse"] == pytest.approx(torch.stack(per_row).mean().item(), rel=1e-5)
    bent = create_objective("regression", task, huber=0.1)
    (update,) = bent.updates(model, bent.encode(batch), {}, torch.Generator())
    huber = 2 * torch.nn.functional.huber_loss(said[batch.mask], batch.targets[batch.mask], delta=0.1)
    torch.testing.assert_close(update.loss, huber)


def test_targets_and_metrics_of_errors_fall(tmp_path):
    assert Target(metric="mse", value=0.5).reached_by({"mse": 0.4})
    assert not Target(metric="mse_ratio", value=0.5).reached_by({"mse_ratio": 0.6})
    assert TrainConfig().selects_by("mse") == "mse"
    assert TrainConfig(metric="mse_ratio").selects_by("mse") == "mse_ratio"
    changes = {"train.target": {"metric": "mse_ratio", "value": 50.0}, "train.steps": 40}
    result = zoo.train({**BASE, "out": str(tmp_path / "easy")}, changes, quiet=True)
    assert (result.status, result.data["steps"]) == ("target", 8)


def test_the_command_trains_evaluates_shows_and_compares(runs, tmp_path, capsys):
    recipe = tmp_path / "waves.yaml"
    recipe.write_text(json.dumps(BASE))
    assert run_command("train", recipe, "train.steps=8", f"out={tmp_path / 'run'}") == 0
    captured = capsys.readouterr()
    assert "mse_ratio" in captured.out
    assert "mse " in captured.err
    assert run_command("eval", runs / "cfc", "task.noise=0.0", "--json") == 0
    score = json.loads(capsys.readouterr().out)
    assert score["mse"] == pytest.approx(evaluate_run(runs / "cfc", {"task.noise": 0.0})["mse"])
    assert run_command("show", "oscillators", "n_steps=16") == 0
    assert "o observed, x to predict" in capsys.readouterr().out
    assert run_command("show", runs / "cfc") == 0
    assert "+ predicted" in capsys.readouterr().out
    assert run_command("show", runs / "digits") == 0
    assert "digit" in capsys.readouterr().out
    assert run_command("show", "oscillators", "--picture", tmp_path / "picture.png") == 0
    assert run_command("generate", runs / "cfc", "--example", 1) == 0
    assert "the last observed places" in capsys.readouterr().out
    assert run_command("compare", runs / "cfc", runs / "gru") == 0
    out = capsys.readouterr().out
    assert "mse" in out
    assert "accuracy" not in out


def test_the_page_shows_errors(runs, tmp_path):
    found = load_runs([runs / "cfc", runs / "gru"])
    table = rows(found)
    assert [row["mse"] for row in table] == sorted(row["mse"] for row in table)
    assert all(row["accuracy"] is None and row["mse_low"] < row["mse"] < row["mse_high"] for row in table)
    page = write_report(found, tmp_path / "page.html").read_text()
    for part in ("error-by-time", "error-by-state", "mean squared error", "predicted"):
        assert part in page, part
    assert 'id="accuracy-by-time"' not in page
    mixed = rows(load_runs([runs]))
    assert mixed[0]["accuracy"] is not None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "next_token"}, r"series of real vectors: set objective=regression\."),
        ({"model.vocab_size": 9}, "model.vocab_size=9 is not allowed: the rows of oscillators are real vectors"),
        ({"model.inputs": 9}, "model.inputs=9 is not allowed: oscillators needs 3"),
        ({"model.outputs": 9}, "model.outputs=9 is not allowed: oscillators needs 2"),
        ({"train.metric": "accuracy"}, "Unknown metric 'accuracy'"),
        ({"model.recursion": {}, "model.causal": False}, "recursi"),
        ({"task": "mqar", "objective": "next_token", "model.inputs": 3}, "the rows of mqar are tokens: leave it out"),
    ],
)
def test_wrong_input_is_one_line(changes, message, tmp_path, capsys):
    recipe = tmp_path / "waves.yaml"
    recipe.write_text(json.dumps(BASE))
    words = [f"{key}={json.dumps(value)}" for key, value in changes.items()]
    assert run_command("train", recipe, *words, f"out={tmp_path / 'run'}") == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    with pytest.raises(zoo.UsageError, match=message) as refusal:
        zoo.train({**BASE, "out": str(tmp_path / "other")}, changes, quiet=True)
    assert line == f"zoo: {refusal.value}"


def test_a_family_serves_series(tmp_path):
    result = zoo.train(
        {**BASE, "model": "mamba2-tiny", "out": str(tmp_path / "run")},
        {"train.steps": 2, "train.batch_size": 2},
        quiet=True,
    )
    assert result.load().config.inputs == 3


def test_models_are_saved_and_loaded_whole(runs, tmp_path):
    model = zoo.load(runs / "cfc")
    zoo.save(model, tmp_path / "saved")
    again = zoo.load(tmp_path / "saved")
    batch = held_out(create_task({**TASK, "gap_steps": (2, 4)}), "test", 3)
    context = zoo.Context(lengths=batch.lengths, timespans=batch.timespans)
    assert torch.equal(again(batch.inputs, None, context)[0], model(batch.inputs, None, context)[0])
    swapped = zoo.swap(model, {"cfc": "lstm"})
    assert torch.equal(swapped.embedding.weight, model.embedding.weight)


class Steps(Task):
    """A class for every step, of a series with a task's own lengths: whether the running sum is positive."""

    class Config(Options):
        """None."""

    name = "signs"
    layout = "series"
    n_inputs, n_classes, seq_len = 1, 2, 10

    def sample(self, n, *, split, seed, start=0):
        seeds = [hash((split, seed, start + i)) % 2**31 for i in range(n)]
        inputs = torch.stack([torch.randn(10, 1, generator=torch.Generator().manual_seed(s)) for s in seeds])
        lengths = torch.tensor([5 + s % 6 for s in seeds])
        targets = (inputs[..., 0].cumsum(1) > 0).long()
        targets[torch.arange(10) >= lengths[:, None]] = IGNORE
        return Batch(inputs, targets, lengths=lengths)

    def render(self, batch, row=0, predictions=None):
        return str(batch.inputs[row, :, 0].tolist())


def test_a_class_for_every_step_of_a_task_of_ones_own(tmp_path):
    made = {"model": {"pattern": "gru", "d_model": 32}, "objective": "classification", "out": str(tmp_path / "run")}
    train = {
        "steps": 150,
        "batch_size": 32,
        "eval_every": 50,
        "eval_rows": 200,
        "test_rows": 50,
        "threads": 1,
        "lr": 1e-2,
    }
    result = zoo.train({**made, "train": train}, task=Steps(Steps.Config()), quiet=True)
    assert result.metrics["validation"]["accuracy"] > 0.9


def test_layers_of_a_series_run_start_a_run_on_other_inputs(runs, tmp_path):
    """The numbers of inputs and outputs are the new task's, and the ends that do not fit are named."""
    wide = {**BASE, "task": {**TASK, "n_oscillators": 1}, "out": str(tmp_path / "run"), "init": str(runs / "cfc")}
    wide = {k: v for k, v in wide.items() if k != "model"}
    with pytest.raises(zoo.UsageError, match=r"embedding.weight is .* init.on_mismatch=fresh"):
        zoo.train(wide, quiet=True)
    zoo.train({**wide, "init": {"source": str(runs / "cfc"), "only": ["backbone.*"]}}, {"train.steps": 2}, quiet=True)
    lists = json.loads((tmp_path / "run" / "init.json").read_text())
    assert "embedding.weight" in lists["fresh"]
    assert all(name.startswith("backbone.") for name in lists["kept"])
