"""The task `maze`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, PositiveInt, field_validator
from torch import Tensor

from zoo.core.errors import UsageError
from zoo.core.options import Options
from zoo.tasks import random
from zoo.tasks.maze.grids import CHARACTERS, OPEN, fingerprint, is_path, is_valid, symmetries
from zoo.tasks.maze.picture import INK, cell
from zoo.tasks.maze.sources import FromFile, Generator, Source
from zoo.tasks.protocol import Batch, Split, Symmetry, Task, check_request, names_of, register
from zoo.tasks.sketch import Sketch

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FALSE = ("a longer path", "wrong")
Share = Annotated[float, Field(ge=0, lt=1)]


@register("maze")
class Maze(Task):
    """Mark a shortest path from S to G in a maze.

    size=9, kind="perfect", as a person sees it, and the second row as tokens (0 padding, then `# SGo` as 1 to 5):

        ```
        #########      #########
        #  G    #      #  Goooo#        inputs   ... 1 2 2 4 2 2 2 2 1 ...
        ####### #      #######o#        targets  ... 1 2 2 4 5 5 5 5 1 ...
        #       #      #      o#
        ####### #  ->  #######o#
        #  S  # #      #  Soo#o#
        # ### # #      # ###o#o#
        #   #   #      #   #ooo#
        #########      #########
        ```

    `perfect` mazes are trees of corridors (random depth-first search), so the path is the only one; with size=30,
    min_length=100, max_length=140 they are Maze-Unique. `random_walls` scatters walls over a share of the cells that
    is uniform in `walls`; with size=30, min_length=111 they are Maze-Hard, rare enough to want `n_puzzles`. Their
    shortest path need not be the only one, unless `unique` is set. So besides `exact` the score has `valid`, any
    shortest path and all else unchanged, and `path`, the same with a path of any length that does not touch itself.
    `answers` says which of these is right for `exact` and for the halting head. The targets are one shortest path,
    chosen at random. Splits are disjoint up to turns, flips and swapping S and G. Slices: `length`, the steps of the
    path, rounded down to multiples of half the longer side.
    """

    class Config(Options):
        """Options of `maze`."""

        size: PositiveInt = 9
        """Height and width of the grid, outer walls included."""
        height: PositiveInt | None = None
        """Instead of `size`."""
        width: PositiveInt | None = None
        """Instead of `size`."""
        kind: Literal["perfect", "random_walls"] = "perfect"
        """How the walls are generated."""
        unique: bool = False
        """Only mazes with a single shortest path; those of `perfect` have no other."""
        answers: Literal["target", "shortest", "path"] = "target"
        """Which answers are right: that of the targets, any shortest path, or any path that does not touch itself."""
        walls: tuple[Share, Share] = (0.3, 0.5)
        """Least and greatest share of wall cells, for `random_walls`."""
        min_length: PositiveInt | None = None
        """Fewest steps from S to G; by default the longer side."""
        max_length: PositiveInt | None = None
        """Most steps from S to G. If given, lengths are uniform from `min_length` to `max_length`."""
        n_puzzles: Annotated[int, Field(ge=1, le=2**31)] | None = None
        """Mazes of the training split, which repeat; by default all mazes of the file, or always new ones."""
        augment: bool = True
        """A random rotation or reflection of each training row, if training rows repeat."""
        path: str | None = None
        """A file of mazes to use instead of the generator: CSV, or drawn line by line; see `zoo.tasks.maze.files`."""
        test_path: str | None = None
        """A second file, whose mazes are the test split. Equal mazes are in no other split."""

        @field_validator("walls", mode="before")
        @classmethod
        def _from_list(cls, value: Any) -> Any:
            return tuple(value) if isinstance(value, list) else value

    layout = "fill_in"
    blank = OPEN
    config: Config

    def __init__(self, config: Config):
        super().__init__(config)
        if config.answers != "target":
            self.many_answers = "one of the shortest paths, chosen at random"
        self.height, self.width = config.height or config.size, config.width or config.size
        self.vocab_size = len(CHARACTERS) + 1
        self.seq_len = self.height * self.width
        self.n_symmetries = len(symmetries(self.height, self.width))
        self._source = self._open()
        self._repeats = config.path is not None or config.n_puzzles is not None

    def _open(self) -> Source:
        c = self.config
        if c.path is not None:
            steering = {"kind", "unique", "walls", "min_length", "max_length"} & c.changed().keys()
            if steering:
                raise UsageError(
                    f"maze: {sorted(steering)[0]} steers the generator and cannot go with path={c.path!r}."
                )
            return FromFile(self.height, self.width, c.path, c.test_path, c.n_puzzles)
        if c.test_path is not None:
            raise UsageError(f"maze: test_path={c.test_path!r} needs `path`, the file of the other splits.")
        if c.walls[0] > c.walls[1]:
            raise UsageError(f"maze: walls={c.walls} should be the least share, then the greatest.")
        shortest = c.min_length or max(self.height, self.width)
        if c.kind == "perfect":
            # Rooms are two apart, and the path visits each at most once.
            bound = 2 * (((self.height - 1) // 2) * ((self.width - 1) // 2) - 1)
        else:
            bound = self.seq_len - 1
        if shortest > bound:
            size = f"{self.height}x{self.width}"
            raise UsageError(
                f"maze: no path of a {size} maze has min_length={shortest} steps; the most is {max(bound, 0)}."
            )
        if c.max_length is not None and c.max_length < shortest:
            raise UsageError(f"maze: max_length={c.max_length} is less than min_length={shortest}.")
        longest = None if c.max_length is None else min(c.max_length, bound)
        perfect = c.kind == "perfect"
        unique = c.unique and not perfect  # a tree has one path between any two cells
        return Generator(self.height, self.width, perfect, unique, c.walls, shortest, longest, c.n_puzzles)

    def sample(self, n: int, *, split: Split, seed: int, start: int = 0) -> Batch:
        check_request(n, split, start)
        grids, answers, lengths = self._source.take(start, n, split, seed)
        if split == "train" and self._repeats and self.config.augment:
            maps = symmetries(self.height, self.width)
            words = random.fold(random.row_keys(split, seed, start, n), 2)
            picked = maps[random.below(words, len(maps))]
            grids, answers = np.take_along_axis(grids, picked, 1), np.take_along_axis(answers, picked, 1)
        step = max(1, max(self.height, self.width) // 2)
        inputs, targets = (torch.from_numpy(tokens.astype(np.int64)) for tokens in (grids, answers))
        return Batch(inputs, targets, {"length": torch.from_numpy(lengths // step * step)})

    def symmetry(self, index: int) -> Symmetry:
        """One of the turns and flips of the grid."""
        cells = symmetries(self.height, self.width)[index]
        return Symmetry(torch.from_numpy(cells), torch.arange(self.vocab_size))

    def problems(self, batch: Batch) -> Tensor:
        """Mazes up to turns, flips and swapping S and G."""
        return names_of(fingerprint(batch.inputs.cpu().numpy(), self.height, self.width))

    def row_scores(self, batch: Batch, predictions: Tensor) -> dict[str, Tensor]:
        """`valid`: a shortest path, whichever, and everything else as it was; `path`: a path of any length."""
        checks = {"valid": is_valid, "path": is_path}
        return {name: self._checked(check, batch, predictions).double() for name, check in checks.items()}

    def is_right(self, batch: Batch, answers: Tensor) -> Tensor:
        if self.config.answers == "target":
            return super().is_right(batch, answers)
        check = is_valid if self.config.answers == "shortest" else is_path
        return self._checked(check, batch, answers).to(answers.device)

    def right_cells(self, batch: Batch, answers: Tensor) -> Tensor:
        """Those that equal their targets; all of an answer that is right."""
        same = super().right_cells(batch, answers)
        return same if self.config.answers == "target" else same | self.is_right(batch, answers)[:, None]

    def _checked(self, check: Callable[..., NDArray[np.bool_]], batch: Batch, answers: Tensor) -> Tensor:
        return torch.from_numpy(check(batch.inputs.cpu().numpy(), answers.cpu().numpy(), self.height, self.width))

    def render(self, batch: Batch, row: int = 0, predictions: Tensor | None = None) -> str:
        lines = self._lines(batch.targets[row])
        if predictions is None:
            return "\n".join(lines)
        wrong = (predictions[row] != batch.targets[row]).cpu().numpy()
        right = self._lines(predictions[row], wrong)
        titles = ["answer", f"predicted: {self._verdict(batch, row, predictions)} (! differs)"]
        rows = zip([titles[0], *lines], [titles[1], *right], strict=True)
        return "\n".join(f"{left.ljust(2 * self.width)}   {line}".rstrip() for left, line in rows)

    def draw(self, batch: Batch, row: int = 0, predictions: Tensor | None = None) -> Figure:
        from zoo.tasks.maze.picture import draw_maze

        shape = (self.height, self.width)
        answer = batch.targets[row].cpu().numpy().reshape(shape)
        if predictions is None:
            return draw_maze(answer, None, "", True)
        verdict = self._verdict(batch, row, predictions)
        return draw_maze(answer, predictions[row].cpu().numpy().reshape(shape), verdict, verdict not in _FALSE)

    def sketch(self, batch: Batch, row: int, tokens: Tensor, hidden: Tensor) -> Sketch:
        kinds = self.kinds(batch, row, tokens, hidden)
        if not hidden[row].any() and self._verdict(batch, row, tokens) not in _FALSE:
            kinds = ["right" if kind == "wrong" else kind for kind in kinds]  # another path, as short
        cells = (cell(kind, token) for kind, token in zip(kinds, tokens[row].tolist(), strict=True))
        return Sketch(self.width, tuple(cells))

    def _lines(self, tokens: Tensor, wrong: NDArray[np.bool_] | None = None) -> list[str]:
        ink = [INK.get(token, "??") for token in tokens.tolist()]
        if wrong is not None:
            ink = [cell[0] + "!" if bad else cell for cell, bad in zip(ink, wrong, strict=True)]
        return ["".join(ink[i : i + self.width]) for i in range(0, self.seq_len, self.width)]

    def _verdict(self, batch: Batch, row: int, predictions: Tensor) -> str:
        if bool((predictions[row] == batch.targets[row]).all()):
            return "right"
        scores = self.row_scores(
            Batch(batch.inputs[row : row + 1], batch.targets[row : row + 1]), predictions[row : row + 1]
        )
        if bool(scores["valid"][0]):
            return "another shortest path"
        return "a longer path" if bool(scores["path"][0]) else "wrong"
