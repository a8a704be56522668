"""ListOps (Nangia and Bowman, 2018; as in Tay et al., "Long Range Arena", ICLR 2021, `data/listops.py`)."""

from __future__ import annotations

from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from zoo.core.errors import UsageError
from zoo.core.options import Options
from zoo.tasks import random, strings
from zoo.tasks.protocol import IGNORE, Batch, Split, Task, check_request, register

_NAMES = [".", "[MIN", "[MAX", "[MED", "[SM", "]", *"0123456789"]
_DIGIT = 6


@register("listops")
class ListOps(Task):
    """Evaluate nested operations on lists of digits.

    With seq_len=12, as a person sees it and as tokens (1 to 4 are the operators, 5 is `]`, digits are 6 to 15, `.` is
    `IGNORE`):

        ```
                 [MAX  1  0  ]
        inputs      2  7  6  5  0  0  0  0  0  0  0  0
        targets     .  .  .  7  .  .  .  .  .  .  .  .
        ```

    `[MIN`, `[MAX`, `[MED` (the median, rounded down) and `[SM` (the sum modulo 10) have 2 to `max_args` arguments. An
    argument is an operation with probability `operators`, otherwise a digit; operations are at most `max_depth` - 1
    deep. Trees are drawn until one has between `min_length` and `seq_len` tokens, with brackets; padding follows it.
    Long Range Arena has seq_len=1999, min_length=501 and the defaults of the other options.

    Chance is one in 10 for uniform guesses. No tree is in two splits. Slices: `length`, rounded up to the next of 4, 6,
    8, 12, 16, 24, ..., and `nesting`, the greatest number of operations within one another.
    """

    class Config(Options):
        """Options of `listops`."""

        seq_len: Annotated[int, Field(ge=4)] = 128
        """Length of the rows and most tokens of a tree."""
        min_length: Annotated[int, Field(ge=4)] | None = None
        """Fewest tokens of a tree, by default a quarter of seq_len."""
        max_depth: Annotated[int, Field(ge=2, le=1000)] = 10
        """Deepest level of a tree, that of digits included."""
        max_args: Annotated[int, Field(ge=2, le=1000)] = 10
        """Most arguments of an operation."""
        operators: Annotated[float, Field(ge=0, lt=1)] = 0.25
        """Probability that an argument is an operation."""

    layout = "next_token"
    vocab_size = len(_NAMES)
    config: Config

    def __init__(self, config: Config):
        super().__init__(config)
        c = config
        self.seq_len = c.seq_len
        self._shortest = c.min_length or max(4, c.seq_len // 4)
        if self._shortest > c.seq_len:
            raise UsageError(f"listops: min_length={c.min_length} is more than seq_len={c.seq_len}.")
        flat = c.max_args + 2
        if self._shortest > flat and (not c.operators or c.max_depth == 2):
            told = f"operators={c.operators} and max_depth={c.max_depth} make lists of at most {flat} tokens"
            raise UsageError(f"listops: min_length={self._shortest} is out of reach: {told}.")

    def sample(self, n: int, *, split: Split, seed: int, start: int = 0) -> Batch:
        from zoo.tasks.kernels import listops

        check_request(n, split, start)
        inputs = strings.draw_for_split(random.row_keys(split, seed, start, n), split, self._trees)
        values, depths = listops.evaluate(inputs)
        lengths = (inputs > 0).sum(1)
        targets = np.full_like(inputs, IGNORE)
        np.put_along_axis(targets, lengths[:, None] - 1, _DIGIT + values[:, None], axis=1)
        slices = {"length": strings.length_bucket(lengths), "nesting": depths}
        return Batch(
            torch.from_numpy(inputs), torch.from_numpy(targets), {k: torch.from_numpy(v) for k, v in slices.items()}
        )

    def _trees(self, keys: random.Keys) -> strings.Tokens:
        from zoo.tasks.kernels import listops

        c = self.config
        tokens = np.zeros((len(keys), c.seq_len), dtype=np.int64)
        if not listops.write(keys, self._shortest, c.max_depth, c.max_args, c.operators, tokens):
            raise UsageError(
                f"listops: hardly any tree has {self._shortest} to {c.seq_len} tokens with max_depth={c.max_depth},"
                f" max_args={c.max_args} and operators={c.operators}: lower min_length or raise those."
            )
        return tokens

    def render(self, batch: Batch, row: int = 0, predictions: Tensor | None = None) -> str:
        scored = batch.targets[row] != IGNORE
        words = [_NAMES[t] for t in batch.inputs[row].tolist() if t]
        lines = [*_indented(words), f"answer     {_NAMES[int(batch.targets[row][scored])]}"]
        if predictions is not None:
            said = int(predictions[row][scored])
            lines.append(f"predicted  {_NAMES[said] if 0 <= said < len(_NAMES) else '?'}")
        return "\n".join(lines)


def _indented(words: list[str], width: int = 100) -> list[str]:
    """A tree in lines, each beginning at an operation or behind one, by depth."""
    lines, depth = [""], 0
    for word in words:
        if (word in _NAMES[1:5] and lines[-1].strip()) or len(lines[-1]) + len(word) >= width:
            lines.append("  " * depth)
        lines[-1] += word if not lines[-1].strip() else " " + word
        depth += (word in _NAMES[1:5]) - (word == "]")
        if word == "]":
            lines.append("  " * depth)
    return [line for line in lines if line.strip()]
