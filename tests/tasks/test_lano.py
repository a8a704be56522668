from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from zoo import tasks
from zoo.tasks import random
from zoo.tasks.protocol import IGNORE, SPLITS, Batch

CASES = [{}, {"depth": 3}, {"depth": 3, "symbols": 2, "min_rules": 2, "max_rules": 4, "grammar_seed": 5}]


def lano(**options):
    return tasks.create_task("lano", **options)


def rules_of(task, level, symbol):
    rules = task.rules[level, symbol, : task.counts[level, symbol]].tolist()
    return [tuple(each for each in rule if each >= 0) for rule in rules]


def distribution(task, level=0, symbol=0):
    """The probability of each string that a symbol may become, by following every rule."""
    if level == len(task.rules):
        return {(1 + symbol,): 1.0}
    found = {}
    rules = rules_of(task, level, symbol)
    for rule in rules:
        parts = [distribution(task, level + 1, each).items() for each in rule]
        for choice in itertools.product(*parts):
            string = sum((text for text, _ in choice), ())
            found[string] = found.get(string, 0.0) + math.prod(p for _, p in choice) / len(rules)
    return found


@pytest.fixture(scope="module")
def small():
    """A grammar whose strings can all be written down."""
    task = lano(depth=3, symbols=2, min_rules=2, max_rules=2, grammar_seed=1)
    return task, distribution(task)


@pytest.mark.parametrize("options", CASES)
def test_grammars(options):
    task = lano(**options)
    c = task.config
    for level in range(c.depth):
        rules = [rule for symbol in range(c.symbols) for rule in rules_of(task, level, symbol)]
        assert len(set(rules)) == len(rules)
        assert all(len(rule) in (2, 3) and set(rule) <= set(range(c.symbols)) for rule in rules)
        assert (task.rules >= 0).sum((2, 3)).min() > 0
    assert task.counts.min() >= c.min_rules
    assert task.counts.max() <= c.max_rules
    assert (lano(**options).rules == task.rules).all()
    other = lano(**{**options, "grammar_seed": 77})
    assert other.rules.shape != task.rules.shape or (other.rules != task.rules).any()


@pytest.mark.parametrize("options", CASES)
@pytest.mark.parametrize("split", SPLITS)
def test_rows(options, split):
    task = lano(**options)
    batch = task.sample(50, split=split, seed=0)
    texts = []
    for inputs, targets in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
        size = sum(t != IGNORE for t in targets)
        assert inputs[0] == task.end == targets[size - 1]
        assert inputs[1:size] == targets[: size - 1]
        assert not any(inputs[size:])
        texts.append(inputs[1:size])
        assert 2**task.config.depth <= len(texts[-1]) <= 3**task.config.depth
    assert all(task.accepts(texts))


def test_probabilities_are_those_of_all_derivations(small):
    task, strings = small
    assert sum(strings.values()) == pytest.approx(1)
    texts = sorted(strings)[:: max(len(strings) // 200, 1)]
    inputs = torch.zeros(len(texts), task.seq_len, dtype=torch.int64)
    for row, text in zip(inputs, texts, strict=True):
        row[1 : 1 + len(text)] = torch.tensor(text)
    logs, _ = task._parsed(Batch(inputs, inputs))
    assert np.abs(np.exp(logs) / [strings[text] for text in texts] - 1).max() < 1e-9


def test_strings_come_as_often_as_the_grammar_says(small):
    task, strings = small
    n = 20_000
    drawn = task._strings(random.row_keys("train", 0, 0, n))
    counts: dict = {}
    for row in drawn.tolist():
        text = tuple(token for token in row if token)
        counts[text] = counts.get(text, 0) + 1
    assert set(counts) <= set(strings)
    for text, share in sorted(strings.items(), key=lambda pair: -pair[1])[:20]:
        assert abs(counts[text] / n - share) < 5 * (share / n) ** 0.5


def test_what_may_come_next_is_what_comes_in_some_string(small):
    task, strings = small
    after: dict = {}
    for text in strings:
        for at in range(len(text) + 1):
            after.setdefault(text[:at], set()).add(text[at] if at < len(text) else task.end)
    batch = task.sample(100, split="test", seed=0)
    _, may = task._parsed(batch)
    for row, inputs in enumerate(batch.inputs.tolist()):
        size = int(batch.scored[row].sum())
        for at in range(size):
            assert {1 + s for s in np.flatnonzero(may[row, at])} == after[tuple(inputs[1 : 1 + at])]


def test_strings_that_are_not_the_grammars(small):
    task, strings = small
    longest = max(map(len, strings))
    texts = [text for size in range(8, 12) for text in itertools.product((1, 2), repeat=size)]
    assert task.accepts(texts) == [text in strings for text in texts]
    assert task.accepts([[], [1], [3] * 9, [0] * 9, [1] * (longest + 40)])[:4] == [False] * 4
    assert task.accepts([]) == []


def test_figures_of_the_loss():
    task = lano(depth=3)
    batch = task.sample(200, split="test", seed=0)
    figures = task.loss_figures(batch, 1.5)
    logs, _ = task._parsed(batch)
    assert figures["floor"] == pytest.approx(-logs.sum() / int(batch.scored.sum()))
    assert figures["excess"] == pytest.approx(1.5 - figures["floor"])
    assert 0 < figures["floor"] < math.log(3)


def test_random_letters_are_often_possible():
    task = lano()
    batch = task.sample(200, split="test", seed=0)
    guesses = torch.randint(1, 4, batch.targets.shape, generator=torch.Generator().manual_seed(0))
    score = task.score(batch, guesses)
    assert 0.8 < score["possible"] < 0.93
    assert score["accuracy"] < 0.4
    assert task.score(batch, torch.full_like(batch.targets, 77))["possible"] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 2}, "depth=2"),
        ({"min_rules": 5}, "min_rules=5 is more than max_rules=4"),
        ({"symbols": 2, "max_rules": 7}, "may need 14 rules a level, and there are 12"),
        ({"min_rules": 1, "max_rules": 1}, "gives only 1 different rows"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(tasks.UsageError, match=message) as error:
        lano(**options)
    assert "\n" not in str(error.value)
