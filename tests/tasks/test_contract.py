"""What every task owes, whichever it is: new tasks are covered by being registered."""

from __future__ import annotations

import functools
import pickle

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from zoo import tasks
from zoo.tasks.protocol import IGNORE, SPLITS, take

NAMES = tasks.list_tasks()


@functools.cache
def made(name: str) -> tasks.Task:
    """A task, for all tests that look at it."""
    return tasks.create_task(name)


@functools.cache
def many(name: str, split: str) -> tasks.Batch:
    """The first 300 rows of a split, which no test changes."""
    return made(name).sample(300, split=split, seed=0)


@pytest.fixture(params=NAMES)
def task(request):
    try:
        return made(request.param)
    except tasks.UsageError as error:
        if "which is missing: pip install" not in str(error):
            raise
        pytest.skip(str(error))  # of a task that reads an optional package


def equal(a: tasks.Batch, b: tasks.Batch) -> bool:
    slices = a.slices.keys() == b.slices.keys() and all(torch.equal(a.slices[k], b.slices[k]) for k in a.slices)
    fields = [(getattr(a, name), getattr(b, name)) for name in a._fields if name != "slices"]
    return slices and all(x is y or torch.equal(x, y) for x, y in fields)


part = take


def wrong_answers(batch: tasks.Batch) -> torch.Tensor:
    """Answers of which none is right."""
    return batch.targets + 1 if batch.mask is not None else torch.where(batch.targets == 1, 2, 1)


@pytest.mark.parametrize("split", SPLITS)
def test_rows_depend_only_on_their_number(task, split):
    whole = task.sample(18, split=split, seed=3)
    fresh = tasks.create_task({"name": task.name})
    assert equal(part(whole, slice(7, 18)), fresh.sample(11, split=split, seed=3, start=7))
    assert equal(part(whole, slice(17, 18)), task.sample(1, split=split, seed=3, start=17))


def test_whole_numbers_of_numpy_serve(task):
    asked = task.sample(np.int64(3), split="test", seed=np.int64(-2), start=np.int32(5))
    assert equal(asked, task.sample(3, split="test", seed=-2, start=5))


def test_seeds_and_splits_give_other_rows(task):
    rows = {(s, seed): task.sample(8, split=s, seed=seed).inputs for s in SPLITS for seed in (0, 1, -5, 2**63)}
    keys = list(rows)
    for i, a in enumerate(keys):
        for b in keys[i + 1 :]:
            assert not torch.equal(rows[a], rows[b]), (a, b)


def test_no_row_is_in_two_splits(task):
    if task.overlap:
        pytest.skip(task.overlap)
    seen: dict[str, set[bytes]] = {}
    for split in SPLITS:
        batch = many(task.name, split)
        seen[split] = {row.numpy().tobytes() for row in batch.inputs}
        assert len(seen[split]) > 250, "rows of a stream should differ"
    assert not seen["train"] & seen["validation"]
    assert not seen["train"] & seen["test"]
    assert not seen["validation"] & seen["test"]


def test_problems_have_names_of_their_own(task):
    """A row's problem is told from the row alone, and is in one split only, however a symmetry turns it."""
    names = {split: task.problems(batch := many(task.name, split)) for split in SPLITS}
    for found in names.values():
        assert found.shape == (300,)
        assert found.dtype == torch.int64
    assert torch.equal(task.problems(part(batch, slice(120, 130))), found[120:130])
    order = torch.arange(299, -1, -1)
    assert torch.equal(task.problems(part(batch, order)), found[order])
    twice = part(batch, torch.tensor([5, 5, 6]))
    assert len(task.problems(twice)[:2].unique()) == 1
    if task.overlap and not task.irregular_times:  # there tokens repeat, tokens with their times do not
        return
    asked = SPLITS[1:] if task.n_puzzles else SPLITS  # where puzzles have names, the demonstrations of all are taught
    sets = [set(names[split].tolist()) for split in asked]
    assert sum(map(len, sets)) == len(set.union(*sets))


def test_shapes_and_ranges(task):
    batch = task.sample(16, split="train", seed=0)
    assert task.layout in ("next_token", "fill_in", "reconstruct", "series")
    assert batch.scored.any(1).all(), "every row asks something"
    assert all(v.shape == (16,) for v in batch.slices.values())
    assert (batch.timespans is None) == (not task.irregular_times)
    if task.layout == "series":
        shapes_of_series(task, batch)
        return
    for tokens in (batch.inputs, batch.targets):
        assert tokens.shape == (16, task.seq_len)
        assert tokens.dtype == torch.int64
    assert batch.inputs.min() >= 0
    assert batch.inputs.max() < task.vocab_size
    scored = batch.targets[batch.targets != IGNORE]
    assert scored.min() >= 0
    assert scored.max() < task.vocab_size
    assert (batch.puzzles is None) == (task.n_puzzles == 0)
    if batch.puzzles is not None:
        assert batch.puzzles.shape == (16,)
        assert batch.puzzles.dtype == torch.int64
        assert 0 <= batch.puzzles.min() <= batch.puzzles.max() < task.n_puzzles


def shapes_of_series(task, batch):
    assert batch.inputs.shape == (16, task.seq_len, task.n_inputs)
    assert batch.inputs.dtype == torch.float32
    assert batch.inputs.isfinite().all()
    if task.n_classes:
        assert batch.mask is None
        assert batch.targets.shape == (16, task.seq_len)
        assert 0 <= batch.targets[batch.scored].min() <= batch.targets[batch.scored].max() < task.n_classes
    else:
        assert batch.targets.shape == (16, task.seq_len, task.n_outputs)
        assert batch.targets.isfinite().all()
        assert batch.mask.dtype == torch.bool
        assert task.trivial(batch).shape == batch.targets.shape
    if batch.timespans is not None:
        assert batch.timespans.shape == (16, task.seq_len)
        assert batch.timespans.min() >= 0
    if batch.lengths is not None:
        steps = torch.arange(task.seq_len) < batch.lengths[:, None]
        assert not (batch.scored & ~steps).any(), "nothing is asked in the padding"


def test_scores(task):
    batch = task.sample(32, split="validation", seed=0)
    right = task.score(batch, batch.targets)
    if task.n_outputs:
        scores_of_vectors(task, batch, right)
        return
    assert right["accuracy"] == right["exact"] == 1.0
    assert right["n"] == 32
    for values in right["slices"].values():
        assert sum(figures["n"] for figures in values.values()) == 32
    wrong = wrong_answers(batch)
    assert task.score(batch, wrong)["exact"] == 0.0
    mixed = torch.cat([batch.targets[:8], wrong[8:]])
    assert task.score(batch, mixed)["exact"] == 0.25
    elsewhere = torch.where(batch.targets == IGNORE, 1, batch.targets)
    assert task.score(batch, elsewhere) == right, "predictions are read only where a target stands"


def scores_of_vectors(task, batch, right):
    assert right["mse"] == right["mse_ratio"] == 0.0
    assert right["n"] == 32
    for values in right["slices"].values():
        assert sum(figures["n"] for figures in values.values()) == 32
    assert task.score(batch, batch.targets + 1)["mse"] == pytest.approx(1.0, rel=1e-5)
    assert task.score(batch, task.trivial(batch))["mse_ratio"] == pytest.approx(1.0)
    elsewhere = torch.where(batch.mask[..., None], batch.targets, torch.nan)
    assert task.score(batch, elsewhere) == right, "predictions are read only where a target is scored"


def test_pictures(task):
    batch = task.sample(3, split="test", seed=0)
    right = batch.targets if batch.mask is not None else batch.targets.clamp(min=0)
    for predictions in (None, right, wrong_answers(batch)):
        assert task.render(batch, 2, predictions).strip()
        assert isinstance(task.draw(batch, 2, predictions), Figure)


def test_docstring_draws_an_example(task):
    assert "inputs " in type(task).__doc__
    assert "targets " in type(task).__doc__


def test_pickles(task):
    batch = task.sample(4, split="train", seed=0)
    assert equal(batch, pickle.loads(pickle.dumps(task)).sample(4, split="train", seed=0))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"n": 4, "split": "valid", "seed": 0}, "Did you mean 'validation'"),
        ({"n": 0, "split": "train", "seed": 0}, "n=0"),
        ({"n": 4, "split": "train", "seed": 0, "start": -1}, "start=-1"),
    ],
)
def test_wrong_requests(task, call, message):
    with pytest.raises(tasks.UsageError, match=message) as error:
        task.sample(**call)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", NAMES)
def test_unknown_options(name):
    with pytest.raises(tasks.UsageError, match="no_such_option"):
        tasks.create_task(name, no_such_option=1)


def test_unknown_task():
    with pytest.raises(tasks.UsageError, match="Did you mean 'sudoku'"):
        tasks.create_task("sodoku")
