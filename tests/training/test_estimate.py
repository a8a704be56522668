"""`zoo train --dry-run` and `zoo.estimate`: nothing is written, and what is said is what training then takes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import zoo
from zoo.cli import main
from zoo.core.errors import UsageError
from zoo.training.fit import fit
from zoo.training.optimizer import Optimizer
from zoo.training.options import Experiment
from zoo.training.recipes import read_experiment

SUDOKU = {"name": "sudoku", "size": 4}
CASES = {
    "causal": {"task": {"name": "mqar", "seq_len": 64}, "model": {"pattern": "2*(mamba2 swiglu)", "d_model": 32}},
    "wide": {"task": {"name": "mqar", "seq_len": 32}, "model": {"pattern": "gqa swiglu", "d_model": 128}},
    "recursive": {
        "task": SUDOKU,
        "model": {"pattern": "gqa swiglu", "d_model": 32, "causal": False, "recursion": {"cycles": 2, "updates": 3}},
        "objective": "deep_supervision",
    },
    "masked": {
        "task": SUDOKU,
        "model": {"pattern": "3*(bidirectional(lstm) swiglu)", "d_model": 32, "causal": False},
        "objective": "masked_diffusion",
    },
}
TRAIN = {"batch_size": 24, "warmup_steps": 1, "threads": 1, "optimizer": "muon", "ema": 0.9}


def allocated(experiment: Experiment) -> int:
    """Bytes that torch allocates at most in the second step of a training, model and optimizer included."""
    parts = experiment.build()
    model = zoo.create_model(parts.model).train()
    model.recompute = experiment.train.recompute
    optimizer, carry, generator = Optimizer(model, experiment.train), {}, torch.Generator()
    size = experiment.train.batch_size
    more = {"parts": experiment.train.accumulate} if experiment.train.accumulate > 1 else {}

    def step() -> None:
        data = parts.objective.encode(parts.task.sample(size, split="train", seed=0))
        for update in parts.objective.updates(model, data, carry, generator, **more):
            update.loss.backward()
            last = update.last
            del update
            if last:
                optimizer.step(0)

    step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    state = sum(
        v.numel() * 4 for p in optimizer.parts for s in p.state.values() for v in s.values() if torch.is_tensor(v)
    )
    weights = sum(4 * p.numel() for p in model.parameters())
    return weights + state + most  # gradients are allocated anew in every step


@pytest.mark.parametrize("more", [{}, {"accumulate": 3}, {"recompute": True}], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_the_estimate_of_memory_is_what_torch_allocates(case, more):
    experiment = {**CASES[case], "train": {**TRAIN, **more, "ema": None}}
    (found,) = zoo.estimate(experiment)
    measured = allocated(read_experiment(experiment))
    assert 0.7 < measured / found["memory"]["total"] < 1.4


def test_weights_moments_and_parameters_are_exact(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    short = {"steps": 2, "eval_every": 2, "eval_rows": 8, "test_rows": 8}
    experiment = {**CASES["causal"], "out": "run", "train": {**TRAIN, **short, "optimizer": "adamw"}}
    (found,) = zoo.estimate(experiment)
    assert list(tmp_path.iterdir()) == []
    result = zoo.train(experiment, quiet=True)
    assert found["n_parameters"] == result.data["n_parameters"]
    model = zoo.load("run")
    weights = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
    memory = found["memory"]
    assert memory["weights"] == memory["average"] == weights
    state = torch.load("run/checkpoints/step_2/training.pt", weights_only=True)["optimizer"]
    moments = [v for part in state for each in part["state"].values() for k, v in each.items() if k != "step"]
    assert memory["optimizer"] == sum(m.numel() * m.element_size() for m in moments)
    assert found["tokens_per_step"] == 24 * 64 == result.data["tokens"] / 2
    assert found["flops_per_step"] == 3 * 24 * 64 * result.data["flops_per_token"]
    assert {"name": found["config"]["name"], **found["config"]} == zoo.core.run_files.read_whole_config(Path("run"))


def test_bfloat16_halves_weights_gradients_and_moments():
    plain, half = (zoo.estimate({**CASES["wide"], "train": {**TRAIN, **more}})[0]["memory"]
                   for more in ({}, {"parameters": "bfloat16"}))  # fmt: skip
    for name in ("weights", "gradients", "optimizer"):
        assert half[name] * 2 == plain[name]
    assert half["average"] == plain["average"]
    assert half["activations"] < plain["activations"]


def test_work_of_a_recursive_step_is_less_than_of_a_plain_one():
    made = read_experiment(CASES["recursive"])
    parts = fit(made.task, made.objective, made.model)
    with torch.device("meta"):
        model = zoo.create_model(parts.model)
    forward = model.flops_per_token(16)
    assert parts.objective.training_flops(model) == 2 * forward  # of two cycles, one has a backward pass
    assert parts.objective.training_flops(model, recompute=True) == forward * 5 // 2


def command(*words: str, capsys) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(list(words))
    said = capsys.readouterr()
    return int(ended.value.code or 0), said.out, said.err


def test_a_dry_run_by_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small = ["task.seq_len=16", "task.n_pairs=2", "model.d_model=16", "train.batch_size=4"]
    status, out, err = command("train", "mqar", "--dry-run", *small, capsys=capsys)
    assert (status, err) == (0, "")
    assert "\n  batch_size: 4\n" in out
    assert [line.split()[0] for line in out.splitlines()[-4:]] == ["folder", "parameters", "a", "memory"]
    status, out, err = command("train", "mqar-demo", "--dry-run", "--json", *small[:2], capsys=capsys)
    found = json.loads(out)
    assert (status, err) == (0, "")
    assert [each["out"] for each in found] == [str(Path("runs/mqar-demo", each["name"])) for each in found]
    assert len({each["n_parameters"] for each in found}) == len(found) > 1
    assert list(tmp_path.iterdir()) == []
    for words, told in (
        (["--dry-run", "train.stpes=3"], "Did you mean 'steps'?"),
        (["--dry-run", "--fresh"], "--fresh"),
        (["--json"], "--json belongs to --dry-run"),
    ):
        status, out, err = command("train", "mqar", *words, capsys=capsys)
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert told in err
    assert list(tmp_path.iterdir()) == []


def test_a_model_beyond_this_machine_has_no_estimate_of_activations(monkeypatch):
    monkeypatch.setattr(zoo.training.machine, "total_memory", lambda: 2**24)
    experiment = {**CASES["wide"], "train": {**TRAIN, "eval_rows": 8, "test_rows": 8}}
    (found,) = zoo.estimate(experiment)
    assert found["memory"]["activations"] is found["memory"]["total"] is None
    with pytest.raises(UsageError, match="parameters take"):
        zoo.estimate({**experiment, "model": {"pattern": "gqa swiglu", "d_model": 1024}})
