"""The task `sudoku`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor

from zoo.core.errors import UsageError
from zoo.core.options import Options
from zoo.tasks import random
from zoo.tasks.protocol import Batch, Split, Symmetry, Task, check_request, names_of, register
from zoo.tasks.sketch import Cell, Kind, Sketch
from zoo.tasks.sudoku.boards import BOXES, FEWEST, Boards, count_symmetries, symmetry
from zoo.tasks.sudoku.solver import augment, fingerprint
from zoo.tasks.sudoku.sources import FromFile, Generator, Source

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLANK = 1
"""The token of a blank cell; digit d is the token d + 1, and 0 is padding."""
_MOST_GIVENS = {4: 8, 6: 18, 9: 36}
_N_TRAIN = 10_000


@register("sudoku")
class Sudoku(Task):
    """Fill in a Sudoku that has exactly one solution.

    size=4, n_givens=4, as a person sees it, and the first row as tokens (0 padding, 1 blank, digit d as d + 1):

        ```
        . . | . 2        1 4 | 3 2
        3 . | . .        3 2 | 1 4        inputs   1 1 1 3 ...
        ----+----   ->   ----+----        targets  2 5 4 3 ...
        . 1 | . .        4 1 | 2 3
        . . | 4 .        2 3 | 4 1
        ```

    Every cell is a target, givens included; for `exact` all of them must be right. Training rows are `n_puzzles` base
    puzzles, repeated, each time under a new random symmetry. Rows of the other splits are puzzles as they are. Splits
    are disjoint up to symmetry: by the puzzle's canonical form for 4x4 and 6x6, by the solution's invariants for 9x9.
    Slices: `givens`, and `guesses` of the solver (the difficulty), rounded down to 0 or a power of two.

    4x4 has few puzzles up to symmetry: with max_givens=5 there are 80 in training, 14 in validation and 15 in test,
    even if many rows are drawn. Nearly all 6x6 and 9x9 rows differ.
    """

    class Config(Options):
        """Options of `sudoku`."""

        size: Literal[4, 6, 9] = 9
        """Digits; 6 has boxes two high and three wide."""
        n_givens: PositiveInt | None = None
        """The exact number of givens. 9x9 puzzles with about 22 or fewer are too rare to be generated: use `path`."""
        max_givens: PositiveInt | None = None
        """The largest number of givens. A number is drawn, and approached as far as the puzzle allows."""
        minimal: bool = False
        """Only puzzles in which every given is needed."""
        min_guesses: NonNegativeInt = 0
        """Only puzzles for which the solver needs at least this number of guesses."""
        n_puzzles: Annotated[int, Field(ge=1, le=2**31)] | None = None
        """Base puzzles of the training split; by default 10,000, or all puzzles of the file."""
        augment: bool = True
        """A random symmetry for each training row."""
        path: str | None = None
        """A file of puzzles to use instead of the generator: CSV, lines or grids; see `zoo.tasks.sudoku.files`."""
        test_path: str | None = None
        """A second file, whose puzzles are the test split. Equal puzzles are in no other split."""

    layout = "fill_in"
    blank = BLANK
    config: Config

    def __init__(self, config: Config):
        super().__init__(config)
        self.vocab_size = config.size + 2
        self.seq_len = config.size**2
        self.n_symmetries = count_symmetries(config.size)
        self._source = self._open()

    def _open(self) -> Source:
        c = self.config
        if c.path is not None:
            steering = {"n_givens", "max_givens", "minimal", "min_guesses"} & c.changed().keys()
            if steering:
                raise UsageError(
                    f"sudoku: {sorted(steering)[0]} steers the generator and cannot go with path={c.path!r}."
                )
            return FromFile(c.size, c.path, c.test_path, c.n_puzzles)
        if c.test_path is not None:
            raise UsageError(f"sudoku: test_path={c.test_path!r} needs `path`, the file of the other splits.")
        for name in ("n_givens", "max_givens"):
            value = getattr(c, name)
            if value is not None and not FEWEST[c.size] <= value <= c.size**2:
                raise UsageError(
                    f"sudoku: {name}={value} is not allowed for size={c.size}: it should be {FEWEST[c.size]} (fewer"
                    f" never leave one solution) to {c.size**2}."
                )
        if c.n_givens is not None and c.max_givens is not None:
            raise UsageError(f"sudoku: n_givens={c.n_givens} and max_givens={c.max_givens} exclude each other.")
        lowest = c.n_givens or FEWEST[c.size]
        highest = c.n_givens or c.max_givens or (c.size**2 if c.minimal else _MOST_GIVENS[c.size])
        return Generator(c.size, lowest, highest, c.minimal, c.min_guesses, c.n_puzzles or _N_TRAIN)

    def sample(self, n: int, *, split: Split, seed: int, start: int = 0) -> Batch:
        check_request(n, split, start)
        puzzles, solutions, guesses = self._source.take(start, n, split, seed)
        if split == "train" and self.config.augment:
            keys = random.fold(random.row_keys(split, seed, start, n), 2)
            puzzles, solutions = augment(puzzles, solutions, keys)
        slices = {"givens": (puzzles > 0).sum(1), "guesses": _bucket(guesses)}
        return Batch(_tokens(puzzles), _tokens(solutions), {k: torch.from_numpy(v) for k, v in slices.items()})

    def problems(self, batch: Batch) -> Tensor:
        """Puzzles up to symmetry, of 9x9 by their solutions: see `zoo.tasks.sudoku.fingerprint`."""
        puzzles, solutions = (_digits(tokens).astype(np.uint8) for tokens in (batch.inputs, batch.targets))
        return names_of(fingerprint(puzzles, solutions))

    def symmetry(self, index: int) -> Symmetry:
        """A random one of the `n_symmetries`, drawn by its number: digits, lines in bands, bands, transposition."""
        cells, digits = symmetry(self.config.size, index)
        tokens = np.concatenate([np.arange(BLANK + 1), digits + BLANK])
        return Symmetry(torch.from_numpy(cells), torch.from_numpy(tokens))

    def render(self, batch: Batch, row: int = 0, predictions: Tensor | None = None) -> str:
        puzzle, answer = _digits(batch.inputs[row]), _digits(batch.targets[row])
        boards = {"puzzle": (puzzle, puzzle), "answer": (answer, answer)}
        if predictions is not None:
            boards["predicted (! wrong)"] = (_digits(predictions[row]), answer)
        columns = [[title, *_lines(board, right, self.config.size)] for title, (board, right) in boards.items()]
        width = max(len(line) for column in columns for line in column) + 3
        return "\n".join("".join(cell.ljust(width) for cell in line).rstrip() for line in zip(*columns, strict=True))

    def draw(self, batch: Batch, row: int = 0, predictions: Tensor | None = None) -> Figure:
        from zoo.tasks.sudoku.picture import draw_board

        puzzle, answer = _digits(batch.inputs[row]), _digits(batch.targets[row])
        filled = answer if predictions is None else _digits(predictions[row])
        return draw_board(puzzle, answer, filled, self.config.size)

    def sketch(self, batch: Batch, row: int, tokens: Tensor, hidden: Tensor) -> Sketch:
        kinds, digits = self.kinds(batch, row, tokens, hidden), _digits(tokens[row]).tolist()
        cells = tuple(_cell(kind, digit) for kind, digit in zip(kinds, digits, strict=True))
        return Sketch(self.config.size, cells, BOXES[self.config.size])


def _cell(kind: Kind, digit: int) -> Cell:
    hidden = kind == "hidden" or digit == 0
    return Cell(kind, "" if hidden else str(digit), f"{'.' if hidden else digit} ")


def _bucket(guesses: NDArray[np.int64]) -> NDArray[np.int64]:
    """0, or the greatest power of two that is not more."""
    return np.where(guesses > 0, 1 << np.frexp(np.maximum(guesses, 1))[1].astype(np.int64) - 1, 0)


def _tokens(boards: Boards) -> Tensor:
    return torch.from_numpy(boards.astype(np.int64) + BLANK)


def _digits(tokens: Tensor) -> NDArray[np.int64]:
    """Digits of tokens; 0 for a token that is no digit."""
    return (tokens.cpu().numpy() - BLANK).clip(min=0)


def _lines(board: NDArray[np.int64], right: NDArray[np.int64], size: int) -> list[str]:
    """A board as text, wrong cells marked."""
    height, width = BOXES[size]
    cells = ["." if d == 0 else str(d) for d in board]
    marked = [c + ("!" if d != r else " ") for c, d, r in zip(cells, board, right, strict=True)]
    lines = []
    for i in range(size):
        if i and i % height == 0:
            lines.append("+".join(["-" * (2 * width + 1)] * (size // width))[1:])
        row = marked[i * size : (i + 1) * size]
        lines.append("| ".join("".join(row[k : k + width]) for k in range(0, size, width)))
    return lines
