"""Data of a user's own in zoo.train: a task object, a Dataset, batches that keep their place and those that do not."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import zoo
from zoo import tasks
from zoo.core.errors import RunError, UsageError
from zoo.tasks import random
from zoo.training.evaluation import evaluate_run
from zoo.training.stopping import Interrupted

ROWS = (torch.randint(0, 7, (90, 1), generator=torch.Generator().manual_seed(0)) + torch.arange(9) * 3) % 11
SIZES = {"vocab_size": 11, "seq_len": 8}


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def experiment(**train):
    options = {"steps": 30, "batch_size": 4, "eval_every": 10, "log_every": 5, "eval_rows": 8, "test_rows": 8}
    options |= {"checkpoint_every": 7, "threads": 1}
    return {"name": "small", "model": {"pattern": "short_conv mlp", "d_model": 16}, "train": options | train}


class Cut(zoo.Callback):
    """Sends this process a real signal at one record."""

    def on_log(self, record):
        if record["step"] == 15:
            os.kill(os.getpid(), signal.SIGINT)


class Stateful:
    """Batches whose place can be saved, as torchdata's StatefulDataLoader has it; six rows each, 60 an epoch."""

    def __init__(self, state=lambda place: {"place": place}):
        self.place, self.state, self.begun_at = 0, state, []

    def __iter__(self):
        self.begun_at.append(self.place)
        while self.place < 60:
            self.place += 6
            yield ROWS[self.place - 6 : self.place]
        self.place = 0

    def state_dict(self):
        return self.state(self.place)

    def load_state_dict(self, state):
        self.place = state["place"]


class Lines(IterableDataset):
    """Rows in order, of different lengths, some with a random change."""

    def __iter__(self):
        for i, row in enumerate(ROWS.tolist()):
            yield [*row[: 5 + i % 5], int(torch.randint(11, ()))][:9]


def indexed():
    return tasks.from_dataset(TensorDataset(ROWS[:41]), **SIZES, validation=list(ROWS[60:75]), test=list(ROWS[75:]))


def shuffled():
    loader = DataLoader(TensorDataset(ROWS[:50, :-1], ROWS[:50, 1:]), batch_size=7, shuffle=True)
    return tasks.from_batches(loader, **SIZES, validation=[ROWS[60:75]], test=None)


def stateful():
    return tasks.from_batches(Stateful(), **SIZES, validation=None, test=[ROWS[75:]])


def rows_in_order():
    return tasks.from_dataset(Lines(), **SIZES, validation=None, test=None)


class Sums(tasks.Task):
    """A task that no registry knows."""

    class Config(zoo.core.options.Options):
        terms: int = 4

    layout = "next_token"
    vocab_size = 10

    def __init__(self, config):
        super().__init__(config)
        self.seq_len = config.terms

    def sample(self, n, *, split, seed, start=0):
        words = random.bits(random.row_keys(split, seed, start, n), self.seq_len)
        inputs = torch.from_numpy(random.below(words, 10))
        return tasks.Batch(inputs, inputs.cumsum(1) % 10)

    def render(self, batch, row=0, predictions=None):
        return str(batch.inputs[row].tolist())


def sums():
    return Sums(Sums.Config(terms=6))


@pytest.mark.parametrize("make", [indexed, shuffled, stateful, rows_in_order, sums])
def test_a_resumed_run_comes_to_the_same_bits(make, outcome_of, capsys):
    whole = zoo.train(experiment(), {"out": "whole"}, task=make(), quiet=True)
    zoo.train(experiment(seed=1), {"out": "other"}, task=make(), quiet=True)
    with pytest.raises(Interrupted):
        zoo.train(experiment(), {"out": "cut"}, task=make(), callbacks=[Cut()])
    started = capsys.readouterr().err
    resumed = zoo.train("cut", task=make(), resume=True)
    said = capsys.readouterr().err
    assert outcome_of("cut") == outcome_of("whole") != outcome_of("other")
    assert resumed.metrics == whole.metrics
    without_state = make in (shuffled, rows_in_order)
    assert ("will read and drop the rows that were trained already" in started) == without_state
    assert ("Reading and dropping 60 rows that were trained already" in said) == without_state


def test_a_saved_place_is_gone_to_and_no_row_is_read_again():
    source = Stateful()
    with pytest.raises(Interrupted):
        zoo.train(experiment(), task=stateful(), callbacks=[Cut()], quiet=True)
    zoo.train(experiment(), task=tasks.from_batches(source, **SIZES, validation=None, test=[ROWS[75:]]), quiet=True)
    assert source.begun_at == [60, 0]  # 60 rows were trained, which are an epoch


def test_a_state_that_is_no_plain_data_is_told_and_rows_are_dropped_instead(capsys, outcome_of):
    class Place:
        pass

    def make():
        return tasks.from_batches(Stateful(lambda place: Place()), **SIZES, validation=None, test=None)

    zoo.train(experiment(), {"out": "whole"}, task=make(), quiet=True)
    with pytest.raises(Interrupted):
        zoo.train(experiment(), {"out": "cut"}, task=make(), callbacks=[Cut()])
    assert (
        capsys.readouterr().err.count("The state_dict of a Stateful is no plain data, so no checkpoint keeps it") == 1
    )
    zoo.train("cut", task=make())
    assert "Reading and dropping 60 rows" in capsys.readouterr().err
    assert outcome_of("cut") == outcome_of("whole")


def test_absent_splits_are_absent_in_the_result():
    result = zoo.train(experiment(), task=rows_in_order(), quiet=True)
    assert result.metrics == {"validation": {}, "test": {}}
    assert result.data["best_step"] == 30
    assert zoo.load("runs/small").n_parameters() == result.data["n_parameters"]
    for key, value in (("metric", "loss"), ("target", {"value": 1.0})):
        with pytest.raises(UsageError, match=rf"^train\.{key} is not allowed: own_batches has no validation rows"):
            zoo.train(experiment(**{key: value}), {"out": key}, task=rows_in_order())
    with pytest.raises(UsageError, match=r"^train\.rows=9 is not allowed: the rows of own_batches come in order\.$"):
        zoo.train(experiment(rows=9), {"out": "rows"}, task=rows_in_order(), quiet=True)


def test_an_iterator_that_ends_ends_the_run_with_a_checkpoint():
    task = tasks.from_batches((ROWS[i : i + 10] for i in range(0, 50, 10)), **SIZES, validation=None, test=None)
    with pytest.raises(RunError, match=r"^The training data ended after 12 batches of 4 rows\. [^\n]*step_12\.$"):
        zoo.train(experiment(), task=task, quiet=True)


def test_a_run_says_what_to_pass_where_its_task_is_missing(zoo_command):
    result = zoo.train(experiment(), {"out": "run"}, task=sums(), quiet=True)
    told = "The task 'Sums' of this run was given as an object from Python, a "
    process = zoo_command("train", "run", "--resume")
    with pytest.raises(UsageError, match=f"^{told}"):
        evaluate_run("run")
    error = process.communicate(timeout=100)[1]
    assert process.returncode == 2
    assert error.startswith(f"zoo: {told}")
    assert len(error.splitlines()) == 1
    score = evaluate_run("run", split="test", task=sums())
    assert score["accuracy"] == result.metrics["test"]["accuracy"]
    assert zoo.train("run", task=sums()).status == "finished"
    with pytest.raises(UsageError, match=r"holds a run with a different task\.from_python\.\w+"):
        zoo.train("run", task=Sums(Sums.Config(terms=5)))


def test_a_task_of_the_zoo_is_recorded_by_name():
    task = tasks.create_task("mqar", vocab_size=64, seq_len=16, n_pairs=2)
    zoo.train(experiment(), {"out": "run"}, task=task, quiet=True)
    assert evaluate_run("run")["n"] == 8


class Draws(Dataset):
    """Rows that differ whenever they are read."""

    def __len__(self):
        return 5

    def __getitem__(self, i):
        return torch.randint(11, (9,))


def test_what_no_run_can_be_of_is_refused():
    for task, told in (
        (TensorDataset(ROWS), r"^task=<torch.* is no zoo\.tasks\.Task: zoo\.tasks\.from_dataset\(\.\.\.\) or"),
        ("mqar", r"^task='mqar' is no zoo\.tasks\.Task: .*; a task's name belongs to the experiment\.$"),
        (
            tasks.from_dataset(Draws(), **SIZES, validation=None, test=None),
            "gives other rows when they are drawn again",
        ),
    ):
        with pytest.raises(UsageError, match=told):
            zoo.train(experiment(), task=task)
    with pytest.raises(UsageError, match=r"^task\.seq_len and a task object are given"):
        zoo.train(experiment(), {"task.seq_len": 4}, task=sums())
    assert not Path("runs").exists()


def test_numpy_rows_are_shuffled_anew_in_every_epoch():
    rows = [np.full(9, i, dtype=np.uint16) for i in range(10)]
    task = tasks.from_dataset(rows, **SIZES, validation=None, test=None)
    epochs = task.sample(30, split="train", seed=0).inputs[:, 0].reshape(3, 10)
    assert (epochs.sort(1).values == torch.arange(10)).all()
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 3
    assert torch.equal(task.sample(9, split="train", seed=0, start=17).inputs[:, 0], epochs.flatten()[17:26])
    assert not torch.equal(task.sample(10, split="train", seed=1).inputs[:, 0], epochs[0])
