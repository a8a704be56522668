"""The contract of tasks: rows that can be drawn again, and an exact score."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from zoo.core.errors import UsageError, unknown
from zoo.core.needs import Need, Needs
from zoo.core.options import Options
from zoo.core.registry import Registry, split_spec
from zoo.tasks import random
from zoo.tasks.batch import IGNORE, Batch, split_rows, take
from zoo.tasks.presets import PRESETS
from zoo.tasks.random import SPLITS, Split
from zoo.tasks.scores import LOWER_IS_BETTER, exactly, squared_errors, summary
from zoo.tasks.sketch import Cell, Kind, Sketch
from zoo.tasks.symmetry import Symmetry

Layout = Literal["next_token", "fill_in", "reconstruct", "series"]
"""How a task asks: for the next token, for cells, for a whole row again, or of a series of real vectors."""

_COLUMNS = 48  # of a terminal, at most, for a sketch


MOST = 2**20
"""How large a whole number among a task's options may be where its field names no other bound: rows are made in
memory, and in time that rises with their length and with what there is to choose from."""


class Task(ABC):
    """A generator of examples and their exact score.

    Row i of a stream depends only on (split, seed, start + i). Rows of the three splits are disjoint, unless the
    class says why not in `overlap`.
    """

    name: ClassVar[str]
    Config: ClassVar[type[Options]]
    layout: ClassVar[Layout]
    overlap: ClassVar[str | None] = None
    irregular_times: bool = False
    """Whether batches have `timespans`."""

    trivial_predictor: ClassVar[str] = "0 everywhere"
    """What `trivial` answers, in words."""
    lower_is_better: ClassVar[frozenset[str]] = LOWER_IS_BETTER
    """The figures of the score of which less is better."""

    is_language: ClassVar[bool] = False
    """Whether targets are the inputs moved by one step: a text to be modelled, with no question in it."""

    continues: ClassVar[bool] = False
    """Whether every scored target but the last is the next input: an answer that can be written token by token."""

    token_is_byte: bool = True
    """Of a text: whether a token is a byte, so that its loss is given in bits per byte."""

    many_answers: str | None = None
    """Which of many right answers the targets are, in words; None where only the targets are right."""

    absent: ClassVar[tuple[Split, ...]] = ()
    """Splits of which there are no rows: validation or test, where a user's own data have none."""

    vocab_size: int
    """Number of token ids; every input and target is below it. A task of the layout `series` has none."""
    n_inputs: int = 0
    """Numbers of a vector of the inputs, under the layout `series`."""
    n_outputs: int = 0
    """Numbers of a vector of the targets, where a series asks for real vectors."""
    n_classes: int = 0
    """Number of classes, where a series asks for those."""
    blank: int | None = None
    """The input token of a cell that is to be filled in, under the layout `fill_in`; every other cell is known then."""
    n_puzzles: int = 0
    """How many puzzles batches number in `puzzles`; 0 for a task that numbers none."""
    seq_len: int
    """Length L of the rows; of the longest, where held-out rows are longer than training rows."""
    n_symmetries: int = 1
    """How many maps `symmetry` gives; 1 where it knows none but the one that changes nothing."""

    def __init_subclass__(cls, **options: Any):
        super().__init_subclass__(**options)
        if "Config" in vars(cls):
            cls.Config._most = MOST
        if not hasattr(cls, "name"):  # of a class that is in no registry
            cls.name = cls.__name__

    def __init__(self, config: Options):
        self.config = config

    def needs(self) -> Needs:
        """What it needs of the model that answers it, beside what the objective needs to ask it."""
        decoder = f"{self.name} has no use for a decoder, with its layout {self.layout}"
        if self.layout == "reconstruct":
            decoder = f"{self.name} needs a decoder"
        puzzles = f"{self.name} numbers {self.n_puzzles}, which is filled in where it is left out"
        inputs, answers = f"{self.name} needs {self.n_inputs}", self.n_outputs or self.n_classes
        outputs, given = f"{self.name} needs {answers}", "which is filled in where it is left out"
        series = self.layout == "series"
        return Needs(
            inputs=Need(self.n_inputs, f"{inputs}, {given}") if series else None,
            outputs=Need(answers, f"{outputs}, {given}") if series else None,
            decoder=Need(self.layout == "reconstruct", decoder),
            n_puzzles=Need(self.n_puzzles, puzzles) if self.n_puzzles else None,
            timespans=Need(True, f"{self.name} has irregular times") if self.irregular_times else None,
        )

    @abstractmethod
    def sample(self, n: int, *, split: Split, seed: int, start: int = 0) -> Batch:
        """Rows start, start + 1, ... start + n - 1 of the stream (split, seed).

        Raises:
            UsageError: an unknown split, or `n` or `start` out of range.
        """

    def score(self, batch: Batch, predictions: Tensor) -> dict[str, Any]:
        """Exact scores of predicted token ids.

        Args:
            batch: rows as `sample` gave them.
            predictions: (n, L) int64, or (n, L, D_out) real vectors, read only where the batch is `scored`.

        Returns:
            `accuracy` (share of scored positions that are right, averaged per row), `exact` (share of rows whose
            answer is right: `is_right`), `n` (rows), what the task adds, and `slices`:
            `{slice name: {value: {the same figures}}}`. Where targets are real vectors, in place of the first two:
            `mse` (mean squared error of the scored steps, averaged per row), `trivial_mse` (the same of `trivial`), and
            `mse_ratio` (the first by the second).
        """
        return summary(self.figures(batch, predictions), batch.slices)

    def trivial(self, batch: Batch) -> Tensor:
        """(n, L, D_out) answers that take no learning, as `trivial_predictor` says, for rows whose targets are real."""
        return torch.zeros_like(batch.targets)

    def figures(self, batch: Batch, predictions: Tensor) -> dict[str, Tensor]:
        """The figures of each row, each (n,), whose means `score` gives."""
        if batch.mask is not None:
            errors = {"mse": predictions, "trivial_mse": self.trivial(batch)}
            own = self.row_scores(batch, predictions)
            return {name: squared_errors(batch, answers) for name, answers in errors.items()} | own
        scored = batch.scored
        right = self.right_cells(batch, predictions) & scored
        return {
            "accuracy": right.sum(1).double() / scored.sum(1).clamp(min=1),
            "exact": self.is_right(batch, predictions).double(),
            **self.row_scores(batch, predictions),
        }

    def is_right(self, batch: Batch, answers: Tensor) -> Tensor:
        """(n,) bool, whether each row's answer is right: what `exact` counts, and what a halting head learns.

        By default every scored position equals its target. A task with many right answers (`many_answers`) checks them
        here; the loss still leads to its targets.

        Args:
            batch: rows of which only `inputs` and `targets` are read.
            answers: (n, L) int64 on the device of the batch; of any value, read only where the batch is `scored`.
        """
        return exactly(batch, answers)

    def right_cells(self, batch: Batch, answers: Tensor) -> Tensor:
        """(n, L) bool, which positions are right: what `accuracy` counts, and drawings mark; arguments as `is_right`.

        By default those that equal their targets. In an answer that is right, every scored position is.
        """
        return answers == batch.targets

    def loss_figures(self, batch: Batch, loss: float) -> dict[str, float]:
        """Further figures that follow from the mean loss of a scored position, in nats: of a text of bytes its bits."""
        return {"bits_per_byte": loss / math.log(2)} if self.is_language and self.token_is_byte else {}

    def problems(self, batch: Batch) -> Tensor:
        """(n,) int64 names of the problems of the rows: equal if the task's own symmetry turns one problem into the
        other.

        Errors are estimated over problems: rows of one name prove no more than one of them. By default rows are one
        problem only where they are equal.
        """
        given = [batch.inputs, batch.targets, *([] if batch.timespans is None else [batch.timespans])]
        rows = zip(*(np.ascontiguousarray(t.cpu().flatten(1)) for t in given), strict=True)
        return names_of(random.contents(np.concatenate([part.view(np.uint8) for part in row]) for row in rows))

    def symmetry(self, index: int) -> Symmetry:
        """The map number `index` of the task's problems onto others; number 0 changes nothing.

        Args:
            index: 0 to `n_symmetries` - 1. Other numbers are other maps, or drawn at random where there are too many
                to be counted through.
        """
        assert index == 0, f"{self.name} has one symmetry"
        return Symmetry(torch.arange(self.seq_len), torch.arange(self.vocab_size))

    def row_scores(self, batch: Batch, predictions: Tensor) -> dict[str, Tensor]:
        """Further figures of each row, each (n,), averaged by `score`; none by default."""
        return {}

    @abstractmethod
    def render(self, batch: Batch, row: int = 0, predictions: Tensor | None = None) -> str:
        """One row drawn as text for a terminal, beside its answer and, where given, a model's predictions (n, L)."""

    def draw(self, batch: Batch, row: int = 0, predictions: Tensor | None = None):
        """One row drawn as a matplotlib figure; by default the text of `render`."""
        from matplotlib.figure import Figure

        text = self.render(batch, row, predictions)
        lines = text.splitlines() or [""]
        figure = Figure(figsize=(0.09 * max(map(len, lines)) + 0.4, 0.2 * len(lines) + 0.4))
        figure.text(0.02, 0.98, text, family="monospace", fontsize=9, va="top")
        return figure

    # ---- answers in the making

    def asked(self, batch: Batch) -> Tensor:
        """(n, L) bool: the cells to be answered, which are scored and not known."""
        scored = batch.scored
        return scored if self.blank is None else scored & (batch.inputs == self.blank)

    def question(self, batch: Batch, row: int = 0) -> Sketch:
        """One row before the first answer; by default its answer with every cell hidden."""
        return self.sketch(batch, row, batch.inputs, self.asked(batch))

    def sketch(self, batch: Batch, row: int, tokens: Tensor, hidden: Tensor) -> Sketch:
        """One row's answer in the making; by default its scored cells in lines, each as `spell` writes it.

        Args:
            batch: rows as `sample` gave them.
            row: which of them.
            tokens: (n, L) int64 answers so far.
            hidden: (n, L) bool, cells without an answer yet, whose tokens are not read.
        """
        kinds, scored = self.kinds(batch, row, tokens, hidden), batch.scored[row].tolist()
        pairs = zip(tokens[row].tolist(), kinds, scored, strict=True)
        words = [(kind, "" if kind == "hidden" else self.spell(token)) for token, kind, kept in pairs if kept]
        tokens_there = range(self.n_classes or self.vocab_size) if batch.mask is None else ()
        most = max([len(self.spell(token)) for token in tokens_there] or [len(word) for _, word in words])
        cells = tuple(Cell(kind, word, (word or "_").rjust(most) + " ") for kind, word in words)
        return Sketch(min(len(cells), max(_COLUMNS // (most + 1), 1)), cells)

    def kinds(self, batch: Batch, row: int, tokens: Tensor, hidden: Tensor) -> list[Kind]:
        """What each of a row's L cells is in an answer in the making, see `sketch`; a real vector is not judged."""
        if batch.mask is not None:
            found: tuple[Kind, Kind] = "right", "hidden"
            pairs = zip(batch.mask[row].tolist(), hidden[row].tolist(), strict=True)
            return [found[unknown] if scored else "given" for scored, unknown in pairs]
        one = take(batch, slice(row, row + 1))
        right, asked = self.right_cells(one, tokens[row : row + 1])[0], self.asked(one)[0]
        cells = (each.tolist() for each in (right, hidden[row], asked, one.scored[0]))
        return [_kind(*cell) for cell in zip(*cells, strict=True)]

    def spell(self, token: Any) -> str:
        """A token as a short word, or a real vector."""
        return ",".join(f"{value:.2f}" for value in token) if isinstance(token, list) else str(token)


class StreamEnded(Exception):
    """Training rows that come in order have come to their end; its text says more, or nothing."""


class RowStream(ABC):
    """Training rows that come in order, from the first."""

    about: str
    """What gives the rows, for a person."""
    has_state: bool
    """Whether its place can be saved."""

    @abstractmethod
    def take(self, n: int) -> Batch:
        """The next `n` rows.

        Raises:
            StreamEnded: there are fewer.
        """

    @abstractmethod
    def state_dict(self) -> dict[str, Any] | None:
        """Its place, or None where it cannot be saved."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a place."""


class Streamed(ABC):
    """A mix-in for tasks whose training rows cannot be drawn by their index."""

    @abstractmethod
    def open(self, seed: int) -> RowStream:
        """The training rows, from the first."""


def names_of(keys: random.Keys) -> Tensor:
    """Keys (n,) as the tensor that holds the same bits."""
    return torch.from_numpy(keys.view(np.int64))


def _kind(right: bool, hidden: bool, asked: bool, scored: bool) -> Kind:
    if not scored or (hidden and not asked):
        return "given"
    if hidden:
        return "hidden"
    if not right:
        return "wrong"
    return "right" if asked else "given"


registry: Registry[type[Task]] = Registry("task", "zoo.tasks", base=Task, settings={"layout": get_args(Layout)})
register = registry.register


def check_split(split: str) -> None:
    """Raises UsageError unless `split` is one of `SPLITS`."""
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)


def check_request(n: int, split: str, start: int) -> None:
    """Raises UsageError unless `sample` can give `n` rows from `start` on of this split."""
    check_split(split)
    if n < 1 or start < 0:
        raise UsageError(f"sample: n={n} must be at least 1 and start={start} at least 0.")


def list_tasks(pattern: str = "*") -> list[str]:
    """Names of the tasks that match a shell pattern."""
    return registry.names(pattern)


def create_task(spec: Any, **options: Any) -> Task:
    """A task from its name and options, or from a mapping with the key `name`. A published name of `PRESETS` has the
    options that it stands for, where they are not given.

    Raises:
        UsageError: unknown task or option, wrong type, or sizes the task cannot hold.
    """
    name, options = split_spec(spec, options, "task")
    name, preset = named(name)
    cls = registry[name]
    task = cls(cls.Config(**{**preset, **options}))
    check_sizes(task)
    return task


def named(name: str) -> tuple[str, dict[str, Any]]:
    """The registered name that a task's name or a published name (`PRESETS`) stands for, and the options with it.

    Raises:
        UsageError: an unknown name.
    """
    if name in registry:
        return name, {}
    if name not in PRESETS:
        raise registry.unknown(name, [*registry.names(), *PRESETS])
    return PRESETS[name].task, dict(PRESETS[name].options)


def check_sizes(task: Task) -> None:
    """Raises UsageError unless a task has set its sizes: those of tokens, or those of real vectors."""
    series = getattr(task, "layout", None) == "series"
    for size in ("n_inputs" if series else "vocab_size", "seq_len"):
        if not getattr(task, size, 0):
            raise UsageError(f"The task {task.name!r} sets no {size}, which its __init__ should.")
    if series and bool(task.n_outputs) == bool(task.n_classes):
        raise UsageError(f"The task {task.name!r} should set one of n_outputs and n_classes in its __init__.")


__all__ = [
    "IGNORE",
    "SPLITS",
    "Batch",
    "RowStream",
    "Split",
    "StreamEnded",
    "Streamed",
    "Symmetry",
    "Task",
    "UsageError",
    "check_request",
    "check_sizes",
    "check_split",
    "create_task",
    "exactly",
    "list_tasks",
    "named",
    "names_of",
    "register",
    "split_rows",
    "take",
]
