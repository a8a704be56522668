"""One sequence cut over several processes: each holds a contiguous piece of its steps, and hands on what it knows.

Every process runs the same program over its own piece. What it needs of the steps before comes from the process before,
as the state at the end of that piece; gradients of states travel the other way. All messages go from one process to one
other, in the order of the program, so that none needs a name.

Shape legend: B batch, T steps of this process's piece.
"""

from __future__ import annotations

import functools
import queue
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from zoo.core.errors import UsageError
from zoo.states import State, document_positions, next_position

T = TypeVar("T")

UNDERWAY = 4  # messages to a process that may wait there to be received: what they hold stays in memory


class Link(ABC):
    """Sends tensors between the processes that share a sequence, which are numbered in the order of its pieces."""

    @abstractmethod
    def post(self, tensor: Tensor, to: int) -> None:
        """Send a tensor, without waiting for its arrival."""

    @abstractmethod
    def take(self, buffer: Tensor, source: int) -> Tensor:
        """The next tensor from a process, which has the shape and dtype of the contiguous `buffer`."""


class ProcessLink(Link):
    """Between processes of `torch.distributed`.

    Args:
        ranks: numbers of the processes in the order of the pieces.
        group: of torch, None for the default one.
    """

    def __init__(self, ranks: Sequence[int], group: Any = None):
        self._ranks, self._group = list(ranks), group
        self._underway: dict[int, deque[tuple[Any, Tensor]]] = {}

    def post(self, tensor: Tensor, to: int) -> None:
        flat = _bytes(tensor.detach().contiguous())
        waiting = self._underway.setdefault(to, deque())
        while len(waiting) >= UNDERWAY:
            waiting.popleft()[0].wait()
        waiting.append((torch.distributed.isend(flat, self._ranks[to], group=self._group), flat))

    def take(self, buffer: Tensor, source: int) -> Tensor:
        torch.distributed.recv(_bytes(buffer), self._ranks[source], group=self._group)
        return buffer


def _bytes(tensor: Tensor) -> Tensor:
    """A contiguous tensor as the bytes that it consists of: not every dtype can be sent."""
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return tensor.reshape(-1).view(torch.uint8)


class ThreadLink(Link):
    """Between threads of this process, each of which plays a process: for tests and for counting bytes.

    Args:
        rank: number of this thread.
        queues: queues[i][j] holds the messages from i to j; None where i has ended.
    """

    def __init__(self, rank: int, queues: list[list[queue.Queue[Tensor | None]]]):
        self._rank, self._queues = rank, queues

    def post(self, tensor: Tensor, to: int) -> None:
        self._queues[self._rank][to].put(tensor.detach().clone())

    def close(self) -> None:
        """Let nobody wait for further messages from here."""
        for each in self._queues[self._rank]:
            each.put(None)

    def take(self, buffer: Tensor, source: int) -> Tensor:
        found = self._queues[source][self._rank].get()
        if found is None:
            raise Ended(f"Piece {self._rank} waits in vain for a message from piece {source}.")
        if found.shape != buffer.shape or found.dtype != buffer.dtype:
            told = f"{tuple(found.shape)} {found.dtype}, expected {tuple(buffer.shape)} {buffer.dtype}"
            raise RuntimeError(f"Piece {self._rank} received {told}: the pieces run different programs.")
        return buffer.copy_(found)


class Ended(RuntimeError):
    """A message does not come, as the thread that should send it has ended."""


class _Mirrored(Link):
    """The pieces in the opposite order."""

    def __init__(self, link: Link, size: int):
        self.link, self._size = link, size

    def post(self, tensor: Tensor, to: int) -> None:
        self.link.post(tensor, self._size - 1 - to)

    def take(self, buffer: Tensor, source: int) -> Tensor:
        return self.link.take(buffer, self._size - 1 - source)


def piece_sizes(length: int, n: int) -> tuple[int, ...]:
    """Steps of each of n pieces of a sequence; the first ones have a step more where it does not divide.

    Raises:
        UsageError: there are fewer steps than pieces.
    """
    if length < n:
        raise UsageError(f"{length} steps cannot be cut into {n} pieces: every piece needs a step.")
    return tuple(length // n + (i < length % n) for i in range(n))


class Pieces:
    """How a sequence is cut, and which piece this process holds.

    Args:
        rank: number of this process's piece.
        sizes: number of steps of each piece.
        link: to the other processes.

    Attributes:
        sent: bytes that this process has sent, gradients included.
    """

    def __init__(self, rank: int, sizes: Sequence[int], link: Link):
        self.rank, self.sizes, self._link = rank, tuple(sizes), link
        self.sent = 0
        self._mirror: Pieces | None = None
        self._start: tuple[Tensor, Tensor] | None = None

    @property
    def n(self) -> int:
        """Number of pieces."""
        return len(self.sizes)

    @property
    def start(self) -> int:
        """Number of the first step of this piece in the sequence."""
        return sum(self.sizes[: self.rank])

    @property
    def steps(self) -> slice:
        """The steps of this piece."""
        return slice(self.start, self.start + self.sizes[self.rank])

    @property
    def share(self) -> float:
        """Of the steps of the sequence, those of this piece."""
        return self.sizes[self.rank] / sum(self.sizes)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def is_last(self) -> bool:
        return self.rank == self.n - 1

    def of_length(self, length: int) -> Pieces:
        """The same processes with a sequence of another length."""
        return Pieces(self.rank, piece_sizes(length, self.n), self._link)

    def mirrored(self) -> Pieces:
        """The same pieces in reversed time, where the last one comes first."""
        if self._mirror is None:
            self._mirror = _MirroredPieces(self, _Mirrored(self._link, self.n))
        return self._mirror

    # ---- messages without gradients

    def post(self, tensor: Tensor, to: int) -> None:
        """Send a tensor to the process of another piece."""
        self._count(tensor.numel() * tensor.element_size())
        self._link.post(tensor, to)

    def take(self, shape: Sequence[int], source: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The next tensor that the process of another piece has sent here."""
        return self._link.take(torch.empty(tuple(shape), dtype=dtype, device=device), source)

    def _count(self, n_bytes: int) -> None:
        self.sent += n_bytes

    def positions(self, batch_size: int, resets: Tensor | None, device: torch.device) -> Tensor:
        """(B,) int64, steps of the current document before this piece.

        Args:
            resets: (B, T) of this piece, true where a document starts.
        """
        if resets is None:
            return torch.full((batch_size,), self.start, dtype=torch.int64, device=device)
        if self._start is None or self._start[0] is not resets:
            start = torch.zeros(batch_size, dtype=torch.int64, device=device)
            if not self.is_first:
                start = self.take((batch_size,), self.rank - 1, dtype=torch.int64, device=device)
            if not self.is_last:
                positions = document_positions(start, resets.shape[1], resets)
                self.post(next_position(positions, start, None), self.rank + 1)
            self._start = resets, start
        return self._start[1]

    def following(self, batch_size: int, resets: Tensor | None, device: torch.device) -> Tensor:
        """(B,) int64, steps of the document at the end of this piece that follow this piece."""
        if resets is None:
            return torch.full((batch_size,), sum(self.sizes[self.rank + 1 :]), dtype=torch.int64, device=device)
        after = torch.zeros(batch_size, dtype=torch.int64, device=device)
        if not self.is_last:
            after = self.take((batch_size,), self.rank + 1, dtype=torch.int64, device=device)
        if not self.is_first:
            T = resets.shape[1]
            first = torch.where(resets, torch.arange(T, device=device), T).amin(1)
            self.post(torch.where(first < T, first, T + after), self.rank - 1)
        return after

    # ---- messages that gradients travel back through

    def shift(self, edge: Tensor, start: Tensor) -> Tensor:
        """What the process before gives here for its own `edge`; in the first, `start`, which has the same form."""
        return _Shift.apply(self, _anchor(edge), edge, start)

    def receive(self, *states: Tensor) -> tuple[Tensor, ...]:
        """The states that the process before sends; in the first, the given ones, whose forms all of them have."""
        if self.is_first:
            return states
        forms = [(s.shape, s.dtype, s.device) for s in states]
        return _Receive.apply(self, _anchor(states[0]), forms)

    def send(self, through: Tensor, *states: Tensor) -> Tensor:
        """Send states to the next process, and return `through`, whose backward pass takes up their gradients."""
        return through if self.is_last else _Send.apply(self, _anchor(through), through, *states)

    def receive_tree(self, state: State) -> State:
        """As `receive`, for any state, whose tensors may have grown on the way."""
        leaves, tree = tree_flatten(state)
        if self.is_first:
            return state
        forms = []
        for leaf in leaves:
            shape = self.take((leaf.ndim,), self.rank - 1, dtype=torch.int64, device=leaf.device)
            forms.append((tuple(shape.tolist()), leaf.dtype, leaf.device))
        return tree_unflatten(list(_Receive.apply(self, _anchor(leaves[0]), forms)), tree)

    def send_tree(self, through: Tensor, state: State) -> Tensor:
        """As `send`, for any state."""
        if self.is_last:
            return through
        leaves = tree_flatten(state)[0]
        for leaf in leaves:
            self.post(torch.tensor(leaf.shape, dtype=torch.int64, device=leaf.device), self.rank + 1)
        return self.send(through, *leaves)


class _MirroredPieces(Pieces):
    """Pieces in reversed time, which count what is sent where the others do."""

    def __init__(self, pieces: Pieces, link: Link):
        super().__init__(pieces.n - 1 - pieces.rank, pieces.sizes[::-1], link)
        self._pieces = pieces

    def _count(self, n_bytes: int) -> None:
        self._pieces._count(n_bytes)


def first_derivative(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Mark the backward pass of a message: it is refused where it would have to be differentiated in turn."""

    @functools.wraps(backward)
    def run(ctx: Any, *gradients: Any) -> Any:
        if torch.is_grad_enabled():  # only within create_graph=True
            raise UsageError(
                "What processes exchange has no second derivatives (create_graph=True): let one process have the whole "
                "sequence and all experts."
            )
        return backward(ctx, *gradients)

    return run


def _anchor(like: Tensor) -> Tensor:
    """What makes a message part of the graph in every process alike, whatever needs a gradient there."""
    return torch.zeros((), device=like.device, requires_grad=torch.is_grad_enabled())


class _Shift(torch.autograd.Function):
    """The anchor is stored so that a forward pass that is computed again is so before its messages are waited for."""

    @staticmethod
    def forward(ctx, pieces: Pieces, anchor: Tensor, edge: Tensor, start: Tensor) -> Tensor:
        ctx.pieces = pieces
        ctx.save_for_backward(anchor)
        if not pieces.is_last:
            pieces.post(edge, pieces.rank + 1)
        if pieces.is_first:
            return start.clone()
        return pieces.take(edge.shape, pieces.rank - 1, dtype=edge.dtype, device=edge.device)

    @staticmethod
    @first_derivative
    def backward(ctx, d_before: Tensor):
        pieces, _ = ctx.pieces, ctx.saved_tensors
        if not pieces.is_first:
            pieces.post(d_before, pieces.rank - 1)
        d_edge = torch.zeros_like(d_before)
        if not pieces.is_last:
            d_edge = pieces.take(d_before.shape, pieces.rank + 1, dtype=d_before.dtype, device=d_before.device)
        return None, None, d_edge, d_before if pieces.is_first else None


class _Receive(torch.autograd.Function):
    """One node for all tensors of a state: it sends back a gradient for each, used here or not."""

    @staticmethod
    def forward(ctx, pieces: Pieces, anchor: Tensor, forms: list[tuple[Any, torch.dtype, torch.device]]):
        ctx.pieces = pieces
        found = [pieces.take(s, pieces.rank - 1, dtype=dtype, device=device) for s, dtype, device in forms]
        ctx.mark_non_differentiable(*(x for x in found if not _has_gradient(x)))
        return tuple(found)

    @staticmethod
    @first_derivative
    def backward(ctx, *d_states: Tensor):
        for d_state in d_states:
            if _has_gradient(d_state):
                ctx.pieces.post(d_state, ctx.pieces.rank - 1)
        return None, None, None


class _Send(torch.autograd.Function):
    """Stores the anchor as `_Shift` does."""

    @staticmethod
    def forward(ctx, pieces: Pieces, anchor: Tensor, through: Tensor, *states: Tensor) -> Tensor:
        ctx.pieces, ctx.forms = pieces, [(s.shape, s.dtype, s.device, _has_gradient(s)) for s in states]
        ctx.save_for_backward(anchor)
        for state in states:
            pieces.post(state, pieces.rank + 1)
        return through.view_as(through)

    @staticmethod
    @first_derivative
    def backward(ctx, d_through: Tensor):
        source, _ = ctx.pieces.rank + 1, ctx.saved_tensors
        taken = (ctx.pieces.take(s, source, dtype=dt, device=dev) if real else None for s, dt, dev, real in ctx.forms)
        return None, None, d_through, *taken


def _has_gradient(x: Tensor) -> bool:
    return x.is_floating_point() or x.is_complex()


def in_threads(n: int, length: int, function: Callable[[Pieces], T]) -> list[T]:
    """What a function returns for each piece of a sequence of `length` steps, one thread a piece.

    Raises:
        BaseException: that of the first piece which failed by itself.
    """
    queues: list[list[queue.Queue[Tensor | None]]] = [[queue.Queue() for _ in range(n)] for _ in range(n)]
    found: list[Any] = [None] * n
    errors: dict[int, BaseException] = {}

    def play(rank: int) -> None:
        link = ThreadLink(rank, queues)
        torch.set_num_threads(1)  # teams of theirs would wait for each other, spinning
        try:
            found[rank] = function(Pieces(rank, sizes, link))
        except BaseException as error:
            errors[rank] = error
        finally:
            link.close()

    sizes, before = piece_sizes(length, n), torch.get_num_threads()
    threads = [threading.Thread(target=play, args=(rank,), daemon=True) for rank in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.set_num_threads(before)
    for rank in sorted(errors, key=lambda rank: (isinstance(errors[rank], Ended), rank)):
        raise errors[rank]
    return found
