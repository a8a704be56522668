"""A finished run that is given more steps goes on, to the bits of a run that had them all from its start."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from pathlib import Path

import pytest
import yaml

import zoo
from zoo.cli import main
from zoo.core.run_files import read_metrics, read_whole_config
from zoo.report import caveats, gather
from zoo.training.loop import Trainer
from zoo.training.stopping import Interrupted
from zoo.training.train import train

TRAIN = {
    "steps": 12,
    "batch_size": 4,
    "rows": 24,
    "optimizer": "muon",
    "schedule": "constant",
    "warmup_steps": 4,
    "ema": 0.9,
    "eval_every": 6,
    "log_every": 3,
    "eval_rows": 8,
    "test_rows": 8,
    "checkpoint_every": 5,
    "threads": 1,
}
SUDOKU = {"name": "sudoku", "size": 4, "max_givens": 6}
RECURSIVE = {
    "pattern": 'token_mlp(norm_axis="time") swiglu',
    "d_model": 16,
    "causal": False,
    "placement": "post",
    "norm": "rmsnorm_plain",
    "recursion": {"cycles": 2, "updates": 2, "max_steps": 5},
}
EXPERIMENTS = {
    "next_token": {
        "task": {"name": "mqar", "vocab_size": 64, "seq_len": 16, "n_pairs": 2},
        "model": {"pattern": "short_conv gqa", "d_model": 16, "dropout": 0.1},
        "objective": "next_token",
    },
    "masked_diffusion": {
        "task": SUDOKU,
        "model": {"pattern": "gqa swiglu", "d_model": 16, "causal": False},
        "objective": {"name": "masked_diffusion", "prompt_dropout": 0.2, "steps": 4},
    },
    "deep_supervision": {"task": SUDOKU, "model": RECURSIVE, "objective": "deep_supervision"},
}


@pytest.fixture
def short(tmp_path, monkeypatch):
    """Trains the shortest run into a folder."""
    monkeypatch.chdir(tmp_path)

    def make(out="x", **options):
        return train({"out": out, **EXPERIMENTS["next_token"], "train": {**TRAIN, **options}}, quiet=True).path

    return make


@contextlib.contextmanager
def _stopped_at(step, monkeypatch):
    """Ctrl-C in the step after this one."""
    original = Trainer._step

    def stopping(self, data):
        if self.at.step == step:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, data)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", stopping)
        with pytest.raises(Interrupted):
            yield


def _command(*words, capsys):
    with pytest.raises(SystemExit) as done:
        main(["train", *words])
    out, err = capsys.readouterr()
    return done.value.code or 0, out, err


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_same_bits_as_a_run_of_all_steps(tmp_path, monkeypatch, outcome_of, name):
    """With a running average and Muon; extended twice, the second time after a stop on the way."""
    monkeypatch.chdir(tmp_path)
    experiment = {**EXPERIMENTS[name], "name": "run", "train": TRAIN}
    whole = train({**experiment, "out": "whole", "train": {**TRAIN, "steps": 24}}, quiet=True)
    train({**experiment, "out": "x"}, quiet=True)
    train("x", {"train.steps": 18}, quiet=True)
    with _stopped_at(20, monkeypatch):
        train("x", {"train.steps": 24}, quiet=True)
    result = train("x", quiet=True)
    assert outcome_of("x") == outcome_of("whole")
    assert read_whole_config(Path("x")) == read_whole_config(Path("whole"))
    extended = result.data.pop("extended")
    assert extended == [{"step": 12, "train.steps": [12, 18]}, {"step": 18, "train.steps": [18, 24]}]
    same = ("status", "steps", "best_step", "tokens", "validation", "test", "train")
    assert {k: result.data[k] for k in same} == {k: whole.data[k] for k in same}
    assert (result.status, result.data["steps"]) == ("finished", 24)
    assert not zoo.load("x").training


def test_the_command_says_how_the_schedule_goes_on(short, capsys):
    short("a")
    short("b", schedule="cosine", lr=1e-3)
    status, out, err = _command("a", "train.steps=18", capsys=capsys)
    assert status == 0
    assert "a: finished at step 18" in out
    assert "the schedule is constant, as if the run had had all steps from its start" in err
    status, _, err = _command("b", "train.steps=18", "train.rows=48", capsys=capsys)
    assert status == 0
    line = next(line for line in err.splitlines() if "cosine schedule" in line)
    assert line.startswith("train.steps was 12 and is 18 from step 12 on: the cosine schedule is that of 18 steps")
    lrs = {r["step"]: r["lr"] for r in read_metrics(Path("b")) if r["split"] == "train"}
    assert lrs[9] > lrs[12] < lrs[15] > lrs[18]  # it rises again, and falls to the new end
    assert json.loads(Path("b/result.json").read_text())["extended"] == [
        {"step": 12, "train.steps": [12, 18], "train.rows": [24, 48]}
    ]
    splits = [r["split"] for r in read_metrics(Path("b"))]
    assert splits.count("test") == 1  # that of the new end
    status, _, err = _command("b", capsys=capsys)
    assert status == 0
    assert "finished at step 18: nothing to do" in err
    runs = gather([Path("a"), Path("b")], print)[0]
    assert [line for line in caveats(runs) if "given more steps" in line] == [
        "experiment (b): given more steps at step 12; its learning rate is not that of a single training."
    ]


def test_a_run_killed_while_it_goes_on_is_not_taken_for_finished(short, capsys):
    """result.json of the first part is still there."""
    folder = short()
    stale = (folder / "result.json").read_bytes()
    train(folder, {"train.steps": 24}, quiet=True)
    (folder / "result.json").write_bytes(stale)  # as after a kill between checkpoint and result
    result = train(folder, quiet=True)
    assert (result.status, result.data["steps"]) == ("finished", 24)


@pytest.mark.parametrize(
    ("options", "changes", "told"),
    [
        ({}, ["train.steps=6"], "x has trained 12 steps, more than train.steps=6"),
        ({}, ["train.rows=48"], "x has done all its 12 steps: to go on, give a larger train.steps too"),
        ({}, ["train.steps=24", "train.lr=1"], "different train.lr"),
        ({}, ["train.steps=24", "train.metric=loss"], "give train.metric=accuracy too"),
        ({"target": {"value": 0.0}}, ["train.steps=24"], "reached its train.target at step 6: train.target=null"),
        ({"steps": 9999, "time_budget": 1e-6}, ["train.steps=10000"], "train.time_budget=null sets no limit"),
    ],
)
def test_what_cannot_go_on_is_refused_in_one_line(short, capsys, options, changes, told):
    folder = short(**options)
    before = (folder / "config.yaml").read_bytes()
    status, _, err = _command("x", *changes, capsys=capsys)
    assert status == 2
    assert err.count("\n") == 1
    assert told in err
    assert (folder / "config.yaml").read_bytes() == before
    with pytest.raises(zoo.UsageError):
        train("x", {k: yaml.safe_load(v) for k, v in (c.split("=") for c in changes)}, quiet=True)


def test_a_run_that_reached_its_target_goes_on_without_it(short):
    folder = short(target={"value": 0.0})
    result = train(folder, {"train.target": None, "train.steps": 18}, quiet=True)
    assert (result.status, result.data["steps"], result.data["seconds_to_target"]) == ("finished", 18, None)


def test_a_stopped_run_may_end_where_it_stands(short, monkeypatch):
    with _stopped_at(6, monkeypatch):
        short()
    result = train("x", {"train.steps": 7}, quiet=True)
    assert (result.status, result.data["steps"]) == ("finished", 7)
    assert [r["step"] for r in read_metrics(Path("x")) if r["split"] == "validation"] == [6, 7]
