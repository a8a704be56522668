"""The stream of training batches: made and encoded in a background thread, exact at any position."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from zoo.objectives.base import Encoded, Objective
from zoo.tasks import random
from zoo.tasks.protocol import Batch, Task, split_rows, take

TOKENS_AHEAD = 65536  # rows are drawn in chunks of about so many tokens, since small draws cost as much as large ones
MOST_BATCHES = 16
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


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, rows: int) -> NDArray[np.int64]:
    """In which order an epoch shows its rows."""
    return random.permutation(random.fold(random.row_keys("train", seed, epoch, 1), _ORDER), rows)
