"""Memorization, a task of MAD (Poli et al. 2024, arXiv 2403.17844)."""

from __future__ import annotations

from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from zoo.core.errors import UsageError
from zoo.core.options import Options
from zoo.tasks import random, strings
from zoo.tasks.mad import MADTask
from zoo.tasks.protocol import IGNORE, Batch, Split, check_request, register


@register("memorization")
class Memorization(MADTask):
    """Memorise the value of each key, which no row contains.

    With vocab_size=8, seq_len=10 (keys 0 to 2, values 3 to 6, `?` is 7, `.` is `IGNORE`):

        ```
                   key  ?  key  ?  key  ?  key  ?  key  ?
        inputs      2   7   0   7   0   7   1   7   0   7
        targets     .   6   .   4   .   4   .   5   .   4
        ```

    One map for all rows of all splits, made from `map_seed`, gives each key a different value. Keys are uniform. The
    splits have different rows but the same map, which the model memorises. MAD trains on 256 rows with 4096 keys; at
    vocab_size=8192 these are about 63 % of the 4095 different keys.
    """

    class Config(Options):
        """Options of `memorization`."""

        vocab_size: Annotated[int, Field(ge=4)] = 256
        """V: the token `?`, and of the rest one half keys and one half values."""
        seq_len: Annotated[int, Field(ge=2)] = 32
        """Tokens of a row, even."""
        map_seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] = 12345
        """Seed of the map."""

    mad_rows = 256
    mad_variations = {"vocab_size": (512, 1024, 2048, 4096, 8192)}  # noqa: RUF012 - never written to
    layout = "next_token"
    config: Config

    def __init__(self, config: Config):
        super().__init__(config)
        c = config
        self.vocab_size, self.seq_len = c.vocab_size, c.seq_len
        if c.seq_len % 2:
            raise UsageError(f"memorization: seq_len={c.seq_len} is odd; a key and ? are two tokens: {c.seq_len + 1}.")
        self.n_keys = (c.vocab_size - 1) // 2
        self.ask = c.vocab_size - 1
        key = random.row_keys("train", c.map_seed, 0, 1)
        self.values = self.n_keys + random.permutation(key, self.ask - self.n_keys)[: self.n_keys]
        rows = float(self.n_keys) ** min(c.seq_len // 2, 50)
        strings.check_instances(self.name, rows, f"vocab_size={c.vocab_size} with seq_len={c.seq_len}")

    def sample(self, n: int, *, split: Split, seed: int, start: int = 0) -> Batch:
        check_request(n, split, start)
        inputs = strings.draw_for_split(random.row_keys(split, seed, start, n), split, self._rows)
        targets = np.full(inputs.shape, IGNORE)
        targets[:, 1::2] = self.values[inputs[:, ::2]]
        return Batch(torch.from_numpy(inputs), torch.from_numpy(targets))

    def _rows(self, row_keys: random.Keys) -> strings.Tokens:
        """(n, L) inputs from keys (n,)."""
        inputs = np.full((len(row_keys), self.seq_len), self.ask)
        inputs[:, ::2] = random.below(random.bits(row_keys, self.seq_len // 2), self.n_keys)
        return inputs

    def render(self, batch: Batch, row: int = 0, predictions: Tensor | None = None) -> str:
        return strings.picture(*strings.named(batch, row, predictions, self.spell), titles=("keys", "values"))

    def spell(self, token: int) -> str:
        if token == self.ask:
            return "?"
        return f"k{token}" if token < self.n_keys else f"v{token - self.n_keys}"
