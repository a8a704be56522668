from __future__ import annotations

import numpy as np
import pytest

import tasks
from tasks import random
from tasks.protocol import SPLITS
from tasks.sudoku import augment, fingerprint, read_puzzles, solve, to_text, write_csv, write_lines

HEADER = "source,question,answer,rating\n"


def some(n: int, size: int = 9, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    batch = tasks.create_task("sudoku", size=size).sample(n, split="train", seed=seed)
    return (batch.inputs - 1).numpy().astype(np.uint8), (batch.targets - 1).numpy().astype(np.uint8)


@pytest.mark.parametrize("size", [4, 6, 9])
def test_csv_round_trip(tmp_path, size):
    puzzles, solutions = some(7, size)
    path = tmp_path / "p.csv"
    write_csv(path, puzzles, solutions, np.arange(7))
    assert path.read_text().startswith(HEADER + "generated,")
    file = read_puzzles(path)
    assert (file.puzzles == puzzles).all()
    assert (file.solutions == solutions).all()
    assert file.ratings.tolist() == list(range(7))
    assert file.lines.tolist() == list(range(2, 9))


def test_line_round_trip_and_blanks(tmp_path):
    puzzles, solutions = some(5)
    path = tmp_path / "p.txt"
    write_lines(path, puzzles)
    path.write_text("\n" + path.read_text().replace(".", "0"))
    file = read_puzzles(path)
    assert (file.puzzles == puzzles).all()
    assert (file.solutions == solutions).all(), "the solver answers where the file does not"
    assert (file.ratings == -1).all()
    assert file.lines.tolist() == [2, 3, 4, 5, 6]


def test_public_form(tmp_path):
    puzzles, solutions = some(1)
    path = tmp_path / "p.csv"
    path.write_text(f"{HEADER}puzzles0_kaggle,{to_text(puzzles[0])},{to_text(solutions[0])},0\n")
    assert (read_puzzles(path).puzzles == puzzles).all()


GOOD = "12343412" + "21434321"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no puzzle"),
        (HEADER, "holds no puzzle"),
        ("1234\n", "1: the puzzle has 4 characters"),
        (f"{GOOD}\n{GOOD}1\n", "2: the puzzle has 17 characters, not 16"),
        (f"{GOOD}\n{GOOD[:-1]}x\n", "2: 'x' in the puzzle"),
        (f"{GOOD[:-1]}5\n", "1: '5' in the puzzle"),
        (f"{GOOD}\n{'.' * 16}\n", "2: the puzzle has more than one solution"),
        (f"11{'.' * 14}\n", "1: the puzzle has no solution"),
        (HEADER + f"a,{GOOD},{GOOD}\n", "2: 3 fields"),
        (HEADER + f"a,{GOOD},{GOOD},hard\n", "2: the rating 'hard'"),
        (HEADER + f"a,{GOOD},{GOOD},1\na,{GOOD},{GOOD[::-1][:8] + GOOD[:8]},1\n", "3: the answer does not solve"),
        (HEADER + f"a,{GOOD},{'1' * 16},1\n", "2: the answer does not solve"),
        (HEADER + f"a,{GOOD},{GOOD[:-1]}.,1\n", "2: '.' in the answer"),
    ],
)
def test_bad_files_name_the_line(tmp_path, text, message):
    path = tmp_path / "bad.csv"
    path.write_text(text)
    with pytest.raises(tasks.UsageError, match=message) as error:
        read_puzzles(path)
    assert "bad.csv" in str(error.value)
    assert "\n" not in str(error.value)


def test_not_text(tmp_path):
    path = tmp_path / "bad.csv"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(tasks.UsageError, match="it is UTF-16; save it as UTF-8"):
        read_puzzles(path)


def test_a_task_of_the_users_puzzles(tmp_path):
    puzzles, solutions = some(80)
    path = tmp_path / "p.csv"
    write_csv(path, puzzles, solutions, np.zeros(80))
    task = tasks.create_task("sudoku", path=str(path), augment=False)
    mine = {p.tobytes() for p in puzzles}
    # An epoch of `some` is all in the training split, by the same fingerprint.
    rows = (task.sample(80, split="train", seed=1).inputs - 1).numpy().astype(np.uint8)
    assert {r.tobytes() for r in rows} == mine
    assert not (rows == puzzles).all(), "in an order of its own"
    with pytest.raises(tasks.UsageError, match="falls into the split 'test'"):
        task.sample(1, split="test", seed=0)
    few = tasks.create_task("sudoku", path=str(path), augment=False, n_puzzles=10).sample(30, split="train", seed=1)
    assert len({r.tobytes() for r in few.inputs.numpy()}) == 10


def test_a_file_is_split_without_leaks(tmp_path):
    batches = [tasks.create_task("sudoku", size=4).sample(60, split=s, seed=0) for s in SPLITS]
    boards = np.concatenate([b.inputs for b in batches]) - 1
    path = tmp_path / "p.txt"
    write_lines(path, boards)
    task = tasks.create_task("sudoku", size=4, path=str(path))
    for i, split in enumerate(SPLITS):
        batch = task.sample(60, split=split, seed=0)
        prints = fingerprint((batch.inputs - 1).numpy(), (batch.targets - 1).numpy())
        assert (random.split_of(prints) == i).all()


def test_a_test_file_of_its_own(tmp_path):
    puzzles, solutions = some(40)
    held_out, held_solutions = augment(puzzles[:15], solutions[:15], random.row_keys("test", 9, 0, 15))
    write_csv(tmp_path / "train.csv", puzzles, solutions, np.zeros(40))
    write_csv(tmp_path / "test.csv", held_out, held_solutions, np.zeros(15))
    task = tasks.create_task(
        "sudoku", path=str(tmp_path / "train.csv"), test_path=str(tmp_path / "test.csv"), augment=False
    )
    tested = (task.sample(15, split="test", seed=0).inputs - 1).numpy()
    assert (tested == held_out).all(), "in the order of the file"
    trained = {r.tobytes() for r in (task.sample(60, split="train", seed=0).inputs - 1).numpy().astype(np.uint8)}
    assert trained == {p.tobytes() for p in puzzles[15:]}


def test_size_must_fit(tmp_path):
    write_lines(tmp_path / "p.txt", some(3, 4)[0])
    with pytest.raises(tasks.UsageError, match="holds 4x4 puzzles and size is 9; set size=4"):
        tasks.create_task("sudoku", path=str(tmp_path / "p.txt"))


def test_answers_are_checked_for_uniqueness_when_drawn(tmp_path):
    solution = solve([[0] * 16]).solutions
    write_csv(tmp_path / "p.csv", np.zeros((1, 16)), solution, [0])
    task = tasks.create_task("sudoku", size=4, path=str(tmp_path / "p.csv"))
    split = SPLITS[int(random.split_of(fingerprint(np.zeros((1, 16)), solution))[0])]
    with pytest.raises(tasks.UsageError, match=r"p.csv:2: the puzzle has more than one solution"):
        task.sample(1, split=split, seed=0)
