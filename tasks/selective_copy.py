"""Selective copying, a task of MAD (Poli et al. 2024, arXiv 2403.17844), in Mamba's paper too (arXiv 2312.00752)."""

from __future__ import annotations

import math
from typing import Annotated

import numpy as np
import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from zoo.core.errors import UsageError
from zoo.core.options import Options
from zoo.tasks import random, strings
from zoo.tasks.mad import MADTask
from zoo.tasks.protocol import IGNORE, Batch, Split, check_request, register


@register("selective_copy")
class SelectiveCopy(MADTask):
    """Copy the tokens that are scattered among blanks, in order.

    With vocab_size=8, seq_len=16, n_copy=3 (data tokens 0 to 5, the blank 6, the command to copy 7, `.` is `IGNORE`):

        ```
        inputs      6   6   4   6   6   6   0   6   6   6   6   4   7   6   6   6
        targets     .   .   .   .   .   .   .   .   .   .   .   .   .   4   0   4
        ```

    Each blank is placed before one of the data tokens, each with the same probability, so the last data token is
    directly before the command. Data tokens are drawn from V - 2. With vocab_size=18, seq_len=4129 the 16 data tokens
    are within 4096 tokens as in Mamba's paper.
    """

    class Config(Options):
        """Options of `selective_copy`."""

        vocab_size: Annotated[int, Field(ge=3)] = 16
        """V, with the blank and the command."""
        seq_len: PositiveInt = 256
        """Tokens of a row, more than 2 n_copy + 1."""
        n_copy: PositiveInt = 16
        """Number of tokens to copy."""

    mad_variations = {  # noqa: RUF012 - never written to
        "vocab_size": (32, 64, 128),
        "seq_len": (512, 1024),
        "rows": (6400, 3200, 1600, 800),
        "n_copy": (32, 64, 96),
    }
    layout = "next_token"
    config: Config

    def __init__(self, config: Config):
        super().__init__(config)
        c = config
        self.vocab_size, self.seq_len = c.vocab_size, c.seq_len
        self.copy, self.blank_word, self.n_words = c.vocab_size - 1, c.vocab_size - 2, c.vocab_size - 2
        self.n_blanks = c.seq_len - 2 * c.n_copy - 1
        if self.n_blanks < 1:
            raise UsageError(
                f"selective_copy: seq_len={c.seq_len} is too short for n_copy={c.n_copy}; take {2 * c.n_copy + 2}."
            )
        rows = float(self.n_words) ** min(c.n_copy, 50) * math.comb(self.n_blanks + min(c.n_copy, 5) - 1, self.n_blanks)
        strings.check_instances(self.name, rows, f"vocab_size={c.vocab_size} with n_copy={c.n_copy}")

    def sample(self, n: int, *, split: Split, seed: int, start: int = 0) -> Batch:
        check_request(n, split, start)
        inputs = strings.draw_for_split(random.row_keys(split, seed, start, n), split, self._rows)
        context = inputs[:, : self.seq_len - self.config.n_copy]
        targets = np.full(inputs.shape, IGNORE)
        targets[:, context.shape[1] :] = context[context < self.n_words].reshape(n, -1)
        return Batch(torch.from_numpy(inputs), torch.from_numpy(targets))

    def _rows(self, row_keys: random.Keys) -> strings.Tokens:
        """(n, L) inputs from keys (n,)."""
        n, k = len(row_keys), self.config.n_copy
        words = random.below(random.bits(random.fold(row_keys, 0), k), self.n_words)
        follows = random.below(random.bits(random.fold(row_keys, 1), self.n_blanks), k)  # the word after each blank
        before = np.bincount((follows + k * np.arange(n)[:, None]).ravel(), minlength=n * k).reshape(n, k)
        inputs = np.full((n, self.seq_len), self.blank_word)
        np.put_along_axis(inputs, np.cumsum(before, axis=1) + np.arange(k), words, axis=1)
        inputs[:, -k - 1] = self.copy
        return inputs

    def render(self, batch: Batch, row: int = 0, predictions: Tensor | None = None) -> str:
        return strings.picture(*strings.named(batch, row, predictions, self.spell), titles=("row", "to write"))

    def spell(self, token: int) -> str:
        return {self.blank_word: "_", self.copy: "copy"}.get(token, str(token))
