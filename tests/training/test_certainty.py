"""What an exact share rests on: rows, the problems among them, and the interval over these."""

from __future__ import annotations

import json

import pytest
import torch

import zoo
from zoo import tasks
from zoo.objectives import create_objective
from zoo.statistics import clustered_interval
from zoo.training.evaluation import certainty, evaluate, evaluate_run, held_out, score_lines

KEYS = ("n_rows", "n_problems", "exact_low", "exact_high")
TASK = {"name": "sudoku", "size": 4, "max_givens": 5}


def test_rows_of_one_puzzle_are_one_problem():
    task = tasks.create_task(TASK)
    rows = held_out(task, "test", 2000)
    easy = task.problems(rows) % 3 > 0  # a model that solves some puzzles always, the others never
    said = torch.where(easy[:, None], rows.targets, 0)
    found = certainty(task, rows, said)
    assert (found["n_rows"], found["n_problems"]) == (2000, 15)
    expected = clustered_interval(easy.double().numpy(), task.problems(rows).numpy())
    assert (found["exact_low"], found["exact_high"]) == expected
    p = easy.double().mean().item()
    assert found["exact_low"] < p < found["exact_high"]
    assert found["exact_high"] - found["exact_low"] > 5 * 3.92 * (p * (1 - p) / 2000) ** 0.5


def test_one_problem_has_no_interval():
    task = tasks.create_task(TASK)
    row = held_out(task, "test", 1)
    found = certainty(task, row, row.targets)
    assert found == {"n_rows": 1, "n_problems": 1, "exact_low": None, "exact_high": None}
    score = {"exact": 1.0, **found, "slices": {}}
    assert score_lines(score) == ["exact: 1.0000", "n_rows: 1", "n_problems: 1"]


@pytest.mark.parametrize("name", ["mqar", "text", "sudoku"])
def test_every_evaluation_says_it(name):
    task = tasks.create_task(name)
    objective = create_objective("next_token", task, causal=True)
    model = zoo.create_model("gqa", d_model=16, vocab_size=objective.vocab_size)
    score = evaluate(model, objective, held_out(task, "validation", 6), batch_size=4)
    assert [score[k] for k in KEYS[:2]] == [6, 6]
    assert 0 <= score["exact_low"] <= score["exact"] <= score["exact_high"] <= 1


def test_runs_keep_it(tmp_path):
    made = {"task": TASK, "model": {"pattern": "gqa", "d_model": 16, "causal": False}, "out": str(tmp_path / "run")}
    short = {"steps": 2, "eval_rows": 40, "test_rows": 50, "batch_size": 4, "threads": 1}
    result = zoo.train({**made, "train": short}, quiet=True)
    written = json.loads((result.path / "result.json").read_text())
    for split, rows in (("validation", 40), ("test", 50)):
        score = evaluate_run(result.path, split=split)
        assert score["n_rows"] == rows > score["n_problems"]
        assert {k: written[split][k] for k in KEYS} == {k: score[k] for k in KEYS}
    lines = [json.loads(line) for line in (result.path / "metrics.jsonl").read_text().splitlines()]
    assert all(set(KEYS) <= line.keys() for line in lines if line["split"] != "train")
