"""Symmetries of tasks: problems become problems of the same name, answers their answers, and back."""

from __future__ import annotations

import pytest
import torch

from zoo.tasks import create_task, list_tasks
from zoo.tasks.protocol import IGNORE, Task, registry

CASES = {
    "sudoku": [{"size": 4}, {"size": 6}, {"size": 9}],
    "maze": [{"size": 7}, {"height": 5, "width": 9}],
    "n_queens": [{"size": 8}],
    "graph_coloring": [{"nodes": 8}, {"nodes": 6, "colors": 4, "givens": 0}],
}


@pytest.mark.parametrize(("name", "options"), [(name, each) for name, cases in CASES.items() for each in cases])
def test_a_problem_becomes_an_equal_one(name, options):
    task = create_task(name, **options)
    rows = task.sample(6, split="test", seed=0)
    seen = set()
    for index in range(min(task.n_symmetries, 24)):
        symmetry = task.symmetry(index)
        assert sorted(symmetry.cells.tolist()) == list(range(task.seq_len))
        assert sorted(symmetry.tokens.tolist()) == list(range(task.vocab_size))
        targets = torch.where(rows.scored, rows.targets, 0)
        targets = symmetry.turn(targets).where(rows.scored[:, symmetry.cells], IGNORE)
        turned = rows._replace(inputs=symmetry.turn(rows.inputs), targets=targets)
        assert torch.equal(task.problems(turned), task.problems(rows))
        assert task.is_right(turned, turned.targets).all()
        logits = torch.nn.functional.one_hot(turned.targets.clamp(min=0), task.vocab_size).float()
        assert torch.equal(symmetry.turn_back(logits).argmax(-1)[rows.scored], rows.targets[rows.scored])
        seen.add((tuple(symmetry.cells.tolist()), tuple(symmetry.tokens.tolist())))
        if index == 0:
            assert torch.equal(turned.inputs, rows.inputs)
    assert len(seen) == min(task.n_symmetries, 24)


def test_counts():
    assert create_task("sudoku").n_symmetries == 362_880 * 3_359_232
    assert create_task("sudoku", size=4).n_symmetries == 24 * 128
    assert create_task("maze").n_symmetries == 8
    assert create_task("maze", height=5, width=9).n_symmetries == 4


def test_others_know_only_the_one_that_changes_nothing():
    known = {name for name in list_tasks() if registry[name].symmetry is not Task.symmetry}
    assert set(CASES) <= known
    task = create_task("copy")
    assert task.n_symmetries == 1
    rows = task.sample(2, split="test", seed=0).inputs
    assert torch.equal(task.symmetry(0).turn(rows), rows)
