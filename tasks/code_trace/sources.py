"""Where programs come from: the grammar, or a person's file of functions."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np

from zoo.core.errors import UsageError
from zoo.core.readers import at_line
from zoo.tasks import random
from zoo.tasks.code_trace import programs, tokens
from zoo.tasks.code_trace.sandbox import read_functions
from zoo.tasks.code_trace.tracer import Frame
from zoo.tasks.filing import Shelves
from zoo.tasks.protocol import SPLITS, Split


class Program(NamedTuple):
    """A program and its trace."""

    source: str
    frames: list[Frame]


class Source(Protocol):
    """Programs by row."""

    def take(self, start: int, n: int, split: Split, seed: int) -> list[Program]:
        """The programs of rows start ... start + n - 1."""

    def fingerprint(self, source: str) -> int:
        """What puts a program that was taken into its split."""


class Generator:
    """Programs of a grammar, ever new ones.

    One that is not of the split is drawn again. So is one that does not fit, of the same size for a while and then a
    statement shorter: a row's size is settled first, lest short programs crowd out those that seldom fit.
    """

    _MAX_TRIES = 2000
    _PATIENCE = 6

    def __init__(self, grammar: programs.Grammar, most: int):
        """`most` is the longest text of a program and its trace."""
        self._grammar, self._most = grammar, most

    def take(self, start: int, n: int, split: Split, seed: int) -> list[Program]:
        keys = random.row_keys(split, seed, start, n)
        words = programs.words_for(self._grammar)
        shape = random.bits(keys, programs.SHAPE)
        misfits = [0] * n
        found: dict[int, Program] = {}
        left = np.arange(n)
        for attempt in range(self._MAX_TRIES):
            drawn = np.concatenate([shape[left], random.bits(random.fold(keys[left], attempt), words)], 1)
            rows = zip(left.tolist(), (drawn >> np.uint64(32)).tolist(), strict=True)
            sources = [programs.write(row, self._grammar, misfits[i] // self._PATIENCE) or "" for i, row in rows]
            prints = np.array([programs.fingerprint(source) for source in sources], dtype=np.uint64)
            usable = random.split_of(prints) == SPLITS.index(split)
            for row, source, used in zip(left.tolist(), sources, usable.tolist(), strict=True):
                room = self._most - len(tokens.prompt(source)) - 1
                frames = programs.run(source, self._grammar, room) if used and source else None
                if frames:
                    found[row] = Program(source, frames)
                elif used:
                    misfits[row] += 1
            left = np.array([row for row in left.tolist() if row not in found], dtype=np.int64)
            if not len(left):
                return [found[row] for row in range(n)]
        raise UsageError(
            f"code_trace: found no program for the split {split!r} that fits seq_len={self._most - 1} and"
            f" max_value={self._grammar.max_value} in {self._MAX_TRIES} tries; allow longer rows or larger values."
        )

    def fingerprint(self, source: str) -> int:
        return programs.fingerprint(source)


class FromFile:
    """The example calls of a file, split by what they call; those of a second file, where given, are the test split."""

    def __init__(self, path: str, test_path: str | None, most: int):
        """`most` is the longest text of a program and its trace.

        Raises:
            UsageError: a file cannot be read or run, or holds a call whose trace is too long.
        """
        read = {p: _read(p, most) for p in (path, test_path) if p is not None}
        self._files = read[path], read[test_path or path]
        main, test = (file.fingerprints for file in self._files)
        self._shelves = Shelves(path, main, None if test_path is None else test)
        self.known = {
            program.source: int(print_)
            for file in self._files
            for program, print_ in zip(file.programs, file.fingerprints, strict=True)
        }

    def take(self, start: int, n: int, split: Split, seed: int) -> list[Program]:
        second, rows = self._shelves.rows(start, n, split, seed)
        return [self._files[second].programs[row] for row in rows.tolist()]

    def fingerprint(self, source: str) -> int:
        return self.known[source]


class Tested:
    """Generated programs, and a file for the test split: written otherwise, so that no program is in both."""

    def __init__(self, generator: Generator, file: FromFile):
        self._generator, self._file = generator, file

    def take(self, start: int, n: int, split: Split, seed: int) -> list[Program]:
        return (self._file if split == "test" else self._generator).take(start, n, split, seed)

    def fingerprint(self, source: str) -> int:
        return (self._file if source in self._file.known else self._generator).fingerprint(source)


class _File(NamedTuple):
    programs: list[Program]
    fingerprints: random.Keys


def _read(path: str, most: int) -> _File:
    examples = read_functions(path, most)
    found = []
    for example in examples:
        program = Program(example.source, example.frames)
        length = len(tokens.prompt(program.source) + tokens.trace_text(program.frames))
        if length > most:
            told = f"the program and its trace take {length - 1} tokens, more than seq_len={most - 1}"
            raise at_line(path, example.line, f"{told}; raise seq_len or leave the call out")
        found.append(program)
    prints = np.array([programs.fingerprint(example.context) for example in examples], dtype=np.uint64)
    return _File(found, prints)
