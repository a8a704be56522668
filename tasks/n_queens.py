"""The n queens problem, completed from queens that are given (Gent, Jefferson and Nightingale, JAIR 2017)."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Annotated

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor

from zoo.core.errors import UsageError
from zoo.core.options import Options
from zoo.tasks import random, strings
from zoo.tasks.maze.grids import symmetries
from zoo.tasks.protocol import SPLITS, Batch, Split, Symmetry, Task, check_request, names_of, register
from zoo.tasks.sketch import Cell, Kind, Sketch

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLANK, EMPTY, QUEEN = 1, 2, 3
_MAX_REDRAWS = 10_000
_NUMBER, _SOLUTION, _ROWS = range(3)  # purposes of a row's random numbers


@register("n_queens")
class NQueens(Task):
    """Place n queens on a board of n x n squares, none of which attacks another; some are given.

    size=7, min_givens=max_givens=2, as a person sees it, and the first row as tokens (0 padding, 1 blank, 2 empty, 3 a
    queen):

        ```
        . . . . . . .       . . . . . q .
        . . . . . . .       . . q . . . .       inputs   1 1 1 1 1 1 1 ...
        . . . . . . Q       . . . . . . Q       targets  2 2 2 2 2 3 2 ...
        . . . . . . .  ->   . . . q . . .
        Q . . . . . .       Q . . . . . .
        . . . . . . .       . . . . q . .
        . . . . . . .       . q . . . . .
        ```

    The given queens are part of a solution, which the targets are; boards may have other solutions. Right is every
    placement of n queens that keeps the given ones, says of every other square that it is empty, and in which no two
    queens are on one row, column or diagonal. For `accuracy` squares are judged by their rows: right are those of a row
    with one queen, which no other queen attacks.

    The number of given queens is uniform from `min_givens` to `max_givens`, then a solution and its queens are drawn.
    Splits are disjoint up to turns and flips of the board. Slices: `givens`, and `solutions`, the number of right
    answers, rounded up to the next of 1, 2, 3, 4, 6, 8, 12, ...
    """

    class Config(Options):
        """Options of `n_queens`."""

        size: Annotated[int, Field(ge=7, le=11)] = 10
        """n, the sides of the board and the queens. Smaller boards have too few solutions for disjoint splits."""
        min_givens: PositiveInt = 2
        """Fewest given queens."""
        max_givens: PositiveInt | None = None
        """Most given queens, by default half of them."""
        min_solutions: NonNegativeInt = 0
        """Only boards that can be completed in at least this number of ways."""

    layout = "fill_in"
    blank = BLANK
    many_answers = "the solution from which the given queens were taken"
    vocab_size = 4
    n_symmetries = 8
    config: Config

    def __init__(self, config: Config):
        super().__init__(config)
        c = config
        self.size, self.seq_len = c.size, c.size**2
        self._givens = c.min_givens, c.max_givens or max(c.size // 2, c.min_givens)
        if self._givens[0] > self._givens[1]:
            raise UsageError(f"n_queens: min_givens={c.min_givens} is more than max_givens={c.max_givens}.")
        if self._givens[1] >= c.size:
            raise UsageError(f"n_queens: of {c.size} queens at most {c.size - 1} are given, not {self._givens[1]}.")

    def sample(self, n: int, *, split: Split, seed: int, start: int = 0) -> Batch:
        check_request(n, split, start)
        keys, known = random.row_keys(split, seed, start, n), solutions(self.size)
        boards = np.zeros((n, self.seq_len), dtype=np.bool_)
        planted, counts, left = np.zeros(n, dtype=np.int64), np.zeros(n, dtype=np.int64), np.arange(n)
        for attempt in range(_MAX_REDRAWS):
            given, solution = self._draw(random.fold(keys[left], attempt))
            found = random.split_of(self._fingerprint(given)) == SPLITS.index(split)
            ways = np.zeros(len(left), dtype=np.int64)
            ways[found] = self._count(given[found])
            found &= ways >= self.config.min_solutions
            here = left[found]
            boards[here], planted[here], counts[here] = given[found], solution[found], ways[found]
            left = left[~found]
            if not len(left):
                break
        else:
            low, high = self._givens
            told = f"{low} to {high} given queens and {self.config.min_solutions} solutions"
            raise UsageError(f"n_queens: found no board of size {self.size} with {told} for the split {split!r}.")
        slices = {"givens": boards.sum(1), "solutions": strings.length_bucket(counts)}
        return Batch(
            torch.from_numpy(np.where(boards, QUEEN, BLANK)),
            torch.from_numpy(np.where(known[planted], QUEEN, EMPTY)),
            {name: torch.from_numpy(values) for name, values in slices.items()},
        )

    def _draw(self, keys: random.Keys) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
        """Boards (n, cells) of given queens, and the number of the solution that each was taken from."""
        known, (low, high) = solutions(self.size), self._givens
        number = low + random.below(random.fold(keys, _NUMBER), high - low + 1)
        solution = random.below(random.fold(keys, _SOLUTION), len(known))
        rank = random.bits(random.fold(keys, _ROWS), self.size).argsort(1).argsort(1)
        kept = np.repeat(rank < number[:, None], self.size, axis=1)
        return known[solution] & kept, solution

    def _count(self, given: NDArray[np.bool_]) -> NDArray[np.int64]:
        """The number of solutions that have all the given queens."""
        shared = given.astype(np.float32) @ _columns(self.size)
        return (shared == given.sum(1)[:, None]).sum(1)

    def _fingerprint(self, given: NDArray[np.bool_]) -> random.Keys:
        """(n,) a hash of the given queens that no turn or flip changes."""
        values = random.mix(np.arange(1, self.seq_len + 1))
        turned = given[:, symmetries(self.size, self.size)]
        return random.mix(random.mix(np.where(turned, values, np.uint64(0)).sum(2)).sum(1))

    def symmetry(self, index: int) -> Symmetry:
        """One of the turns and flips of the board."""
        cells = symmetries(self.size, self.size)[index]
        return Symmetry(torch.from_numpy(cells), torch.arange(self.vocab_size))

    def problems(self, batch: Batch) -> Tensor:
        """Boards up to turns and flips."""
        return names_of(self._fingerprint(batch.inputs.cpu().numpy() == QUEEN))

    def is_right(self, batch: Batch, answers: Tensor) -> Tensor:
        """Whether n queens stand, the given ones among them, and none attacks another."""
        return self.right_cells(batch, answers).all(1)

    def right_cells(self, batch: Batch, answers: Tensor) -> Tensor:
        """The squares of rows with one queen, which is not attacked, and in which every given queen is kept."""
        queens = answers == QUEEN
        said = (queens | (answers == EMPTY)) & (queens | (batch.inputs != QUEEN))
        good = said & ~(queens & self._attacked(queens))
        rows = good.unflatten(1, (self.size, self.size)).all(2)
        rows &= queens.unflatten(1, (self.size, self.size)).sum(2) == 1
        return rows.repeat_interleave(self.size, 1)

    def _attacked(self, queens: Tensor) -> Tensor:
        """(n, cells) squares on a row, column or diagonal with two queens or more."""
        lines = torch.from_numpy(_lines(self.size)).to(queens.device)
        crowded = queens.to(lines) @ lines > 1
        return crowded.to(lines) @ lines.T > 0

    def kinds(self, batch: Batch, row: int, tokens: Tensor, hidden: Tensor) -> list[Kind]:
        """Of an answer in the making: a queen is wrong if it attacks another, an empty square never."""
        if not hidden[row].any():
            return super().kinds(batch, row, tokens, hidden)
        queens = (tokens[row : row + 1] == QUEEN) & ~hidden[row : row + 1]
        wrong = (queens & self._attacked(queens))[0].tolist()
        cells = zip(hidden[row].tolist(), self.asked(batch)[row].tolist(), wrong, strict=True)
        return [
            "given" if not asked else "hidden" if unsaid else "wrong" if bad else "right"
            for unsaid, asked, bad in cells
        ]

    def render(self, batch: Batch, row: int = 0, predictions: Tensor | None = None) -> str:
        given, none = batch.inputs[row], torch.zeros_like(batch.inputs, dtype=torch.bool)
        columns = [["given", *self._text(given, given)], ["answer", *self._text(given, batch.targets[row])]]
        if predictions is not None:
            kinds = self.kinds(batch, row, predictions, none)
            verdict = "right" if "wrong" not in kinds else "wrong"
            lines = self._text(given, predictions[row], [kind == "wrong" for kind in kinds])
            columns.append([f"predicted: {verdict} (! wrong)", *lines])
        width = 2 * self.size + 3
        return "\n".join("".join(cell.ljust(width) for cell in line).rstrip() for line in zip(*columns, strict=True))

    def _text(self, given: Tensor, tokens: Tensor, wrong: list[bool] | None = None) -> list[str]:
        ink = [_ink(token, old == QUEEN) for token, old in zip(tokens.tolist(), given.tolist(), strict=True)]
        marked = [cell + ("!" if wrong and wrong[i] else " ") for i, cell in enumerate(ink)]
        return ["".join(marked[i : i + self.size]).rstrip() for i in range(0, self.seq_len, self.size)]

    def draw(self, batch: Batch, row: int = 0, predictions: Tensor | None = None) -> Figure:
        """The board; given queens black, placed ones blue, attacked ones red."""
        from matplotlib.figure import Figure

        tokens = batch.targets if predictions is None else predictions
        kinds = self.kinds(batch, row, tokens, torch.zeros_like(tokens, dtype=torch.bool))
        squares = np.add.outer(np.arange(self.size), np.arange(self.size)) % 2
        figure = Figure(figsize=(0.45 * self.size, 0.45 * self.size), layout="constrained")
        axes = figure.add_subplot()
        axes.imshow(squares, cmap="Greys", vmin=-0.2, vmax=4)
        axes.set_xticks([])
        axes.set_yticks([])
        for cell, (kind, token) in enumerate(zip(kinds, tokens[row].tolist(), strict=True)):
            if token == QUEEN:
                y, x = divmod(cell, self.size)
                black = int(batch.inputs[row, cell]) == QUEEN
                color = "black" if black else "tab:red" if kind == "wrong" else "tab:blue"
                axes.text(x, y, "\u265b", ha="center", va="center", fontsize=18, color=color)
        return figure

    def sketch(self, batch: Batch, row: int, tokens: Tensor, hidden: Tensor) -> Sketch:
        kinds, given = self.kinds(batch, row, tokens, hidden), (batch.inputs[row] == QUEEN).tolist()
        cells = zip(kinds, tokens[row].tolist(), given, strict=True)
        return Sketch(self.size, tuple(_cell(*cell) for cell in cells))


def _ink(token: int, given: bool) -> str:
    return {QUEEN: "Q" if given else "q", EMPTY: ".", BLANK: "."}.get(token, "?")


def _cell(kind: Kind, token: int, given: bool) -> Cell:
    if kind == "hidden":
        return Cell(kind, "", "  ")
    return Cell(kind, "\u265b" if token == QUEEN else "", f"{_ink(token, given)} ")


@cache
def solutions(size: int) -> NDArray[np.bool_]:
    """(s, size * size) all placements of queens, none of which attacks another."""
    columns = np.zeros((1, 0), dtype=np.int64)
    for row in range(size):
        new = np.arange(size)
        apart = row - np.arange(row)
        off = new - columns[:, :, None]
        free = ((off != 0) & (abs(off) != apart[:, None])).all(1)
        which, column = free.nonzero()
        columns = np.concatenate([columns[which], column[:, None]], axis=1)
    return (columns[:, :, None] == np.arange(size)).reshape(len(columns), -1)


@cache
def _columns(size: int) -> NDArray[np.float32]:
    """`solutions` as the columns of a matrix."""
    return np.ascontiguousarray(solutions(size).T.astype(np.float32))


@cache
def _lines(size: int) -> NDArray[np.float32]:
    """(cells, lines) which squares are on which row, column and diagonal of either direction."""
    y, x = np.divmod(np.arange(size * size), size)
    groups = [y, x, y + x, y - x + size - 1]
    return np.concatenate([g[:, None] == np.arange(2 * size - 1) for g in groups], axis=1).astype(np.float32)
