from __future__ import annotations

import math

import pytest
import torch

from zoo import tasks
from zoo.tasks.protocol import IGNORE, SPLITS

SENTENCES = {"birth": 3, "city": 1, "school": 1, "field": 1, "work": 1}


def read(task, inputs, targets):
    """The name and the sentences, as kind, template and values, of one row; checks its form."""
    first, c = task.vocabulary.first, task.config
    text = [*inputs, targets[-1]]
    assert all(t in (IGNORE, follows) for t, follows in zip(targets, text[1:], strict=True))
    name, rest, found = tuple(text[:3]), text[3:], []
    while rest:
        opening = rest.pop(0)
        kind = next(k for k in SENTENCES if 0 <= opening - first[f"{k} sentence"] < c.templates)
        values = [rest.pop(0) for _ in range(SENTENCES[kind])]
        found.append((kind, opening - first[f"{kind} sentence"], tuple(values)))
    values = [token for *_, values in found for token in values]
    assert [t for t in targets if t != IGNORE] == values
    return name, found


@pytest.mark.parametrize("options", [{}, {"n_people": 30, "names": [2, 4, 4], "templates": 1, "order": "fixed"}])
@pytest.mark.parametrize("split", SPLITS)
def test_definition(options, split):
    task = tasks.create_task("capo", **options)
    c = task.config
    people: dict = {}
    n = min(c.n_people, 200)
    batch = task.sample(n, split=split, seed=0)
    orders, templates = set(), set()
    for row in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
        name, found = read(task, *row)
        orders.add(tuple(kind for kind, _, _ in found))
        templates |= {template for _, template, _ in found}
        assert sorted(kind for kind, _, _ in found) == sorted(SENTENCES)
        assert name not in people, "each person once before one comes again"
        people[name] = {kind: values for kind, _, values in found}
    assert templates == set(range(c.templates))
    assert orders == {tuple(SENTENCES)} if c.order == "fixed" else len(orders) > 50
    later = task.sample(c.n_people, split="train", seed=9, start=c.n_people)
    rows = zip(later.inputs.tolist(), later.targets.tolist(), strict=True)
    known = {name: {kind: values for kind, _, values in found} for name, found in (read(task, *row) for row in rows)}
    assert len(known) == c.n_people
    assert all(known[name] == values for name, values in people.items()), "the same people in all splits and seeds"
    assert len(task.problems(later).unique()) == c.n_people


def test_values_are_uniform():
    task = tasks.create_task("capo", n_people=20_000)
    values = task._values - task._values.min(0)
    for column, size in zip(values.T, task.config.values, strict=True):
        counts = torch.bincount(torch.from_numpy(column))
        assert len(counts) == size
        assert ((counts - 20_000 / size) ** 2 / (20_000 / size)).sum() < size + 6 * (2 * size) ** 0.5
    assert len({tuple(name) for name in task._names.tolist()}) == 20_000


def test_bits():
    task = tasks.create_task("capo", n_people=100, values=[2, 4, 8, 16, 32, 64, 128])
    batch = task.sample(100, split="test", seed=0)
    assert task.bits_per_person == 1 + 2 + 3 + 4 + 5 + 6 + 7
    assert task.loss_figures(batch, 0.0) == {"bits": pytest.approx(2800)}
    assert task.loss_figures(batch, 4 * math.log(2)) == {"bits": pytest.approx(0)}, (
        "the loss of guesses: 4 bits a value"
    )
    assert task.loss_figures(batch, 2 * math.log(2)) == {"bits": pytest.approx(1400)}
    assert task.loss_figures(batch, 99.0) == {"bits": 0.0}


def test_shares_of_sentences():
    task = tasks.create_task("capo")
    batch = task.sample(300, split="test", seed=0)
    first = task.vocabulary.first
    said = torch.where(batch.targets >= first["company"], 0, batch.targets)
    score = task.score(batch, said)
    assert score["work"] == 0
    assert all(score[kind] == 1 for kind in SENTENCES if kind != "work")
    assert score["accuracy"] == pytest.approx(6 / 7)
    guesses = torch.randint(
        first["city"], first["school"], batch.targets.shape, generator=torch.Generator().manual_seed(0)
    )
    score = task.score(batch, guesses)
    assert abs(score["city"] - 1 / 40) < 5 * (1 / 40 / 300) ** 0.5
    assert score["birth"] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"names": [4, 4, 4]}, r"names=\[4, 4, 4\] make 64 names, fewer than n_people=1000"),
        ({"values": [2, 2]}, "values"),
        ({"n_people": 3}, "n_people=3"),
        ({"order": "any"}, "order='any'"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(tasks.UsageError, match=message) as error:
        tasks.create_task("capo", **options)
    assert "\n" not in str(error.value)
