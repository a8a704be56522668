"""Multi-query associative recall (Arora et al., "Zoology", ICLR 2024; after `zoology/data/multiquery_ar.py`).

Its variants are after `forgetting_mqar.py` and `compositional_ar.py` there.
"""

from __future__ import annotations

import math
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, NonNegativeInt, PositiveInt, field_validator
from torch import Tensor

from zoo.core.errors import UsageError
from zoo.core.options import Options
from zoo.tasks import random
from zoo.tasks.protocol import IGNORE, SPLITS, Batch, Split, Task, check_request, names_of, register

_MIN_INSTANCES = 200  # below this, a split of an eighth may be empty
_MAX_REDRAWS = 10_000
_UPDATES = 2**32  # the purpose of random numbers, apart from those of the redraws, which count from 3


@register("mqar")
class MQAR(Task):
    """Recall the value of each key when the key appears again.

    With vocab_size=16, seq_len=14, n_pairs=2, random_non_queries=False (`.` is `IGNORE`):

        ```
                 key val key val              query               query
        inputs    2   8   4  15   0   0   0   0   4   0   0   0   2   0
        targets   .   .   .   .   .   .   .   .  15   .   .   .   8   .
        ```

    Keys are different tokens of [1, V/2), values different tokens of [V/2, V). The block of pairs, written `n_passes`
    times, opens the row. The rest is slots of two tokens; each key is put at the first token of a slot i = 1, 2, ...,
    drawn without replacement with probability proportional to i ** (power_a - 1): small `power_a` favours short gaps,
    1 is uniform. The target there is the key's value. Other positions are uniform tokens of [0, V), or 0.

    With `n_updates`, this number of keys are written again after the block, in random order, each with another value;
    the last value is the target. The score adds `updated`, the accuracy on these keys, and `stale`, the share of them
    that are answered with their old value. With n_updates=1:

        ```
                 key val key val key val query                   query
        inputs    6  13   4  14   4  10   6   0   0   0   4   0   0   0
        targets   .   .   .   .   .   .  13   .   .   .  10   .   .   .
        ```

    With `compositional` a key is two tokens, from [1, V/3) and [V/3, 2V/3), and values are from [2V/3, V). The keys are
    all pairs of first and second tokens, of equal number, so neither token alone determines the value. Slots are then
    three tokens, and the target is at the second token of the key. With vocab_size=32, seq_len=26, n_pairs=4:

        ```
                 -key- val -key- val -key- val -key- val -key-    -key-    -key-    -key-
        inputs    2 15 20   2 14 21   3 15 26   3 14 28   2 15  0  3 15  0  3 14  0  2 14  0  0  0
        targets   .  .  .   .  .  .   .  .  .   .  .  .   . 20  .  . 26  .  . 28  .  . 21  .  .  .
        ```

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
        power_a: Annotated[float, Field(gt=0, le=10)] = 0.01
        """Exponent of the gaps' power law."""
        random_non_queries: bool = True
        """Fill the other positions with random tokens rather than 0."""
        n_passes: PositiveInt = 1
        """Number of times that the block of pairs is written."""
        n_updates: NonNegativeInt = 0
        """Number of keys that get another value after the block, at most n_pairs."""
        compositional: bool = False
        """Keys of two tokens; n_pairs must be a square."""

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
        if c.n_updates > min(self._choices):
            raise UsageError(f"mqar: n_updates={c.n_updates} is more than the {min(self._choices)} keys of a row.")
        odd = [n for n in self._choices if c.compositional and math.isqrt(n) ** 2 != n]
        if odd:
            near = math.isqrt(odd[0])
            raise UsageError(
                f"mqar: n_pairs={odd[0]} with compositional=True should be a square, such as {max(near, 1) ** 2} or"
                f" {(near + 1) ** 2}."
            )
        block, updates = self._width * (c.n_passes + 1), self._width * c.n_updates
        if block * most + updates > c.seq_len:
            allowed, needed = (c.seq_len - updates) // block, block * most + updates
            fits = allowed >= 1 and not c.compositional and allowed >= c.n_updates
            fix = f"at most {allowed} pairs, or seq_len={needed}" if fits else f"seq_len={needed + needed % 2}"
            variants = {"n_updates": c.n_updates, "compositional": c.compositional}
            given = "".join(f", {name}={value}" for name, value in variants.items() if value)
            raise UsageError(
                f"mqar: n_pairs={most} with n_passes={c.n_passes}{given} needs {needed} positions and seq_len is"
                f" {c.seq_len}; take {fix}."
            )
        for n in self._choices:
            instances = self._key_sets(n) * math.perm(self._n_values, n)
            if instances < _MIN_INSTANCES:
                raise UsageError(
                    f"mqar: vocab_size={c.vocab_size} with n_pairs={n} has only {instances} different sets of pairs,"
                    f" too few for disjoint splits (at least {_MIN_INSTANCES}); raise vocab_size or n_pairs."
                )

    @property
    def _width(self) -> int:
        """Tokens of a key and its value, and of a slot."""
        return 3 if self.config.compositional else 2

    @property
    def _part(self) -> int:
        """The first token id after those of the (first) key token, and where the next kind begins."""
        return self.vocab_size // self._width

    @property
    def _n_values(self) -> int:
        return self.vocab_size - self._part * (self._width - 1)

    def _key_sets(self, pairs: int) -> int:
        if self.config.compositional:
            side = math.isqrt(pairs)
            return math.comb(self._part - 1, side) * math.comb(self._part, side)
        return math.comb(self._part - 1, pairs)

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
        n, length, width, passes = len(row_keys), self.seq_len, self._width, self.config.n_passes
        keys, values = self._pairs(row_keys, pairs, split)
        context = self._context(pairs)
        block = np.concatenate([keys, values[..., None]], axis=2)
        slots = self._slots(random.fold(row_keys, 1), pairs, (length - context) // width)
        queries = context + width * slots

        inputs = np.zeros((n, length), dtype=np.int64)
        inputs[:, : passes * pairs * width] = np.tile(block.reshape(n, -1), (1, passes))
        if self.config.n_updates:
            which, new = self._updates(random.fold(row_keys, _UPDATES), values)
            again = np.take_along_axis(block, which[..., None], axis=1)
            again[..., -1] = new
            inputs[:, passes * pairs * width : context] = again.reshape(n, -1)
            np.put_along_axis(values, which, new, axis=1)
        for i in range(width - 1):
            np.put_along_axis(inputs, queries + i, keys[..., i], axis=1)
        if self.config.random_non_queries:
            noise = random.below(random.bits(random.fold(row_keys, 2), length), self.vocab_size)
            inputs = np.where(inputs == 0, noise, inputs)
        targets = np.full((n, length), IGNORE, dtype=np.int64)
        np.put_along_axis(targets, queries + width - 2, values, axis=1)
        return inputs, targets

    def _context(self, pairs: int) -> int:
        """Positions before the first slot."""
        return self._width * (pairs * self.config.n_passes + self.config.n_updates)

    def _pairs(self, row_keys: random.Keys, pairs: int, split: Split) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Keys (n, pairs, 1 or 2) and values (n, pairs), drawn again until the set of pairs belongs to `split`."""
        keys = np.empty((len(row_keys), pairs, self._width - 1), dtype=np.int64)
        values = np.empty(keys.shape[:2], dtype=np.int64)
        left = np.arange(len(row_keys))
        for attempt in range(_MAX_REDRAWS):
            again = random.fold(row_keys[left], 3 + attempt)
            k = self._keys(again, pairs)
            v = self.vocab_size - self._n_values + random.distinct(random.fold(again, 1), pairs, self._n_values)
            found = random.split_of(self._fingerprint(k, v)) == SPLITS.index(split)
            keys[left[found]], values[left[found]] = k[found], v[found]
            left = left[~found]
            if not len(left):
                return keys, values
        raise UsageError(f"mqar: no set of pairs falls into the split {split!r}; raise vocab_size or n_pairs.")

    def _fingerprint(self, keys: NDArray[np.int64], values: NDArray[np.int64]) -> random.Keys:
        """(n,) a hash of each set of pairs, from keys (n, pairs, 1 or 2) and values (n, pairs)."""
        code = values if not self.config.compositional else keys[..., 1] * self.vocab_size + values
        code = code + keys[..., 0] * self.vocab_size ** (self._width - 1)
        return random.mix(code).reshape(values.shape).sum(1)  # a sum of hashes does not see the order

    def problems(self, batch: Batch) -> Tensor:
        """Sets of pairs, in any order of the pairs and of the queries."""
        names = np.empty(len(batch.inputs), dtype=np.uint64)
        for pairs in set(self._choices):
            rows = (batch.slices["n_pairs"] == pairs).cpu().numpy()
            block = batch.inputs.cpu().numpy()[rows, : pairs * self._width].reshape(-1, pairs, self._width)
            names[rows] = self._fingerprint(block[..., :-1], block[..., -1])
        return names_of(names)

    def _keys(self, row_keys: random.Keys, pairs: int) -> NDArray[np.int64]:
        """(n, pairs, 1 or 2) keys."""
        first = random.fold(row_keys, 0)
        if not self.config.compositional:
            return 1 + random.distinct(first, pairs, self._part - 1)[..., None]
        side = math.isqrt(pairs)
        firsts = 1 + random.distinct(first, side, self._part - 1)
        seconds = self._part + random.distinct(random.fold(row_keys, 2), side, self._part)
        order = np.argsort(random.bits(random.fold(row_keys, 3), pairs), axis=1)
        return np.stack(
            [np.take_along_axis(firsts, order // side, 1), np.take_along_axis(seconds, order % side, 1)], axis=2
        )

    def _updates(self, row_keys: random.Keys, values: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Which keys (n, n_updates) get which new values (n, n_updates)."""
        updates = self.config.n_updates
        which = np.argsort(random.bits(random.fold(row_keys, 0), values.shape[1]), axis=1)[:, :updates]
        old = np.take_along_axis(values, which, axis=1)
        new = random.below(random.bits(random.fold(row_keys, 1), updates), self._n_values - 1)
        new += self.vocab_size - self._n_values
        return which, new + (new >= old)

    def _slots(self, row_keys: random.Keys, pairs: int, n_slots: int) -> NDArray[np.int64]:
        """(n, pairs) slots from 0 on, drawn one after another without replacement.

        Arrival times of independent exponential clocks with these rates give the same law in one sort.
        """
        rates = np.arange(1, n_slots + 1) ** (self.config.power_a - 1.0)
        arrivals = -np.log(random.uniform(random.bits(row_keys, n_slots))) / rates
        return np.argsort(arrivals, axis=1)[:, :pairs]

    def row_scores(self, batch: Batch, predictions: Tensor) -> dict[str, Tensor]:
        """`updated` and `stale`, with `n_updates`."""
        if not self.config.n_updates:
            return {}
        figures = {name: torch.zeros(len(batch.inputs), dtype=torch.float64) for name in ("updated", "stale")}
        for pairs in set(self._choices):
            rows = (batch.slices["n_pairs"] == pairs).nonzero().squeeze(1)
            if len(rows):
                inputs, targets, said = batch.inputs[rows], batch.targets[rows], predictions[rows]
                at = (targets != IGNORE).nonzero()[:, 1].view(-1, pairs)
                updated, old = self._history(inputs, at)
                for name, value in (("updated", targets.gather(1, at)), ("stale", old)):
                    hits = updated & (said.gather(1, at) == value)
                    figures[name][rows] = hits.sum(1).double() / self.config.n_updates
        return figures

    def _history(self, inputs: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        """Whether the keys queried at positions (n, n_pairs) were updated, and their first values."""
        width, pairs = self._width, at.shape[1]
        context = self._context(pairs)
        block = inputs[:, : pairs * width].view(-1, 1, pairs, width)
        again = inputs[:, context - self.config.n_updates * width : context].view(len(inputs), 1, -1, width)
        keys = torch.stack([inputs.gather(1, at - (width - 2) + i) for i in range(width - 1)], 2)[:, :, None]
        old = (keys == block[..., :-1]).all(-1) * block[..., -1]
        return (keys == again[..., :-1]).all(-1).any(-1), old.sum(-1)

    def render(self, batch: Batch, row: int = 0, predictions: Tensor | None = None) -> str:
        inputs, targets = batch.inputs[row].tolist(), batch.targets[row].tolist()
        n_pairs, width = sum(t != IGNORE for t in targets), self._width
        cells = []
        for position, (token, target) in enumerate(zip(inputs, targets, strict=True)):
            cell = f"{token}"
            if target != IGNORE:
                cell = f"[{token}>{target}]"
                if predictions is not None:
                    given = int(predictions[row, position])
                    cell += " ok" if given == target else f" not {given}"
            cells.append(cell)
        written = [inputs[i : i + width] for i in range(0, self._context(n_pairs), width)]
        told = {"pairs": written[:n_pairs], "then": written[n_pairs * self.config.n_passes :]}
        above = [
            f"{title}: " + "  ".join(f"{'+'.join(map(str, key))}>{value}" for *key, value in pairs)
            for title, pairs in told.items()
            if pairs
        ]
        width = max(map(len, cells)) + 1
        columns = max(1, 100 // width)
        lines = ["".join(c.rjust(width) for c in cells[i : i + columns]) for i in range(0, len(cells), columns)]
        return "\n".join([*above, "row ([key>value] where the value is a target):", *lines])
