"""The task `arc`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from zoo.core.errors import UsageError
from zoo.core.options import Options
from zoo.tasks import random
from zoo.tasks.arc.augmentation import augmentations
from zoo.tasks.arc.files import read_puzzles
from zoo.tasks.arc.grids import COLOURS, FIRST, LARGEST, PAD, Grid, Pair, Puzzle, corner_of, from_tokens, to_tokens
from zoo.tasks.arc.made import SMALLEST, made_puzzles
from zoo.tasks.arc.picture import SQUARES, cell
from zoo.tasks.arc.voting import Ballot, Vote, count_votes, two_guesses
from zoo.tasks.protocol import IGNORE, Batch, Split, Task, check_request, register
from zoo.tasks.sketch import Sketch

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Name = Annotated[str, Field(min_length=1)]

_MADE_SIZE = 8
_SLICE = 5  # sides of answers are told apart in such steps


class _Rows(NamedTuple):
    """Which pairs, under which of their maps, each (n,), and (n, 2) random words for their corners, 0 for the first."""

    pairs: NDArray[np.int64]
    numbers: NDArray[np.int64]
    corners: random.Keys


@register("arc")
class Arc(Task):
    """Find the rule in a puzzle's demonstrations, and answer its test (ARC, Chollet 2019, arXiv 1911.01547).

    A row is one pair of grids of one puzzle. About the rule, the row has only the number of the puzzle
    (`Batch.puzzles`): the model is trained on all pairs that demonstrate the rule, as HRM and TRM are. A 2x3 grid
    turned upside down, size=6, as a person sees it, and as tokens (0 padding, 1 the line after the grid's last row and
    column, colour c as c + 2; `.` is not scored):

        ```
        ⬛🟦🟦        🟥🟦⬛        inputs   2 3 3 1 0 0  4 3 2 1 0 0  1 1 1 0 0 0  0 ...
        🟥🟦⬛   ->   ⬛🟦🟦        targets  4 3 2 1 . .  2 3 3 1 . .  1 1 1 . . .  . ...
        ```

    Each puzzle appears in `n_augmentations` versions, made by maps that are drawn from its name: one of the eight
    rotations and reflections, and new colours for all colours except black. The first map changes nothing. Each version
    counts as another puzzle with its own number. Training rows are the demonstrations of all puzzles and the test pairs
    of the training set, repeated in a new order each time, under a random map and mostly at a random place of the
    canvas. Rows of the other splits are test pairs of the evaluation set, a quarter of its puzzles for validation:
    first each of them unchanged, then each under its second map, and so on.

    The score has `exact` of each row and `two_guesses`: the share of test pairs whose right answer is among the two
    most frequent grids under the pair's augmentations, see `ballots`. Slices: `side`, the longest side of the answer,
    rounded up to multiples of 5.

    Without `path` the puzzles are small generated ones (`zoo.tasks.arc.made`), for trials: they are not ARC's.
    """

    class Config(Options):
        """Options of `arc`."""

        path: str | None = None
        """A folder of puzzles, see `read_puzzles`; by default generated ones."""
        training: tuple[Name, ...] = ("training",)
        """The sets of the folder whose test pairs are training rows too."""
        evaluation: tuple[Name, ...] = ("evaluation",)
        """The sets of the folder whose test pairs are validation and test rows."""
        size: Annotated[int, Field(ge=1, le=LARGEST)] | None = None
        """Side of the canvas; larger puzzles are left out. By default 30, and 8 for generated puzzles."""
        n_made: Annotated[int, Field(ge=2, le=10_000)] = 64
        """Number of generated puzzles of each set."""
        n_augmentations: Annotated[int, Field(ge=1, le=10_000)] = 16
        """Largest number of versions of a puzzle, with the unchanged one."""
        translate: bool = True
        """Put training rows at a random place of the canvas, except one in as many as the puzzle has pairs."""

    layout = "fill_in"
    config: Config

    def __init__(self, config: Config):
        super().__init__(config)
        self.size = config.size or (_MADE_SIZE if config.path is None else LARGEST)
        self.vocab_size = FIRST + COLOURS
        self.seq_len = self.size**2
        training, evaluation = self._read()
        self.puzzles = training + evaluation
        self._maps = [augmentations(puzzle, config.n_augmentations) for puzzle in self.puzzles]
        n_maps = np.array([len(maps.turns) for maps in self._maps])
        self._first = np.concatenate([[1], 1 + np.cumsum(n_maps)])  # 0 is no puzzle
        self.n_puzzles = int(self._first[-1])
        self._lay_out(len(training), n_maps)

    def _read(self) -> tuple[list[Puzzle], list[Puzzle]]:
        """The puzzles of both sets that fit."""
        c = self.config
        if c.path is None:
            if steering := {"training", "evaluation"} & c.changed().keys():
                raise UsageError(f"arc: {sorted(steering)[0]} names files, and made puzzles have none: set `path`.")
            if self.size < SMALLEST:
                raise UsageError(f"arc: size={self.size} is too small for made puzzles: the least is {SMALLEST}.")
            return made_puzzles(0, c.n_made, self.size), made_puzzles(c.n_made, c.n_made, self.size)
        if "n_made" in c.changed():
            raise UsageError(f"arc: n_made={c.n_made} is for made puzzles and cannot go with path={c.path!r}.")
        sets = []
        for subsets in (c.training, c.evaluation):
            read = [puzzle for subset in subsets for puzzle in read_puzzles(c.path, subset)]
            sets.append([puzzle for puzzle in read if puzzle.side <= self.size])
        sets = [list({_content(puzzle): puzzle for puzzle in found}.values()) for found in sets]  # some sets overlap
        taught, asked = ([puzzle.name for puzzle in found] for found in sets)
        if twice := [name for name in asked if name in set(taught)]:
            told = "in a set that is taught and in one that is asked; an answer that is taught cannot be asked"
            raise UsageError(f"arc: {c.path!r} has the puzzle {twice[0]!r} {told}.")
        if twice := [name for name, n in Counter(asked).items() if n > 1]:
            told = "twice in the sets that are asked, and not alike"
            raise UsageError(f"arc: {c.path!r} has the puzzle {twice[0]!r} {told}.")
        if not sets[0] or len(sets[1]) < 2:
            found = f"{len(sets[0])} training and {len(sets[1])} evaluation puzzles"
            raise UsageError(f"arc: {c.path!r} has {found} within size={self.size}; one and two are the least.")
        return sets[0], sets[1]

    def _lay_out(self, n_training: int, n_maps: NDArray[np.int64]) -> None:
        """Number all pairs, and note which are whose."""
        self._pairs: list[Pair] = []
        owners, taught = [], []
        for i, puzzle in enumerate(self.puzzles):
            for pairs, is_taught in ((puzzle.train, True), (puzzle.test, i < n_training)):
                self._pairs += pairs
                owners += [i] * len(pairs)
                taught += [is_taught] * len(pairs)
        self._owners, self._n_maps = np.array(owners), n_maps
        self._n_pairs = np.bincount(self._owners)
        prints = random.fold(random.mix(random.SPLIT_SALT), np.arange(len(n_maps) - n_training))
        held = n_training + np.argsort(prints, kind="stable")
        validation = held[: max(len(held) // 4, 1)]
        asked = ~np.array(taught)
        self._members = {
            "train": np.flatnonzero(taught),
            "validation": np.flatnonzero(asked & np.isin(self._owners, validation)),
            "test": np.flatnonzero(asked & ~np.isin(self._owners, validation)),
        }

    def sample(self, n: int, *, split: Split, seed: int, start: int = 0) -> Batch:
        check_request(n, split, start)
        rows = (self._taught if split == "train" else self._asked)(start, n, split, seed)
        owners = self._owners[rows.pairs]
        inputs, targets = (np.empty((n, self.seq_len), dtype=np.int64) for _ in range(2))
        for i, (pair, number, owner) in enumerate(zip(rows.pairs, rows.numbers, owners, strict=True)):
            grids = [self._maps[owner].apply(number, grid) for grid in self._pairs[pair]]
            room = self.size + 1 - np.maximum(*(grid.shape for grid in grids))
            y, x = random.below(rows.corners[i], room).tolist()
            inputs[i], targets[i] = (to_tokens(grid, self.size, (y, x)).ravel() for grid in grids)
        targets[targets == PAD] = IGNORE
        sides = np.array([max(self._pairs[pair].answer.shape) for pair in rows.pairs])
        slices = {"side": torch.from_numpy(-(-sides // _SLICE) * _SLICE)}
        puzzles = torch.from_numpy(self._first[owners] + rows.numbers)
        return Batch(torch.from_numpy(inputs), torch.from_numpy(targets), slices, puzzles=puzzles)

    def _taught(self, start: int, n: int, split: Split, seed: int) -> _Rows:
        """Epoch after epoch of the training pairs, each in an order of its own."""
        members = self._members[split]
        rows = np.arange(start, start + n)
        pairs = np.empty(n, dtype=np.int64)
        for epoch in range(start // len(members), (start + n - 1) // len(members) + 1):
            here = rows // len(members) == epoch
            pairs[here] = members[_order(len(members), split, seed, epoch)[rows[here] % len(members)]]
        words = random.bits(random.row_keys(split, seed, start, n), 4)
        owners = self._owners[pairs]
        moved = (random.below(words[:, 1], self._n_pairs[owners]) > 0) & self.config.translate
        corners = np.where(moved[:, None], words[:, 2:], np.uint64(0))
        return _Rows(pairs, random.below(words[:, 0], self._n_maps[owners]), corners)

    def _asked(self, start: int, n: int, split: Split, seed: int) -> _Rows:
        """The pairs of a split, all under their first map, then all that have one under their second, and so on."""
        members = self._members[split]
        pairs = members[_order(len(members), split, seed, 0)]
        n_maps = self._n_maps[self._owners[pairs]]
        having = [int((n_maps > number).sum()) for number in range(n_maps.max())]  # that many maps and more
        ends = np.cumsum(having)
        rows = np.arange(start, start + n) % ends[-1]
        numbers = np.searchsorted(ends, rows, side="right")
        places = rows - (ends - having)[numbers]
        picked = np.empty(n, dtype=np.int64)
        for number in np.unique(numbers):
            here = numbers == number
            picked[here] = pairs[n_maps > number][places[here]]
        return _Rows(picked, numbers, np.zeros((n, 2), dtype=np.uint64))

    # ---- scores

    def problems(self, batch: Batch) -> Tensor:
        """Puzzles, whatever their pairs and maps: a rule that is found answers them all."""
        return torch.from_numpy(self._owner_of(batch))

    def _owner_of(self, batch: Batch) -> NDArray[np.int64]:
        """(n,) places in `puzzles` of the puzzles that rows belong to."""
        if batch.puzzles is None:
            raise UsageError("arc: rows need to say whose they are: the batch should have `puzzles`, as sampled.")
        return np.searchsorted(self._first, batch.puzzles.cpu().numpy(), side="right") - 1

    def score(self, batch: Batch, predictions: Tensor) -> dict[str, Any]:
        """As every task's, and `two_guesses` of the rows' ballots, which read predictions beyond the scored cells."""
        return {"two_guesses": two_guesses(self.ballots(batch, predictions)), **super().score(batch, predictions)}

    def ballots(self, batch: Batch, predictions: Tensor, confidence: Tensor | None = None) -> list[Ballot]:
        """What the rows' predictions vote for, by test pair.

        Args:
            batch: rows as `sample` gave them.
            predictions: (n, L) int64. A vote is the largest rectangle of colours at the grid's corner, mapped back.
            confidence: (n,) in each, such as what a halting head says; it decides between guesses given equally often.
        """
        trust = [0.0] * len(predictions) if confidence is None else confidence.double().tolist()
        return count_votes(self._votes(batch, predictions, trust))

    def _votes(self, batch: Batch, predictions: Tensor, trust: list[float]) -> Iterable[Vote]:
        owners = self._owner_of(batch).tolist()
        assert batch.puzzles is not None
        for i, (owner, mapped) in enumerate(zip(owners, batch.puzzles.tolist(), strict=True)):
            number = mapped - int(self._first[owner])
            grids = self._grids(batch, i, predictions)
            question, answer, given = (self._maps[owner].undo(number, grid) for grid in grids)
            yield Vote(self.puzzles[owner].name, question, answer, given, trust[i])

    def _grids(self, batch: Batch, row: int, predictions: Tensor | None = None) -> list[Grid]:
        """Question, answer and, where given, prediction of a row as they lie on the canvas."""
        rows = [batch.inputs[row], batch.targets[row], *([] if predictions is None else [predictions[row]])]
        canvases = [tokens.cpu().numpy().reshape(self.size, self.size) for tokens in rows]
        corner = corner_of(canvases[0])
        return [from_tokens(canvas, corner) for canvas in canvases]

    # ---- pictures

    def render(self, batch: Batch, row: int = 0, predictions: Tensor | None = None) -> str:
        grids = self._grids(batch, row, predictions)
        titles = ["input", "answer", f"predicted: {_verdict(grids)} (! differs)"]
        columns = [_lines(grid) for grid in grids[:2]] + [_lines(grid, grids[1]) for grid in grids[2:]]
        widths = [max(2 * grid.shape[1], len(title)) + 3 for grid, title in zip(grids, titles, strict=False)]
        lines = ["".join(title.ljust(w) for title, w in zip(titles, widths, strict=False)).rstrip()]
        for i in range(max(map(len, columns))):
            cells = [column[i] if i < len(column) else "" for column in columns]
            lines.append("".join(c + " " * (w - _wide(c)) for c, w in zip(cells, widths, strict=True)).rstrip())
        return "\n".join(lines)

    def draw(self, batch: Batch, row: int = 0, predictions: Tensor | None = None) -> Figure:
        from zoo.tasks.arc.picture import draw_grids

        grids = self._grids(batch, row, predictions)
        return draw_grids(dict(zip(["input", "answer", f"predicted: {_verdict(grids)}"], grids, strict=False)))

    def question(self, batch: Batch, row: int = 0) -> Sketch:
        """The input grid."""
        grid = self._grids(batch, row)[0]
        return Sketch(grid.shape[1], tuple(cell("given", colour + FIRST) for colour in grid.ravel().tolist()))

    def sketch(self, batch: Batch, row: int, tokens: Tensor, hidden: Tensor) -> Sketch:
        """The scored part of the canvas: the answer with the lines that end it."""
        scored = (batch.targets[row] != IGNORE).view(self.size, self.size)
        ys, xs = (slice(int(at[0]), int(at[-1]) + 1) for at in (scored.any(i).nonzero() for i in (1, 0)))
        kinds = np.array(self.kinds(batch, row, tokens, hidden)).reshape(self.size, self.size)
        kinds[~scored.numpy()] = "outside"
        canvas = tokens[row].view(self.size, self.size).numpy()
        pairs = zip(kinds[ys, xs].ravel().tolist(), canvas[ys, xs].ravel().tolist(), strict=True)
        return Sketch(xs.stop - xs.start, tuple(cell(kind, token) for kind, token in pairs))


def _content(puzzle: Puzzle) -> tuple[Any, ...]:
    """What two puzzles have in common that are one."""
    pairs = (grid for pair in (*puzzle.train, *puzzle.test) for grid in pair)
    return puzzle.name, len(puzzle.train), *((grid.shape, grid.tobytes()) for grid in pairs)


@lru_cache(maxsize=8)
def _order(n: int, split: Split, seed: int, epoch: int) -> NDArray[np.int64]:
    """The order of n pairs in an epoch of a stream."""
    return random.permutation(random.fold(random.row_keys(split, seed, epoch, 1), 1), n)


def _verdict(grids: list[Grid]) -> str:
    return "right" if np.array_equal(grids[1], grids[-1]) else "wrong"


def _lines(grid: Grid, right: Grid | None = None) -> list[str]:
    """A grid as text; of a prediction, cells that differ from the right one are marked."""
    if right is None:
        return ["".join(SQUARES[colour] for colour in line) for line in grid.tolist()]
    expected = np.full(grid.shape, COLOURS)
    height, width = (min(sides) for sides in zip(grid.shape, right.shape, strict=True))
    expected[:height, :width] = right[:height, :width]
    marked = zip(grid.tolist(), expected.tolist(), strict=True)
    return ["".join(SQUARES[c] + ("!" if c != e else " ") for c, e in zip(*lines, strict=True)) for lines in marked]


def _wide(text: str) -> int:
    """Columns of a terminal that a text takes: two for each square."""
    return len(text) + sum(character in SQUARES for character in text)
