"""A run that is stopped, in whatever way, ends in the same bits as one that is not."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest

import zoo
from zoo.core.run_files import read_metrics
from zoo.training.loading import load
from zoo.training.loop import Trainer
from zoo.training.stopping import Interrupted
from zoo.training.train import train


def stop_at(monkeypatch, step: int, number: int = signal.SIGINT) -> None:
    """Send this process a real signal while it trains step `step`."""
    original = Trainer._step

    def stepping(self, data):
        if self.at.step == step:
            os.kill(os.getpid(), number)
        return original(self, data)

    monkeypatch.setattr(Trainer, "_step", stepping)


@pytest.mark.crossed("overrides", "steps")
@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"train.optimizer": "muon", "train.ema": None, "train.schedule": "wsd", "model.pattern": "lstm swiglu"},
        {"model.pattern": "mha mlp", "train.batch_size": 3, "train.log_every": 4},
        {"model.pattern": 'mamba2 moe(balance="both", bias_rate=0.05)'},
    ],
    ids=["average", "muon", "attention", "experts"],
)
@pytest.mark.parametrize("steps", [[9, 10, 29], [13]], ids=str)
def test_interrupted_run_ends_in_the_same_bits(recipe, monkeypatch, outcome_of, uncut, overrides, steps):
    whole = uncut(overrides)
    for step in steps:
        with monkeypatch.context() as patch:
            stop_at(patch, step)
            with pytest.raises(Interrupted, match=rf"step {step + 1}\b.*zoo train cut --resume"):
                train(recipe, {**overrides, "out": "cut"}, quiet=True)
    resumed = train(recipe, {**overrides, "out": "cut"}, resume=True, quiet=True)
    assert outcome_of("cut") == whole["outcome"]
    assert resumed.status == whole["status"] == "finished"
    assert resumed.metrics == whole["metrics"]


def test_interrupted_in_an_evaluation(recipe, monkeypatch, outcome_of, uncut):
    original = Trainer._evaluate

    def evaluating(self):
        if self.at.step == 20:
            os.kill(os.getpid(), signal.SIGTERM)
        original(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_evaluate", evaluating)
        with pytest.raises(Interrupted, match="step 20") as error:
            train(recipe, {"out": "cut"}, quiet=True)
    assert error.value.exit_status == 128 + signal.SIGTERM
    assert read_metrics(Path("cut"))[-1]["split"] == "train"
    train("cut", quiet=True)
    assert outcome_of("cut") == uncut({})["outcome"]


def test_interrupted_while_test_is_read(recipe, monkeypatch, outcome_of, uncut):
    original = Trainer._test

    def testing(self):
        os.kill(os.getpid(), signal.SIGINT)
        return original(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_test", testing)
        with pytest.raises(Interrupted, match="step 40"):
            train(recipe, {"out": "cut"}, quiet=True)
    assert train(recipe, {"out": "cut"}, quiet=True).status == "finished"
    assert outcome_of("cut") == uncut({})["outcome"]


def test_records_after_the_checkpoint_are_written_anew(recipe, monkeypatch, outcome_of, uncut):
    with monkeypatch.context() as patch:
        stop_at(patch, 16)
        with pytest.raises(Interrupted):
            train(recipe, {"out": "cut"}, quiet=True)
    with open("cut/metrics.jsonl", "a") as file:  # what a killed process had still written
        file.write('{"step": 20, "split": "train", "seco')
    train(recipe, {"out": "cut"}, quiet=True)
    assert outcome_of("cut") == uncut({})["outcome"]


def test_finished_run_is_left_as_it_is(recipe, capsys):
    first = train(recipe)
    before = Path("runs/small/metrics.jsonl").stat().st_mtime_ns
    again = train(recipe)
    assert again.data == first.data
    assert Path("runs/small/metrics.jsonl").stat().st_mtime_ns == before
    assert "nothing to do" in capsys.readouterr().err


def test_more_time(recipe):
    short = train(recipe, {"train.time_budget": 1e-6}, quiet=True)
    assert (short.status, short.data["steps"]) == ("time_budget", 1)
    longer = train(recipe, quiet=True)
    assert (longer.status, longer.data["steps"]) == ("finished", 40)


def test_changed_config_is_refused_with_the_keys(recipe, monkeypatch):
    stop_at(monkeypatch, 8)
    with pytest.raises(Interrupted):
        train(recipe, quiet=True)
    with pytest.raises(zoo.UsageError, match=r"task\.n_pairs \(2 there, 1 now\), train\.lr \(0\.003 there, 0\.1 now\)"):
        train(recipe, {"train.lr": 0.1, "task.n_pairs": 1}, quiet=True)
    assert train(recipe, {"train.keep": 5, "train.checkpoint_every": 2}, quiet=True).status == "finished"


def test_fresh_starts_over(recipe):
    train(recipe, quiet=True)
    assert train(recipe, {"train.steps": 3}, fresh=True, quiet=True).data["steps"] == 3


def test_resume_needs_a_run(recipe):
    with pytest.raises(zoo.UsageError, match="no checkpoint to resume from"):
        train(recipe, resume=True, quiet=True)


def wait_for_checkpoint(process, folder: Path) -> None:
    while not list(folder.glob("checkpoints/step_*")):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.002)


LONG = ("train.steps=250", "train.eval_every=50", "train.checkpoint_every=20")


AS_LONG = {"train.steps": 250, "train.eval_every": 50, "train.checkpoint_every": 20}


def test_ctrl_c_and_a_second_process(recipe, zoo_command, outcome_of, uncut):
    """The real command: a second one on the same folder, Ctrl-C, and the way on."""
    from zoo.cli import main

    process = zoo_command("train", recipe, *LONG)
    wait_for_checkpoint(process, Path("runs/small"))
    with pytest.raises(zoo.UsageError, match="in use by another process"):
        train(recipe, AS_LONG, quiet=True)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "Go on with: zoo train runs/small --resume" in err.splitlines()[-1]
    assert not out
    with pytest.raises(SystemExit) as ended:
        main(["train", "runs/small", "--resume", "--quiet"])
    assert ended.value.code == 0
    assert outcome_of("runs/small") == uncut(AS_LONG)["outcome"]


def test_killed_run_resumes_to_the_same_bits(recipe, zoo_command, outcome_of, uncut):
    kill_and_resume(recipe, zoo_command, outcome_of, uncut, random.Random(time.time_ns()))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_killed_again_and_again(recipe, zoo_command, outcome_of, uncut, seed):
    kill_and_resume(recipe, zoo_command, outcome_of, uncut, random.Random(seed), kills=4, early=True)


def kill_and_resume(recipe, zoo_command, outcome_of, uncut, chance, *, kills=1, early=False):
    for _ in range(kills):
        process = zoo_command("train", recipe, *LONG)
        if early:  # also while it starts
            time.sleep(chance.uniform(0, 6))
        else:
            wait_for_checkpoint(process, Path("runs/small"))
            time.sleep(chance.uniform(0, 0.5))
        process.kill()
        process.communicate()
        if list(Path("runs/small/checkpoints").glob("step_*")):
            load("runs/small", "last")  # the last good checkpoint always loads
    train(recipe, AS_LONG, quiet=True)
    assert outcome_of("runs/small") == uncut(AS_LONG)["outcome"]
    assert not list(Path("runs/small").glob("**/*.tmp"))
