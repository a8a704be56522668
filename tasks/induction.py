"""Induction heads (Olsson et al. 2022; as a task in H3, arXiv 2212.14052, and Mamba, arXiv 2312.00752)."""

from __future__ import annotations

from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from zoo.core.options import Options
from zoo.tasks import random, strings
from zoo.tasks.protocol import IGNORE, Batch, Split, Task, check_request, register

Length = Annotated[int, Field(ge=3)]


@register("induction")
class Induction(Task):
    """Predict the token that followed a special token, when the special token appears again.

    With vocab_size=8, length=12 (7 is the special token, `.` is `IGNORE`):

        ```
        inputs      3   0   7   5   5   1   6   0   2   2   4   7
        targets     .   .   .   .   .   .   .   .   .   .   .   5
        ```

    The special token is at the end of the row and at a random place before. All other tokens are uniform over V - 1.
    Mamba's paper trains on rows of 256 tokens and tests on rows of 64 to 2**20. Slices: `gap`, tokens from the answer
    to the question, rounded up to the next of 1, 2, 3, 4, 6, 8, 12, ...
    """

    class Config(Options):
        """Options of `induction`."""

        vocab_size: Annotated[int, Field(ge=3)] = 16
        """V, the special token included."""
        length: Length = 256
        """Tokens of a row."""
        validation_length: Length | None = None
        """Tokens of a row of validation, by default `length`."""
        test_length: Length | None = None
        """Tokens of a row of test, by default `length`."""

    layout = "next_token"
    config: Config

    def __init__(self, config: Config):
        super().__init__(config)
        c = config
        self.vocab_size, self.special = c.vocab_size, c.vocab_size - 1
        self._lengths = {
            "train": c.length,
            "validation": c.validation_length or c.length,
            "test": c.test_length or c.length,
        }
        self.seq_len = max(self._lengths.values())
        for split, length in self._lengths.items():
            rows = float(c.vocab_size - 1) ** min(length - 2, 50) * (length - 2)
            strings.check_instances(self.name, rows, f"{split} rows of length={length} over {c.vocab_size} tokens")

    def sample(self, n: int, *, split: Split, seed: int, start: int = 0) -> Batch:
        check_request(n, split, start)
        length = self._lengths[split]

        def draw(keys: random.Keys) -> strings.Tokens:
            tokens = random.below(random.bits(random.fold(keys, 0), length), self.special)
            tokens[np.arange(len(keys)), random.below(random.fold(keys, 1), length - 2)] = self.special
            tokens[:, -1] = self.special
            return tokens

        inputs = strings.draw_for_split(random.row_keys(split, seed, start, n), split, draw)
        answer = 1 + (inputs == self.special).argmax(1)
        targets = np.full(inputs.shape, IGNORE)
        targets[:, -1] = inputs[np.arange(n), answer]
        slices = {"gap": torch.from_numpy(strings.length_bucket(length - 1 - answer))}
        return Batch(torch.from_numpy(inputs), torch.from_numpy(targets), slices)

    def render(self, batch: Batch, row: int = 0, predictions: Tensor | None = None) -> str:
        return strings.picture(*strings.named(batch, row, predictions, self.spell), titles=("row", "what followed"))

    def spell(self, token: int) -> str:
        return "*" if token == self.special else str(token)
