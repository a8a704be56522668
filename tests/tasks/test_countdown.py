from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch

from zoo import tasks
from zoo.tasks.countdown import BLANK, MINUS, NUMBER, OVER, PLUS, SIGNS, TIMES, evaluated
from zoo.tasks.protocol import IGNORE, SPLITS, take


def countdown(**options):
    return tasks.create_task("countdown", **options)


def by_hand(expression) -> int:
    """The value of an expression in postfix form, 0 where it is none."""
    stack: list[Fraction] = []
    for token in expression:
        if token >= NUMBER:
            stack.append(Fraction(token - NUMBER + 1))
            continue
        if token not in SIGNS or len(stack) < 2:
            return 0
        b, a = stack.pop(), stack.pop()
        value = {PLUS: a + b, MINUS: a - b, TIMES: a * b, OVER: a / b}[token]
        if value <= 0 or value.denominator != 1:
            return 0
        stack.append(value)
    return int(stack[0]) if len(stack) == 1 else 0


def parts(task, inputs):
    """Numbers and target of a row."""
    return [t - NUMBER + 1 for t in inputs[: task.most] if t], inputs[task.most] - NUMBER + 1


@pytest.mark.parametrize(
    "options", [{}, {"min_numbers": 2, "max_numbers": 6, "largest": 40}, {"largest": 100, "max_target": 20}]
)
@pytest.mark.parametrize("split", SPLITS)
def test_rows(options, split):
    task = countdown(**options)
    c = task.config
    batch = task.sample(100, split=split, seed=0)
    sizes, signs = [], set()
    rows = zip(batch.inputs.tolist(), batch.targets.tolist(), *(v.tolist() for v in batch.slices.values()), strict=True)
    for inputs, targets, count, products in rows:
        numbers, target = parts(task, inputs)
        expression = [t for t in targets if t != IGNORE]
        assert len(expression) == 2 * len(numbers) - 1
        assert targets[task.most + 1 :][: len(expression)] == expression
        assert [t for t in inputs[task.most + 1 :] if t] == [BLANK] * len(expression)
        assert sorted(t - NUMBER + 1 for t in expression if t >= NUMBER) == sorted(numbers)
        assert by_hand(expression) == target
        assert 1 <= target <= c.max_target
        assert 1 <= min(numbers) <= max(numbers) <= c.largest
        assert count == len(numbers)
        assert products == sum(t in (TIMES, OVER) for t in expression)
        sizes.append(count)
        signs |= set(expression) & set(SIGNS)
    assert signs == set(SIGNS)
    counts = np.bincount(sizes)[c.min_numbers :]
    assert len(counts) == c.max_numbers - c.min_numbers + 1
    assert counts.min() > 50 / len(counts), "uniform"


def test_values_against_fractions():
    rng = np.random.default_rng(0)
    shapes = [rng.integers(0, NUMBER + 12, (4000, 7)), rng.integers(PLUS, NUMBER + 8, (4000, 7))]
    for expressions in shapes:
        expressions[:, :2] = rng.integers(NUMBER, NUMBER + 12, (4000, 2))
        expressions[:, 2] = rng.choice([*SIGNS, NUMBER, NUMBER + 5], 4000)
        ends = rng.integers(3, 8, 4000)
        expressions[np.arange(7) >= ends[:, None]] = 0
        expected = [by_hand(np.trim_zeros(row, "b").tolist()) for row in expressions]
        assert evaluated(expressions).tolist() == expected
        assert np.count_nonzero(expected) > 100
    assert evaluated(np.array([[NUMBER + 4, 0, NUMBER, PLUS], [0, 0, 0, 0], [NUMBER + 4, 0, 0, 0]])).tolist() == [
        0,
        0,
        5,
    ]


def test_every_expression_with_the_value_is_right():
    task = countdown(min_numbers=3, max_numbers=3, largest=9, max_target=20)
    batch = task.sample(25, split="validation", seed=0)
    several = 0
    for i, inputs in enumerate(batch.inputs.tolist()):
        numbers, target = parts(task, inputs)
        tokens = [v + NUMBER - 1 for v in numbers]
        every = [
            [a, b, s, c, t] if flat else [a, b, c, s, t]
            for a, b, c in itertools.permutations(tokens)
            for s, t in itertools.product(SIGNS, repeat=2)
            for flat in (True, False)
        ]
        said = take(batch, torch.full((len(every),), i)).targets.clone()
        said[:, task.most + 1 :] = torch.tensor(every)
        one = take(batch, torch.full((len(every),), i))
        expected = [by_hand(e) == target for e in every]
        assert task.is_right(one, said).tolist() == expected
        assert task.right_cells(one, said)[torch.tensor(expected)].all()
        several += len({tuple(e) for e, right in zip(every, expected, strict=True) if right}) > 1
    assert several > 15


def test_each_number_is_used_once():
    task = countdown(min_numbers=3, max_numbers=3)
    row = [NUMBER + 1, NUMBER + 1, NUMBER + 3, NUMBER + 7, 1, 1, 1, 1, 1]  # 2, 2, 4 for 8
    two, four = NUMBER + 1, NUMBER + 3
    answers = {
        (two, two, PLUS, four, PLUS): True,
        (two, four, two, PLUS, PLUS): True,
        (four, four, PLUS, two, PLUS): False,
        (two, four, TIMES, 0, 0): False,
        (two, two, TIMES, four, PLUS): True,
        (two, two, OVER, four, TIMES): False,
        (two, two, four, PLUS, PLUS + 99): False,
    }
    inputs = torch.tensor([row] * len(answers))
    said = torch.tensor([[*row[:4], *answer] for answer in answers])
    targets = torch.where(inputs == BLANK, said[0], IGNORE)
    assert task.is_right(tasks.Batch(inputs, targets), said).tolist() == list(answers.values())


def test_numbers_in_any_order_are_one_problem():
    task = countdown(min_numbers=4)
    batch = task.sample(100, split="train", seed=0)
    turned = batch.inputs.clone()
    turned[:, :4] = batch.inputs[:, [2, 0, 3, 1]]
    assert torch.equal(task.problems(batch), task.problems(batch._replace(inputs=turned)))
    turned[:, 4] = NUMBER + (turned[:, 4] - NUMBER + 1) % 100
    assert not (task.problems(batch) == task.problems(batch._replace(inputs=turned))).any()


def test_chance_is_next_to_nothing():
    task = countdown(min_numbers=4)
    batch = task.sample(2000, split="test", seed=0)
    rng = np.random.default_rng(0)
    order = torch.from_numpy(rng.random((2000, 4)).argsort(1))
    numbers = batch.inputs[:, :4].gather(1, order)
    signs = torch.from_numpy(rng.integers(PLUS, NUMBER, (2000, 3)))
    said = torch.cat(
        [
            batch.inputs[:, :5],
            numbers[:, :2],
            signs[:, :1],
            numbers[:, 2:3],
            signs[:, 1:2],
            numbers[:, 3:],
            signs[:, 2:],
        ],
        1,
    )
    assert task.score(batch, said)["exact"] < 0.03, "numbers and operators at random places of one shape"


def test_pictures():
    task = countdown(min_numbers=3, max_numbers=3)
    row = torch.tensor([[NUMBER + 1, NUMBER + 1, NUMBER + 3, NUMBER + 7, 1, 1, 1, 1, 1]])
    answer = torch.tensor([[IGNORE] * 4 + [NUMBER + 1, NUMBER + 1, PLUS, NUMBER + 3, PLUS]])
    batch = tasks.Batch(row, answer)
    assert "2 2 + 4 +   (2 + 2) + 4 = 8" in task.render(batch)
    assert "(2 + 2) + 4 = 8: right" in task.render(batch, 0, answer)
    other = torch.tensor([[0] * 4 + [NUMBER + 1, PLUS, NUMBER + 1, NUMBER + 3, PLUS]])
    assert "2 + 2 4 +: wrong" in task.render(batch, 0, other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_numbers": 5}, "min_numbers=5 is more than max_numbers=4"),
        ({"min_numbers": 2, "largest": 8}, "gives only 32 different rows"),
        ({"max_numbers": 7}, "max_numbers"),
        ({"numbers": 4}, "numbers"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(tasks.UsageError, match=message) as error:
        countdown(**options)
    assert "\n" not in str(error.value)
