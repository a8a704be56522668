from __future__ import annotations

from collections import deque

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo import tasks
from zoo.tasks import random
from zoo.tasks.maze import fingerprint, is_path, is_valid, read_mazes, solve, write_mazes
from zoo.tasks.maze.grids import to_text
from zoo.tasks.protocol import SPLITS

WALL, OPEN, START, GOAL, PATH = 1, 2, 3, 4, 5


def neighbours(grid: np.ndarray, cell: tuple[int, int]):
    for dy, dx in ((0, 1), (1, 0), (0, -1), (-1, 0)):
        y, x = cell[0] + dy, cell[1] + dx
        if 0 <= y < grid.shape[0] and 0 <= x < grid.shape[1] and grid[y, x] != WALL:
            yield y, x


def distances(grid: np.ndarray, start: tuple[int, int]) -> dict[tuple[int, int], int]:
    found, queue = {start: 0}, deque([start])
    while queue:
        here = queue.popleft()
        for there in neighbours(grid, here):
            if there not in found:
                found[there] = found[here] + 1
                queue.append(there)
    return found


def place(grid: np.ndarray, token: int) -> tuple[int, int]:
    (cell,) = np.argwhere(grid == token)
    return int(cell[0]), int(cell[1])


def all_answers(grid: np.ndarray) -> set[bytes]:
    """The maze with each of its shortest paths."""
    away = distances(grid, place(grid, START))
    goal = place(grid, GOAL)
    if goal not in away:
        return set()
    paths = [[goal]]
    for step in range(away[goal] - 1, 0, -1):
        paths = [[*p, c] for p in paths for c in neighbours(grid, p[-1]) if away.get(c) == step]
    answers = set()
    for path in paths:
        answer = grid.copy()
        for cell in path[1:]:
            answer[cell] = PATH
        answers.add(answer.tobytes())
    return answers


def drawn(split: str, n: int, height: int, width: int, **options) -> tuple[np.ndarray, np.ndarray]:
    task = tasks.create_task("maze", height=height, width=width, **options)
    batch = task.sample(n, split=split, seed=0)
    return tuple(t.numpy().astype(np.uint8).reshape(n, height, width) for t in (batch.inputs, batch.targets))


@pytest.mark.parametrize(("height", "width"), [(7, 7), (9, 9), (8, 8), (5, 14), (30, 30), (41, 41)])
@pytest.mark.parametrize("split", SPLITS)
def test_perfect_mazes_are_trees(height, width, split):
    grids, answers = drawn(split, 12, height, width)
    for grid, answer in zip(grids, answers, strict=True):
        inside = np.argwhere(grid != WALL)
        assert len(inside) == 2 * ((height - 1) // 2) * ((width - 1) // 2) - 1, "every room, and a door fewer"
        edges = sum(len(list(neighbours(grid, (y, x)))) for y, x in inside) // 2
        away = distances(grid, place(grid, START))
        assert len(away) == len(inside)
        assert edges == len(inside) - 1
        assert (grid[[0, -1]] == WALL).all()
        assert (grid[:, [0, -1]] == WALL).all()
        assert all_answers(grid) == {answer.tobytes()}
        assert away[place(grid, GOAL)] >= max(height, width)


def test_spare_walls_fall_on_either_side():
    grids, _ = drawn("train", 60, 8, 9)
    doubled = (grids[:, 1] == WALL).all(1)
    assert 15 < doubled.sum() < 45


@pytest.mark.parametrize(("height", "width"), [(9, 9), (6, 11), (30, 30)])
def test_random_walls(height, width):
    for split in SPLITS:
        grids, answers = drawn(split, 16, height, width, kind="random_walls")
        walls = (grids == WALL).mean((1, 2))
        assert walls.min() >= 0.3 - 0.5 / (height * width)
        assert walls.max() <= 0.5 + 0.5 / (height * width)
        for grid, answer in zip(grids, answers, strict=True):
            assert distances(grid, place(grid, START))[place(grid, GOAL)] >= max(height, width)
            if height < 30:
                assert answer.tobytes() in all_answers(grid)
        assert is_valid(grids.reshape(16, -1), answers.reshape(16, -1), height, width).all()


def test_lengths_are_uniform_in_the_given_range():
    grids, answers = drawn("train", 1200, 11, 11, min_length=10, max_length=29)
    lengths = solve(grids.reshape(1200, -1), 11, 11)[1]
    assert ((answers == PATH).sum((1, 2)) == lengths - 1).all()
    counts = np.bincount(lengths, minlength=30)[10:]
    assert counts.sum() == 1200
    assert ((counts - 60) ** 2 / 60).sum() < 19 + 5 * np.sqrt(2 * 19)


def test_published_settings():
    grids, _ = drawn("train", 8, 30, 30, min_length=100, max_length=140)
    lengths = solve(grids.reshape(8, -1), 30, 30)[1]
    assert lengths.min() >= 100
    assert lengths.max() <= 140
    grids, _ = drawn("train", 8, 30, 30, kind="random_walls", min_length=61)
    assert (solve(grids.reshape(8, -1), 30, 30)[1] >= 61).all()


grids_4x5 = st.lists(st.sampled_from([WALL, OPEN, OPEN]), min_size=18, max_size=18)


@settings(max_examples=80, deadline=None)
@given(grids_4x5, st.permutations(range(20)), st.lists(st.integers(0, 19), max_size=3))
def test_validity_against_all_shortest_paths(cells, order, spoiled):
    grid = np.array([START, GOAL, *cells], dtype=np.uint8)[list(order)]
    answers = all_answers(grid.reshape(4, 5))
    solution, length = solve([grid], 4, 5)
    if not answers:
        assert length[0] == -1
        return
    assert solution[0].tobytes() in answers
    proposals = [np.frombuffer(a, dtype=np.uint8).copy() for a in sorted(answers)]
    for proposal in list(proposals):
        changed = proposal.copy()
        changed[spoiled] = np.where(changed[spoiled] == PATH, OPEN, PATH)
        proposals.append(changed)
    proposals += [grid, np.full(20, PATH, dtype=np.uint8)]
    expected = [p.tobytes() in answers for p in proposals]
    assert is_valid([grid] * len(proposals), proposals, 4, 5).tolist() == expected


def test_another_shortest_path_counts():
    task = tasks.create_task("maze", size=3, kind="random_walls", min_length=4)
    inputs = torch.tensor([[3, 2, 2, 2, 1, 2, 2, 2, 4]] * 4)
    right = torch.tensor([3, 5, 5, 2, 1, 5, 2, 2, 4])
    other = torch.tensor([3, 2, 2, 5, 1, 2, 5, 5, 4])
    both = torch.tensor([3, 5, 5, 5, 1, 5, 5, 5, 4])
    broken = torch.tensor([3, 5, 5, 2, 1, 2, 2, 5, 4])
    batch = tasks.Batch(inputs, right.repeat(4, 1), {"length": torch.tensor([4, 4, 4, 4])})
    predictions = torch.stack([right, other, both, broken])
    scores = task.score(batch, predictions)
    assert scores["exact"] == 0.25
    assert scores["valid"] == 0.5
    assert scores["slices"]["length"]["4"]["valid"] == 0.5
    assert "another shortest path" in task.render(batch, 1, predictions)
    assert "wrong" in task.render(batch, 3, predictions)
    predictions[0, 4] = 99
    assert task.score(batch, predictions)["valid"] == 0.25


def all_paths(grid: np.ndarray) -> set[bytes]:
    """The maze with each path from start to goal that does not touch itself, of any length."""
    start, goal, found = place(grid, START), place(grid, GOAL), set()

    def walk(path):
        for cell in neighbours(grid, path[-1]):
            if sum(near in path for near in neighbours(grid, cell)) > 1:
                continue
            if cell == goal:
                answer = grid.copy()
                for step in path[1:]:
                    answer[step] = PATH
                found.add(answer.tobytes())
            elif cell not in path:
                walk([*path, cell])

    walk([start])
    return found


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([WALL, OPEN, OPEN, OPEN]), min_size=14, max_size=14), st.permutations(range(16)))
def test_paths_of_any_length(cells, order):
    grid = np.array([START, GOAL, *cells], dtype=np.uint8)[list(order)]
    found = all_paths(grid.reshape(4, 4))
    open_ = np.flatnonzero(grid == OPEN)
    proposals = [np.frombuffer(a, dtype=np.uint8) for a in sorted(found)] + [grid]
    for proposal in proposals[:20]:
        for cell in open_:
            changed = proposal.copy()
            changed[cell] = PATH if changed[cell] == OPEN else OPEN
            proposals.append(changed)
    proposals.append(np.full(16, PATH, dtype=np.uint8))
    expected = [p.tobytes() in found for p in proposals]
    assert is_path([grid] * len(proposals), proposals, 4, 4).tolist() == expected
    assert not (is_valid([grid] * len(proposals), proposals, 4, 4) & ~np.array(expected)).any(), "shortest paths too"


def test_which_answers_are_right():
    inputs = torch.tensor([[3, 2, 2, 2, 2, 2, 4, 2, 2]] * 4)
    target = torch.tensor([3, 2, 2, 5, 2, 2, 4, 2, 2])
    longer = torch.tensor([3, 5, 5, 2, 2, 5, 4, 5, 5])
    touching = torch.tensor([3, 5, 2, 5, 5, 2, 4, 2, 2])
    batch = tasks.Batch(inputs, target.repeat(4, 1))
    said = torch.stack([target, longer, touching, inputs[0]])
    for answers, exact in (("target", 0.25), ("shortest", 0.25), ("path", 0.5)):
        task = tasks.create_task("maze", size=3, kind="random_walls", answers=answers)
        score = task.score(batch, said)
        assert (score["exact"], score["valid"], score["path"]) == (exact, 0.25, 0.5)
        assert task.is_right(batch, said).tolist() == [True, answers == "path", False, False]
        assert task.right_cells(batch, said)[1].all() == (answers == "path")
        assert (task.many_answers is None) == (answers == "target")
        assert "a longer path" in task.render(batch, 1, said)


@pytest.mark.parametrize("kind", ["perfect", "random_walls"])
def test_unique_mazes_have_one_shortest_path(kind):
    grids, answers = drawn("test", 60, 7, 7, kind=kind, unique=True, walls=(0.1, 0.4))
    assert [all_answers(grid) for grid in grids] == [{answer.tobytes()} for answer in answers]
    grids, _ = drawn("test", 60, 7, 7, kind="random_walls", walls=(0.1, 0.4))
    assert max(len(all_answers(grid)) for grid in grids) > 1, "without the option there are several"


def turns(grid: np.ndarray) -> list[np.ndarray]:
    copies = [np.rot90(g, k) for g in (grid, grid.T) for k in range(4)]
    return [c for c in copies if c.shape == grid.shape]


@pytest.mark.parametrize(("height", "width"), [(7, 7), (5, 9)])
@pytest.mark.parametrize("kind", ["perfect", "random_walls"])
def test_no_maze_is_in_two_splits_turned_or_flipped(height, width, kind):
    seen = {}
    for split in SPLITS:
        grids, _ = drawn(split, 150, height, width, kind=kind)
        seen[split] = {g.tobytes() for g in grids}
        copies = [np.ascontiguousarray(t) for g in grids for t in turns(g)]
        swapped = [np.where(c == START, GOAL, np.where(c == GOAL, START, c)).astype(np.uint8) for c in copies]
        seen[split + " copies"] = {c.tobytes() for c in copies + swapped}
    for a in SPLITS:
        for b in SPLITS:
            if a != b:
                assert not seen[a] & seen[b + " copies"], (a, b)


def test_fingerprint():
    grids, _ = drawn("test", 20, 9, 9)
    expected = fingerprint(grids.reshape(20, -1), 9, 9)
    assert len(set(expected)) == 20
    assert (random.split_of(expected) == 2).all()
    for copies in zip(*(turns(g) for g in grids), strict=True):
        assert (fingerprint(np.stack(copies).reshape(20, -1), 9, 9) == expected).all()


def test_repeated_training_mazes_are_turned():
    task = tasks.create_task("maze", n_puzzles=3)
    batch = task.sample(60, split="train", seed=0)
    kinds = fingerprint(batch.inputs.numpy(), 9, 9)
    assert len(set(kinds)) == 3
    assert 15 < len({r.tobytes() for r in batch.inputs.numpy()}) <= 24
    assert (kinds[:3] == kinds[57:]).all()
    assert task.score(batch, batch.targets)["valid"] == 1.0
    still = tasks.create_task("maze", n_puzzles=3, augment=False).sample(60, split="train", seed=0)
    assert len({r.tobytes() for r in still.inputs.numpy()}) == 3


@pytest.mark.parametrize(("height", "width"), [(9, 9), (6, 10)])
def test_file_round_trip(tmp_path, height, width):
    grids, answers = (g.reshape(5, -1) for g in drawn("train", 5, height, width, kind="random_walls"))
    path = tmp_path / "m.csv"
    write_mazes(path, grids, answers, height, width)
    file = read_mazes(path) if height == width else read_mazes(path, height, width)
    assert (file.height, file.width) == (height, width)
    assert (file.grids == grids).all()
    assert (file.answers == answers).all()
    first = path.read_text().splitlines()[1].split(",")
    assert set(first[1]) <= set("# SG")
    assert set(first[2]) <= set("# SGo")
    assert int(first[3]) == file.lengths[0] == first[2].count("o") + 1


def test_a_task_of_the_users_mazes(tmp_path):
    parts = [drawn(split, 30, 9, 9) for split in SPLITS]
    grids, answers = (np.concatenate([p[i] for p in parts]).reshape(90, -1) for i in range(2))
    write_mazes(tmp_path / "m.csv", grids, answers, 9, 9)
    write_mazes(tmp_path / "t.csv", grids[:10], answers[:10], 9, 9)
    task = tasks.create_task("maze", path=str(tmp_path / "m.csv"))
    for i, split in enumerate(SPLITS):
        batch = task.sample(30, split=split, seed=0)
        found = set(fingerprint(batch.inputs.numpy(), 9, 9))
        assert found == set(fingerprint(grids[30 * i : 30 * i + 30], 9, 9))
        assert task.score(batch, batch.targets)["valid"] == 1.0
    held = tasks.create_task("maze", path=str(tmp_path / "m.csv"), test_path=str(tmp_path / "t.csv"))
    assert (held.sample(10, split="test", seed=0).inputs.numpy() == grids[:10]).all()
    trained = set(fingerprint(held.sample(90, split="train", seed=0).inputs.numpy(), 9, 9))
    assert not trained & set(fingerprint(grids[:10], 9, 9))


HEADER = "source,question,answer,rating\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no puzzle"),
        ("a,b,c,d\n", "1: ',' is no cell of a maze; read are CSV with a header such as source,question,answer,rating"),
        (HEADER, "holds no puzzle"),
        (HEADER + "x,S G,SoG,2\n", "2: a maze of 3 cells is not square"),
        (HEADER + "x,S  G,S oG,2\nx,S  G ,S oG,2\n", "3: the question has 5 cells, not 4"),
        (HEADER + "x,S x ,S oG,2\n", "2: 'x' in the question"),
        (HEADER + "x,S oG,S oG,2\n", "2: 'o' in the question"),
        (HEADER + "x,S ##,S ##,2\n", "2: the maze needs one S, one G and a way"),
        (HEADER + "x,S##G,S##G,2\n", "2: the maze needs one S, one G and a way"),
        (HEADER + "x,SGGG,SGGG,1\n", "2: the maze needs one S"),
        (HEADER + "x,S  G,S oG,2\nx,S  G,SooG,2\n", "3: the answer is not the maze with a shortest path"),
        (HEADER + "x,S  G,S oG\n", "2: 3 fields"),
        ("####\n#SG\n####\n", "1: the rows of the maze have 3 to 4 cells"),
    ],
)
def test_bad_files_name_the_line(tmp_path, text, message):
    path = tmp_path / "bad.csv"
    path.write_text(text)
    with pytest.raises(tasks.UsageError, match=message) as error:
        read_mazes(path)
    assert "bad.csv" in str(error.value)
    assert "\n" not in str(error.value)


DRAWN = ["#####", "#S  #", "### #", "#G  #", "#####"]
SOLVED = ["#####", "#Soo#", "###o#", "#Goo#", "#####"]
FLAT, ANSWER = "".join(DRAWN), "".join(SOLVED)
DATASET = "\n".join(SOLVED).replace("G", "E").replace("o", "X")
FORMS = {
    "public": HEADER + f"x,{FLAT},{ANSWER},6\n",
    "quoted": f'"source","question","answer","rating"\n"x","{FLAT}","{ANSWER}","6"\n',
    "upper case": f"Maze,Solution\n{FLAT},{ANSWER}\n",
    "without answers": f"id,maze\n1,{FLAT}\n",
    "rows in quoted fields": 'question,answer\n"{}","{}"\n'.format("\n".join(DRAWN), "\n".join(SOLVED)),
    "crlf in quoted fields": 'question,answer\r\n"{}",\r\n'.format("\r\n".join(DRAWN)),
    "drawn": "\n".join(DRAWN) + "\n",
    "drawn and solved": "\r\n".join(SOLVED),
    "maze-dataset": DATASET,
    "maze-dataset in a table": f'maze,solution\n"{DATASET.replace("X", " ")}","{DATASET}"\n',
}


@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_forms_that_people_have(tmp_path, form, marked):
    path = tmp_path / "m"
    path.write_bytes(FORMS[form].encode("utf-8-sig" if marked else "utf-8"))
    file = read_mazes(path)
    assert (file.height, file.width, len(file.grids)) == (5, 5, 1)
    assert to_text(file.grids[0]) == FLAT
    assert to_text(file.answers[0]) == ANSWER


def test_drawn_mazes_have_a_size_of_their_own(tmp_path):
    path = tmp_path / "m.txt"
    path.write_text("\n\n".join(["\n".join(DRAWN[1:4])] * 2))
    file = read_mazes(path)
    assert (file.height, file.width, len(file.grids)) == (3, 5, 2)
    assert file.lines.tolist() == [1, 5]
    with pytest.raises(tasks.UsageError, match=r"m\.txt:1: the maze is drawn in 3 rows of 5, and height=5 and width=3"):
        read_mazes(path, 5, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 3}, "no path of a 3x3 maze.*the most is 0"),
        ({"size": 9, "min_length": 31}, "min_length=31 steps; the most is 30"),
        ({"min_length": 20, "max_length": 12}, "max_length=12 is less than min_length=20"),
        ({"kind": "random"}, "kind='random'.*Did you mean 'random_walls'"),
        ({"walls": (0.5, 0.3)}, "walls"),
        ({"walls": (0.5, 1.0)}, "walls"),
        ({"path": "/nowhere.csv"}, "nowhere.csv cannot be read: there is no such file"),
        ({"path": "x", "kind": "random_walls"}, "kind steers the generator"),
        ({"test_path": "x"}, "needs `path`"),
        ({"height": 0}, "height=0"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(tasks.UsageError, match=message) as error:
        tasks.create_task("maze", **options)
    assert "\n" not in str(error.value)


def test_file_of_another_size(tmp_path):
    grids, answers = (g.reshape(3, -1) for g in drawn("train", 3, 7, 7))
    write_mazes(tmp_path / "m.csv", grids, answers, 7, 7)
    with pytest.raises(tasks.UsageError, match=r"m.csv:2: .*49 cells, not 81"):
        tasks.create_task("maze", path=str(tmp_path / "m.csv"))


def test_mazes_too_rare_to_be_found():
    task = tasks.create_task("maze", size=4, kind="random_walls", min_length=15)
    with pytest.raises(tasks.UsageError, match="found no 4x4 maze with min_length=15"):
        task.sample(1, split="train", seed=0)


def test_render_is_the_maze():
    task = tasks.create_task("maze", height=7, width=9)
    batch = task.sample(1, split="train", seed=0)
    lines = task.render(batch).splitlines()
    assert len(lines) == 7
    assert all(len(line) == 18 for line in lines)
    assert sum(line.count("·") for line in lines) == (batch.targets[0] == PATH).sum()
