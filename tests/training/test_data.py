"""The stream gives the same rows however it is cut."""

from __future__ import annotations

import threading

import pytest
import torch

from zoo import tasks
from zoo.objectives import create_objective
from zoo.tasks.protocol import split_rows
from zoo.training import data
from zoo.training.data import Stream


@pytest.fixture
def task():
    return tasks.create_task("mqar", vocab_size=64, seq_len=16, n_pairs=2)


def batches(task, start, stop, rows=None):
    objective = create_objective("next_token", task)
    device = torch.device("cpu")
    stream = Stream(task, objective, seed=3, batch_size=5, start=start, stop=stop, device=device, rows=rows)
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


@pytest.mark.parametrize("tokens_ahead", [1, 300, 10**6])
@pytest.mark.parametrize("rows", [3, 17, 1000])
def test_so_many_rows_come_again_in_another_order(task, monkeypatch, tokens_ahead, rows):
    monkeypatch.setattr(data, "TOKENS_AHEAD", tokens_ahead)
    whole = torch.cat([b.tokens for b in batches(task, 0, 40, rows)])
    assert torch.equal(torch.cat([b.tokens for b in batches(task, 11, 40, rows)]), whole[5 * 11 :])
    kept = {tuple(row) for row in task.sample(rows, split="train", seed=3).inputs.tolist()}
    epochs = [[tuple(row) for row in part.tolist()] for part in whole.split(rows)]
    full = [epoch for epoch in epochs if len(epoch) == rows]
    assert all(set(epoch) == kept for epoch in full)
    assert all(set(epoch) <= kept for epoch in epochs)
    assert len(full) < 2 or len({tuple(epoch) for epoch in full}) > 1


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
