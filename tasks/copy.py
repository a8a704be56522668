"""Copying (Jelassi et al., "Repeat After Me", ICML 2024)."""

from __future__ import annotations

import textwrap
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from zoo.core.errors import UsageError
from zoo.tasks import random, strings
from zoo.tasks.haystack import PAD, LongOptions, Vocabulary
from zoo.tasks.protocol import IGNORE, Batch, Split, Task, check_request, register

_SHOWN = 400


@register("copy")
class Copy(Task):
    """Write a random string again.

    With seq_len=8, symbols=8, as a person sees it and as tokens (1 is `=`, symbols are 2 to 9, `.` is `IGNORE`):

        ```
                 s3 s0 s3 s1  = s3 s0 s3
        inputs    5  2  5  3  1  5  2  5
        targets   .  .  .  .  5  2  5  3
        ```

    A row is L / 2 symbols, `=`, and the same symbols again except the last. Chance is one in `symbols`. Rows in
    different splits differ in the string. The score has `reach`, the number of symbols before the first wrong one.
    Slices: `length`.
    """

    class Config(LongOptions):
        """Options of `copy`. Strings are half as long as rows."""

        symbols: Annotated[int, Field(ge=2)] = 26
        """Number of different symbols."""

    layout = "next_token"
    continues = True
    config: Config

    def __init__(self, config: Config):
        super().__init__(config)
        self.seq_len = config.seq_len
        shortest = config.min_length or config.seq_len
        for option, length in (("seq_len", self.seq_len), ("min_length", shortest)):
            if length % 2:
                raise UsageError(
                    f"copy: {option}={length} is odd; a string and its copy are as long, so take {length + 1}."
                )
        if shortest > self.seq_len:
            raise UsageError(f"copy: min_length={config.min_length} is more than seq_len={config.seq_len}.")
        self._shortest = shortest // 2
        told = f"symbols={config.symbols} in strings of {self._shortest}"
        strings.check_instances(self.name, float(config.symbols) ** min(self._shortest, 50), told)
        self.vocabulary = Vocabulary(equals=["="], symbols=config.symbols)
        self.vocab_size = len(self.vocabulary)

    def sample(self, n: int, *, split: Split, seed: int, start: int = 0) -> Batch:
        check_request(n, split, start)
        most = self.seq_len // 2

        def draw(keys: random.Keys) -> strings.Tokens:
            lengths = self._shortest + random.below(random.fold(keys, 0), most - self._shortest + 1)
            symbols = self.vocabulary.first["symbols"] + random.below(random.bits(keys, most), self.config.symbols)
            return np.where(np.arange(most) < lengths[:, None], symbols, PAD)

        given = strings.draw_for_split(random.row_keys(split, seed, start, n), split, draw)
        lengths = (given != PAD).sum(1)
        again = lengths[:, None] + np.arange(most)
        inputs = np.zeros((n, self.seq_len + 1), dtype=np.int64)
        inputs[:, :most] = given
        np.put_along_axis(inputs, again + 1, given, axis=1)
        np.put_along_axis(inputs, lengths[:, None], self.vocabulary.first["equals"], axis=1)
        targets = np.full((n, self.seq_len), IGNORE)
        np.put_along_axis(targets, again, np.where(given == PAD, IGNORE, given), axis=1)
        end = np.arange(self.seq_len) >= 2 * lengths[:, None]
        inputs = np.where(end, PAD, inputs[:, :-1])
        told = 2 * lengths if 2 * self._shortest == self.seq_len else strings.length_bucket(2 * lengths)
        return Batch(torch.from_numpy(inputs), torch.from_numpy(targets), {"length": torch.from_numpy(told)})

    def row_scores(self, batch: Batch, predictions: Tensor) -> dict[str, Tensor]:
        """`reach`: how many symbols are right before the first wrong one."""
        scored = batch.targets != IGNORE
        so_far = ((predictions == batch.targets) | ~scored).long().cumprod(1)
        return {"reach": (so_far * scored).sum(1).double()}

    def render(self, batch: Batch, row: int = 0, predictions: Tensor | None = None) -> str:
        true = batch.targets[row][batch.targets[row] != IGNORE]
        lines = {"string": self._words(true)}
        if predictions is not None:
            said = predictions[row][batch.targets[row] != IGNORE]
            lines["predicted"] = self._words(said, true)
        return "\n".join(
            textwrap.fill(f"{name:<10}{text}", 100, subsequent_indent=" " * 10) for name, text in lines.items()
        )

    def _words(self, tokens: Tensor, true: Tensor | None = None) -> str:
        """Symbols as words, wrong ones marked `!`."""
        pairs = zip(tokens.tolist(), (tokens if true is None else true).tolist(), strict=True)
        words = [self.vocabulary[t] + "!" * (t != right) for t, right in pairs]
        return " ".join(words[:_SHOWN]) + (f" ... ({len(words) - _SHOWN:,} more)" if len(words) > _SHOWN else "")
