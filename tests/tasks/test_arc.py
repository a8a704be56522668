"""The task `arc` on small made files in both public forms, and on the real folder where ARC_DATA names it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import zoo
from zoo import tasks
from zoo.tasks.arc import (
    Pair,
    Puzzle,
    Vote,
    augmentations,
    count_votes,
    from_tokens,
    made_puzzles,
    read_puzzles,
    to_json,
    to_tokens,
    two_guesses,
)
from zoo.tasks.arc.grids import corner_of, turn, turn_back
from zoo.tasks.arc.made import FAMILIES
from zoo.tasks.protocol import IGNORE, SPLITS
from zoo.training.recipes import read_experiment

SETS = {
    "training": made_puzzles(0, 6, 6) + made_puzzles(6, 6, 8),
    "evaluation": made_puzzles(100, 4, 6) + made_puzzles(104, 4, 8),
}


GOOD = {"train": [{"input": [[1]], "output": [[2]]}], "test": [{"input": [[3]], "output": [[4]]}]}
"""A puzzle in a file."""


def write_folders(root: Path) -> Path:
    """One file for each puzzle."""
    for name, puzzles in SETS.items():
        (root / name).mkdir()
        for puzzle in puzzles:
            (root / name / f"{puzzle.name}.json").write_text(json.dumps(to_json(puzzle)))
    return root


def write_contest(root: Path, prefix: str = "arc-agi_") -> Path:
    """All questions in one file, all answers in another."""
    for name, puzzles in SETS.items():
        data = {puzzle.name: to_json(puzzle) for puzzle in puzzles}
        answers = {key: [pair.pop("output") for pair in puzzle["test"]] for key, puzzle in data.items()}
        (root / f"{prefix}{name}_challenges.json").write_text(json.dumps(data))
        (root / f"{prefix}{name}_solutions.json").write_text(json.dumps(answers))
    return root


def arc(**options) -> tasks.Task:
    return tasks.create_task("arc", **options)


def grid(*rows: str) -> np.ndarray:
    return np.array([[int(cell) for cell in row] for row in rows], dtype=np.uint8)


def same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype == np.uint8 and np.array_equal(a, b)


# ---- tokens and maps


def test_tokens_by_hand():
    canvas = to_tokens(grid("019", "900"), 5, (1, 2))
    assert canvas.tolist() == [
        [0, 0, 0, 0, 0],
        [0, 0, 2, 3, 11],
        [0, 0, 11, 2, 2],
        [0, 0, 1, 1, 1],
        [0, 0, 0, 0, 0],
    ]
    assert to_tokens(grid("5"), 2).tolist() == [[7, 1], [1, 0]]
    assert corner_of(canvas) == (1, 2)


def test_grids_come_back_from_tokens():
    for puzzle in made_puzzles(0, 22, 8):
        for made in (g for pair in puzzle.train for g in pair):
            for corner in ((0, 0), (8 - made.shape[0], 8 - made.shape[1])):
                canvas = to_tokens(made, 8, corner)
                assert same(from_tokens(canvas, corner), made)
                canvas[canvas == 0] = 5  # what stands beyond the end of the grid is not read
                assert corner != (0, 0) or same(from_tokens(canvas), made)


def test_the_largest_rectangle_is_read():
    """Of a prediction with a hole, as the authors of TRM crop it."""
    canvas = np.full((4, 4), 3)
    canvas[1, 2] = 1
    assert from_tokens(canvas).shape == (4, 2)
    canvas[2, 0] = -100
    assert from_tokens(canvas).shape == (1, 4)  # as large as 2 x 2, and first
    assert from_tokens(np.zeros((3, 3), dtype=np.int64)).size == 0


def test_eight_turns_and_flips_and_back():
    sample = grid("012", "345")
    turned = [turn(sample, number) for number in range(8)]
    assert len({(t.shape, t.tobytes()) for t in turned}) == 8
    assert all(same(turn_back(t, number), sample) for number, t in enumerate(turned))


def test_augmentations_are_undone():
    for puzzle in made_puzzles(0, 22, 8):
        maps = augmentations(puzzle, 40)
        assert len(maps.turns) == 40
        assert (maps.colours[:, 0] == 0).all(), "black stays"
        assert (np.sort(maps.colours, 1) == np.arange(10)).all()
        assert maps.turns[0] == 0
        assert (maps.colours[0] == np.arange(10)).all()
        question = puzzle.train[0].question
        for number in range(40):
            assert same(maps.undo(number, maps.apply(number, question)), question)
        again = augmentations(puzzle, 25)
        assert (again.turns == maps.turns[:25]).all(), "the first ones are the same, however many"
        assert (again.colours == maps.colours[:25]).all()


def test_no_map_of_a_puzzle_does_what_another_does():
    one = Puzzle("one colour", (Pair(grid("07", "00"), grid("70", "00")),), (Pair(grid("00", "07"), grid("00", "70")),))
    maps = augmentations(one, 1000)
    done = {tuple(maps.apply(i, g).tobytes() for g in one.train[0]) for i in range(len(maps.turns))}
    assert len(maps.turns) == len(done) == 8 * 9, "every turn with every colour, and no more"


# ---- files


def test_both_forms_are_read_alike(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    folders, contest = write_folders(tmp_path / "a"), write_contest(tmp_path / "b")
    for name, puzzles in SETS.items():
        for root in (folders, contest):
            read = {puzzle.name: puzzle for puzzle in read_puzzles(root, name)}
            assert sorted(read) == sorted(p.name for p in puzzles)
            for puzzle in puzzles:
                assert to_json(read[puzzle.name]) == to_json(puzzle)
    one, other = ({p.name: n for p, n in zip(t.puzzles, t._n_maps, strict=True)} for t in map(of, (folders, contest)))
    assert one == other


def of(root: Path, **options) -> tasks.Task:
    return arc(path=str(root), size=8, n_augmentations=4, **options)


def test_a_file_may_tell_its_name(tmp_path):
    write_folders(tmp_path)
    (tmp_path / "training" / "x.json").write_text(json.dumps(GOOD | {"name": "y"}))
    assert [p.name for p in read_puzzles(tmp_path, "training") if to_json(p) == GOOD] == ["x"]


def test_subsets_are_chosen_by_name(tmp_path):
    write_contest(tmp_path)
    write_contest(tmp_path, prefix="other-")
    with pytest.raises(zoo.UsageError, match=r"has 2 files \*training_challenges.json; it should have one"):
        of(tmp_path)
    names = {"training": ("arc-agi_training",), "evaluation": ("arc-agi_evaluation",)}
    assert len(of(tmp_path, **names).puzzles) == 20


DAMAGED = [
    ("", "no JSON (Expecting value)"),
    ('{"train": [', "this is no JSON ("),
    ("[" * 100_000, "nested too deeply"),
    (b"\xff\xfe\xff", "it is UTF-16; save it as UTF-8"),
    ('{"train": [], "train": []}', "'train' stands twice in one object"),
    ("[]", "puzzle 'x' should be an object with 'test' and 'train', not an empty list"),
    ({"train": GOOD["train"]}, "puzzle 'x' should be an object with 'test' and 'train', not 'train'"),
    (GOOD | {"code": "print()"}, "should be an object with 'test' and 'train', not 'train', 'test', 'code'"),
    (GOOD | {"train": []}, "puzzle 'x': train should be a list with something in it, not an empty list"),
    (GOOD | {"train": "1"}, "puzzle 'x': train should be a list with something in it, not a text"),
    (GOOD | {"test": [{"input": [[1]]}]}, "puzzle 'x': test pair 1 should be an object with 'input' and 'output'"),
    (GOOD | {"test": [3]}, "test pair 1 should be an object with 'input' and 'output', not a number"),
]
GRIDS = [
    ([], "output should be a list with something in it, not an empty list"),
    (None, "output should be a list with something in it, not null"),
    ([[]], "output row 1 should be a list with something in it"),
    ([[1, 2], [3]], "output row 2 has 1 cells where row 1 has 2"),
    ([[1], 2], "output row 2 should be a list with something in it, not a number"),
    ([[10]], "output row 1 has '10'; a colour is a number from 0 to 9"),
    ([[-1]], "output row 1 has '-1'"),
    ([[1.0]], "output row 1 has '1.0'"),
    ([[True]], "output row 1 has 'True'"),
    ([["1"]], "output row 1 has '1'"),
    ([[0]] * 31, "output is 31x1; the largest is 30x30"),
    ([[0] * 31], "output is 1x31; the largest is 30x30"),
]


DAMAGED += [(GOOD | {"train": [{"input": [[1]], "output": g}]}, f"train pair 1: {told}") for g, told in GRIDS]


@pytest.mark.parametrize(("data", "told"), DAMAGED, ids=range(len(DAMAGED)))
def test_damaged_files(tmp_path, data, told):
    write_folders(tmp_path)
    raw = data if isinstance(data, bytes) else (data if isinstance(data, str) else json.dumps(data)).encode()
    (tmp_path / "training" / "x.json").write_bytes(raw)
    with pytest.raises(zoo.UsageError) as error:
        of(tmp_path)
    assert told in str(error.value)
    assert str(error.value).startswith(f"{tmp_path / 'training' / 'x.json'}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda q, a: a.pop("swap-0"), "there is no answer to puzzle 'swap-0'"),
        (lambda q, a: a.update(other=[[[1]]]), "puzzle 'other' is not in arc-agi_training_challenges.json"),
        (lambda q, a: a["swap-0"].append([[1]]), "answers to"),
        (lambda q, a: a.update({"swap-0": 7}), "puzzle 'swap-0' should be a list with something in it, not a number"),
        (lambda q, a: a["swap-0"].__setitem__(0, [[12]]), "puzzle 'swap-0': answer 1 row 1 has '12'"),
        (lambda q, a: q["swap-0"]["test"][0].update(output=[[1]]), "test pair 1 should be an object with 'input', not"),
        (lambda q, a: q.clear() or a.clear(), "holds no puzzle of 'training'"),
    ],
)
def test_damaged_contests(tmp_path, change, told):
    write_contest(tmp_path)
    files = [tmp_path / f"arc-agi_training_{what}.json" for what in ("challenges", "solutions")]
    data = [json.loads(file.read_text()) for file in files]
    change(*data)
    for file, changed in zip(files, data, strict=True):
        file.write_text(json.dumps(changed))
    with pytest.raises(zoo.UsageError) as error:
        of(tmp_path)
    assert told in str(error.value)
    assert "\n" not in str(error.value)


def test_answers_that_are_missing_altogether(tmp_path):
    write_contest(tmp_path)
    (tmp_path / "arc-agi_evaluation_solutions.json").unlink()
    with pytest.raises(zoo.UsageError, match=r"test pair 1 should be an object with 'input' and 'output', not 'input'"):
        of(tmp_path)


def test_sets_that_are_taught_may_overlap(tmp_path):
    """As ARC-1 and ARC-2 do: a puzzle that is the same in both is one, another of its name is another."""
    write_folders(tmp_path)
    alone = len(of(tmp_path).puzzles)
    shutil.copytree(tmp_path / "training", tmp_path / "training2")
    assert len(of(tmp_path, training=("training", "training2")).puzzles) == alone
    (tmp_path / "training2" / "new.json").write_text(json.dumps(GOOD))
    (tmp_path / "training" / "new.json").write_text(json.dumps(GOOD | {"train": GOOD["train"] * 2}))
    assert len(of(tmp_path, training=("training", "training2")).puzzles) == alone + 2
    shutil.copytree(tmp_path / "evaluation", tmp_path / "evaluation2")
    assert len(of(tmp_path, evaluation=("evaluation", "evaluation2")).puzzles) == alone + 1
    with pytest.raises(zoo.UsageError, match="has the puzzle 'new' twice in the sets that are asked, and not alike"):
        of(tmp_path, training=("evaluation",), evaluation=("training", "training2"))


def test_a_set_may_be_a_path_and_hold_a_folder_for_each_concept(tmp_path):
    """ConceptARC: corpus/AboveBelow/AboveBelow1.json and so on."""
    write_folders(tmp_path)
    for concept in ("AboveBelow", "Count"):
        (tmp_path / "corpus" / concept).mkdir(parents=True)
        for i in (1, 2, 3):
            path = tmp_path / "corpus" / concept / f"{concept}{i}.json"
            path.write_text(json.dumps(GOOD | {"id": path.stem}))
    n = len(of(tmp_path).puzzles) - len(SETS["training"])
    assert len(of(tmp_path, training=("corpus",)).puzzles) == n + 6
    assert len(of(tmp_path, training=("corpus/Count",)).puzzles) == n + 3
    assert len(of(tmp_path / "corpus", training=("Count",), evaluation=("AboveBelow",)).puzzles) == 6


def test_the_form_of_re_arc_is_named(tmp_path):
    write_folders(tmp_path)
    (tmp_path / "training" / "x.json").write_text(json.dumps(GOOD["train"]))
    with pytest.raises(zoo.UsageError, match="puzzle 'x': a list of pairs, as re-arc has them, says not which are"):
        of(tmp_path)


def test_a_puzzle_in_both_sets_is_refused(tmp_path):
    write_folders(tmp_path)
    (tmp_path / "training" / "twice.json").write_text(json.dumps(GOOD))
    (tmp_path / "evaluation" / "twice.json").write_text(json.dumps(GOOD))
    with pytest.raises(zoo.UsageError, match="has the puzzle 'twice' in a set that is taught and in one"):
        of(tmp_path)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"size": 5}, "size=5 is too small for made puzzles: the least is 6"),
        ({"size": 31}, "size=31 is not allowed"),
        ({"training": ("concept",)}, "training names files, and made puzzles have none: set `path`"),
        ({"path": "no/such/folder"}, "Cannot read 'no/such/folder': there is no such folder; `path` should be"),
        ({"path": ".", "n_made": 9}, r"n_made=9 is for made puzzles and cannot go with path='\.'"),
        ({"path": "docs"}, "'docs' has neither a folder 'training' nor a file \\*training_challenges.json"),
    ],
)
def test_wrong_options(options, told):
    with pytest.raises(zoo.UsageError, match=told):
        arc(**options)


def test_puzzles_that_do_not_fit_are_left_out(tmp_path):
    write_folders(tmp_path)
    found = of(tmp_path)
    smaller = arc(path=str(tmp_path), size=6, n_augmentations=4)
    assert {p.name for p in smaller.puzzles} == {p.name for p in found.puzzles if p.side <= 6}
    assert 10 <= len(smaller.puzzles) < len(found.puzzles) == 20
    with pytest.raises(zoo.UsageError, match=r"has 0 training and 0 evaluation puzzles within size=2"):
        arc(path=str(tmp_path), size=2)


# ---- rows


def whose(task, batch) -> list[tuple[int, int]]:
    """(puzzle, map) of each row."""
    owners = np.searchsorted(task._first, batch.puzzles.numpy(), side="right") - 1
    return [(int(o), int(p - task._first[o])) for o, p in zip(owners, batch.puzzles.tolist(), strict=True)]


@pytest.mark.parametrize("split", SPLITS)
def test_rows_are_pairs_of_their_puzzle(split):
    task = arc(n_made=11, n_augmentations=3)
    batch = task.sample(200, split=split, seed=1)
    for i, (owner, number) in enumerate(whose(task, batch)):
        puzzle, maps = task.puzzles[owner], task._maps[owner]
        question, answer = (maps.undo(number, g) for g in task._grids(batch, i))
        is_evaluation = owner >= 11
        allowed = puzzle.test if split != "train" else puzzle.train if is_evaluation else puzzle.train + puzzle.test
        assert any(same(question, pair.question) and same(answer, pair.answer) for pair in allowed)
        assert split == "train" or is_evaluation
        inputs, targets = batch.inputs[i].view(8, 8), batch.targets[i].view(8, 8)
        corner = corner_of(inputs.numpy())
        for tokens, shown in ((inputs, question), (targets, answer)):
            marked = torch.from_numpy(to_tokens(maps.apply(number, shown), 8, corner))
            assert torch.equal(tokens, marked if tokens is inputs else marked.where(marked > 0, IGNORE))


def test_every_pair_comes_once_in_an_epoch_of_training():
    task = arc(n_made=8, n_augmentations=2)
    n = len(task._members["train"])
    epochs = [task._taught(start, n, "train", 5).pairs for start in (0, n, 2 * n)]
    assert all((np.sort(pairs) == task._members["train"]).all() for pairs in epochs)
    assert not (epochs[0] == epochs[1]).all()
    assert not (epochs[1] == epochs[2]).all()
    maps = {number for _, number in whose(task, task.sample(n, split="train", seed=5))}
    assert maps == {0, 1}


def test_training_rows_lie_anywhere():
    corners = {}
    for translate in (True, False):
        batch = arc(translate=translate).sample(300, split="train", seed=0)
        corners[translate] = [corner_of(row.view(8, 8).numpy()) for row in batch.inputs]
    assert set(corners[False]) == {(0, 0)}
    assert len(set(corners[True])) > 15
    assert 60 < corners[True].count((0, 0)) < 200, "a fifth stays, and some grids fill the canvas"
    asked = arc().sample(300, split="test", seed=0)
    assert {corner_of(row.view(8, 8).numpy()) for row in asked.inputs} == {(0, 0)}


def test_asked_pairs_come_map_by_map():
    task = arc(n_made=20, n_augmentations=3)
    for split, count in (("validation", 5), ("test", 15)):
        n = len(task._members[split])
        batch = task.sample(3 * n + 2, split=split, seed=0)
        rows = whose(task, batch)
        assert len({owner for owner, _ in rows}) == count
        assert [number for _, number in rows] == [0] * n + [1] * n + [2] * n + [0] * 2
        assert [owner for owner, _ in rows[:n]] == [owner for owner, _ in rows[n : 2 * n]]
        assert torch.equal(batch.inputs[:2], batch.inputs[3 * n :])


def test_puzzles_with_fewer_maps_leave_the_line(tmp_path):
    write_folders(tmp_path)
    (tmp_path / "evaluation" / "x.json").write_text(json.dumps(GOOD))
    few = GOOD | {"train": [{"input": [[0]], "output": [[0, 1]]}], "test": [{"input": [[1]], "output": [[1, 0]]}]}
    (tmp_path / "evaluation" / "y.json").write_text(json.dumps(few))
    task = arc(path=str(tmp_path), size=8, n_augmentations=100)
    counts = {p.name: n for p, n in zip(task.puzzles, task._n_maps.tolist(), strict=True)}
    assert counts["y"] == 8 * 9 < counts["x"] == 100
    rows = set()
    for split in ("validation", "test"):
        mine = whose(task, task.sample(sum(task._n_maps[task._owners[task._members[split]]]), split=split, seed=0))
        rows |= set(mine)
    asked = range(len(SETS["training"]), len(task.puzzles))
    assert rows == {(i, k) for i in asked for k in range(task._n_maps[i])}, "every map of every asked puzzle"


def test_numbers_are_puzzles_under_maps():
    task = arc(n_made=10, n_augmentations=5)
    assert task.n_puzzles == 1 + 20 * 5
    batch = task.sample(3000, split="train", seed=0)
    assert set(batch.puzzles.tolist()) == set(range(1, task.n_puzzles)), "0 is no puzzle"


def test_made_puzzles_have_one_rule_each():
    puzzles = made_puzzles(0, 8 * len(FAMILIES), 8)
    assert {p.name.rsplit("-", 1)[0] for p in puzzles} == set(FAMILIES)
    assert max(p.side for p in puzzles) == 8
    for puzzle in puzzles:
        pairs = puzzle.train + puzzle.test
        assert len({(p.question.shape, p.question.tobytes()) for p in pairs}) == len(pairs)
        assert any(not same(p.question, p.answer) for p in pairs)
    gravity = next(p for p in puzzles if p.name.startswith("gravity"))
    for question, answer in gravity.train:
        assert (np.bincount(question.ravel(), minlength=10) == np.bincount(answer.ravel(), minlength=10)).all()
    for question, answer in next(p for p in puzzles if p.name.startswith("enlarge")).train:
        assert same(answer[::2, ::2], question)
        assert same(answer[1::2, 1::2], question)


# ---- votes


def test_votes_by_hand():
    a, b, c, d = (grid(str(i)) for i in range(4))
    question, other = grid("55"), grid("66")

    def vote(given, confidence=0.0, asked=question, puzzle="p"):
        return Vote(puzzle, asked, d, given, confidence)

    (ballot,) = count_votes([vote(a), vote(b), vote(c), vote(c), vote(b)])
    assert [(g.grid.item(), g.votes) for g in ballot.guesses] == [(1, 2), (2, 2), (0, 1)], (
        "ties by which was seen first"
    )
    assert not ballot.solved()
    (ballot,) = count_votes([vote(a, 9.0), vote(b, 0.1), vote(c, 0.2), vote(c, 0.4), vote(b, 0.1)])
    assert [g.grid.item() for g in ballot.guesses] == [2, 1, 0], "then by confidence, which counts only between equals"
    assert ballot.guesses[0].confidence == pytest.approx(0.3)
    ballots = count_votes(
        [
            vote(a), vote(d), vote(a), vote(b), vote(d),  # the second guess is right
            vote(a, asked=other), vote(b, asked=other), vote(d, asked=other),  # the third would be
            vote(d, puzzle="q"),
        ]
    )  # fmt: skip
    assert [(ballot.puzzle, ballot.solved()) for ballot in ballots] == [("p", True), ("p", False), ("q", True)]
    assert [ballot.solved(1) for ballot in ballots] == [False, False, True]
    assert ballots[1].solved(3)
    assert two_guesses(ballots) == pytest.approx(2 / 3)


def test_a_grid_of_another_shape_is_another_grid():
    flat, tall = grid("12"), grid("1", "2")
    (ballot,) = count_votes([Vote("p", flat, tall, flat), Vote("p", flat, tall, flat), Vote("p", flat, tall, tall)])
    assert [g.votes for g in ballot.guesses] == [2, 1]
    assert not ballot.solved(1)


def test_augmented_answers_vote_for_one_grid():
    task = arc(n_made=8, n_augmentations=6)
    n = len(task._members["test"])
    batch = task.sample(6 * n, split="test", seed=0)
    right = batch.targets.where(batch.targets != IGNORE, 1)
    ballots = task.ballots(batch, right)
    assert len(ballots) == n
    for ballot in ballots:
        assert [(g.votes, ballot.solved()) for g in ballot.guesses] == [(6, True)]
    # Wrong in most rows, each time in another way: the two right ones win. With one right one, confidence has to help.
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(2, 12, right.shape, generator=generator)
    some = torch.where((torch.arange(6 * n) < 2 * n)[:, None], right, noise)
    score = task.score(batch, some)
    assert score["two_guesses"] == 1.0
    assert score["exact"] == pytest.approx(1 / 3)
    one = torch.where((torch.arange(6 * n) >= 5 * n)[:, None], right, noise)
    assert two_guesses(task.ballots(batch, one)) == 0.0
    sure = (torch.arange(6 * n) >= 5 * n).float()
    assert two_guesses(task.ballots(batch, one, sure)) == 1.0
    assert task.score(batch, noise)["two_guesses"] == 0.0
    with pytest.raises(zoo.UsageError, match="the batch should have `puzzles`"):
        task.score(batch._replace(puzzles=None), right)


def test_moved_training_rows_vote_too():
    task = arc(n_made=8, n_augmentations=6)
    batch = task.sample(100, split="train", seed=0)
    assert task.score(batch, batch.targets)["two_guesses"] == 1.0


# ---- pictures


def test_pictures_by_hand(tmp_path):
    question, answer = grid("07", "80"), grid("123")
    puzzle = to_json(Puzzle("x", (Pair(question, answer),), (Pair(question, answer),)))
    write_folders(tmp_path)
    for name in SETS:
        (tmp_path / name / f"{name}.json").write_text(json.dumps(puzzle))
    task = of(tmp_path)
    batch = next(
        b
        for split in ("validation", "test")
        for i in range(40)
        if task.puzzles[whose(task, b := task.sample(1, split=split, seed=0, start=i))[0][0]].name == "evaluation"
    )
    assert whose(task, batch)[0][1] == 0
    assert task.render(batch).splitlines() == ["input   answer", "⬛🟧    🟦🟥🟩", "🔵⬛"]
    lines = task.render(batch, 0, torch.where(batch.targets == 4, 5, batch.targets)).splitlines()
    assert lines[0].endswith("predicted: wrong (! differs)")
    assert lines[1].endswith("🟦 🟩!🟩")
    assert "right" in task.render(batch, 0, batch.targets)
    figure = task.draw(batch, 0, torch.where(batch.targets == 4, 5, batch.targets))
    assert [ax.get_title() for ax in figure.axes] == ["input", "answer", "predicted: wrong"]
    assert len(figure.axes[2].lines) == 2 + 1, "the lines between cells, and one cross"
    nothing = torch.zeros_like(batch.inputs)
    assert len(task.draw(batch, 0, nothing).axes) == 3
    assert "wrong" in task.render(batch, 0, nothing)


# ---- training


def test_the_recipe_on_small_made_puzzles(tmp_path):
    (tmp_path / "data").mkdir()
    write_contest(tmp_path / "data")
    changes = {
        "task.path": str(tmp_path / "data"), "task.size": 6, "task.n_augmentations": 3, "out": str(tmp_path / "run"),
        "model.pattern": "2*(mha(n_heads=2) swiglu)", "model.d_model": 16, "model.recursion.prefix": 2,
        "model.recursion.max_steps": 2, "train.steps": 4, "train.batch_size": 4, "train.eval_every": 2,
        "train.eval_rows": 6, "train.test_rows": 6, "train.warmup_steps": 2, "train.device": "cpu", "train.threads": 1,
    }  # fmt: skip
    threads = torch.get_num_threads()
    try:
        result = zoo.train(read_experiment("arc-trm", changes), quiet=True)
    finally:
        torch.set_num_threads(threads)
    assert (result.status, result.data["steps"]) == ("finished", 4)
    numbered = arc(**{k.removeprefix("task."): v for k, v in changes.items() if k.startswith("task.")}).n_puzzles
    assert result.data["model"]["recursion"]["n_puzzles"] == numbered >= 1 + 3 * 10
    assert 0 <= result.data["test"]["two_guesses"] <= 1


# ---- the real thing

REAL = os.environ.get("ARC_DATA")


@pytest.mark.skipif(not REAL, reason="ARC_DATA names no folder of ARC's puzzles")
def test_real_puzzles():
    task = arc(path=REAL, n_augmentations=50)
    n_evaluation = sum(len(task._members[split]) for split in ("validation", "test"))
    first = [len(read_puzzles(REAL, subset)) for subset in ("training", "evaluation")]
    assert len(task.puzzles) == sum(first), "all fit on 30 x 30"
    asked = [pair for puzzle in task.puzzles[first[0] :] for pair in puzzle.test]
    assert len(asked) == n_evaluation
    assert task.n_puzzles <= 1 + 50 * len(task.puzzles)
    batch = task.sample(2 * len(task._members["validation"]), split="validation", seed=0)
    assert batch.inputs.shape[1] == 900
    score = task.score(batch, batch.targets)
    assert score["two_guesses"] == score["exact"] == 1.0
    ballots = task.ballots(batch, batch.targets)
    assert {ballot.guesses[0].votes for ballot in ballots} == {2}
    answers = {pair.answer.tobytes() for pair in asked}
    assert all(ballot.answer.tobytes() in answers for ballot in ballots)
    train = task.sample(500, split="train", seed=0)
    assert task.score(train, train.targets)["two_guesses"] == 1.0
    evaluated = {row.numpy().tobytes() for row in batch.inputs}
    assert not evaluated & {row.numpy().tobytes() for row in train.inputs}
