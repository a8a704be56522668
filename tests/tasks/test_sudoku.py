from __future__ import annotations

from itertools import permutations, product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo import tasks
from zoo.tasks import random
from zoo.tasks.protocol import SPLITS
from zoo.tasks.sudoku import augment, fingerprint, from_text, is_minimal, is_solution, read_puzzles, solve, to_text

REAL = Path(__file__).parents[3] / "shared/data/sudoku"
BOX = {4: (2, 2), 6: (2, 3), 9: (3, 3)}


def count_solutions(board: list[int], size: int) -> int:
    """All solutions, by plain backtracking."""
    if 0 not in board:
        return 1
    height, width = BOX[size]
    cell = board.index(0)
    r, c = divmod(cell, size)
    taken = set()
    for other, digit in enumerate(board):
        y, x = divmod(other, size)
        if r == y or c == x or (r // height == y // height and c // width == x // width):
            taken.add(digit)
    return sum(
        count_solutions([*board[:cell], digit, *board[cell + 1 :]], size)
        for digit in range(1, size + 1)
        if digit not in taken
    )


def consistent(board: list[int], size: int) -> bool:
    """Whether no digit stands twice in a line or box."""
    cells = [(*divmod(i, size), d) for i, d in enumerate(board) if d]
    height, width = BOX[size]
    for seen in (
        [(r, d) for r, c, d in cells],
        [(c, d) for r, c, d in cells],
        [(r // height, c // width, d) for r, c, d in cells],
    ):
        if len(set(seen)) < len(seen):
            return False
    return True


def disguise(boards: list[np.ndarray], size: int, rng: np.random.Generator) -> list[np.ndarray]:
    """The same random symmetry of each board, made apart from the code under test."""
    height, width = BOX[size]

    def lines(group: int) -> np.ndarray:
        groups = rng.permutation(size // group)
        return np.concatenate([g * group + rng.permutation(group) for g in groups])

    rows, columns, digits = lines(height), lines(width), np.append(0, 1 + rng.permutation(size))
    flip = height == width and rng.random() < 0.5
    grids = [digits[b.reshape(size, size)][rows][:, columns] for b in boards]
    return [(g.T if flip else g).ravel().astype(np.uint8) for g in grids]


def draw(split: str, n: int, **options) -> tuple[np.ndarray, np.ndarray]:
    batch = tasks.create_task("sudoku", **options).sample(n, split=split, seed=0)
    return (batch.inputs - 1).numpy().astype(np.uint8), (batch.targets - 1).numpy().astype(np.uint8)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([0, 0, 0, 1, 2, 3, 4]), min_size=16, max_size=16))
def test_solver_counts_as_brute_force_does(board):
    expected = count_solutions(board, 4) if consistent(board, 4) else 0
    every = solve([board], limit=1000)
    assert every.n_solutions[0] == expected
    two = solve([board])
    assert two.n_solutions[0] == min(expected, 2)
    if expected:
        solution = two.solutions[0]
        assert is_solution(two.solutions, 4).all()
        assert all(g in (0, s) for g, s in zip(board, solution, strict=True))
    else:
        assert not two.solutions.any()


def test_solver_finds_all_full_boards():
    assert solve(np.zeros((1, 16)), limit=10_000).n_solutions[0] == 288
    assert solve(np.zeros((1, 81))).n_solutions[0] == 2


@pytest.mark.parametrize("size", [6, 9])
def test_solver_counts_when_givens_go_missing(size):
    puzzles, _ = draw("test", 5, size=size, n_givens={6: 12, 9: 34}[size])
    rng = np.random.default_rng(0)
    for puzzle in puzzles:
        fewer = puzzle.copy()
        fewer[rng.choice(np.flatnonzero(puzzle), 3, replace=False)] = 0
        assert solve([fewer], limit=10**6).n_solutions[0] == count_solutions(fewer.tolist(), size)


def test_guesses_rate_difficulty():
    easy = "53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79"
    hard = "8..........36......7..9.2...5...7.......457.....1...3...1....68..85...1..9....4.."
    result = solve([from_text(easy), from_text(hard)])
    assert result.n_solutions.tolist() == [1, 1]
    assert result.guesses[0] == 0
    assert result.guesses[1] > 5


@pytest.mark.parametrize(
    ("options", "fewest", "most"),
    [
        ({"size": 4}, 4, 8),
        ({"size": 4, "max_givens": 5}, 4, 5),
        ({"size": 4, "n_givens": 4}, 4, 4),
        ({"size": 4, "n_givens": 10}, 10, 10),
        ({"size": 6}, 8, 18),
        ({"size": 6, "n_givens": 10}, 10, 10),
        ({"size": 9}, 17, 36),
        ({"size": 9, "n_givens": 26}, 26, 26),
        ({"size": 9, "max_givens": 24}, 17, 24),
        ({"size": 9, "n_givens": 81}, 81, 81),
    ],
)
def test_generated_puzzles_have_one_solution(options, fewest, most):
    for split in SPLITS:
        puzzles, solutions = draw(split, 24, **options)
        solved = solve(puzzles)
        assert (solved.n_solutions == 1).all()
        assert (solved.solutions == solutions).all()
        givens = (puzzles > 0).sum(1)
        assert fewest <= givens.min()
        assert givens.max() <= most


@pytest.mark.parametrize("size", [4, 6, 9])
def test_minimal_puzzles(size):
    puzzles, _ = draw("train", 24, size=size, minimal=True)
    assert is_minimal(puzzles).all()
    for puzzle in puzzles[:4]:
        for cell in np.flatnonzero(puzzle):
            without = puzzle.copy()
            without[cell] = 0
            assert solve([without]).n_solutions[0] == 2
    spare = puzzles.copy()
    solutions = solve(puzzles).solutions
    blank = (puzzles == 0).argmax(1)
    rows = np.arange(len(puzzles))
    spare[rows, blank] = solutions[rows, blank]
    assert not is_minimal(spare).any()


def test_difficulty_filter():
    task = tasks.create_task("sudoku", minimal=True, min_guesses=4)
    batch = task.sample(16, split="validation", seed=0)
    assert (solve((batch.inputs - 1).numpy()).guesses >= 4).all()
    assert (batch.slices["guesses"] >= 4).all()


def test_training_rows_are_base_puzzles_in_disguise():
    options = {"n_puzzles": 5}
    puzzles, solutions = draw("train", 20, **options)
    plain, plain_solutions = draw("train", 20, augment=False, **options)
    assert (plain[:5] == plain[15:]).all(), "an epoch has five puzzles"
    assert len({p.tobytes() for p in puzzles}) == 20
    assert (fingerprint(puzzles, solutions) == fingerprint(plain, plain_solutions)).all()
    assert (solve(puzzles).solutions == solutions).all()


@pytest.mark.parametrize("size", [4, 6, 9])
def test_fingerprint_sees_through_symmetry(size):
    puzzles, solutions = draw("test", 12, size=size)
    expected = fingerprint(puzzles, solutions)
    rng = np.random.default_rng(0)
    for _ in range(30):
        pairs = [disguise([p, s], size, rng) for p, s in zip(puzzles, solutions, strict=True)]
        copies = [np.stack(boards) for boards in zip(*pairs, strict=True)]
        assert is_solution(copies[1], size).all()
        assert (fingerprint(*copies) == expected).all()
    keys = random.row_keys("train", 0, 0, 12)
    assert (fingerprint(*augment(puzzles, solutions, keys)) == expected).all()


def test_fingerprint_tells_puzzles_apart():
    rows = np.array(list(permutations([1, 2, 3, 4])))
    boards = rows[np.array(list(product(range(24), repeat=4)))]  # all 4x4 grids with every digit once in a row
    boxes = boards.reshape(-1, 2, 2, 2, 2).swapaxes(2, 3).reshape(-1, 4, 4)
    whole = [(np.sort(lines) == [1, 2, 3, 4]).all((1, 2)) for lines in (boards.swapaxes(1, 2), boxes)]
    boards = boards[whole[0] & whole[1]].reshape(-1, 16)
    assert len(boards) == 288
    assert len(set(fingerprint(boards, boards))) == 2, "4x4 has two essentially different grids"
    puzzles, solutions = draw("train", 200, size=9, n_givens=40, augment=False)
    assert len(set(fingerprint(puzzles, solutions))) == 200


def least_copy(puzzle: np.ndarray) -> bytes:
    """The canonical form of a 4x4 puzzle, from the definition."""
    orders = [[0, 1, 2, 3], [1, 0, 2, 3], [0, 1, 3, 2], [1, 0, 3, 2]]
    orders += [[*o[2:], *o[:2]] for o in orders]
    grid = puzzle.reshape(4, 4)
    copies = []
    for g in (grid, grid.T):
        for rows, columns in product(orders, orders):
            names: dict[int, int] = {0: 0}
            copies.append(bytes(names.setdefault(d, len(names)) for d in g[rows][:, columns].ravel().tolist()))
    return min(copies)


def test_no_small_puzzle_is_in_two_splits_in_disguise():
    for options in ({"max_givens": 5}, {"minimal": True}, {}):
        seen = {s: {least_copy(p) for p in draw(s, 150, size=4, **options)[0]} for s in SPLITS}
        assert not seen["train"] & (seen["validation"] | seen["test"])
        assert not seen["validation"] & seen["test"]


@pytest.mark.parametrize("size", [6, 9])
def test_rows_belong_to_their_split(size):
    for i, split in enumerate(SPLITS):
        rows = draw(split, 100, size=size)
        assert (random.split_of(fingerprint(*rows)) == i).all()


@pytest.mark.parametrize(("options", "classes"), [({"minimal": True}, 36), ({"n_givens": 4}, 13)])
def test_the_splits_share_out_all_4x4_puzzles(options, classes):
    """36 essentially different minimal 4x4 puzzles are known, 13 of them with four givens."""
    prints = [set(fingerprint(*draw(s, 3000, size=4, **options)).tolist()) for s in SPLITS]
    assert sum(map(len, prints)) == len(set.union(*prints)) == classes


def test_problems_of_4x4_are_few():
    """With at most five givens there are 109 essentially different puzzles: 80, 14 and 15 in the splits."""
    task = tasks.create_task("sudoku", size=4, max_givens=5)
    names = {split: task.problems(task.sample(3000, split=split, seed=0)) for split in SPLITS}
    assert [len(found.unique()) for found in names.values()] == [80, 14, 15]


def test_few_givens_on_4x4_still_vary():
    puzzles, solutions = draw("train", 2000, size=4, max_givens=5)
    assert len({p.tobytes() for p in puzzles}) > 1500
    assert len({s.tobytes() for s in solutions}) > 250


def test_scores_want_every_cell():
    task = tasks.create_task("sudoku", size=4)
    batch = task.sample(2, split="test", seed=0)
    predictions = batch.targets.clone()
    given = (batch.inputs[0] > 1).nonzero()[0, 0]
    predictions[0, given] = 0
    scores = task.score(batch, predictions)
    assert scores["exact"] == 0.5
    assert scores["accuracy"] == pytest.approx(31 / 32)
    assert "!" in task.render(batch, 0, predictions)
    assert set(scores["slices"]) == {"givens", "guesses"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 5}, "size=5"),
        ({"n_givens": 16}, "n_givens=16 is not allowed for size=9.*17"),
        ({"size": 4, "max_givens": 17}, "max_givens=17 is not allowed.*16"),
        ({"size": 4, "n_givens": 5, "max_givens": 6}, "exclude each other"),
        ({"path": "/nowhere/x.csv"}, "/nowhere/x.csv cannot be read: there is no such file"),
        ({"path": "x", "minimal": True}, "minimal steers the generator"),
        ({"test_path": "x"}, "needs `path`"),
        ({"n_puzzles": 0}, "n_puzzles=0"),
        ({"minimal": 1}, "minimal=1"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(tasks.UsageError, match=message) as error:
        tasks.create_task("sudoku", **options)
    assert "\n" not in str(error.value)


def test_puzzles_too_rare_to_be_found():
    task = tasks.create_task("sudoku", size=4, minimal=True, n_givens=8)
    with pytest.raises(tasks.UsageError, match=r"no minimal puzzle of size 4 with 8 givens.*`path`"):
        task.sample(1, split="train", seed=0)


@pytest.mark.parametrize("boards", [np.zeros((2, 80)), np.zeros(81), np.full((1, 81), 10)])
def test_wrong_boards(boards):
    with pytest.raises(tasks.UsageError, match="sudoku: "):
        solve(boards)


def test_all_real_puzzles_with_17_givens():
    path = REAL / "clues17.txt"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    file = read_puzzles(path)
    assert len(file.puzzles) >= 49_150
    solved = solve(file.puzzles)
    assert (solved.n_solutions == 1).all()
    assert is_solution(solved.solutions, 9).all()
    assert ((file.puzzles == 0) | (file.puzzles == solved.solutions)).all()
    assert ((file.puzzles > 0).sum(1) == 17).all()
    assert is_minimal(file.puzzles[::100]).all()
    # They have some 46,300 different solution grids: the fingerprint should tell nearly all of these apart.
    assert len(set(fingerprint(file.puzzles, solved.solutions))) > 46_000
    assert to_text(file.puzzles[0]).replace(".", "0") == path.read_text().split()[0]
