"""Tables of puzzles, and of questions, in files from anywhere; and which of their rows make which split."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from zoo.core.errors import UsageError
from zoo.core.readers import MOST_BYTES, at_line, shown, unreadable
from zoo.tasks import random
from zoo.tasks.protocol import SPLITS, Split

HEADER = ("source", "question", "answer", "rating")


class Rows(NamedTuple):
    """n rows of text: line numbers (n,) int64 from 1, and fields, "" where the file has none."""

    lines: NDArray[np.int64]
    questions: list[str]
    answers: list[str]
    ratings: list[str]


QUESTIONS = ("question", "puzzle", "puzzles", "quizzes", "quiz", "sudoku", "board", "grid", "maze", "mazes", "unsolved")
ANSWERS = ("answer", "answers", "solution", "solutions", "solved")
RATINGS = ("rating", "difficulty", "level")
COLUMNS = {"question": QUESTIONS, "answer": ANSWERS, "rating": RATINGS}
"""What public files call the columns, in whatever case."""


def rows_of(path: str | Path, rows: Sequence[tuple[int, str, str, str]]) -> Rows:
    """Rows from (line, question, answer, rating).

    Raises:
        UsageError: there is none.
    """
    if not rows:
        raise UsageError(f"{shown(path)} holds no puzzle.")
    lines, questions, answers, ratings = zip(*rows, strict=True)
    return Rows(np.array(lines, dtype=np.int64), list(questions), list(answers), list(ratings))


def read_table(
    path: str | Path, text: str, columns: dict[str, tuple[str, ...]]
) -> list[tuple[int, dict[str, str]]] | None:
    """The rows of a table (CSV, or separated by semicolons or tabs), each with its line; None where it is no such one.

    Args:
        text: of the file. Empty lines and comments (`#`) may stand before the header.
        columns: what to call a column, and which names files give it, in whatever case; others are left out. A table
            has to have the first.

    Raises:
        UsageError: a row has another number of fields than the header, or the table is damaged.
    """
    begin, line = 0, 1
    for candidate in io.StringIO(text, newline=""):
        if candidate.strip() and not candidate.startswith("#"):
            break
        begin, line = begin + len(candidate), line + 1
    else:
        return None
    for delimiter in ",;\t":
        header = [name.strip().lower() for name in next(csv.reader([candidate.strip("\r\n")], delimiter=delimiter), [])]
        places = {
            key: next(i for i, name in enumerate(header) if name in names)
            for key, names in columns.items()
            if set(names) & set(header)
        }
        if next(iter(columns)) in places:
            return list(_table_rows(path, text[begin:], line, delimiter, len(header), places))
    return None


def _table_rows(
    path: str | Path, text: str, line: int, delimiter: str, n_fields: int, places: dict[str, int]
) -> Iterator[tuple[int, dict[str, str]]]:
    limit = csv.field_size_limit(MOST_BYTES)
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
        next(reader)
        for fields in reader:
            if not any(field.strip() for field in fields):
                continue
            if len(fields) != n_fields:
                at = line + reader.line_num - 1
                raise at_line(path, at, f"{len(fields)} fields, where the header has {n_fields}")
            yield line + reader.line_num - 1, {key: fields[place] for key, place in places.items()}
    except csv.Error as error:
        raise unreadable(path, error) from None
    finally:
        csv.field_size_limit(limit)


def write_rows(
    path: str | Path, source: str, questions: Iterable[str], answers: Iterable[str], ratings: Iterable
) -> None:
    """Write rows in the public CSV form."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(HEADER)
        writer.writerows((source, *row) for row in zip(questions, answers, ratings, strict=True))


def require(path: str | Path, lines: NDArray[np.int64], right: NDArray[np.bool_], message: str) -> None:
    """Raises UsageError for the first row that is not right (n,)."""
    if not right.all():
        raise at_line(path, int(lines[np.argmin(right)]), message)


def decode(
    path: str | Path, lines: NDArray[np.int64], texts: Sequence[str], table: dict[str, int], cells: int, what: str
) -> NDArray[np.uint8]:
    """(n, cells) codes of texts by a table of characters.

    Raises:
        UsageError: a text of another length, or with a character that is not in the table.
    """
    for line, text in zip(lines.tolist(), texts, strict=True):
        if len(text) != cells:
            raise at_line(path, line, f"the {what} has {len(text)} cells, not {cells}")
    raw = np.frombuffer("".join(texts).encode("latin-1", "replace"), dtype=np.uint8).reshape(-1, cells)
    codes = np.full(256, 255, dtype=np.uint8)
    for character, code in table.items():
        codes[ord(character)] = code
    decoded = codes[raw]
    strange = decoded == 255
    if strange.any():
        row, cell = (int(i) for i in np.argwhere(strange)[0])
        allowed = " ".join(map(repr, table))
        raise at_line(path, int(lines[row]), f"{texts[row][cell]!r} in the {what}; allowed are {allowed}")
    return decoded


class Shelves:
    """Which rows of a file make a stream: split by fingerprint; a second file, where given, is the test split."""

    def __init__(self, path: str, main: random.Keys, test: random.Keys | None = None, n_train: int | None = None):
        """Files are given by the fingerprints (n,) of their rows.

        Rows of the first file that are also in the second, up to symmetry, belong to no split. `n_train` rows,
        chosen by the seed, make a training epoch; all, where it is None.
        """
        self._path, self._n_train, self._has_test = path, n_train, test is not None
        split = random.split_of(main)
        self._members = {name: np.flatnonzero(split == i) for i, name in enumerate(SPLITS)}
        if test is not None:
            free = ~np.isin(main, test)
            validation = split == SPLITS.index("validation")
            self._members = {
                "train": np.flatnonzero(free & ~validation),
                "validation": np.flatnonzero(free & validation),
                "test": np.arange(len(test)),
            }
        self._epoch: tuple[int, NDArray[np.int64]] | None = None

    def rows(self, start: int, n: int, split: Split, seed: int) -> tuple[bool, NDArray[np.int64]]:
        """Whether to look in the second file, and the places there of rows start ... start + n - 1.

        A training stream goes through its rows in an order set by the seed, again and again; the others go through
        theirs in file order.

        Raises:
            UsageError: no row belongs to the split.
        """
        members = self._members[split]
        if not len(members):
            raise UsageError(f"Nothing in {self._path!r} falls into the split {split!r}; give more.")
        if split == "train":
            members = self._shuffled(members, seed)
        return self._has_test and split == "test", members[np.arange(start, start + n) % len(members)]

    def _shuffled(self, members: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
        if self._epoch is None or self._epoch[0] != seed:
            key = random.fold(random.row_keys("train", seed, 0, 1), 1)
            self._epoch = seed, members[random.permutation(key, len(members))[: self._n_train]]
        return self._epoch[1]
