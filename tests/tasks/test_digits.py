"""Digits: scikit-learn's pictures, each in one split, read in the order that is named."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from zoo import tasks
from zoo.tasks.protocol import IGNORE, SPLITS

SIZES = {"train": 1356, "validation": 237, "test": 204}


def pictures(order, split, n, **options):
    return tasks.create_task("digits", order=order, **options).sample(n, split=split, seed=0)


def test_every_picture_is_in_one_split():
    """The three splits together are the file, with its labels."""
    pixels, digits = load_digits(return_X_y=True)
    expected = sorted((*row.astype(int), digit) for row, digit in zip(pixels, digits, strict=True))
    found = []
    for split in SPLITS:
        batch = pictures("pixels", split, SIZES[split])
        rows = (batch.inputs[..., 0] * 16).round().int().tolist()
        found += [(*row, digit) for row, digit in zip(rows, batch.targets[:, -1].tolist(), strict=True)]
    assert sorted(found) == expected
    seen = [set(map(tuple, pictures("rows", s, SIZES[s]).inputs.flatten(1).tolist())) for s in SPLITS]
    assert len(set.union(*seen)) == sum(map(len, seen))


def test_a_split_shows_all_its_pictures_before_one_comes_again():
    n = SIZES["test"]
    task = tasks.create_task("digits")
    names = task.problems(task.sample(2 * n, split="test", seed=0))
    assert len(names[:n].unique()) == len(names[n:].unique()) == n
    assert not torch.equal(names[:n], names[n:])


def test_orders_show_the_same_pictures():
    flat, rows, mixed = (pictures(order, "train", 20) for order in ("pixels", "rows", "permuted"))
    assert flat.inputs.shape == (20, 64, 1)
    assert rows.inputs.shape == (20, 8, 8)
    assert torch.equal(flat.inputs.flatten(1), rows.inputs.flatten(1))
    assert not torch.equal(flat.inputs, mixed.inputs)
    task = tasks.create_task("digits", order="permuted")
    assert torch.equal(flat.inputs[:, torch.from_numpy(task.places)], mixed.inputs)
    other = pictures("permuted", "train", 20, order_seed=1)
    assert not torch.equal(mixed.inputs, other.inputs)
    for batch in (flat, rows, mixed):
        assert torch.equal(batch.targets[:, -1], flat.targets[:, -1])
        assert (batch.targets[:, :-1] == IGNORE).all()
    np.testing.assert_allclose(task._picture(mixed, 3), rows.inputs[3])


def test_what_is_missing_or_ignored_is_named(monkeypatch):
    with pytest.raises(tasks.UsageError, match='order_seed=3 belongs to order="permuted"'):
        tasks.create_task("digits", order_seed=3)
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "sklearn" else found(name))
    with pytest.raises(tasks.UsageError, match=r'pip install "sequence-zoo\[digits\]"'):
        tasks.create_task("digits")
