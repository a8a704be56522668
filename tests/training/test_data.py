"""The stream gives the same rows however it is cut."""

from __future__ import annotations

import threading

import pytest
import torch

import tasks
from zoo.objectives import create_objective
from zoo.training import data
from zoo.training.data import Stream, split_rows


@pytest.fixture
def task():
    return tasks.create_task("mqar", vocab_size=64, seq_len=16, n_pairs=2)


def batches(task, start, stop):
    objective = create_objective("next_token", task)
    stream = Stream(task, objective, seed=3, batch_size=5, start=start, stop=stop, device=torch.device("cpu"))
    try:
        return [next(stream) for _ in range(stop - start)]
    finally:
        stream.close()


@pytest.mark.parametrize("tokens_ahead", [1, 300, 10**6])
def test_batches_are_those_of_the_task(task, monkeypatch, tokens_ahead):
    monkeypatch.setattr(data, "TOKENS_AHEAD", tokens_ahead)
    threads = torch.get_num_threads()
    for start in (0, 7):
        for i, batch in enumerate(batches(task, start, 40), start):
            rows = task.sample(5, split="train", seed=3, start=5 * i)
            assert torch.equal(batch.tokens, rows.inputs)
            assert torch.equal(batch.targets, rows.targets[rows.targets != tasks.IGNORE])
            assert torch.equal(rows.targets.flatten()[batch.positions], batch.targets)
    assert torch.get_num_threads() == threads


def test_errors_of_the_thread_reach_the_loop(task, monkeypatch):
    monkeypatch.setattr(type(task), "sample", lambda *a, **k: 1 / 0)
    before = threading.active_count()
    with pytest.raises(ZeroDivisionError):
        batches(task, 0, 3)
    assert threading.active_count() == before


def test_split_rows_loses_none(task):
    whole = task.sample(7, split="train", seed=0)
    parts = split_rows(whole, 3)
    assert [len(p.inputs) for p in parts] == [3, 3, 1]
    assert torch.equal(torch.cat([p.targets for p in parts]), whole.targets)
    assert torch.equal(torch.cat([p.slices["n_pairs"] for p in parts]), whole.slices["n_pairs"])
