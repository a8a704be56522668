"""Files that nobody vouches for, read in one way; puzzles in them, and which rows make which split."""

from __future__ import annotations

import csv
import io
import json
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tasks import random
from tasks.protocol import SPLITS, Split
from tasks.registry import UsageError, quoted

HEADER = ("source", "question", "answer", "rating")


MOST_BYTES = 2**31
"""The most that is read of a file, where a reader names no other limit."""
MOST_BYTES_OF_NAME, MOST_BYTES_OF_PATH = 255, 4000
_FORMS = {  # how files begin that people take for text
    b"\xff\xfe": "UTF-16; save it as UTF-8",
    b"\xfe\xff": "UTF-16; save it as UTF-8",
    b"\x1f\x8b": "compressed by gzip; unpack it first",
    b"PK\x03\x04": "a ZIP archive; unpack it first",
    b"BZh": "compressed by bzip2; unpack it first",
    b"\xfd7zXZ": "compressed by xz; unpack it first",
    b"\x28\xb5\x2f\xfd": "compressed by zstd; unpack it first",
    b"PAR1": "a Parquet table; save it as CSV or JSON",
}
_KINDS: tuple[tuple[Callable[[int], bool], str], ...] = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe; write what comes through it to a file first"),
    (stat.S_ISSOCK, "a socket"),
    (lambda mode: not stat.S_ISREG(mode), "a device"),
)


def shown(text: object) -> str:
    """Text of an untrusted file, or a path, as it may stand in a message: one line, nothing that a terminal obeys."""
    return str(text) if str(text).isprintable() else ascii(str(text))[1:-1]


def unreadable(path: str | Path, reason: object) -> UsageError:
    """The error for a file that cannot be read."""
    if isinstance(reason, OSError):
        reason = reason.strerror or reason
    text = " ".join(str(reason).split())  # some libraries' reasons have several lines
    return UsageError(f"{shown(path)} cannot be read: {shown(text)[:300].rstrip('.')}.")


def check_path(path: str | Path, given_as: str = "") -> Path:
    """A path that a file could have, which need not be there.

    Args:
        path: as a person gave it.
        given_as: the option it was given by, for errors.

    Raises:
        UsageError: no file could have it.
    """
    data = os.fsencode(path)
    why = "it holds the character NUL" if b"\0" in data else ""
    if len(data) > MOST_BYTES_OF_PATH or any(len(part) > MOST_BYTES_OF_NAME for part in data.split(b"/")):
        why = f"names may have {MOST_BYTES_OF_NAME} bytes, and paths {MOST_BYTES_OF_PATH:,}"
    if why:
        raise UsageError(f"{given_as}{'=' if given_as else ''}{quoted(str(path), 60)} is not allowed: {why}.")
    return Path(path)


def regular(path: str | Path, *, most: int = MOST_BYTES) -> Path:
    """`path`, once it is known to be a file of at most `most` bytes, or a link to one.

    For libraries that open a file by its name. Reading may never end on a pipe, a socket or a device.

    Raises:
        UsageError: it is none, there is nothing, or it is too large.
    """
    path = Path(path)
    try:
        _check(path, os.stat(path), most)
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have, such as one with a NUL
        raise _refused(path, error) from None
    return path


def read_bytes(path: str | Path, *, most: int = MOST_BYTES) -> bytes:
    """All of a file, which has to be one, of at most `most` bytes.

    Raises:
        UsageError: it cannot be read; says why.
    """
    try:
        _check(path, os.stat(path), most)
        waits_never = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
        with open(os.open(path, os.O_RDONLY | waits_never), "rb") as file:
            _check(path, os.fstat(file.fileno()), most)  # another may have taken its place
            data = file.read(most + 1)
    except (OSError, ValueError) as error:
        raise _refused(path, error) from None
    if data is None or len(data) > most:  # some that call themselves files, as those of /proc, tell no size
        raise unreadable(path, f"it has more than {most:,} bytes")
    return data


def read_text(path: str | Path, *, most: int = MOST_BYTES) -> str:
    """The text of a file in UTF-8, with or without the mark (BOM) that some editors put first; line ends as they are.

    Raises:
        UsageError: it cannot be read, or is no such text; says why, and where.
    """
    data = read_bytes(path, most=most)
    if form := form_of(data):
        raise unreadable(path, f"it is {form}")
    try:
        if (at := data.find(b"\0")) >= 0:
            raise UnicodeDecodeError("utf-8", data, at, at + 1, "a NUL byte")
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise at_line(path, line, f"this is no UTF-8 text (the byte 0x{data[error.start]:02x})") from None


def form_of(data: bytes) -> str | None:
    """What a file is that begins so, and what to do with it, where it is one that people take for text."""
    return next((form for beginning, form in _FORMS.items() if data.startswith(beginning)), None)


def read_json(path: str | Path, *, most: int = MOST_BYTES, **hooks: Any) -> Any:
    """What a file of JSON holds; `hooks` are those of `json.loads`, and may raise a ValueError.

    Raises:
        UsageError: it cannot be read, or is no JSON; says why, and where.
    """
    return parse_json(path, read_text(path, most=most), **hooks)


def parse_json(path: str | Path, text: str, line: int = 1, **hooks: Any) -> Any:
    """What JSON holds that begins at a line of a file, as `read_json`.

    Raises:
        UsageError: it is none.
    """
    try:
        return json.loads(text, **hooks)
    except json.JSONDecodeError as error:
        raise at_line(path, line + error.lineno - 1, f"this is no JSON ({error.msg})") from None
    except RecursionError:
        raise at_line(path, line, "this is no JSON that can be read (it is nested too deeply)") from None
    except ValueError as error:  # of a hook, or a number of too many digits
        reason = "a number has too many digits" if "integer string" in str(error) else str(error)[:200]
        raise at_line(path, line, f"this is no JSON that can be read ({shown(reason)})") from None


def _check(path: str | Path, found: os.stat_result, most: int) -> None:
    kind = next((told for is_kind, told in _KINDS if is_kind(found.st_mode)), None)
    if kind is not None:
        raise unreadable(path, f"it is no file but {kind}")
    if found.st_size > most:
        raise unreadable(path, f"it has more than {most:,} bytes")


def _refused(path: str | Path, error: OSError | ValueError) -> UsageError:
    if isinstance(error, UsageError):
        return error
    if isinstance(error, FileNotFoundError):
        return unreadable(path, "there is no such file")
    return unreadable(path, error if isinstance(error, OSError) else "no file can have such a name")


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


def at_line(path: str | Path, line: int, message: str) -> UsageError:
    """The error for one line of a file."""
    return UsageError(f"{shown(path)}:{line}: {message}.")


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
