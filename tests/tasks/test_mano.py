from __future__ import annotations

import numpy as np
import pytest
import torch

from zoo import tasks
from zoo.tasks.protocol import IGNORE, SPLITS, Batch

CASES = [
    {},
    {"max_operators": 10},
    {"max_operators": 3, "modulus": 7, "operators": "/-"},
    {"max_operators": 1, "modulus": 40, "operators": "*"},
]


def value(tokens, number, modulus):
    """Value and depth of a prefix expression, read from the front of a list that is used up."""
    token = tokens.pop(0)
    if token >= number:
        return token - number, 0
    (a, left), (b, right) = (value(tokens, number, modulus) for _ in range(2))
    if token == 4:
        assert b, "nothing is divided by 0"
        found = next(x for x in range(modulus) if x * b % modulus == a)
    else:
        found = {1: a + b, 2: a - b, 3: a * b}[token] % modulus
    return found, 1 + max(left, right)


@pytest.mark.parametrize("options", CASES)
@pytest.mark.parametrize("split", SPLITS)
def test_definition(options, split):
    task = tasks.create_task("mano", **options)
    c = task.config
    number = 6 + c.max_operators
    batch = task.sample(100, split=split, seed=0)
    counts = set()
    for row, (inputs, targets) in enumerate(zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True)):
        count = inputs[0] - 5
        counts.add(count)
        assert inputs[2 * count + 2] == 5
        assert not any(inputs[2 * count + 3 :])
        assert {i for i, t in enumerate(targets) if t != IGNORE} == {2 * count + 2}
        tokens = inputs[1 : 2 * count + 2]
        signs = [token for token in tokens if token < number]
        assert len(signs) == count == batch.slices["operators"][row]
        assert {"+-*/"[sign - 1] for sign in signs} <= set(c.operators)
        found, depth = value(tokens, number, c.modulus)
        assert not tokens, "one expression"
        assert targets[2 * count + 2] == number + found
        assert depth == batch.slices["depth"][row]
    assert counts == (set(range(1, c.max_operators + 1)) if split == "train" else {c.max_operators})


@pytest.mark.parametrize("options", [{"max_operators": 3, "modulus": 5}, {"modulus": 7, "operators": "+-*/"}])
def test_chance_is_the_share_of_the_most_frequent_value(options):
    task = tasks.create_task("mano", **options)
    batch = task.sample(6000, split="test", seed=0)
    counts = torch.bincount(batch.targets[batch.scored] - 6 - task.config.max_operators)
    share = task._shares()
    assert share.sum() == pytest.approx(1)
    spread = 6 * np.sqrt(share.max() / 600)  # of the draws, and of the expressions of a split, which repeat
    assert np.abs(counts.numpy() / 6000 - share).max() < spread
    best = torch.full_like(batch.targets, 6 + task.config.max_operators + int(share.argmax()))
    assert abs(task.score(batch, best)["scaled"]) < 2 * spread


def test_sides_of_the_first_operator_are_uniform():
    task = tasks.create_task("mano", max_operators=3)
    inputs = task.sample(3000, split="test", seed=0).inputs[:, 2:].tolist()
    sizes = []
    for tokens in inputs:
        due = 1
        for at, token in enumerate(tokens):
            due += 1 if token < 9 else -1
            if not due:
                sizes.append(at // 2)
                break
    counts = np.bincount(sizes)
    assert len(counts) == 3
    assert np.abs(counts / 3000 - 1 / 3).max() < 5 * (2 / 9 / 3000) ** 0.5


def test_sums_and_products_may_be_turned_round():
    task = tasks.create_task("mano", max_operators=2, modulus=9)
    two, a, b, c = 7, 8, 10, 12

    def names(*expressions):
        rows = torch.tensor([[two, *expression, 5] for expression in expressions])
        return len(task.problems(Batch(rows, rows)).unique())

    assert names([1, 3, a, b, c], [1, c, 3, b, a], [1, 3, b, a, c]) == 1
    assert names([2, a, 3, b, c], [2, 3, b, c, a]) == 2
    assert names([1, 2, a, b, c], [1, 2, b, a, c], [1, c, 2, a, b]) == 2
    assert names([1, a, 1, b, c], [1, 1, a, b, c]) == 2, "brackets are not moved"
    assert names([1, a, 3, b, c], [3, a, 1, b, c]) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"operators": "+%"}, "operators='\\+%' is not allowed"),
        ({"operators": "++"}, "operators='\\+\\+' is not allowed"),
        ({"operators": ""}, "operators='' is not allowed"),
        ({"modulus": 6, "operators": "/"}, "modulus=6 with operators='/' should be a prime number"),
        ({"modulus": 3, "max_operators": 1}, "gives only"),
        ({"max_operators": 0}, "max_operators=0"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(tasks.UsageError, match=message) as error:
        tasks.create_task("mano", **options)
    assert "\n" not in str(error.value)
