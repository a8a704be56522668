from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from zoo import tasks
from zoo.tasks import random
from zoo.tasks.protocol import SPLITS
from zoo.tasks.sudoku import augment, fingerprint, read_puzzles, solve, to_text, write_csv, write_lines

REAL = Path(__file__).parents[3] / "shared/data/real"
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
        ("1234\n", "1: the puzzle has 1 rows of 4; read are CSV with a header such as"),
        (f"{GOOD}\n{GOOD}1\n", "2: the puzzle has 17 cells; read are CSV with a header such as"),
        (f"{GOOD}\n{GOOD[:-1]}a\n", "2: '123434122143432a' is no puzzle"),
        (f"{GOOD[:-1]}5\n", "1: '5' in the puzzle"),
        (f"{GOOD}\n{'.' * 16}\n", "2: the puzzle has more than one solution"),
        (f"11{'.' * 14}\n", "1: the puzzle has no solution"),
        (HEADER + f"a,{GOOD},{GOOD}\n", "2: 3 fields"),
        (HEADER + f"a,{GOOD[:-1]}a,,\n", "2: 'a' in the puzzle"),
        (f"{GOOD}\n{GOOD[:-4]}\n", "2: the puzzle has 12 cells"),
        ("12\n", "1: the puzzle has 2 cells"),
        ("This is a novel.\nIt has\nno puzzle.\n", "3: no puzzle follows; read are CSV"),
        (f"{GOOD}\nGrid 2\nGrid 3\n{GOOD}\n", "3: 'Grid 3' is no puzzle"),
        ("1234\n3412\n2143\n43\n", "4: the puzzle of line 1 has 3 rows of 4"),
        ("1234\n3412\n2143\n\n\n", "1: the puzzle has 3 rows of 4"),
        ("1234\n3412\nEasy\n2143\n4321\n", "3: the puzzle of line 1 has 2 rows of 4"),
        ("puzzle;solution\n" + f"{GOOD};{GOOD}\n{GOOD}\n", "3: 1 fields, where the header has 2"),
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


ROWS = ["1.34", "3412", "2143", "4321"]
ONE, FULL = "".join(ROWS), "1234341221434321"
NINE = [
    "53..7....",
    "6..195...",
    ".98....6.",
    "8...6...3",
    "4..8.3..1",
    "7...2...6",
    ".6....28.",
    "...419..5",
    "....8..79",
]
SIX = "1.3456456123231564564231312645645312"
FORMS = {
    "kaggle": f"quizzes,solutions\n{ONE},{FULL}\n",
    "kaggle with an index": f",quizzes,solutions\n0,{ONE},{FULL}\n",
    "kaggle 3m": f"id,puzzle,solution,clues,difficulty\n1,{ONE},{FULL},15,1.5\n",
    "d1": f"Puzzle,Solution\n{ONE.replace('.', '0')},{FULL}\n",
    "quoted": f'"source","question","answer","rating"\n"a","{ONE}","{FULL}","0"\n',
    "a space behind the header": f"source,question,answer,rating \r\na,{ONE},{FULL},0\r\n",
    "semicolons": f"puzzle;solution\n{ONE};{FULL}\n",
    "tabs": f"Puzzle\tSolution\n{ONE}\t{FULL}\n",
    "one column": f"puzzle\n{ONE}\n",
    "a word for the rating": f"question,answer,rating\n{ONE},{FULL},hard\n",
    "comments before the header": f"# of the web\n\nPuzzle,Solution\n{ONE},{FULL}\n",
    "rows in a quoted field": 'puzzle,solution\n"1.34\n3412\n2143\n4321",\n',
    "spaced cells in a field": f"Puzzle,Solution\n{' '.join(ONE)},{' '.join(FULL)}\n",
    "no header": f"{ONE},{FULL}\n",
    "plain": f"{ONE}\n",
    "plain crlf": f"\r\n{ONE}\r\n",
    "a title": f"Gordon F. Royle, A collection of 49,151 con?gurations, http://mapleta.au/~gordon\n{ONE}\n",
    "hash comments": f"# easy\n{ONE} # the first\n",
    "slash comments": f"// easy\n{ONE} // 0.1 s\n",
    "tdoku": f"{ONE}:1:{FULL}\n",
    "tdoku without an answer": f"{ONE}:12:\n",
    "sudoku-exchange": f"0000183b305c {ONE}  1.2\n",
    "puzzle and solution": f"{ONE} {FULL}\n",
    **{f"blanks {blank}": ONE.replace(".", blank) + "\n" for blank in "0_*xX-?"},
    "euler": "Grid 01\n" + "\n".join(ROWS).replace(".", "0") + "\n",
    "spaced rows": "\n".join(" ".join(row) for row in ROWS).replace(".", "0") + "\n",
    "ruled rows": "1 . | 3 4\n3 4 | 1 2\n----+----\n2 1 | 4 3\n4 3 | 2 1\n",
    "boxed rows": "+---+---+\n|1 _|3 4|\n|3 4|1 2|\n|---+---|\n|2 1|4 3|\n|4 3|2 1|\n+---+---+\n",
    "rows with commas": "1,0,3,4\n3,4,1,2\n2,1,4,3\n4,3,2,1\n",
    "sdk": "#ASomebody\n#DA puzzle\n[Puzzle]\n" + "\n".join(ROWS) + "\n[State]\n1234\n3412\n2143\n4321\n",
    "a title that is a column's name": "Puzzle\n" + "\n".join(ROWS) + "\n",
}


@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_forms_that_people_have(tmp_path, form, marked):
    path = tmp_path / "p"
    path.write_bytes(FORMS[form].encode("utf-8-sig" if marked else "utf-8"))
    file = read_puzzles(path)
    assert to_text(file.puzzles[0]) == ONE
    assert to_text(file.solutions[0]) == FULL
    assert len(file.puzzles) == 1
    assert file.ratings[0] == {"kaggle 3m": 1.5, "quoted": 0, "a space behind the header": 0}.get(form, -1)


def test_other_sizes_and_several(tmp_path):
    path = tmp_path / "p"
    path.write_text("\n\n".join(["Grid 1", "\n".join(NINE), "Grid 2", "\n".join(NINE), "".join(NINE)]) + "\n")
    file = read_puzzles(path)
    assert [to_text(p) for p in file.puzzles] == ["".join(NINE)] * 3
    assert file.lines.tolist() == [3, 15, 25]
    path.write_text(SIX + "\n")
    assert read_puzzles(path).puzzles.shape == (1, 36)


@pytest.mark.skipif(not REAL.is_dir(), reason=f"the files of {REAL} are not there")
@pytest.mark.parametrize(
    ("file", "n", "first"),
    [
        ("kaggle_quizzes_solutions_head.csv", None, "..43..2.9..5..9..1"),
        ("royle_sudoku17_head.txt", None, ".......1.4........."[:18]),
        ("top95_bom.txt", 95, "4.....8.5.3......."),
    ],
)
def test_real_files(file, n, first):
    found = read_puzzles(REAL / file)
    assert n is None or len(found.puzzles) == n
    assert to_text(found.puzzles[0]).startswith(first)


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
