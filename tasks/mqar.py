"""Multi-query associative recall (Arora et al., "Zoology", ICLR 2024; after `zoology/data/multiquery_ar.py`)."""

from __future__ import annotations

import math
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, PositiveInt, field_validator
from torch import Tensor

from tasks import random
from tasks.protocol import IGNORE, SPLITS, Batch, Split, Task, check_request, register
from tasks.registry import Options, UsageError

_MIN_INSTANCES = 200  # below this, a split of an eighth may be empty
_MAX_REDRAWS = 10_000


@register("mqar")
class MQAR(Task):
    """Recall the value of each key when the key comes again.

    With vocab_size=16, seq_len=14, n_pairs=2, random_non_queries=False (`.` is `IGNORE`):

        ```
                 key val key val              query               query
        inputs    2   8   4  15   0   0   0   0   4   0   0   0   2   0
        targets   .   .   .   .   .   .   .   .  15   .   .   .   8   .
        ```

    Keys are different tokens of [1, V/2), values different tokens of [V/2, V). The block of pairs, written `n_passes`
    times, opens the row. The rest is slots of two tokens; each key is put at the first token of a slot i = 1, 2, ...,
    drawn without replacement with probability proportional to i ** (power_a - 1): small `power_a` favours short gaps,
    1 is uniform. The target there is the key's value. Other positions hold uniform tokens of [0, V), or 0.

    Two rows with the same set of pairs, in whatever order, belong to the same split. Slices: `n_pairs`.
    """

    class Config(Options):
        """Options of `mqar`."""

        vocab_size: PositiveInt = 8192
        """V, more than seq_len."""
        seq_len: PositiveInt = 64
        """L, even."""
        n_pairs: PositiveInt | Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = 4
        """Pairs of a row, or the numbers to draw it from; 2 * n_pairs * (n_passes + 1) <= seq_len."""
        power_a: Annotated[float, Field(gt=0)] = 0.01
        """Exponent of the gaps' power law."""
        random_non_queries: bool = True
        """Fill the other positions with random tokens rather than 0."""
        n_passes: PositiveInt = 1
        """How often the block of pairs is written."""

        @field_validator("n_pairs", mode="before")
        @classmethod
        def _from_list(cls, value: Any) -> Any:
            return tuple(value) if isinstance(value, list) else value

    layout = "next_token"
    config: Config

    def __init__(self, config: Config):
        super().__init__(config)
        self.vocab_size = config.vocab_size
        self.seq_len = config.seq_len
        self._choices = (config.n_pairs,) if isinstance(config.n_pairs, int) else config.n_pairs
        self._check()

    def _check(self) -> None:
        c, most = self.config, max(self._choices)
        if c.seq_len % 2:
            raise UsageError(
                f"mqar: seq_len={c.seq_len} is odd; keys and values come in twos, so take {c.seq_len + 1}."
            )
        if c.vocab_size <= c.seq_len:
            raise UsageError(
                f"mqar: vocab_size={c.vocab_size} must be more than seq_len={c.seq_len}; take at least {c.seq_len + 1}."
            )
        block = 2 * (c.n_passes + 1)
        if block * most > c.seq_len:
            allowed = c.seq_len // block
            fix = f"at most {allowed} pairs, or seq_len={block * most}" if allowed else f"seq_len={block * most}"
            raise UsageError(
                f"mqar: n_pairs={most} with n_passes={c.n_passes} needs {block * most} positions and seq_len is"
                f" {c.seq_len}; take {fix}."
            )
        keys, values = c.vocab_size // 2 - 1, c.vocab_size - c.vocab_size // 2
        if min(keys, values) < most:
            raise UsageError(
                f"mqar: vocab_size={c.vocab_size} has only {keys} keys for n_pairs={most}; take {2 * most + 2}."
            )
        for n in self._choices:
            instances = math.comb(keys, n) * math.perm(values, n)
            if instances < _MIN_INSTANCES:
                raise UsageError(
                    f"mqar: vocab_size={c.vocab_size} with n_pairs={n} has only {instances} different sets of pairs,"
                    f" too few for disjoint splits (at least {_MIN_INSTANCES}); raise vocab_size or n_pairs."
                )

    def sample(self, n: int, *, split: Split, seed: int, start: int = 0) -> Batch:
        check_request(n, split, start)
        keys = random.row_keys(split, seed, start, n)
        choice = random.below(random.fold(keys, 0), len(self._choices))
        n_pairs = np.array(self._choices)[choice]
        inputs = np.zeros((n, self.seq_len), dtype=np.int64)
        targets = np.full((n, self.seq_len), IGNORE, dtype=np.int64)
        for pairs in set(self._choices):
            rows = n_pairs == pairs
            if rows.any():
                inputs[rows], targets[rows] = self._rows(keys[rows], pairs, split)
        return Batch(torch.from_numpy(inputs), torch.from_numpy(targets), {"n_pairs": torch.from_numpy(n_pairs)})

    def _rows(self, row_keys: random.Keys, pairs: int, split: Split) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Inputs and targets (n, L) of rows that all have the same number of pairs."""
        n, length = len(row_keys), self.seq_len
        keys, values = self._pairs(row_keys, pairs, split)
        context = 2 * pairs * self.config.n_passes
        block = np.stack([keys, values], axis=2).reshape(n, 2 * pairs)
        slots = self._slots(random.fold(row_keys, 1), pairs, (length - context) // 2)
        queries = context + 2 * slots

        inputs = np.zeros((n, length), dtype=np.int64)
        inputs[:, :context] = np.tile(block, (1, self.config.n_passes))
        np.put_along_axis(inputs, queries, keys, axis=1)
        if self.config.random_non_queries:
            noise = random.below(random.bits(random.fold(row_keys, 2), length), self.vocab_size)
            inputs = np.where(inputs == 0, noise, inputs)
        targets = np.full((n, length), IGNORE, dtype=np.int64)
        np.put_along_axis(targets, queries, values, axis=1)
        return inputs, targets

    def _pairs(self, row_keys: random.Keys, pairs: int, split: Split) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Keys and values (n, pairs), drawn again until the set of pairs belongs to `split`."""
        half = self.vocab_size // 2
        keys = np.empty((len(row_keys), pairs), dtype=np.int64)
        values = np.empty_like(keys)
        left = np.arange(len(row_keys))
        for attempt in range(_MAX_REDRAWS):
            again = random.fold(row_keys[left], 3 + attempt)
            k = 1 + random.distinct(random.fold(again, 0), pairs, half - 1)
            v = half + random.distinct(random.fold(again, 1), pairs, self.vocab_size - half)
            # A sum of hashes does not see the order.
            fingerprint = random.mix(k * self.vocab_size + v).reshape(k.shape).sum(1)
            found = random.split_of(fingerprint) == SPLITS.index(split)
            keys[left[found]], values[left[found]] = k[found], v[found]
            left = left[~found]
            if not len(left):
                return keys, values
        raise UsageError(f"mqar: no set of pairs falls into the split {split!r}; raise vocab_size or n_pairs.")

    def _slots(self, row_keys: random.Keys, pairs: int, n_slots: int) -> NDArray[np.int64]:
        """(n, pairs) slots from 0 on, drawn one after another without replacement.

        Arrival times of independent exponential clocks with these rates give the same law in one sort.
        """
        rates = np.arange(1, n_slots + 1) ** (self.config.power_a - 1.0)
        arrivals = -np.log(random.uniform(random.bits(row_keys, n_slots))) / rates
        return np.argsort(arrivals, axis=1)[:, :pairs]

    def render(self, batch: Batch, row: int = 0, predictions: Tensor | None = None) -> str:
        inputs, targets = batch.inputs[row].tolist(), batch.targets[row].tolist()
        n_pairs = sum(t != IGNORE for t in targets)
        cells = []
        for position, (token, target) in enumerate(zip(inputs, targets, strict=True)):
            cell = f"{token}"
            if target != IGNORE:
                cell = f"[{token}>{target}]"
                if predictions is not None:
                    given = int(predictions[row, position])
                    cell += " ok" if given == target else f" not {given}"
            cells.append(cell)
        pairs = "  ".join(
            f"{k}>{v}" for k, v in zip(inputs[0 : 2 * n_pairs : 2], inputs[1 : 2 * n_pairs : 2], strict=True)
        )
        width = max(map(len, cells)) + 1
        columns = max(1, 100 // width)
        lines = ["".join(c.rjust(width) for c in cells[i : i + columns]) for i in range(0, len(cells), columns)]
        return "\n".join([f"pairs: {pairs}", "row ([key>value] where the value is asked for):", *lines])
