"""Pairs of keys and values, with noise between them: what `in_context_recall` and `noisy_recall` share."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from zoo.core.errors import UsageError
from zoo.tasks import random, strings
from zoo.tasks.mad import MADTask
from zoo.tasks.protocol import IGNORE, Batch, Split, check_request

Teach = Literal["all", "values"]
"""The targets of training rows: every next token, as in MAD, or only those of held-out rows."""


class PairRecall(MADTask):
    """Rows of pairs of a key and its value; a value is a target wherever its key has been seen before.

    Tokens are K keys, then the values, then the noise; K is half of the tokens that are no noise.
    """

    layout = "next_token"
    config: Any  # with vocab_size, seq_len and teach
    noise_tokens: int = 0
    noise_share: float = 0.0

    def _set_up(self) -> None:
        c = self.config
        self.vocab_size, self.seq_len = c.vocab_size, c.seq_len - 1
        if c.seq_len % 2 or c.seq_len < 4:
            raise UsageError(
                f"{self.name}: seq_len={c.seq_len} is not allowed: it should be even, for pairs, and at least 4."
            )
        self.n_words = c.vocab_size - self.noise_tokens
        self.n_keys = self.n_words // 2
        if self.n_keys < 1:
            told = f" beside {self.noise_tokens} tokens of noise" if self.noise_tokens else ""
            raise UsageError(
                f"{self.name}: vocab_size={c.vocab_size} leaves no key and value{told}; take {self.noise_tokens + 2}."
            )
        self.n_pairs = c.seq_len // 2
        # A row has a last pair whose key was seen, and at least one more that is no noise; all other keys are free.
        choices = float(self.n_words - self.n_keys) * self.n_keys ** min(self.n_pairs - 1, 50)
        strings.check_instances(self.name, choices, f"vocab_size={c.vocab_size} with seq_len={c.seq_len}")

    def sample(self, n: int, *, split: Split, seed: int, start: int = 0) -> Batch:
        check_request(n, split, start)
        tokens = strings.draw_for_split(random.row_keys(split, seed, start, n), split, self._rows)
        keys, noisy = tokens[:, ::2], tokens[:, ::2] >= self.n_words
        # Every pair of noise is told apart from the keys and from all others.
        seen = random.repeats(np.where(noisy, self.vocab_size + np.arange(self.n_pairs), keys))
        targets = tokens[:, 1:].copy()
        if split != "train" or self.config.teach == "values":
            targets[:, 1::2] = IGNORE
            targets[:, ::2][~seen] = IGNORE
        n_keys = strings.length_bucket((~seen & ~noisy).sum(1))
        slices = {"n_keys": torch.from_numpy(n_keys)}
        return Batch(torch.from_numpy(tokens[:, :-1].copy()), torch.from_numpy(targets), slices)

    def _rows(self, row_keys: random.Keys) -> strings.Tokens:
        """(n, seq_len + 1) tokens from keys (n,)."""
        n, pairs = len(row_keys), self.n_pairs
        keys = random.below(random.bits(random.fold(row_keys, 0), pairs), self.n_keys)
        noisy = self._noisy(random.fold(row_keys, 1))
        # The last key is one of those seen: of random ranks for all keys, the highest that a seen one has.
        ranks = random.bits(random.fold(row_keys, 2), self.n_keys)
        seen = np.zeros((n, self.n_keys), dtype=bool)
        rows, places = np.nonzero(~noisy[:, :-1])
        seen[rows, keys[rows, places]] = True
        keys[:, -1] = np.where(seen, ranks, 0).argmax(1)

        n_values = self.n_words - self.n_keys
        value_of = self.n_keys + random.below(random.bits(random.fold(row_keys, 3), self.n_keys), n_values)
        tokens = np.stack([keys, np.take_along_axis(value_of, keys, 1)], axis=2)
        if self.noise_share:
            noise = random.below(random.bits(random.fold(row_keys, 4), 2 * pairs), self.noise_tokens)
            tokens[noisy] = self.n_words + noise.reshape(n, pairs, 2)[noisy]
        return tokens.reshape(n, 2 * pairs)

    def _noisy(self, row_keys: random.Keys) -> NDArray[np.bool_]:
        """(n, n_pairs) which pairs are noise; never the last, nor all before it."""
        noisy = random.uniform(random.bits(row_keys, self.n_pairs)) < self.noise_share
        first = random.below(random.fold(row_keys, self.n_pairs), self.n_pairs - 1)
        np.put_along_axis(noisy, first[:, None], False, axis=1)
        noisy[:, -1] = False
        return noisy

    def render(self, batch: Batch, row: int = 0, predictions: Tensor | None = None) -> str:
        return strings.picture(
            *strings.named(batch, row, predictions, self.spell), titles=("keys and values", "next token")
        )

    def spell(self, token: int) -> str:
        if token < self.n_keys:
            return f"k{token}"
        return f"v{token - self.n_keys}" if token < self.n_words else f"~{token - self.n_words}"
