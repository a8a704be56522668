from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from zoo import tasks
from zoo.tasks.protocol import IGNORE, SPLITS

CASES = [{}, {"vocab_size": 8, "length": 12}, {"length": 64, "validation_length": 20, "test_length": 300}]


def induction(row):
    """What followed the first token that equals the last."""
    return row[row.index(row[-1]) + 1]


@pytest.mark.parametrize("options", CASES)
@pytest.mark.parametrize("split", SPLITS)
def test_program_that_reads_the_row_scores_100(options, split):
    task = tasks.create_task("induction", **options)
    batch = task.sample(40, split=split, seed=0)
    for row, targets in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
        assert [i for i, token in enumerate(row) if token == task.special][1:] == [len(row) - 1]
        assert targets[:-1] == [IGNORE] * (len(row) - 1)
        assert targets[-1] == induction(row)


def test_guessing_scores_one_in_the_number_of_tokens():
    task = tasks.create_task("induction")
    batch = task.sample(3000, split="test", seed=0)
    guesses = torch.randint(15, batch.targets.shape, generator=torch.Generator().manual_seed(0))
    spread = math.sqrt(1 / 15 * 14 / 15 / 3000)
    assert abs(task.score(batch, guesses)["accuracy"] - 1 / 15) < 4 * spread


def test_place_and_tokens_are_drawn_alike():
    task = tasks.create_task("induction", vocab_size=9, length=22)
    inputs = task.sample(4000, split="train", seed=0).inputs.numpy()
    places = np.bincount((inputs == 8).argmax(1), minlength=20)
    assert len(places) == 20
    assert (abs(places / 200 - 1) < 0.3).all()
    tokens = np.bincount(inputs[inputs < 8], minlength=8)
    assert (abs(tokens / tokens.mean() - 1) < 0.05).all()


def test_splits_have_their_own_lengths():
    task = tasks.create_task("induction", length=16, validation_length=64, test_length=2**16)
    assert task.seq_len == 2**16
    assert [task.sample(2, split=s, seed=0).inputs.shape[1] for s in SPLITS] == [16, 64, 2**16]


def test_slices_tell_the_gap():
    batch = tasks.create_task("induction", length=40).sample(200, split="test", seed=0)
    for row, gap in zip(batch.inputs.tolist(), batch.slices["gap"].tolist(), strict=True):
        assert gap / 2 < 39 - (row.index(15) + 1) <= gap


def test_docstring_is_true():
    task = tasks.create_task("induction", vocab_size=8, length=12)
    lines = [line.split() for line in type(task).__doc__.splitlines()]
    shown = {words[0]: words[1:] for words in lines if words and words[0] in ("inputs", "targets")}
    row = list(map(int, shown["inputs"]))
    assert len(row) == 12
    assert shown["targets"] == ["."] * 11 + [str(induction(row))]


def test_render_marks_the_special_token():
    task = tasks.create_task("induction", vocab_size=8, length=12)
    batch = task.sample(1, split="test", seed=0)
    first, second = task.render(batch).splitlines()
    assert first.split().count("*") == 2
    assert second.split() == ["what", "followed", str(int(batch.targets[0, -1]))]
    assert "!" in task.render(batch, 0, batch.targets + 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 2}, "length=2 is not allowed"),
        ({"vocab_size": 2}, "vocab_size=2 is not allowed"),
        ({"vocab_size": 3, "length": 6}, "train rows of length=6 over 3 tokens gives only 64 different rows"),
        ({"test_length": 3}, "test rows of length=3 over 16 tokens gives only 15"),
        ({"seq_len": 64}, "Unknown option of induction 'seq_len'.*Available: vocab_size, length"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(tasks.UsageError, match=message) as error:
        tasks.create_task("induction", **options)
    assert "\n" not in str(error.value)
