"""Answers in the making, of every task: what is known, hidden, right and wrong is told apart, and hidden is hidden."""

from __future__ import annotations

import pytest
import torch
from rich.cells import cell_len

from zoo import tasks
from zoo.tasks.maze.grids import GOAL, OPEN, PATH, START
from zoo.tasks.protocol import IGNORE

OF_TOKENS = [name for name in tasks.list_tasks() if tasks.protocol.registry[name].layout != "series"]
"""The rows of the others are drawn as plots."""


@pytest.fixture(params=OF_TOKENS)
def task(request):
    return tasks.create_task(request.param)


@pytest.fixture
def rows(task):
    return task.sample(3, split="validation", seed=0)


def answers(rows):
    """Right ones, and which cells are hidden: none."""
    return torch.where(rows.targets == IGNORE, rows.inputs, rows.targets), torch.zeros_like(rows.targets) > 0


def test_the_question(task, rows):
    """It is drawn, and nothing of it is an answer."""
    kinds = {cell.kind for cell in task.question(rows, 1).cells}
    assert kinds
    assert kinds <= {"given", "hidden", "outside"}


def test_right_answers(task, rows):
    sketch = task.sketch(rows, 1, *answers(rows))
    assert sketch.cells
    assert {cell.kind for cell in sketch.cells} <= {"given", "right", "outside"}
    assert len({cell_len(cell.ink) for cell in sketch.cells}) == 1, "inks stand below each other"
    assert sketch.height * sketch.width >= len(sketch.cells) > (sketch.height - 1) * sketch.width


def test_wrong_answers(task, rows):
    tokens, none = answers(rows)
    asked = task.asked(rows)[1]
    first = int(asked.nonzero()[0])
    tokens[1, first] = (tokens[1, first] + 1) % task.vocab_size
    wrong = task.sketch(rows, 1, tokens, none).count("wrong")
    assert wrong == 1 or (task.many_answers and wrong > 1), "where cells are judged by each other, one spoils several"
    assert task.sketch(rows, 0, tokens, none).count("wrong") == 0


def test_hidden_cells_tell_nothing(task, rows):
    tokens, _ = answers(rows)
    hidden = task.asked(rows)
    sketch = task.sketch(rows, 1, tokens, hidden)
    assert sketch.count("hidden") == hidden[1].sum() > 0
    assert sketch.count("right") == sketch.count("wrong") == 0
    assert task.sketch(rows, 1, torch.where(hidden, 0, tokens), hidden) == sketch


def test_another_shortest_path_is_not_wrong():
    """From one corner to the other there are two ways around the edge."""
    maze = tasks.create_task("maze", size=3, kind="random_walls", min_length=4)
    question = torch.tensor([[START, OPEN, OPEN, OPEN, OPEN, OPEN, OPEN, OPEN, GOAL]])
    above, below = question.clone(), question.clone()
    above[0, [1, 2, 5]] = PATH
    below[0, [3, 6, 7]] = PATH
    rows, none = tasks.Batch(question, above), torch.zeros_like(question) > 0
    assert maze.sketch(rows, 0, below, none).count("wrong") == 0
    longer = below.clone()
    longer[0, 4] = PATH
    assert maze.sketch(rows, 0, longer, none).count("wrong") == 7
    unfinished = none.clone()
    unfinished[0, 7] = True
    assert maze.sketch(rows, 0, below, unfinished).count("wrong") == 5
