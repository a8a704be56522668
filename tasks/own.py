"""Own data as a task: a torch `Dataset` of rows, or batches from any iterable, with a declared vocabulary."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from zoo.core.errors import UsageError, quoted
from zoo.core.options import Options
from zoo.tasks import random
from zoo.tasks.protocol import SPLITS, Batch, Split, Streamed, Task, check_request
from zoo.tasks.rows import Reader, Rows, join, seeded
from zoo.tasks.strings import named, picture

_ORDER = 1  # what keys are folded with for the order of rows


class OwnConfig(Options, label="own data"):
    """What is declared about own data.

    Attributes:
        vocab_size: number of token ids; every token is below it.
        seq_len: tokens of a row that the model reads, at most.
        layout: as `Task.layout`.
        data: the class of the training data, for a person.
        n_rows: number of training rows, where the data have a length.
    """

    vocab_size: PositiveInt
    seq_len: PositiveInt
    layout: str = "next_token"
    data: str
    n_rows: int | None = Field(default=None, ge=0, le=2**62)


def from_dataset(
    dataset: Any,
    *,
    vocab_size: int,
    seq_len: int,
    validation: Any,
    test: Any,
    layout: str = "next_token",
) -> Task:
    """A task from a torch `Dataset`, or from any other collection or iterable of rows.

    A row is a sequence of up to `seq_len + 1` tokens, in which every next token is predicted; or a pair, or a mapping
    with `inputs` and `targets`, of up to `seq_len` tokens each. A target of -100 is not scored. Rows that are shorter
    are padded on the right (only with the layout `next_token`).

    With `dataset[i]` and `len(dataset)`, every epoch reads all training rows in an order of its own, which follows from
    the seed; a resumed run continues to the same bits. Row i must be the same whenever it is read. An iterable of rows
    is read as `from_batches` reads batches.

    Args:
        dataset: the training rows.
        vocab_size: number of token ids.
        seq_len: tokens of the longest row that the model reads.
        validation: rows of the same form, read in order; None declares that there are none. Then no weights are chosen,
            and the last ones count.
        test: the same, read once at the end.
        layout: next_token; or fill_in, where the target at position t is the content of cell t.

    Raises:
        UsageError: a size or layout that is not allowed, no rows, or a row of another form; says which row.
    """
    return _task([dataset, validation, test], vocab_size, seq_len, layout, batched=False)


def from_batches(
    batches: Iterable[Any],
    *,
    vocab_size: int,
    seq_len: int,
    validation: Any,
    test: Any,
    layout: str = "next_token",
) -> Task:
    """A task from batches: a `DataLoader`, a generator, or any other iterable.

    A batch is what a `DataLoader` makes of rows as `from_dataset` takes them. Batches may have any size: the run cuts
    them into batches of `train.batch_size` rows. What can be iterated again starts again at its end, with random states
    that follow from the seed and the epoch; an iterator that ends also ends the run.

    Where the batches, or their iterator, have `state_dict` and `load_state_dict` (torchdata's `StatefulDataLoader`,
    Hugging Face's streamed data sets), checkpoints keep that state. Otherwise a resumed run reads and drops the rows
    that were trained already, and says so.

    Args:
        batches: of the training rows.
        vocab_size: number of token ids.
        seq_len: tokens of the longest row that the model reads.
        validation: batches that can be iterated again; None declares that there are none.
        test: the same.
        layout: as in `from_dataset`.

    Raises:
        UsageError: as `from_dataset`.
    """
    return _task([batches, validation, test], vocab_size, seq_len, layout, batched=True)


def _task(parts: list[Any], vocab_size: int, seq_len: int, layout: str, *, batched: bool) -> Task:
    if layout not in ("next_token", "fill_in"):
        raise UsageError(f"layout={quoted(layout)} is not allowed: own data are 'next_token' or 'fill_in'.")
    train = parts[0]
    indexed = not batched and _is_indexed(train)
    name, n_rows = type(train).__name__, len(train) if indexed else None
    config = OwnConfig(vocab_size=vocab_size, seq_len=seq_len, layout=layout, data=name, n_rows=n_rows)
    for split, part in zip(SPLITS, parts, strict=True):
        if part is None and split == "train":
            raise UsageError("There are no training rows: the data are None.")
        if part is not None and not _is_indexed(part) and not isinstance(part, Iterable):
            told = (
                "a Dataset, or an iterable of batches" if batched else "a Dataset, a list or another iterable of rows"
            )
            raise UsageError(f"The {split} data are {quoted(part, 60)}: expected {told}.")
        if part is not None and split != "train" and isinstance(part, Iterator):
            raise UsageError(f"The {split} data are an iterator, which ends when it was read once: give a list of it.")
        if part is not None and not batched and _is_indexed(part) and not len(part):
            raise UsageError(f"The {split} data have no row; None declares that there are none.")
    reader = Reader(vocab_size, seq_len, batched=batched, pads=layout == "next_token")
    return (IndexedData if indexed else StreamedData)(config, reader, parts)


def _is_indexed(part: Any) -> bool:
    """Whether rows are read by their index: torch's iterable data sets inherit a `__getitem__` that raises."""
    iterable = isinstance(part, torch.utils.data.IterableDataset)
    return hasattr(part, "__getitem__") and hasattr(part, "__len__") and not iterable


class OwnData(Task):
    """Rows of a user's own; `train`, `validation` and `test` are theirs, None where there are none."""

    Config = OwnConfig
    overlap = "The splits are the user's own."
    config: OwnConfig

    def __init__(self, config: OwnConfig, reader: Reader, parts: list[Any]):
        super().__init__(config)
        self.vocab_size, self.seq_len = config.vocab_size, config.seq_len
        self.layout = config.layout  # type: ignore[misc,assignment]
        self._reader, self._parts = reader, dict(zip(SPLITS, parts, strict=True))
        self.absent = tuple(split for split, part in self._parts.items() if part is None)  # type: ignore[misc]
        self._kept: dict[Split, list[Batch]] = {}
        first = next((split for split in SPLITS if self._can_draw(split)), None)
        if first is not None:
            self.sample(1, split=first, seed=0)
            self.is_language = reader.continues is True  # type: ignore[misc]
            self.token_is_byte = False  # type: ignore[misc]

    def _can_draw(self, split: Split) -> bool:
        return self._parts[split] is not None

    def sample(self, n: int, *, split: Split, seed: int, start: int = 0) -> Batch:
        check_request(n, split, start)
        part = self._parts[split]
        if part is None:
            raise UsageError(f"{self.name} has no {split} rows: they were declared absent.")
        if not self._reader.batched and _is_indexed(part):
            places = np.arange(start, start + n)
            return join(
                [self._reader.rows(part[i], f"Row {i} of {split}") for i in self._order(places, split, seed, len(part))]
            )
        kept = self._first(start + n, split)
        return join([kept[i % len(kept)] for i in range(start, start + n)])

    def _order(self, places: Any, split: Split, seed: int, n: int) -> list[int]:
        """The indices of rows: in training another order in each epoch, else as they are, again and again."""
        if split != "train":
            return (places % n).tolist()
        epochs, inverse = np.unique(places // n, return_inverse=True)
        keys = random.fold(np.concatenate([random.row_keys("train", seed, int(e), 1) for e in epochs]), _ORDER)
        return random.shuffled(keys[inverse], places % n, n).tolist()

    def _first(self, n: int, split: Split) -> list[Batch]:
        """The first `n` rows of a part that is iterated, or all where there are fewer; kept for the next time."""
        kept = self._kept.setdefault(split, [])
        if len(kept) < n:
            with seeded(0, 0):
                kept.clear()
                for i, item in enumerate(self._parts[split]):
                    rows = self._reader.rows(item, f"{'Batch' if self._reader.batched else 'Row'} {i} of {split}")
                    kept += [Batch(a[None], b[None]) for a, b in zip(*rows[:2], strict=True)]
                    if len(kept) >= n:
                        break
            if not kept:
                raise UsageError(f"The {split} data have no row; None declares that there are none.")
        return kept

    def render(self, batch: Batch, row: int = 0, predictions: Tensor | None = None) -> str:
        return picture(*named(batch, row, predictions, str), ("inputs", "targets"))


class IndexedData(OwnData):
    """Rows that are read by their index."""

    name = "own_dataset"


class StreamedData(OwnData, Streamed):
    """Training rows that come in order only."""

    name = "own_batches"

    def _can_draw(self, split: Split) -> bool:
        return split != "train" and super()._can_draw(split)

    def sample(self, n: int, *, split: Split, seed: int, start: int = 0) -> Batch:
        if split == "train":
            raise UsageError(f"{self.name}: training rows come in order, so none can be drawn by its index.")
        return super().sample(n, split=split, seed=seed, start=start)

    def open(self, seed: int) -> Rows:
        return Rows(self._parts["train"], self._reader, seed)


__all__ = ["IndexedData", "OwnConfig", "StreamedData", "from_batches", "from_dataset"]
