"""Rows of own data: how what a person's data give is read as tokens, and how rows that come in order are counted."""

from __future__ import annotations

import contextlib
import random as python_random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.core.errors import UsageError, quoted
from zoo.tasks import random
from zoo.tasks.protocol import IGNORE, Batch, RowStream, StreamEnded

_KEYS = ("inputs", "targets")
_TOKENS = "input_ids"  # what tokenizers call a row of tokens


class Reader:
    """Reads what data give, a row or a batch of rows, as inputs and targets.

    Args:
        vocab_size: every token is below it.
        seq_len: tokens of a row, at most.
        batched: whether batches are read.
        pads: whether shorter rows are padded on the right.
    """

    def __init__(self, vocab_size: int, seq_len: int, *, batched: bool, pads: bool):
        self.vocab_size, self.seq_len, self.batched, self.pads = vocab_size, seq_len, batched, pads
        self.continues: bool | None = None
        """Whether all rows read so far were sequences in which every next token is predicted."""

    def rows(self, item: Any, where: str) -> Batch:
        """(n, seq_len) inputs and targets; n is 1 for a row.

        Raises:
            UsageError: another form, shape or type, or a token out of the vocabulary; names `where`.
        """
        parts = self._parts(item, where)
        whole = len(parts) == 1
        self.continues = whole and self.continues is not False
        inputs, targets = (parts[0][:, :-1], parts[0][:, 1:]) if whole else parts
        if inputs.shape != targets.shape:
            shapes = f"{tuple(inputs.shape)} inputs and {tuple(targets.shape)} targets"
            raise UsageError(f"{where} has {shapes}: every input needs a target (-100 where nothing is scored).")
        n = inputs.shape[1]
        most = self.seq_len + whole
        if n + whole > most or n < 1:
            told = f"seq_len={self.seq_len} takes {1 + whole} to {most}"
            raise UsageError(f"{where} has {n + whole} tokens: {told}{' (one more, to predict)' if whole else ''}.")
        if n < self.seq_len and not self.pads:
            raise UsageError(f"{where} has {n} tokens, not seq_len={self.seq_len}: cells of fill_in are not padded.")
        for tokens, lowest, what in ((inputs, 0, "input"), (targets, None, "target")):
            wrong = (tokens < 0) | (tokens >= self.vocab_size)
            wrong &= (tokens != IGNORE) if lowest is None else True
            if wrong.any():
                token = tokens[wrong][0].item()
                raise UsageError(
                    f"{where} has the {what} {token}: tokens are from 0 to vocab_size-1={self.vocab_size - 1}."
                )
        short = self.seq_len - n
        return Batch(F.pad(inputs, (0, short)), F.pad(targets, (0, short), value=IGNORE))

    def _parts(self, item: Any, where: str) -> list[Tensor]:
        """The tensors (n, L) of an item: one of tokens, or inputs and targets."""
        if isinstance(item, Mapping):
            names = list(item)
            if all(key in item for key in _KEYS):
                item = tuple(item[key] for key in _KEYS)
            elif _TOKENS in item and "labels" not in item:
                item = item[_TOKENS]
            else:
                told = f"expected {' and '.join(_KEYS)} (targets are not moved any more), or {_TOKENS} alone"
                raise UsageError(f"{where} has the keys {quoted(names, 80)}: {told}.")
        if isinstance(item, list | tuple) and 1 <= len(item) <= 2 and not _is_number(item[0]) and self._is_pair(item):
            return [self._tensor(part, where) for part in item]
        return [self._tensor(item, where)]

    def _is_pair(self, item: Any) -> bool:
        """Whether a list of one or two things is what a Dataset or a DataLoader makes, and not two rows in a list."""
        if isinstance(item, tuple) and not (self.batched and _is_flat(item[0])):
            return True
        return all(isinstance(part, Tensor | np.ndarray) and part.ndim == 1 + self.batched for part in item)

    def _tensor(self, part: Any, where: str) -> Tensor:
        try:
            tensor = part if isinstance(part, Tensor) else torch.from_numpy(np.asarray(part))
        except (TypeError, ValueError):
            raise UsageError(f"{where} is {quoted(part, 60)}: expected tokens (see zoo.tasks.from_dataset).") from None
        if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
            raise UsageError(
                f"{where} has {str(tensor.dtype).removeprefix('torch.')} values: tokens are whole numbers."
            )
        if tensor.ndim != 1 + self.batched:
            expected = "(rows, tokens)" if self.batched else "(tokens,)"
            raise UsageError(f"{where} has the shape {tuple(tensor.shape)}: expected {expected}.")
        tensor = tensor.detach().cpu().to(torch.int64)
        return tensor if self.batched else tensor[None]


def join(batches: list[Batch]) -> Batch:
    return Batch(torch.cat([batch.inputs for batch in batches]), torch.cat([batch.targets for batch in batches]))


class Rows(RowStream):
    """Training rows of a source that is iterated, epoch after epoch, cut into batches of any size.

    Every item is made with random states that follow from the seed and its number, so that a shuffled `DataLoader`,
    or a `Dataset` that draws at random, gives the same rows to every run with that seed.
    """

    def __init__(self, source: Any, reader: Reader, seed: int):
        self._source, self._reader, self._seed = source, reader, seed
        self.about = f"a {type(source).__name__}"
        self._iterator: Iterator[Any] | None = None
        self._items, self._in_epoch = 0, 0
        self._left: list[Batch] = []
        self._state: Any = None
        """The state of an iterator that is yet to be made."""
        self.has_state = self._keeper() is not None

    def _keeper(self) -> Any:
        """What keeps the state: the source or its iterator."""
        if self._iterator is None and not _keeps(self._source):
            self._start()
        return next((each for each in (self._source, self._iterator) if _keeps(each)), None)

    def _start(self) -> None:
        with seeded(self._seed, self._items):
            if self._state is not None and _keeps(self._source):
                self._source.load_state_dict(self._state)
            iterator: Any = iter(self._source)
            if self._state is not None and not _keeps(self._source) and _keeps(iterator):
                iterator.load_state_dict(self._state)
            self._iterator = iterator
        self._state = None

    def take(self, n: int) -> Batch:
        taken: list[Batch] = []
        while n:
            if not self._left:
                self._left = [self._next()]
            part = self._left[0]
            taken.append(Batch(part.inputs[:n], part.targets[:n]))
            rest = Batch(part.inputs[n:], part.targets[n:])
            self._left = [rest] if len(rest.inputs) else []
            n -= len(taken[-1].inputs)
        return join(taken)

    def _next(self) -> Batch:
        if self._iterator is None:
            self._start()
        assert self._iterator is not None
        while True:
            with seeded(self._seed, self._items):
                try:
                    item = next(self._iterator)
                except StopIteration:
                    if not self._in_epoch:  # an iterator, which starts again at its end
                        raise StreamEnded("The training data have no row." if not self._items else "") from None
                    self._iterator, self._in_epoch = iter(self._source), 0
                    continue
            what = "batch" if self._reader.batched else "row"
            rows = self._reader.rows(item, f"Training {what} {self._items}")
            self._items += 1
            if len(rows.inputs):
                self._in_epoch += 1
                return rows

    def state_dict(self) -> dict[str, Any] | None:
        keeper = self._keeper()
        if keeper is None:
            return None
        left = self._left[0] if self._left else None
        rest = None if left is None else {"inputs": left.inputs.clone(), "targets": left.targets.clone()}
        return {"items": self._items, "in_epoch": self._in_epoch, "left": rest, "source": keeper.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._items, self._in_epoch, self._state = state["items"], state["in_epoch"], state["source"]
        self._left = [] if state["left"] is None else [Batch(**state["left"])]
        self._iterator = None
        self._start()


@contextlib.contextmanager
def seeded(seed: int, item: int) -> Iterator[None]:
    """Random states of Python, numpy and torch that follow from a seed and a number; afterwards as before."""
    key = int(random.row_keys("train", seed, item, 1)[0])
    before = python_random.getstate(), np.random.get_state(), torch.get_rng_state()
    python_random.seed(key)
    np.random.seed(key % 2**32)
    torch.default_generator.manual_seed(key % 2**63)
    try:
        yield
    finally:
        python_random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


def _keeps(thing: Any) -> bool:
    return callable(getattr(thing, "state_dict", None)) and callable(getattr(thing, "load_state_dict", None))


def _is_number(thing: Any) -> bool:
    return isinstance(thing, int | float | np.number) or (isinstance(thing, Tensor) and thing.ndim == 0)


def _is_flat(thing: Any) -> bool:
    return isinstance(thing, list) and bool(thing) and _is_number(thing[0])


__all__ = ["Reader", "Rows", "join", "seeded"]
