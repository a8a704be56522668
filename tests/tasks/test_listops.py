from __future__ import annotations

import statistics

import numpy as np
import pytest
import torch

from zoo import tasks
from zoo.tasks.protocol import IGNORE, SPLITS

OPERATIONS = {
    1: min,
    2: max,
    3: lambda values: int(statistics.median(values)),
    4: lambda values: sum(values) % 10,
}

CASES = [
    {},
    {"seq_len": 12},
    {"seq_len": 300, "min_length": 200, "max_depth": 4, "max_args": 20},
    {"seq_len": 40, "max_args": 2, "operators": 0.45},
    {"seq_len": 14, "max_depth": 2, "operators": 0.0},
]


def tree(tokens):
    """Value and depth of a tree, read from the front of a list that is used up; checks its form."""
    token = tokens.pop(0)
    if token >= 6:
        return token - 6, 0, 0
    values, depths, sizes = [], [], []
    while tokens[0] != 5:
        value, depth, size = tree(tokens)
        values.append(value)
        depths.append(depth)
        sizes.append(size)
    tokens.pop(0)
    return OPERATIONS[token](values), 1 + max(depths), max(len(values), *sizes)


@pytest.mark.parametrize("options", CASES)
@pytest.mark.parametrize("split", SPLITS)
def test_definition(options, split):
    task = tasks.create_task("listops", **options)
    c = task.config
    batch = task.sample(100, split=split, seed=0)
    lengths, seen = [], set()
    for row, (inputs, targets) in enumerate(zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True)):
        tokens = [token for token in inputs if token]
        lengths.append(len(tokens))
        assert not any(inputs[len(tokens) :]), "padding is on the right"
        assert {i for i, t in enumerate(targets) if t != IGNORE} == {len(tokens) - 1}
        seen |= set(tokens)
        value, depth, most = tree(tokens)
        assert not tokens, "one tree"
        assert targets[lengths[-1] - 1] == 6 + value
        assert depth == batch.slices["nesting"][row] < c.max_depth
        assert most <= c.max_args
    assert (c.min_length or max(4, c.seq_len // 4)) <= min(lengths)
    assert max(lengths) <= c.seq_len
    assert seen == set(range(1, 16))


def test_shares_of_operations_and_digits():
    """Of all arguments of the root, whose trees are short beside the bounds."""
    task = tasks.create_task("listops", seq_len=40, min_length=4, max_depth=3, max_args=5)
    inputs = task.sample(3000, split="train", seed=0).inputs.numpy()
    opened = (inputs > 0) & (inputs < 5)
    depth = np.cumsum(opened, axis=1) - np.cumsum(inputs == 5, axis=1)
    operations = (opened & (depth == 2)).sum()
    digits = ((inputs > 5) & (depth == 1)).sum()
    total = operations + digits
    assert abs(operations / total - 0.25) < 5 * (0.25 * 0.75 / total) ** 0.5
    kinds = np.bincount(inputs[opened])[1:]
    assert abs(kinds / kinds.sum() - 0.25).max() < 5 * (0.25 * 0.75 / kinds.sum()) ** 0.5
    arguments = (opened & (depth == 2)).sum(1) + ((inputs > 5) & (depth == 1)).sum(1)
    counts = np.bincount(arguments)[2:]
    assert len(counts) == 4
    assert abs(counts / 3000 - 0.25).max() < 5 * (0.25 * 0.75 / 3000) ** 0.5


def test_uniform_guesses_are_right_one_in_ten():
    task = tasks.create_task("listops")
    batch = task.sample(2000, split="validation", seed=0)
    guesses = torch.randint(6, 16, batch.targets.shape, generator=torch.Generator().manual_seed(0))
    assert abs(task.score(batch, guesses)["accuracy"] - 0.1) < 5 * (0.09 / 2000) ** 0.5


def test_rows_of_long_range_arena():
    task = tasks.create_task("listops", seq_len=1999, min_length=501)
    lengths = (task.sample(100, split="train", seed=0).inputs > 0).sum(1)
    assert lengths.min() > 500
    assert lengths.max() < 2000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_length": 200}, "min_length=200 is more than seq_len=128"),
        ({"min_length": 100, "max_depth": 2}, "min_length=100 is out of reach.*at most 12 tokens"),
        ({"min_length": 100, "operators": 0.0}, "min_length=100 is out of reach"),
        ({"seq_len": 3}, "seq_len=3"),
        ({"operators": 1.0}, "operators=1.0"),
        ({"max_args": 1}, "max_args=1"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(tasks.UsageError, match=message) as error:
        tasks.create_task("listops", **options)
    assert "\n" not in str(error.value)


def test_trees_too_rare_to_be_found():
    task = tasks.create_task("listops", seq_len=20_000, min_length=19_000, max_depth=4)
    with pytest.raises(tasks.UsageError, match="hardly any tree has 19000 to 20000 tokens"):
        task.sample(1, split="train", seed=0)
