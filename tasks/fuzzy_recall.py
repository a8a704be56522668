"""Fuzzy in-context recall, a task of MAD (Poli et al. 2024, arXiv 2403.17844)."""

from __future__ import annotations

import math
from typing import Annotated

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, PositiveInt
from torch import Tensor

from zoo.core.errors import UsageError
from zoo.core.options import Options
from zoo.tasks import random, strings
from zoo.tasks.mad import MADTask
from zoo.tasks.protocol import IGNORE, Batch, Split, check_request, register
from zoo.tasks.recall import Teach

MotifSize = Annotated[int, Field(ge=1, le=6)]


@register("fuzzy_recall")
class FuzzyRecall(MADTask):
    """Recall the value of a key, where keys and values have several tokens.

    With vocab_size=12, k_motif_size=2, v_motif_size=2, seq_len=16 (keys of tokens 0 to 4, values of tokens 5 to 10,
    padding 11, `.` is `IGNORE`), a held-out row:

        ```
                     padding            key--- val--- key--- val--- key--- val
        inputs      11  11  11  11  11   4   1   8   7   4   3   8  10   4   3   8
        targets      .   .   .   .   .   .   .   .   .   .   .   .   .   .   8  10
        ```

    A key is up to `k_motif_size` different tokens, in random number and order; in held-out rows it has exactly this
    number. Each row draws for each key a value of up to `v_motif_size` tokens. The last key also appears earlier, at a
    random place. The kind of the next token shows where a key ends. In training rows every next token is a target
    (padding too), in held-out rows the values of keys that appeared before. The last token is not read.

    In the authors' code the last key may be missing in the rest of a row; here it is always there.
    Slices: `value_size`, tokens of the last value.
    """

    class Config(Options):
        """Options of `fuzzy_recall`."""

        vocab_size: Annotated[int, Field(ge=4, le=1024)] = 16
        """V: padding, and of the rest one half for keys and one for values."""
        seq_len: PositiveInt = 128
        """Tokens of a row."""
        k_motif_size: MotifSize = 3
        """Most tokens of a key."""
        v_motif_size: MotifSize = 3
        """Most tokens of a value."""
        teach: Teach = "all"
        """Targets of training rows: every next token, or only `values` of keys that appeared before."""

    mad_variations = {  # noqa: RUF012 - never written to
        "vocab_size": (32, 64, 128),
        "seq_len": (256, 512, 1024),
        "rows": (6400, 3200, 1600, 800),
    }
    layout = "next_token"
    config: Config

    def __init__(self, config: Config):
        super().__init__(config)
        c = config
        self.vocab_size, self.seq_len = c.vocab_size, c.seq_len
        self.n_keys = (c.vocab_size - 1) // 2
        self.n_values = c.vocab_size - 1 - self.n_keys
        self.pad = c.vocab_size - 1
        k, v = c.k_motif_size, c.v_motif_size
        if k > self.n_keys or v > self.n_values:
            raise UsageError(
                f"fuzzy_recall: vocab_size={c.vocab_size} has {self.n_keys} tokens for keys of {k} different ones and"
                f" {self.n_values} for values of {v}; take vocab_size={2 * max(k, v) + 1}."
            )
        if c.seq_len < 4 * (k + v):
            raise UsageError(
                f"fuzzy_recall: seq_len={c.seq_len} is too short for keys of {k} and values of {v} tokens; take"
                f" {4 * (k + v)}."
            )
        pairs = min(c.seq_len // (k + v) - 2, 20)
        keys = float(math.perm(self.n_keys, k)) ** pairs
        strings.check_instances(self.name, keys * self.n_values, f"vocab_size={c.vocab_size}, seq_len={c.seq_len}")

    def sample(self, n: int, *, split: Split, seed: int, start: int = 0) -> Batch:
        check_request(n, split, start)
        keys = random.row_keys(split, seed, start, n)
        marked = strings.draw_for_split(keys, split, lambda k: self._rows(k, train=split == "train"))
        tokens, asked = marked % self.vocab_size, marked >= self.vocab_size
        targets = tokens[:, 1:].copy()
        if split != "train" or self.config.teach == "values":
            targets[~asked[:, 1:]] = IGNORE
        size = torch.from_numpy((~asked[:, ::-1]).argmax(1))
        return Batch(torch.from_numpy(tokens[:, :-1].copy()), torch.from_numpy(targets), {"value_size": size})

    def _rows(self, row_keys: random.Keys, *, train: bool) -> strings.Tokens:
        """(n, L + 1) tokens from keys (n,); V is added to those that are targets."""
        c, n = self.config, len(row_keys)
        k, v = c.k_motif_size, c.v_motif_size
        least = 1 if train else k
        most_pairs = -(-c.seq_len // (least + 1))

        # The last pair is drawn with the others, behind them.
        words = random.bits(random.fold(row_keys, 0), (most_pairs + 1) * (k + 1)).reshape(n, -1, k + 1)
        k_size = least + random.below(words[:, :, 0], k + 1 - least)
        key = _motif(words[:, :, 1:], k_size, self.n_keys)
        code = ((key + 1) * (self.n_keys + 1) ** np.arange(k)).sum(2)
        v_size, value = self._values(row_keys, code)

        last = k_size[:, -1:] + v_size[:, -1:]
        end = c.seq_len - last - (k + v)  # no pair but the last begins from here on
        begin = _before(k_size + v_size)
        wanted = random.below(random.fold(row_keys, 1)[:, None], end - (k + v) + 1)
        place = (begin >= wanted).argmax(1)
        told = ((code == code[:, -1:]) & (np.arange(most_pairs + 1) < place[:, None])).any(1)
        rows = np.flatnonzero(~told)
        for drawn in (k_size, key, code, v_size, value):
            drawn[rows, place[rows]] = drawn[rows, -1]

        kept = _before(k_size + v_size) < end
        kept[:, -1] = True
        there = np.concatenate([np.arange(k) < k_size[..., None], np.arange(v) < v_size[..., None]], axis=2)
        there &= kept[..., None]
        marks = np.zeros((n, most_pairs + 1, k + v), dtype=np.int64)
        marks[..., k:] = self.vocab_size * random.repeats(code)[..., None]  # what is left out stands behind all else
        marks[:, -1, k:] = self.vocab_size
        tokens = np.concatenate([key, self.n_keys + value], axis=2) + marks
        result = np.full((n, c.seq_len + 1), self.pad)
        at = c.seq_len + 1 - there.sum((1, 2))[:, None] + _before(there.reshape(n, -1))
        where, slot = np.nonzero(there.reshape(n, -1))
        result[where, at[where, slot]] = tokens.reshape(n, -1)[where, slot]
        return result

    def _values(self, row_keys: random.Keys, code: strings.Tokens) -> tuple[strings.Tokens, strings.Tokens]:
        """Sizes (n, pairs) and tokens (n, pairs, v) of the value that each row has for each key."""
        v = self.config.v_motif_size
        words = random.bits(random.fold(random.fold(row_keys, 2)[:, None], code), v + 1)
        size = 1 + random.below(words[..., 0], v)
        return size, _motif(words[..., 1:], size, self.n_values)

    def render(self, batch: Batch, row: int = 0, predictions: Tensor | None = None) -> str:
        return strings.picture(
            *strings.named(batch, row, predictions, self.spell), titles=("keys and values", "next token")
        )

    def spell(self, token: int) -> str:
        if token == self.pad:
            return "_"
        return f"k{token}" if token < self.n_keys else f"v{token - self.n_keys}"


def _motif(words: random.Keys, sizes: NDArray[np.int64], bound: int) -> strings.Tokens:
    """(..., m) different tokens below `bound` from random words (..., m), of which the first `sizes` count, else -1."""
    tokens = np.full(words.shape, -1, dtype=np.int64)
    for i in range(words.shape[-1]):
        token = random.below(words[..., i], bound - i)
        for earlier in np.moveaxis(np.sort(tokens[..., :i], axis=-1), -1, 0):  # in the rising order of those not taken
            token += token >= earlier
        tokens[..., i] = token
    tokens[np.arange(words.shape[-1]) >= sizes[..., None]] = -1
    return tokens


def _before(counts: NDArray) -> strings.Tokens:
    """(n, m) the sum of what stands further left in each row."""
    return np.cumsum(counts, axis=1) - counts
