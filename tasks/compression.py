"""Compression, a task of MAD (Poli et al. 2024, arXiv 2403.17844)."""

from __future__ import annotations

from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from zoo.core.options import Options
from zoo.tasks import random, strings
from zoo.tasks.mad import MADTask
from zoo.tasks.protocol import Batch, Split, check_request, register


@register("compression")
class Compression(MADTask):
    """Predict every token of a row from the features of its last token.

    With vocab_size=8, seq_len=10 (7 ends every row):

        ```
        inputs      3   0   6   2   2   5   1   0   4   7
        targets     3   0   6   2   2   5   1   0   4   7
        ```

    The tokens before the last are uniform over V - 1 tokens. Under the layout `reconstruct` the target at position t is
    the token there, and it is predicted only from the features at the end of the row: see `model.decoder`.
    The last token is a target as well, as in the authors' code, and is the same in every row.
    """

    class Config(Options):
        """Options of `compression`."""

        vocab_size: Annotated[int, Field(ge=3)] = 16
        """V; one of the tokens ends the row."""
        seq_len: Annotated[int, Field(ge=2)] = 32
        """Tokens of a row, the last included."""

    mad_variations = {  # noqa: RUF012 - never written to
        "vocab_size": (32, 64, 128),
        "seq_len": (64, 128, 256),
        "rows": (6400, 3200, 1600, 800),
    }
    layout = "reconstruct"
    config: Config

    def __init__(self, config: Config):
        super().__init__(config)
        self.vocab_size, self.seq_len = config.vocab_size, config.seq_len
        rows = float(config.vocab_size - 1) ** min(config.seq_len - 1, 50)
        strings.check_instances(self.name, rows, f"vocab_size={config.vocab_size} with seq_len={config.seq_len}")

    def sample(self, n: int, *, split: Split, seed: int, start: int = 0) -> Batch:
        check_request(n, split, start)
        inputs = torch.from_numpy(strings.draw_for_split(random.row_keys(split, seed, start, n), split, self._rows))
        return Batch(inputs, inputs.clone())

    def _rows(self, row_keys: random.Keys) -> strings.Tokens:
        """(n, L) tokens from keys (n,)."""
        words = random.below(random.bits(row_keys, self.seq_len - 1), self.vocab_size - 1)
        return np.pad(words, ((0, 0), (0, 1)), constant_values=self.vocab_size - 1)

    def render(self, batch: Batch, row: int = 0, predictions: Tensor | None = None) -> str:
        return strings.picture(*strings.named(batch, row, predictions, self.spell), titles=("row", "to tell again"))

    def spell(self, token: int) -> str:
        return "end" if token == self.vocab_size - 1 else str(token)
