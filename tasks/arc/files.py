"""Puzzles in files: the two public JSON forms, read strictly."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from zoo.core.errors import UsageError
from zoo.core.readers import check_path, read_json
from zoo.tasks.arc.grids import COLOURS, LARGEST, Grid, Pair, Puzzle


def read_puzzles(folder: str | Path, subset: str) -> list[Puzzle]:
    """The puzzles of a subset, such as "training" or "evaluation", by name.

    The folder has either a folder of that name, or at that path, with a file `NAME.json` for each puzzle, as the
    repositories fchollet/ARC-AGI and arcprize/ARC-AGI-2 have it under `data`, or with a folder of such files for each
    concept, as ConceptARC has it; or all puzzles in `*SUBSET_challenges.json` and the answers to their test pairs in
    `*SUBSET_solutions.json`, as the contests on Kaggle have it.

    Raises:
        UsageError: nothing there, or anything in it that is not as it should be; names the file and the puzzle.
    """
    root = check_path(folder)
    if not os.path.isdir(root):
        raise UsageError(
            f"Cannot read {str(folder)!r}: there is no such folder; `path` should be that of ARC's puzzles."
        )
    if os.path.isdir(root / subset):
        found = list((root / subset).glob("*.json")) or list((root / subset).glob("*/*.json"))  # of ConceptARC's corpus
        files = sorted(path for path in found if path.is_file())
        puzzles = [_puzzle(path, path.stem, _load(path), None) for path in files]
    else:
        path = _challenges(root, subset)
        answers = path.with_name(path.name.replace("_challenges.json", "_solutions.json"))
        puzzles = _contest(path, answers)
    if not puzzles:
        raise UsageError(f"{str(folder)!r} holds no puzzle of {subset!r}.")
    return puzzles


def to_json(puzzle: Puzzle) -> dict[str, list[dict[str, list[list[int]]]]]:
    """A puzzle as the repositories have it in its file."""

    def pairs(of: tuple[Pair, ...]) -> list[dict[str, list[list[int]]]]:
        return [{"input": pair.question.tolist(), "output": pair.answer.tolist()} for pair in of]

    return {"train": pairs(puzzle.train), "test": pairs(puzzle.test)}


def _challenges(root: Path, subset: str) -> Path:
    ending = f"{subset}_challenges.json"
    found = [
        p for p in root.glob("*_challenges.json") if p.name == ending or p.name.endswith(("_" + ending, "-" + ending))
    ]
    if len(found) != 1:
        told = f"{len(found)} files" if found else f"neither a folder {subset!r} nor a file"
        raise UsageError(f"{str(root)!r} has {told} *{ending}; it should have one.")
    return found[0]


def _contest(path: Path, answers: Path) -> list[Puzzle]:
    """The puzzles of a file, with the answers of another, where it exists."""
    challenges = _mapping(path, "a puzzle for each name", _load(path))
    solutions = _mapping(answers, "answers for each name", _load(answers)) if answers.exists() else None
    if solutions is not None and (strange := sorted(solutions.keys() - challenges.keys())):
        raise UsageError(f"{answers}: puzzle {strange[0]!r} is not in {path.name}.")
    puzzles = []
    for name, data in challenges.items():
        if solutions is not None and name not in solutions:
            raise UsageError(f"{answers}: there is no answer to puzzle {name!r}.")
        puzzles.append(_puzzle(path, name, data, None if solutions is None else (answers, solutions[name])))
    return puzzles


def _load(path: Path) -> Any:
    def once(items: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in items]
        if len(set(keys)) < len(keys):
            raise ValueError(f"{next(k for k in keys if keys.count(k) > 1)!r} stands twice in one object")
        return dict(items)

    return read_json(path, object_pairs_hook=once)


def _mapping(path: Path, what: str, data: Any) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise UsageError(f"{path}: the file should be an object with {what}, not {_kind(data)}.")
    return data


def _puzzle(path: Path, name: str, data: Any, solved: tuple[Path, Any] | None) -> Puzzle:
    """A puzzle checked; its answers are its own, or those `solved` in the file named there."""
    where = f"{path}: puzzle {name!r}"
    if isinstance(data, list) and all(isinstance(pair, dict) for pair in data) and data:
        told = "a list of pairs, as re-arc has them, says not which are demonstrations and which are asked"
        raise UsageError(f"{where}: {told}: it should be an object with 'test' and 'train'.")
    _keys(where, data, {"train", "test"}, besides={"name", "id"})  # which a few public files have
    train = tuple(
        _pair(f"{where}: train pair {i}", p) for i, p in enumerate(_list(f"{where}: train", data["train"]), 1)
    )
    asked = _list(f"{where}: test", data["test"])
    if solved is None:
        return Puzzle(name, train, tuple(_pair(f"{where}: test pair {i}", p) for i, p in enumerate(asked, 1)))
    file, given = solved
    answers = _list(f"{file}: puzzle {name!r}", given)
    if len(answers) != len(asked):
        raise UsageError(f"{file}: puzzle {name!r} has {len(answers)} answers to {len(asked)} test pairs.")
    test = []
    for i, (pair, answer) in enumerate(zip(asked, answers, strict=True), 1):
        _keys(f"{where}: test pair {i}", pair, {"input"})
        question = _grid(f"{where}: test pair {i}: input", pair["input"])
        test.append(Pair(question, _grid(f"{file}: puzzle {name!r}: answer {i}", answer)))
    return Puzzle(name, train, tuple(test))


def _pair(where: str, data: Any) -> Pair:
    _keys(where, data, {"input", "output"})
    return Pair(_grid(f"{where}: input", data["input"]), _grid(f"{where}: output", data["output"]))


def _keys(where: str, data: Any, keys: set[str], besides: Collection[str] = ()) -> None:
    if not isinstance(data, dict) or data.keys() - set(besides) != keys:
        given = ", ".join(map(repr, data)) or "nothing" if isinstance(data, dict) else _kind(data)
        raise UsageError(f"{where} should be an object with {' and '.join(map(repr, sorted(keys)))}, not {given[:80]}.")


def _list(where: str, data: Any) -> list[Any]:
    if not isinstance(data, list) or not data:
        raise UsageError(f"{where} should be a list with something in it, not {_kind(data)}.")
    return data


def _grid(where: str, data: Any) -> Grid:
    rows = _list(where, data)
    width = len(_list(f"{where} row 1", rows[0]))
    if max(len(rows), width) > LARGEST:
        raise UsageError(f"{where} is {len(rows)}x{width}; the largest is {LARGEST}x{LARGEST}.")
    for i, row in enumerate(rows, 1):
        if len(_list(f"{where} row {i}", row)) != width:
            raise UsageError(f"{where} row {i} has {len(row)} cells where row 1 has {width}.")
        for cell in row:
            if type(cell) is not int or not 0 <= cell < COLOURS:
                raise UsageError(
                    f"{where} row {i} has {str(cell)[:20]!r}; a colour is a number from 0 to {COLOURS - 1}."
                )
    return np.array(rows, dtype=np.uint8)


def _kind(data: Any) -> str:
    """What a piece of JSON is, for a person."""
    names = {dict: "an object", list: "a list", str: "a text", type(None): "null", bool: "true or false"}
    return f"an empty {'list' if data == [] else 'object'}" if data in ([], {}) else names.get(type(data), "a number")
