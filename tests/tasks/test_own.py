"""Rows and batches of a user's own: the forms that are read, and the lines that refuse others."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from zoo import tasks
from zoo.core.errors import UsageError
from zoo.tasks import random

SIZES = {"vocab_size": 9, "seq_len": 4, "validation": None, "test": None}
ROW = [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    "row",
    [
        ROW,
        torch.tensor(ROW),
        np.array(ROW, dtype=np.uint8),
        (torch.tensor(ROW),),
        (ROW[:-1], ROW[1:]),
        [torch.tensor(ROW[:-1]), torch.tensor(ROW[1:])],
        {"inputs": ROW[:-1], "targets": ROW[1:]},
        {"input_ids": ROW, "attention_mask": [1] * 5},
    ],
    ids=str,
)
def test_forms_of_a_row(row):
    batch = tasks.from_dataset([row, row], **SIZES).sample(3, split="train", seed=0)
    assert batch.inputs.tolist() == [ROW[:-1]] * 3
    assert batch.targets.tolist() == [ROW[1:]] * 3


@pytest.mark.parametrize(
    "batch",
    [
        [ROW, ROW],
        torch.tensor([ROW, ROW]),
        [torch.tensor([ROW, ROW])],
        next(iter(DataLoader(TensorDataset(torch.tensor([ROW, ROW])), batch_size=2))),
        next(iter(DataLoader([{"inputs": np.array(ROW[:-1]), "targets": np.array(ROW[1:])}] * 2, batch_size=2))),
        next(iter(DataLoader(TensorDataset(torch.tensor([ROW[:-1]] * 2), torch.tensor([ROW[1:]] * 2)), batch_size=2))),
    ],
    ids=["lists", "tensor", "tensor in a list", "TensorDataset", "mappings", "pairs"],
)
def test_forms_of_a_batch(batch):
    task = tasks.from_batches([batch], **{**SIZES, "validation": [batch]})
    for rows in (task.sample(3, split="validation", seed=0), task.open(0).take(3)):
        assert rows.inputs.tolist() == [ROW[:-1]] * 3
        assert rows.targets.tolist() == [ROW[1:]] * 3


def test_short_rows_are_padded_and_the_padding_is_not_scored():
    batch = tasks.from_dataset([[1, 2, 3]], **SIZES).sample(1, split="train", seed=0)
    assert (batch.inputs.tolist(), batch.targets.tolist()) == ([[1, 2, 0, 0]], [[2, 3, -100, -100]])


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ([1, 2, 3, 4, 5, 6], r"has 6 tokens: seq_len=4 takes 2 to 5 \(one more, to predict\)"),
        ([1], r"has 1 tokens: seq_len=4 takes 2 to 5"),
        ([1, 9], r"has the target 9: tokens are from 0 to vocab_size-1=8"),
        ([-1, 1], "has the input -1"),
        (([-100, 1], [1, 1]), "has the input -100"),
        (([1, 1], [1, -1]), "has the target -1"),
        ([0.5, 1.0], "has float64 values: tokens are whole numbers"),
        (torch.tensor([True, False]), "has bool values"),
        ([[1, 2], [3, 4]], r"has the shape \(2, 2\): expected \(tokens,\)"),
        (([1, 2], [1]), r"has \(1, 2\) inputs and \(1, 1\) targets: every input needs a target"),
        ({"input_ids": ROW, "labels": ROW}, r"has the keys \['input_ids', 'labels'\]: expected inputs and targets"),
        ("a text", "is 'a text': expected tokens"),
        ([[1, 2], [3]], r"is \[\[1, 2\], \[3\]\]: expected tokens"),
    ],
)
def test_a_row_of_another_form_is_refused_by_its_number(row, told):
    with pytest.raises(UsageError, match=rf"^Row 0 of train {told}[^\n]*$"):
        tasks.from_dataset([row], **SIZES)
    good = tasks.from_batches([[ROW]], **SIZES).open(0)
    assert good.take(1)
    with pytest.raises(UsageError, match=r"^Training row 1 "):
        tasks.from_dataset(iter([ROW, row]), **SIZES).open(0).take(2)


@pytest.mark.parametrize(
    ("make", "changes", "told"),
    [
        (tasks.from_dataset, {"dataset": None}, "There are no training rows: the data are None"),
        (tasks.from_dataset, {"dataset": []}, "The train data have no row"),
        (tasks.from_dataset, {"dataset": 3}, "The train data are 3: expected a Dataset, a list or another iterable"),
        (tasks.from_dataset, {"validation": []}, "The validation data have no row; None declares that there are none"),
        (tasks.from_batches, {"validation": []}, "The validation data have no row"),
        (tasks.from_batches, {"validation": iter([])}, "The validation data are an iterator, which ends when"),
        (tasks.from_dataset, {"layout": "series"}, "layout='series' is not allowed: own data are"),
        (tasks.from_dataset, {"vocab_size": 0}, "own data: vocab_size=0 is not allowed"),
        (tasks.from_dataset, {"layout": "fill_in", "dataset": [([1, 2], [1, 2])]}, "has 2 tokens, not seq_len=4"),
    ],
)
def test_data_that_are_none_are_refused(make, changes, told):
    options = {"dataset" if make is tasks.from_dataset else "batches": [ROW], **SIZES, **changes}
    with pytest.raises(UsageError, match=f"{told}[^\n]*$"):
        make(**options)


def test_splits_that_are_absent_have_no_rows():
    task = tasks.from_dataset([ROW], **SIZES)
    assert task.absent == ("validation", "test")
    with pytest.raises(UsageError, match=r"^own_dataset has no validation rows: they were declared absent\.$"):
        task.sample(1, split="validation", seed=0)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 64, 1000])
def test_a_shuffle_without_memory_is_a_permutation(n):
    keys = random.row_keys("train", 0, 0, 3)
    orders = [random.shuffled(np.repeat(key, n), np.arange(n), n).tolist() for key in keys]
    assert all(sorted(order) == list(range(n)) for order in orders)
    assert n < 64 or len({tuple(order) for order in orders}) == 3
    if n == 1000:  # places that were next to each other are not any more, and every place is as likely
        gaps = np.abs(np.diff(orders[0]))
        assert abs(gaps.mean() - n / 3) < 30
    huge = random.shuffled(np.repeat(keys[:1], 100), np.arange(100), 10**12)
    assert len(set(huge.tolist())) == 100
    assert 0 <= huge.min() < huge.max() < 10**12
