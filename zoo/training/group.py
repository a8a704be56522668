"""What a training does through the processes that share it; this is the ordinary case, one process, which leads."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from zoo.objectives.base import Carry, Update, joined
from zoo.pieces import Pieces
from zoo.training.train_options import TrainConfig

T = TypeVar("T")


class Group:
    """The processes of one training. This class is the group of an ordinary training: one process, which leads.

    Attributes:
        rank: number of this process.
        size: number of processes.
    """

    rank, size = 0, 1
    pieces: Pieces | None = None
    """Which piece of a sequence this process reads, to be taken `of_length`; None where sequences are not cut."""

    def cut_sequences(self, n: int) -> None:
        """Have every n processes share their rows, each with a piece of every sequence."""

    def share_experts(self, n: int) -> None:
        """Have every n processes share out the experts of each layer, in models that are `cut` from now on."""

    @property
    def leads(self) -> bool:
        """Whether this process writes the run folder and speaks for all."""
        return self.rank == 0

    def rows(self, n: int) -> slice | None:
        """Which of n rows are this process's; None for all of them."""
        return None

    def agreed(self, prepare: Callable[[], T], statement: Callable[[T], Mapping[str, Any]]) -> T:
        """What every process prepares for itself, where all of them come to the same statement.

        Raises:
            UsageError: that of any process, in all of them; or they differ.
        """
        return prepare()

    def told(self, action: Callable[[], T]) -> T:
        """What an action returns in the leading process, in all of them; its `UsageError` or `RunError` likewise."""
        return action()

    def largest(self, *numbers: int) -> list[int]:
        """The largest of each number over the processes."""
        return list(numbers)

    def total(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over the processes."""
        return tensor

    def gathered(self, items: list[T]) -> list[list[T]]:
        """The items of each process, in order."""
        return [items]

    def exchange(self, parts: list[Tensor], lengths: list[int]) -> list[Tensor]:
        """What every process has for this one, where `parts` are what this one has for each of them.

        Args:
            parts: one-dimensional tensors of one type.
            lengths: of what will be received.
        """
        return parts

    def cuts(self, config: TrainConfig) -> bool:
        """Whether the processes of a training by this config hold weights in pieces."""
        return False

    def cut(self, model: nn.Module, config: TrainConfig, device: torch.device) -> None:
        """Make of a model on the device "meta" one in pieces on a device: this process's rows, without values yet."""

    def pour(self, values: Callable[[], nn.Module], *models: nn.Module) -> None:
        """Fill models in pieces with the weights of a whole one, which only the leading process makes."""

    def together(self, model: nn.Module) -> contextlib.AbstractContextManager[None]:
        """Each process calls a model as often as it likes; where the weights are in pieces, all wait for the last."""
        return contextlib.nullcontext()

    def share(self, module: nn.Module) -> None:
        """Give all processes the leading one's parameters and buffers of a module."""

    def seed_step(self, seed: int, step: int, device: torch.device) -> None:
        """Make what layers draw at random (dropout) other numbers in each process, the same in a resumed run."""

    def stepping(self, model: nn.Module, parts: int) -> Stepping:
        """What takes the updates of a batch, each of them in parts, out of an objective.

        After the backward pass of the last part, and `finish`, the gradients are those of the whole batch.
        """
        return Stepping()

    def set_timeout(self, seconds: float) -> None:
        """Set after how many seconds a process that does not answer counts as lost."""

    def contact(self) -> contextlib.AbstractContextManager[None]:
        """What torch says of a lost process is one line, a `LostProcess`."""
        return contextlib.nullcontext()


class Stepping:
    """Takes the updates of a batch out of an objective, one after another."""

    def next(self, updates: Iterator[Update]) -> Update | None:
        """The next update, forward pass included; None after the last."""
        return next(updates, None)

    def finish(self) -> None:
        """Called after the backward pass of an update's last part, for gradients that are not whole by then."""


def on_cpu(data: Any) -> Any:
    """Plain data with all its tensors on the CPU, so that it can be sent."""
    return tree_map_only(Tensor, lambda tensor: tensor.cpu(), data)


def row_pieces(carry: Carry, rows: slice | None) -> Carry:
    """The rows of a process among those that objectives carry from batch to batch."""
    return carry if rows is None else {name: tensor[rows].clone() for name, tensor in carry.items()}


def joined_rows(group: Group, carry: Carry) -> Carry:
    """What all processes carry, as one process would."""
    if group.size == 1:
        return carry
    pieces = [piece for each in group.gathered([{k: v.cpu() for k, v in carry.items()}]) for piece in each]
    return {name: torch.cat([piece[name] for piece in pieces]) for name in carry}


def joined_pieces(lists: list[list[Update]], n: int) -> list[Update]:
    """The updates of all processes, of which every n share their rows, with whole rows again."""
    found = []
    for i in range(0, len(lists), n):
        found += [joined(parts) for parts in zip(*lists[i : i + n], strict=True)]
    return found


def interleaved(lists: Iterable[list[T]]) -> list[T]:
    """Items of which each process has had every n-th, in their order."""
    each = list(lists)
    return [each[i % len(each)][i // len(each)] for i in range(sum(map(len, each)))]


__all__ = ["Group", "Stepping", "interleaved", "joined_pieces", "joined_rows", "on_cpu", "row_pieces"]
