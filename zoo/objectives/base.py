"""The contract of objectives: how a model is trained on a task, and how its answer is computed.

An objective stands between a task's rows and a model's tokens. It encodes rows (in a background thread, on the CPU),
yields the losses of one batch, one per optimizer step, and turns a model into predictions in the task's own
coordinates. It never sees optimizers, devices or precision: those are the training loop's.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.core.errors import UsageError
from zoo.core.needs import Need, Needs
from zoo.core.options import Options
from zoo.core.registry import Registry, split_spec
from zoo.models.config import ModelConfig
from zoo.objectives.contract import encoded, evaluated, solving, updating
from zoo.protocol import Context
from zoo.tasks.protocol import IGNORE, Batch, Task

T = TypeVar("T")

Carry = dict[str, Tensor]
"""What an objective carries from batch to batch, such as the states of unfinished rows; kept in checkpoints."""


class Encoded(NamedTuple):
    """Rows as the model reads them.

    Attributes:
        tokens: (n, T) int64; of a series its inputs, (n, T, D_in) real vectors.
        positions: (m,) int64, the scored positions in the flattened (n * T).
        targets: (m,) int64, what should be predicted there; or (m, D_out) real vectors.
        timespans: (n, T) time since the previous token, where the task has irregular times.
        puzzles: (n,) int64 numbers of the puzzles, where the task numbers them and the objective passes them on.
        streams: (n,) int64 names of the rows' random streams, where the batch has them: see `zoo.objectives.draws`.
        lengths: (n,) int64 steps of each row, where rows are padded.
    """

    tokens: Tensor
    positions: Tensor
    targets: Tensor
    timespans: Tensor | None = None
    puzzles: Tensor | None = None
    streams: Tensor | None = None
    lengths: Tensor | None = None

    @property
    def rows(self) -> Tensor:
        """(m,) the row of each scored position."""
        return self.positions // self.tokens.shape[1]

    @property
    def n_steps(self) -> int:
        """Steps of all rows, n * T."""
        return self.tokens.shape[0] * self.tokens.shape[1]

    def to(self, device: torch.device) -> Encoded:
        return self.each(lambda t: t.to(device, non_blocking=True))

    def each(self, change: Callable[[Tensor], Tensor]) -> Encoded:
        """The same with every tensor changed."""
        return Encoded(*(None if t is None else change(t) for t in self))  # type: ignore[arg-type]

    def piece(self, cut: slice) -> Encoded:
        """The steps of a piece of every row."""
        T, n = self.tokens.shape[1], cut.stop - cut.start
        row, step = self.positions // T, self.positions % T
        here = (step >= cut.start) & (step < cut.stop)
        positions = (row * n + step - cut.start)[here]
        timespans = None if self.timespans is None else self.timespans[:, cut]
        return self._replace(
            tokens=self.tokens[:, cut], positions=positions, targets=self.targets[here], timespans=timespans
        )

    def split(self, parts: int, rows: slice | None = None) -> list[Encoded]:
        """The rows, or some of them, in a number of parts, one after another, as `row_parts` cuts them."""
        if parts == 1 and rows is None:
            return [self]
        row = self.rows
        found = []
        for cut in row_parts(len(self.tokens), parts, rows):
            here = (row >= cut.start) & (row < cut.stop)
            positions = self.positions[here] - cut.start * self.tokens.shape[1]
            whole = (self.timespans, self.puzzles, self.streams, self.lengths)
            of_rows = (None if t is None else t[cut] for t in whole)
            found.append(Encoded(self.tokens[cut], positions, self.targets[here], *of_rows))
        return found


def row_parts(n: int, parts: int, rows: slice | None = None) -> list[slice]:
    """n rows, or some of them, in a number of parts; the first ones have a row more where it does not divide."""
    ends = torch.arange(n)[slice(None) if rows is None else rows].tensor_split(parts)
    return [slice(int(part[0]), int(part[-1]) + 1) for part in ends if len(part)]


def with_losses(loss: Tensor, context: Context, share: float = 1.0) -> Tensor:
    """A loss and what mixers add to it (`Context.losses`), for rows that are this share of the batch."""
    for extra in context.losses:
        loss = loss + share * extra
    return loss


@dataclass
class Update:
    """The loss of one optimizer step, or of a part of its rows.

    Attributes:
        loss: scalar to differentiate; of a part, what it adds to the loss of the whole batch.
        logits: (m, vocab) at the scored positions, for the training accuracy; or (m, D_out) predicted real vectors.
        targets: (m,), or (m, D_out) real vectors.
        rows: (m,) int64, the row each position belongs to, counted within the part.
        metrics: further scalars worth logging.
        share: the part's share of the rows.
        last: whether the optimizer moves the model after this part.
        predicted: (m,) the most probable tokens, or (m, D_out), where the logits are no longer kept.
        right: (n,) bool, whether each row's answer is right (`Task.is_right`), where whole answers are judged; else the
            figure `exact` compares them with the targets.
    """

    loss: Tensor
    logits: Tensor
    targets: Tensor
    rows: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)
    share: float = 1.0
    last: bool = True
    predicted: Tensor | None = None
    right: Tensor | None = None

    def figures(self) -> dict[str, float]:
        """`accuracy` averaged per row and `exact`, or `mse`, as `Task.score` defines them, and the further metrics."""
        return figures([self])

    def light(self) -> Update:
        """The same figures, without the graph and the logits."""
        metrics = {k: v.detach() for k, v in self.metrics.items()}
        logits = self.logits.detach()
        predicted = self.answers()
        return replace(self, loss=self.loss.detach(), logits=logits[:0], predicted=predicted, metrics=metrics)

    def answers(self) -> Tensor:
        """(m,) the most probable tokens, or (m, D_out) the predicted real vectors."""
        if self.predicted is not None:
            return self.predicted
        logits = self.logits.detach()
        return logits if self.targets.is_floating_point() else logits.argmax(-1)


def figures(parts: Sequence[Update]) -> dict[str, float]:
    """`Update.figures` of all parts of a batch together."""
    found, exact = [], []
    for part in parts:
        # On the CPU, as not every device has float64.
        said, targets = part.answers().cpu(), part.targets.cpu()
        is_real = targets.is_floating_point()
        each = (said.double() - targets.double()).square().mean(-1) if is_real else (said == targets).double()
        rows = part.rows.cpu()
        scored = torch.bincount(rows).double()
        kept = scored > 0
        sums = torch.bincount(rows, each, len(scored))
        exact.append((sums == scored if part.right is None else part.right.cpu()[: len(scored)])[kept])
        found.append((sums / scored)[kept])
    mean = torch.cat(found).mean().item()
    whole = {"mse": mean} if is_real else {"accuracy": mean, "exact": torch.cat(exact).double().mean().item()}
    metrics: dict[str, float] = {}
    for part in parts:
        for name, value in part.metrics.items():
            metrics[name] = metrics.get(name, 0.0) + part.share * value.detach().float().item()
    return whole | metrics


_OF_SCORED = ("targets", "rows", "logits")


def joined(parts: Sequence[Update]) -> Update:
    """The update of whole rows, from those of the pieces of their sequences; without a graph."""
    share = sum(part.share for part in parts)
    metrics: dict[str, Tensor] = {}
    for part in parts:
        for name, value in part.metrics.items():
            metrics[name] = metrics.get(name, torch.zeros_like(value)) + value * (part.share / share)
    whole: dict[str, Any] = {name: torch.cat([getattr(part, name).cpu() for part in parts]) for name in _OF_SCORED}
    said = torch.cat([part.answers().cpu() for part in parts])
    loss = torch.stack([part.loss.detach().cpu() for part in parts]).sum()
    return replace(parts[0], **whole, loss=loss, predicted=said, metrics=metrics, share=share)


class Frame(NamedTuple):
    """The answers after one step of solving, in the task's coordinates, on the CPU.

    Attributes:
        tokens: (n, L) int64 token ids; the row's input where a cell is hidden or not scored. Of a series, (n, L)
            classes or (n, L, D_out) real vectors, of any value where nothing is scored.
        hidden: (n, L) bool, scored cells that have no answer yet.
        halting: (n,) probability that the model gives to its answer being right, where it has a say in that.
    """

    tokens: Tensor
    hidden: Tensor
    halting: Tensor | None = None


_CHECKS: dict[str, Callable[[Callable[..., Any]], Callable[..., Any]]] = {
    "encode": partial(encoded, Encoded),
    "updates": partial(updating, Update),
    "solve": partial(solving, Frame),
    "evaluate": evaluated,
}


class Objective(ABC):
    """A way to train a model and compute its answers; final classes enter the registry with `@register("name")`.

    Args:
        config: its options.
        task: the task that is taught.
        causal: whether the model reads left to right only.

    Raises:
        UsageError: a task or a model that does not fit, naming the fix.
    """

    name: ClassVar[str]
    Config: ClassVar[type[Options]]
    recursive: ClassVar[bool] = False
    """Whether it teaches recursive models, and no others."""
    series: ClassVar[bool] = False
    """Whether it teaches tasks of the layout `series`, and no others."""
    metric: ClassVar[str] = "accuracy"
    """The figure of the task's score that selects the best weights, where a training names none."""
    step_name: str = "step"
    """What one step of finding an answer is called."""
    reads_back: bool = False
    """Whether answers are generated token by token, by the model's `step` from a state."""
    loss_is_bound: ClassVar[bool] = False
    """Whether the loss of `evaluate` is only an upper bound of the answers' negative log likelihood."""
    reads_shifted: ClassVar[bool] = False
    """Whether it reads the logits of a model with `shifted_logits` one step earlier."""

    trains: str = ""
    """What the names of the trained weights begin with; all others stay as they are."""

    vocab_size: int
    """Token ids the model needs: the task's and those the objective adds; 0 for series."""
    length: int
    """Tokens the model reads at once."""

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        for name, check in _CHECKS.items():
            if name in vars(cls):
                setattr(cls, name, check(vars(cls)[name]))

    def __init__(self, config: Options, task: Task, *, causal: bool):
        self.config, self.task, self.causal = config, task, causal
        if self.series and task.layout != "series":
            raise UsageError(
                f"{self.name} teaches series of real vectors, and the rows of {task.name} are tokens: "
                "set objective=next_token."
            )
        if task.layout == "series" and not self.series:
            fix = "classification" if task.n_classes else "regression"
            told = f"{self.name} teaches tokens, and {task.name} is a series of real vectors"
            raise UsageError(f"{told}: set objective={fix}.")

    def needs(self, draft: ModelConfig) -> Needs:
        """What it needs of the model, for this task; what is left out there is filled in.

        Args:
            draft: the model's config without what is filled in.

        Raises:
            UsageError: a model with `shifted_logits`, which this objective does not read so.
        """
        if draft.shifted_logits and not self.reads_shifted:
            told = (
                "reads the logits of a step as those of its own token: leave it out, or set objective=masked_diffusion"
            )
            raise UsageError(f"model.shifted_logits=True is not allowed: {self.name} {told}.")
        task, recursive = self.task.name, f"{self.name} does not teach recursive models: set objective=deep_supervision"
        if self.recursive:
            recursive = f"{self.name} teaches a model that thinks in steps: set model.recursion={{}}"
        length = self.length + (draft.recursion.prefix if self.recursive and draft.recursion else 0)
        filled_in = f"{task} needs {self.vocab_size}, which is filled in where it is left out"
        return Needs(
            recursion=Need(self.recursive, recursive),
            vocab_size=Need(self.vocab_size, filled_in),
            length=Need(length, f"{task} under {self.name} reads {length} tokens"),
        )

    @abstractmethod
    def encode(self, batch: Batch) -> Encoded:
        """Rows as the model reads them; a pure function, called in a background thread."""

    def carries(self, carry: Carry, model: nn.Module, n: int) -> bool:
        """Whether a checkpoint's `carry` can be what `updates` leaves after a batch of `n` rows; by default nothing."""
        return not carry

    @abstractmethod
    def updates(self, model: nn.Module, data: Encoded, carry: Carry, generator: torch.Generator) -> Iterator[Update]:
        """The losses of one batch, one per optimizer step; the model changes between them.

        An objective that `train.accumulate` may be set with has a further argument, `parts: int = 1`: the number of
        parts in which the rows of a step are read. Each part has a loss of its own, which is differentiated before the
        next one is read; the losses, and so the gradients, add up to those of the whole batch.

        An objective that several processes may train with has one argument more, `rows: slice | None = None`: the rows
        of the batch that this process reads. `data` is the whole batch everywhere, and random numbers are drawn for the
        whole batch everywhere, so that a row is trained in the same way whatever the number of processes. The losses of
        all processes add up to that of the whole batch. `carry` then has these rows only.

        An objective that may train with sequences cut over processes has one argument more, `pieces: Pieces | None =
        None`: which piece of every sequence this process reads. The context of the model's pass gets the pieces of the
        sequence's length.

        Args:
            model: in training mode.
            data: one batch from `encode`, on the model's device.
            carry: changed in place; what it holds when the iterator ends comes with the next batch.
            generator: the source of every random draw, on the CPU.
        """

    def training_flops(self, model: Any, *, recompute: bool = False) -> int:
        """Matmul FLOPs (multiply-add = 2) by token of a training step: forward, and backward twice as many."""
        return (4 if recompute else 3) * model.flops_per_token(self.length)

    @classmethod
    def takes_parts(cls) -> bool:
        """Whether `updates` can read a batch in parts."""
        return "parts" in inspect.signature(cls.updates).parameters

    @classmethod
    def takes_rows(cls) -> bool:
        """Whether `updates` can read some rows of a batch, where other processes read the others."""
        return "rows" in inspect.signature(cls.updates).parameters

    def takes_pieces(self) -> bool:
        """Whether `updates` can read one piece of every sequence, where other processes read the others."""
        return "pieces" in inspect.signature(type(self).updates).parameters

    def passes(self, model: nn.Module, batch: Batch) -> int:
        """Largest number of passes of the model for the answers of these rows: tokens, unmasking passes, steps."""
        return 1

    @abstractmethod
    def solve(self, model: nn.Module, batch: Batch) -> Iterator[Frame]:
        """The answers after every step of solving; the last are those of `predict`.

        Without gradients, in evaluation mode. No answer depends on the other rows: what is drawn at random comes from
        the row's own stream (`zoo.objectives.draws`).
        """

    def solutions(self, model: nn.Module, batch: Batch) -> list[tuple[str, list[Frame]]]:
        """All paths to the answer of a batch's only row, each with its name, first the one that `solve` gives.

        By default the only one, without a name.
        """
        return [("", list(self.solve(model, batch)))]

    def predict(self, model: nn.Module, batch: Batch) -> Tensor:
        """Predicted token ids (n, L) in the task's coordinates, on the CPU; without gradients, in evaluation mode."""
        return last_of(self.solve(model, batch)).tokens

    @abstractmethod
    def evaluate(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """(predictions as `predict`, mean loss of a scored position): what validation measures, in few passes.

        A loss that is estimated may be a vector of several estimates of the same mean, independent of each other.

        Like `solve` without regard to the other rows: the loss is the mean of the rows' own, by their scored positions.
        """


objectives: Registry[type[Objective]] = Registry(
    "objective", "zoo.objectives", base=Objective, optional=("parts", "rows", "pieces")
)
register = objectives.register
"""Class decorator `@register("name")`."""


def list_objectives(pattern: str = "*") -> list[str]:
    """Names of the objectives that match a shell pattern."""
    return objectives.names(pattern)


def create_objective(spec: Any, task: Task, *, causal: bool = True, **options: Any) -> Objective:
    """An objective from its name and options, or from a mapping with the key `name`.

    Raises:
        UsageError: unknown objective or option, a wrong type, or a task or model that does not fit.
    """
    name, options = split_spec(spec, options, "objective")
    cls = objectives[name]
    objective = cls(cls.Config(**options), task, causal=causal)
    for size in ("vocab_size", "length"):
        if not hasattr(objective, size):
            raise UsageError(f"The objective {name!r} sets no {size}, which its __init__ should.")
    return objective


def last_of(items: Iterable[T]) -> T:
    """The last of one or more items, without keeping the others."""
    return deque(items, maxlen=1).pop()


class Answered(NamedTuple):
    """Rows with their answers filled in; the last L tokens correspond to the task's L targets.

    Attributes:
        tokens: (n, T) int64.
        cells: (n, T) bool, which of them are answers.
        timespans: (n, T), 1 for tokens that the task's row does not have, where the task has irregular times.
    """

    tokens: Tensor
    cells: Tensor
    timespans: Tensor | None


def appended(batch: Batch, separator: int | None = None) -> Answered:
    """Each row, the separator if there is one, and the row again with its answers: T = 2 L or 2 L + 1."""
    asked = batch.targets != IGNORE
    answer = torch.where(asked, batch.targets, batch.inputs)
    between = [] if separator is None else [torch.full_like(answer[:, :1], separator)]
    tokens = torch.cat([batch.inputs, *between, answer], 1)
    return Answered(tokens, F.pad(asked, (tokens.shape[1] - asked.shape[1], 0)), _spread(batch, tokens))


def answered(task: Task, batch: Batch) -> Answered:
    """Rows for a bidirectional model: `appended`, unless the answers are a text within the row.

    That (`Task.continues`) is answered where the row says it, at the step after the one that asks: T = L + 1.
    """
    if not task.continues:
        return appended(batch)
    asked = batch.targets != IGNORE
    following = torch.cat([batch.inputs[:, 1:], batch.inputs[:, -1:]], 1)
    tokens = torch.cat([batch.inputs[:, :1], torch.where(asked, batch.targets, following)], 1)
    return Answered(tokens, F.pad(asked, (1, 0)), _spread(batch, tokens))


def answered_length(task: Task, objective: str) -> int:
    """T of `answered`.

    Raises:
        UsageError: the rows say each answer right behind its question, where a model that looks both ways reads it.
    """
    if task.continues:
        return task.seq_len + 1
    batch = task.sample(4, split="train", seed=0)
    asked = (batch.targets != IGNORE)[:, :-1]
    if asked.any() and (batch.targets[:, :-1] == batch.inputs[:, 1:])[asked].all():
        told = "says each answer right behind its question, where a model that looks both ways reads it"
        raise UsageError(f"{task.name} {told}: {objective} cannot teach it, objective=next_token can.")
    return 2 * task.seq_len


def _spread(batch: Batch, tokens: Tensor) -> Tensor | None:
    if batch.timespans is None:
        return None
    return F.pad(batch.timespans, (0, tokens.shape[1] - batch.timespans.shape[1]), value=1.0)


def at_least_float32(logits: Tensor) -> Tensor:
    """Logits for losses and choices: those of a lower precision in float32."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def scored(targets: Tensor) -> Tensor:
    """The scored positions of (n, L) targets in the flattened (n * L)."""
    return (targets.reshape(-1) != IGNORE).nonzero().squeeze(1)


__all__ = [
    "Answered",
    "Carry",
    "Encoded",
    "Frame",
    "Objective",
    "Update",
    "UsageError",
    "answered",
    "answered_length",
    "appended",
    "at_least_float32",
    "create_objective",
    "figures",
    "joined",
    "last_of",
    "list_objectives",
    "register",
    "row_parts",
    "scored",
    "with_losses",
]
