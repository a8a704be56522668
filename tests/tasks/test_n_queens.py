from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from zoo import tasks
from zoo.tasks.n_queens import BLANK, EMPTY, QUEEN, solutions
from zoo.tasks.protocol import SPLITS, take


def n_queens(**options):
    return tasks.create_task("n_queens", **options)


def is_solution(board: np.ndarray) -> bool:
    """By hand: every pair of n queens looked at."""
    queens = list(zip(*np.nonzero(board), strict=True))
    apart = all(a != c and b != d and abs(a - c) != abs(b - d) for (a, b), (c, d) in itertools.combinations(queens, 2))
    return len(queens) == len(board) and apart


@pytest.mark.parametrize(("size", "count"), [(4, 2), (5, 10), (6, 4), (7, 40), (8, 92), (9, 352), (10, 724)])
def test_all_solutions(size, count):
    boards = solutions(size)
    assert len(np.unique(boards, axis=0)) == len(boards) == count
    assert all(is_solution(board.reshape(size, size)) for board in boards[:200])


@pytest.mark.parametrize(
    "options", [{"size": 7}, {}, {"size": 8, "min_givens": 1, "max_givens": 4, "min_solutions": 2}]
)
@pytest.mark.parametrize("split", SPLITS)
def test_rows(options, split):
    task = n_queens(**options)
    batch = task.sample(60, split=split, seed=0)
    known = solutions(task.size).astype(bool)
    for inputs, targets, givens, ways in zip(
        batch.inputs.numpy(), batch.targets.numpy(), *map(torch.Tensor.tolist, batch.slices.values()), strict=True
    ):
        given = inputs == QUEEN
        assert (inputs[~given] == BLANK).all()
        assert (targets[given] == QUEEN).all()
        assert is_solution((targets == QUEEN).reshape(task.size, task.size))
        assert given.sum() == givens
        exact = (known[:, given]).all(1).sum()
        assert exact <= ways <= exact * 1.5
        assert exact >= task.config.min_solutions


def test_every_completion_is_right_and_nothing_else():
    task = n_queens(size=8, min_givens=1, max_givens=2)
    rows = task.sample(30, split="train", seed=0)
    known = np.where(solutions(8), QUEEN, EMPTY)
    several = 0
    for i in range(30):
        answers = torch.from_numpy(known)
        one = take(rows, torch.full((len(known),), i))
        expected = (answers == QUEEN)[:, rows.inputs[i] == QUEEN].all(1)
        assert torch.equal(task.is_right(one, answers), expected)
        assert torch.equal(task.right_cells(one, answers).all(1), expected)
        several += int(expected.sum() > 1)
    assert several > 20
    spoiled = known.copy()
    cells = np.random.default_rng(0).integers(0, 64, len(known))
    spoiled[np.arange(len(known)), cells] = QUEEN + EMPTY - spoiled[np.arange(len(known)), cells]
    nothing = take(rows, torch.zeros(len(known), dtype=torch.int64))._replace(inputs=torch.ones(len(known), 64).long())
    assert task.is_right(nothing, torch.from_numpy(known)).all()
    assert not task.is_right(nothing, torch.from_numpy(spoiled)).any()
    assert not task.is_right(nothing, torch.from_numpy(np.where(known == QUEEN, QUEEN, BLANK))).any(), "not said empty"
    assert not task.is_right(nothing, torch.from_numpy(known + 96)).any()


def test_the_checker_against_pairs_of_queens():
    rng, task = np.random.default_rng(0), n_queens(size=7)
    boards = np.zeros((3000, 49), dtype=np.int64)
    for board in boards:  # some lines at random, others of a solution
        board[:] = solutions(7)[rng.integers(40)]
        moved = rng.permutation(7)[: rng.integers(0, 4)]
        board.reshape(7, 7)[moved] = np.eye(7, dtype=np.int64)[rng.integers(0, 7, len(moved))]
    blank = torch.ones(3000, 49, dtype=torch.int64)
    found = task.is_right(tasks.Batch(blank, blank), torch.from_numpy(np.where(boards, QUEEN, EMPTY)))
    expected = [is_solution(board.reshape(7, 7)) for board in boards]
    assert found.tolist() == expected
    assert 100 < sum(expected) < 2900


def test_chance():
    """A queen at random on each row without one is right as often as there are solutions."""
    task = n_queens(size=7, min_givens=4, max_givens=4)
    rows = task.sample(400, split="test", seed=0)
    rng = np.random.default_rng(0)
    said = (rows.inputs.numpy() == QUEEN).reshape(-1, 7, 7)
    expected = ((solutions(7)[None] & said.reshape(-1, 1, 49)).sum(2) == 4).sum(1).mean() / 7**3
    found = []
    for _ in range(40):
        guess = np.eye(7, dtype=bool)[rng.integers(0, 7, (400, 7))]
        guess = np.where(said.any(2)[:, :, None], said, guess).reshape(400, 49)
        found.append(task.score(rows, torch.from_numpy(np.where(guess, QUEEN, EMPTY)))["exact"])
    assert np.mean(found) == pytest.approx(expected, abs=5 * np.sqrt(expected / 16000))


@pytest.mark.parametrize("size", [7, 8])
def test_no_board_is_in_two_splits_turned_or_flipped(size):
    task = n_queens(size=size)
    seen = []
    for split in SPLITS:
        boards = (task.sample(400, split=split, seed=0).inputs.numpy() == QUEEN).reshape(-1, size, size)
        turned = [np.rot90(b, k, (1, 2)) for b in (boards, boards.swapaxes(1, 2)) for k in range(4)]
        seen.append({board.tobytes() for boards in turned for board in boards})
        batch = task.sample(400, split=split, seed=0)
        other = torch.from_numpy(np.where(turned[5], QUEEN, BLANK).reshape(400, -1))
        assert torch.equal(task.problems(batch), task.problems(batch._replace(inputs=other)))
    assert not seen[0] & seen[1]
    assert not seen[0] & seen[2]
    assert not seen[1] & seen[2]


def test_accuracy_and_pictures():
    task = n_queens(size=8)
    batch = task.sample(2, split="test", seed=0)
    said = batch.targets.clone()
    free = int(((batch.inputs[0] == BLANK) & (said[0] == QUEEN)).nonzero()[0])
    said[0, free] = EMPTY
    score = task.score(batch, said)
    assert (score["exact"], score["accuracy"]) == (0.5, 1 - 1 / 16), "the row without a queen is wrong"
    assert "predicted: wrong" in task.render(batch, 0, said)
    assert "predicted: right" in task.render(batch, 1, said)
    hidden = batch.inputs == BLANK
    hidden[0, free] = False
    kinds = task.kinds(batch, 0, batch.targets, hidden)
    assert kinds[free] == "right"
    clash = batch.targets.clone()
    other = free + (1 if free % 8 < 7 else -1)
    clash[0, other], hidden[0, other] = QUEEN, False
    assert [task.kinds(batch, 0, clash, hidden)[cell] for cell in (free, other)] == ["wrong", "wrong"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_givens": 4, "max_givens": 3}, "min_givens=4 is more than max_givens=3"),
        ({"size": 8, "max_givens": 8}, "at most 7 are given, not 8"),
        ({"size": 6}, "size"),
        ({"gives": 6}, "gives"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(tasks.UsageError, match=message) as error:
        n_queens(**options)
    assert "\n" not in str(error.value)


def test_boards_that_are_not_there():
    with pytest.raises(tasks.UsageError, match="found no board of size 7 with 6 to 6 given queens and 2 solutions"):
        n_queens(size=7, min_givens=6, min_solutions=2).sample(1, split="train", seed=0)
