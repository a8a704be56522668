"""What objectives carry from batch to batch survives a stop: the same bits as a run that was never stopped."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch
import yaml

import zoo
from zoo.training.loading import load
from zoo.training.loop import Trainer
from zoo.training.stopping import Interrupted
from zoo.training.train import train

TRAIN = {
    "steps": 24,
    "batch_size": 4,
    "optimizer": "adam_atan2",
    "beta2": 0.95,
    "ema": 0.9,
    "eval_every": 12,
    "log_every": 4,
    "eval_rows": 4,
    "test_rows": 4,
    "checkpoint_every": 5,
    "threads": 1,
}
SUDOKU = {"name": "sudoku", "size": 4, "max_givens": 6}
TRM = {
    "pattern": 'token_mlp(norm_axis="time") swiglu',
    "d_model": 16,
    "causal": False,
    "placement": "post",
    "norm": "rmsnorm_plain",
    "recursion": {"cycles": 2, "updates": 2, "max_steps": 5},
}
EQR = {"training_noise": 0.1, "noise": 0.1, "noise_at": "application", "damping": 0.1}
MASKED = {"pattern": "gqa swiglu", "d_model": 16, "causal": False}
EXPERIMENTS = {
    "thinking": {"task": SUDOKU, "model": TRM, "objective": "deep_supervision"},
    "starts": {
        "task": SUDOKU,
        "model": {**TRM, "pattern": 'gqa moe(n_experts=4, balance="both", bias_rate=0.05)'},
        "objective": {"name": "deep_supervision", "random_start": True, "exploration": 0.5, "starts": 2, **EQR},
    },
    "puzzles": {
        "task": {"name": "arc", "size": 6, "n_made": 4, "n_augmentations": 2},
        "model": {**TRM, "recursion": {**TRM["recursion"], "prefix": 2, "outer": "swiglu"}},
        "objective": {"name": "deep_supervision", "halting": "q"},
        "train": {**TRAIN, "puzzle_lr": 0.01, "weight_decay": 1.0, "decay_all": True, "recompute": True},
    },
    "candidates": {
        "task": SUDOKU,
        "model": TRM,
        "objective": {
            "name": "deep_supervision",
            "candidates": 2,
            "decay": 0.7,
            "curriculum": [[9, 1, 1], [6, 1, 2]],
            "training_noise": 0.1,
        },
    },
    "unmasking": {
        "task": SUDOKU,
        "model": MASKED,
        "objective": {"name": "masked_diffusion", "prompt_dropout": 0.2, "order": "random", "steps": 4},
    },
    "order": {
        "task": SUDOKU,
        "init": "source",
        "model": MASKED,
        "objective": {"name": "masked_diffusion", "unmasking_order": {"group": 2, "updates": 2}},
        "train": {**TRAIN, "weight_decay": 0.1},
    },
    "blocks": {
        "task": SUDOKU,
        "model": {"pattern": "mamba2 swiglu", "d_model": 16},
        "objective": {"name": "block_diffusion", "steps": 2, "order": "random"},
    },
    "looped": {
        "task": {"name": "mqar", "seq_len": 24, "n_pairs": [2, 3], "vocab_size": 25},
        "model": {"pattern": 'loop(2, gqa swiglu, inject="add")', "d_model": 16},
        "objective": {"name": "deep_supervision", "exploration": 0.5, "steps": 5, "training_noise": 0.1},
    },
    "correcting": {
        "task": SUDOKU,
        "model": MASKED,
        "objective": {
            "name": "uniform_diffusion",
            "steps": 4,
            "self_conditioning": True,
            "curriculum": {"batches": 13, "constant": 4, "start": 0.1},
        },
    },
}


@pytest.fixture(params=EXPERIMENTS)
def experiment(request, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if request.param == "order":
        zoo.save(zoo.create_model(MASKED, vocab_size=7), "source")
    return {"train": TRAIN, **EXPERIMENTS[request.param]}


def test_a_stopped_run_ends_in_the_same_bits(experiment, monkeypatch, outcome_of):
    """Stopped in the middle of puzzles that are being thought about, and right after another stop."""
    train({**experiment, "out": "whole"}, quiet=True)
    carried = []
    original = Trainer._step

    def stopping_at(step):
        def stepping(self, data):
            if self.at.step == step:
                carried.append({k: v.clone() for k, v in self.session.carry.items()})
                os.kill(os.getpid(), signal.SIGINT)
            return original(self, data)

        return stepping

    for step in (7, 8, 18):
        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "_step", stopping_at(step))
            with pytest.raises(Interrupted):
                train({**experiment, "out": "cut"}, quiet=True)
    train({**experiment, "out": "cut"}, resume=True, quiet=True)
    assert outcome_of("cut") == outcome_of("whole")
    if experiment["objective"] == "deep_supervision" or ("steps" in experiment["objective"] and "begun" in carried[0]):
        for carry in carried:  # else nothing of it would be tested
            assert 0 < carry["steps"].max() < TRM["recursion"]["max_steps"]
            assert not carry["halted"].all()
            assert not torch.equal(carry["answer"][0], carry["answer"][1])


@pytest.mark.parametrize("name", ["thinking", pytest.param("unmasking", marks=pytest.mark.slow)])
def test_a_killed_command_ends_in_the_same_bits(zoo_command, outcome_of, name):
    """`zoo train`, killed without a chance to save, and run again; then `zoo eval` reads what it left."""
    long = {**EXPERIMENTS[name], "train": {**TRAIN, "steps": 100, "eval_every": 50, "checkpoint_every": 10}}
    Path("long.yaml").write_text(yaml.safe_dump(long))
    process = zoo_command("train", "long.yaml", "out=cut")
    while len(list(Path("cut").glob("checkpoints/step_*"))) < 2:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.002)
    process.kill()
    process.communicate()
    assert not Path("cut/result.json").exists()
    load("cut", "last")
    train({**long, "name": "long", "out": "cut"}, resume=True, quiet=True)
    train({**long, "name": "long", "out": "whole"}, quiet=True)
    assert outcome_of("cut") == outcome_of("whole")
