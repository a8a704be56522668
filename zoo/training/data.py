"""The stream of training batches: made and encoded in a background thread, exact at any position; or in order only."""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from zoo.core.errors import RunError, UsageError
from zoo.objectives.base import Encoded, Objective
from zoo.tasks import random
from zoo.tasks.protocol import Batch, Streamed, StreamEnded, Task, split_rows, take
from zoo.training.randomness import kept_random_state

TOKENS_AHEAD = 65536  # rows are drawn in chunks of about so many tokens, since small draws cost as much as large ones
MOST_BATCHES = 16
_SAME = "The run comes to the same bits if the same rows come again."
_ORDER = 2**63  # the purpose of random numbers, apart from those of the rows


class Stream:
    """Batches `start`, `start + 1`, ... `stop - 1` of a task's training split.

    Batch i has rows i * batch_size and following, whatever the chunk they were drawn in. With `rows`, the training set
    has that number of rows; they come again in every epoch, each time in another order.
    """

    def __init__(
        self,
        task: Task,
        objective: Objective,
        *,
        seed: int,
        batch_size: int,
        start: int,
        stop: int,
        device: torch.device,
        rows: int | None = None,
    ):
        self.task, self.objective, self.device, self.rows = task, objective, device, rows
        self.kept: Batch | None = None
        self.seed, self.batch_size = seed, batch_size
        self.next_batch, self.stop = start, stop
        self.per_chunk = min(max(TOKENS_AHEAD // (batch_size * objective.length), 1), MOST_BATCHES)
        # One thread of its own: a second team of threads would only fight with the model for the same cores.
        self.pool = ThreadPoolExecutor(1, "zoo-data", initializer=lambda: torch.set_num_threads(1))
        self.chunks: deque[Future[list[Encoded]]] = deque()
        self.ready: deque[Encoded] = deque()
        self._request(1)  # the first step waits for one batch only
        self._request(self.per_chunk)

    def _request(self, n_batches: int) -> None:
        n = min(n_batches, self.stop - self.next_batch)
        if n > 0:
            self.chunks.append(self.pool.submit(self._make, self.next_batch, n))
            self.next_batch += n

    def _make(self, first: int, n: int) -> list[Encoded]:
        size = self.batch_size
        if self.rows is None:
            rows = self.task.sample(n * size, split="train", seed=self.seed, start=first * size)
        else:
            if self.kept is None:
                self.kept = self.task.sample(self.rows, split="train", seed=self.seed)
            rows = take(self.kept, self._again(first * size, n * size, self.rows))
        data = [self.objective.encode(part) for part in split_rows(rows, size)]
        if self.device.type == "cuda":
            data = [d.each(torch.Tensor.pin_memory) for d in data]
        return data

    def _again(self, start: int, n: int, rows: int) -> Tensor:
        """(n,) which of the rows are at places start, start + 1, ... of the stream."""
        epochs = range(start // rows, (start + n - 1) // rows + 1)
        orders = [_order(self.seed, epoch, rows) for epoch in epochs]
        skip = start - epochs[0] * rows
        return torch.from_numpy(np.concatenate(orders)[skip : skip + n])

    def __next__(self) -> Encoded:
        if not self.ready:
            self.ready.extend(self.chunks.popleft().result())
            self._request(self.per_chunk)
        return self.ready.popleft().to(self.device)

    def close(self) -> None:
        self.pool.shutdown(wait=True, cancel_futures=True)


class DataEnded(RunError):
    """The training data ended before the training."""


class Flow:
    """Batches of a task whose training rows come in order, made between two steps of the training.

    Args:
        task: the task.
        objective: encodes its rows.
        seed: of the run.
        batch_size: rows of a batch.
        start: batches that were trained already.
        state: the place of the rows after these, where a checkpoint has it.
        device: of the batches.
        say: takes a line for a person.

    Raises:
        UsageError: the rows do not take the state.
        DataEnded: the rows end before the place is reached.
    """

    def __init__(
        self,
        task: Streamed,
        objective: Objective,
        *,
        seed: int,
        batch_size: int,
        start: int,
        state: dict[str, Any] | None,
        device: torch.device,
        say: Callable[[str], None],
    ):
        self._objective, self._batch_size, self._device, self._say = objective, batch_size, device, say
        self._batches = start
        with kept_random_state():
            self._rows = task.open(seed)
            if state is not None:
                self._resume(state)
            elif start:
                told = f"Reading and dropping {start * batch_size:,} rows that were trained already"
                say(f"{told}: {self._why_not()}. {_SAME}")
                for _ in range(start):
                    self._take()
            elif not self._rows.has_state:
                say(f"A resumed run will read and drop the rows that were trained already: {self._why_not()}.")

    def _why_not(self) -> str:
        return f"{self._rows.about} has no state_dict that a checkpoint could keep"

    def _resume(self, state: dict[str, Any]) -> None:
        try:
            self._rows.load_state_dict(state)
        except Exception as error:  # of a person's own data
            told = (
                f"{self._rows.about} does not take the state of the checkpoint ({type(error).__name__}: {error!s:.200})"
            )
            raise UsageError(
                f"{told}: give the data that the run was trained on, or start over with --fresh."
            ) from error

    def _take(self) -> Batch:
        try:
            return self._rows.take(self._batch_size)
        except StreamEnded as error:
            told = str(error) or f"The training data ended after {self._batches:,} batches of {self._batch_size} rows."
            raise DataEnded(f"{told} Give data that can be iterated again, or train.steps={self._batches}.") from None

    def __next__(self) -> Encoded:
        with kept_random_state():
            rows = self._take()
        self._batches += 1
        return self._objective.encode(rows).to(self._device)

    def state(self) -> dict[str, Any] | None:
        """The place of the rows, as a checkpoint keeps it; None where there is none that it could."""
        with kept_random_state():
            state = self._rows.state_dict() if self._rows.has_state else None
        if state is None:
            return None
        try:
            file = io.BytesIO()
            torch.save(state, file)
            torch.load(io.BytesIO(file.getvalue()), weights_only=True)
        except Exception as error:  # what is no plain value
            if not self._told:
                first = " ".join(str(error).split())[:160]
                self._say(
                    f"The state_dict of {self._rows.about} is no plain data, so no checkpoint keeps it ({first})."
                )
                self._told = True
            return None
        return state

    _told = False

    def close(self) -> None:
        pass


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, rows: int) -> NDArray[np.int64]:
    """In which order an epoch shows its rows."""
    return random.permutation(random.fold(random.row_keys("train", seed, epoch, 1), _ORDER), rows)


def any_rows(task: Task, n: int, seed: int) -> Batch:
    """Rows of a task for what depends on their shape alone."""
    if isinstance(task, Streamed):
        zeros = torch.zeros(n, task.seq_len, dtype=torch.int64)
        return Batch(zeros, zeros)
    return task.sample(n, split="train", seed=seed)
