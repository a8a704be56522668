"""Documents in JSON lines: a row starts at a random byte of the files, in the document that is found there."""

from __future__ import annotations

import bisect
import contextlib
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from zoo.core.errors import UsageError, quoted
from zoo.core.readers import at_line, form_of, parse_json, regular, shown, unreadable
from zoo.tasks import random
from zoo.tasks.question_files import Writing
from zoo.tasks.random import SPLITS, Split

ENDINGS = (".jsonl", ".ndjson")
MOST_BYTES = 2**62
MOST_BYTES_OF_LINE = 2**26
_CHUNK = 2**16
_MOST_DRAWS, _DRAWS = 10_000, 20  # at all, and at once
_MOST_SKIPPED = 1000  # lines of other splits, after which a row goes on with its first document
_LEAST_CHARACTERS = 6  # read at first for a token
_LOOKED_AT = 10_000  # lines among which each split has one


class JsonLines:
    """The documents of files of JSON lines, one a line, each of which belongs to one split.

    Which split a document belongs to follows from the place of its line in the files. A row looks up the line at a
    random byte, so that every part of the files is as likely. The row starts at that part of the document and continues
    with the following documents of its split, each ended by the end token. So there is no index, and neither memory nor
    the time to start grows with the size of the files.

    Args:
        paths: of the files, in order.
        length: tokens of a row, with the one behind it.
        field: of the objects, that holds the text.
        writing: turns text into tokens.

    Raises:
        UsageError: a file that is empty or no such file, or too few documents.
    """

    def __init__(self, paths: Sequence[Path], length: int, field: str, writing: Writing):
        self._paths, self._length, self._field, self._writing = paths, length, field, writing
        sizes = [regular(path, most=MOST_BYTES).stat().st_size for path in paths]
        for path, size in zip(paths, sizes, strict=True):
            if not size:
                raise unreadable(path, "it is empty")
        self._sizes, self._begins = sizes, [0, *itertools.accumulate(sizes)]
        self._check()

    def _check(self) -> None:
        """Look for a document of each split, and at the first one."""
        found: set[int] = set()
        n = 0
        with contextlib.ExitStack() as stack:
            for which, path in enumerate(self._paths):
                file = stack.enter_context(open(path, "rb"))
                if form := form_of(file.read(8)):
                    raise unreadable(path, f"it is {form}")
                file.seek(0)
                start = 0
                while line := self._line(which, file, start):
                    if line.strip():
                        if not n:
                            self._text(which, start, line)
                        n += 1
                        found.add(self._split(which, start))
                        if len(found) == len(SPLITS) or n > _LOOKED_AT:
                            return
                    start += len(line)
        lacking = next(name for i, name in enumerate(SPLITS) if i not in found)
        where = shown(self._paths[0]) if len(self._paths) == 1 else f"{len(self._paths)} files"
        raise UsageError(f"text: the {n:,} documents of {where} are too few: none falls into the split {lacking!r}.")

    def _split(self, which: int, start: int) -> int:
        return random.split_of_place(self._begins[which] + start)

    def rows(self, keys: random.Keys, split: Split) -> NDArray[np.int64]:
        """(n, length) tokens, a row for each key (n,)."""
        with contextlib.ExitStack() as stack:
            files = _Files(self._paths, stack)
            return np.array([self._row(keys[i : i + 1], SPLITS.index(split), files) for i in range(len(keys))])

    def _row(self, key: random.Keys, split: int, files: _Files) -> list[int]:
        which, start, line, share = self._drawn(key, split, files)
        first = (which, start, line)
        tokens = self._tokens(which, start, line, share, self._length)
        while len(tokens) < self._length:
            which, start, line = self._following(which, start + len(line), split, files) or first
            tokens += self._tokens(which, start, line, 0.0, self._length - len(tokens))
        return tokens[: self._length]

    def _drawn(self, key: random.Keys, split: int, files: _Files) -> tuple[int, int, bytes, float]:
        """A document of the split at a random byte: file, place, line, and how far into the line the byte is."""
        total = self._begins[-1]
        for word in self._words(key):
            place = word * total >> 64
            which = bisect.bisect_right(self._begins, place) - 1
            place -= self._begins[which]
            start = self._line_start(which, files[which], place)
            if self._split(which, start) == split:
                line = self._line(which, files[which], start)
                if line.strip():
                    return which, start, line, (place - start) / len(line)
        raise UsageError(f"text: {_MOST_DRAWS:,} draws found no document of the split {SPLITS[split]!r}.")

    def _words(self, key: random.Keys) -> Iterator[int]:
        for more in range(_MOST_DRAWS // _DRAWS):
            yield from random.bits(random.fold(key, more), _DRAWS)[0].tolist()

    def _following(self, which: int, start: int, split: int, files: _Files) -> tuple[int, int, bytes] | None:
        """The next document of a split; from the end of the last file on, from the first line of the first one."""
        for _ in range(_MOST_SKIPPED):
            if start >= self._sizes[which]:
                which, start = (which + 1) % len(self._paths), 0
            line = self._line(which, files[which], start)
            if self._split(which, start) == split and line.strip():
                return which, start, line
            start += len(line)
        return None

    def _tokens(self, which: int, start: int, line: bytes, share: float, n: int) -> list[int]:
        """At least `n` tokens from a share of a document on, or all to its end token where there are fewer."""
        text = self._text(which, start, line)
        begin = int(share * len(text)) if len(text) > n else 0
        if begin:  # at a space, where a word begins
            space = text.find(" ", begin)
            begin = space if space >= 0 else max(text.rfind(" ", 0, begin), 0)
        room = max(_LEAST_CHARACTERS * n, 256)
        while True:
            ends = begin + room >= len(text)
            tokens = self._writing.answer(text[begin : begin + room])
            if ends:
                return [*tokens, self._writing.end]
            if len(tokens) > n + n // 8 + 8:  # those at the cut may not be what they are in the whole text
                return tokens[:n]
            room *= 2

    def _text(self, which: int, start: int, line: bytes) -> str:
        path = self._paths[which]
        try:
            text = line.decode("utf-8-sig" if not start else "utf-8")
        except UnicodeDecodeError as error:
            told = f"this is no UTF-8 text (the byte 0x{line[error.start]:02x})"
            raise at_line(path, self._number(which, start), told) from None
        try:
            found = parse_json(path, text)
        except UsageError:
            parse_json(path, text, self._number(which, start))  # again, for its line
            raise
        if not isinstance(found, dict) or self._field not in found:
            holds = f"the fields {quoted(list(found), 80)}" if isinstance(found, dict) else f"a {type(found).__name__}"
            told = f"this line holds {holds}, where an object with the field {self._field!r} is expected (task.field)"
            raise at_line(path, self._number(which, start), told)
        if not isinstance(found[self._field], str):
            told = f"{self._field} is {quoted(found[self._field], 40)}, not a text"
            raise at_line(path, self._number(which, start), told)
        return found[self._field]

    def _number(self, which: int, start: int) -> int:
        """The number of the line that starts at a place."""
        number, left = 1, start
        with open(self._paths[which], "rb") as file:
            while left and (chunk := file.read(min(left, 2**20))):
                number += chunk.count(b"\n")
                left -= len(chunk)
        return number

    def _line_start(self, which: int, file: IO[bytes], place: int) -> int:
        """Where the line begins that holds a byte."""
        end = place
        while end:
            begin = max(end - _CHUNK, 0)
            file.seek(begin)
            found = file.read(end - begin).rfind(b"\n")
            if found >= 0:
                return begin + found + 1
            end = begin
            if place - end > MOST_BYTES_OF_LINE:
                raise self._too_long(which, place)
        return 0

    def _line(self, which: int, file: IO[bytes], start: int) -> bytes:
        """A line with its line end; nothing at the end of the file."""
        file.seek(start)
        line = file.readline(MOST_BYTES_OF_LINE + 1)
        if len(line) > MOST_BYTES_OF_LINE:
            raise self._too_long(which, start)
        return line

    def _too_long(self, which: int, place: int) -> UsageError:
        told = f"this line has more than {MOST_BYTES_OF_LINE:,} bytes"
        return at_line(self._paths[which], self._number(which, place), told)


class _Files:
    """Files that are opened when they are first read."""

    def __init__(self, paths: Sequence[Path], stack: contextlib.ExitStack):
        self._paths, self._stack = paths, stack
        self._open: dict[int, IO[bytes]] = {}

    def __getitem__(self, which: int) -> IO[bytes]:
        if which not in self._open:
            self._open[which] = self._stack.enter_context(self._paths[which].open("rb"))
        return self._open[which]


__all__ = ["ENDINGS", "JsonLines"]
