"""A task in one file: which symbol is missing?"""

from typing import Annotated

import numpy as np
import torch
from pydantic import Field

from zoo.core.options import Options
from zoo.tasks import random, strings
from zoo.tasks.protocol import IGNORE, Batch, Task, check_request, register


@register("missing_symbol")
class MissingSymbol(Task):
    """Find the symbol that is not in the row.

    With symbols=6 (0 is the question, symbols are 1 to 6, `.` is `IGNORE`):

        ```
        inputs      3   1   6   4   2   0
        targets     .   .   .   .   .   5
        ```

    A row has all symbols except one, in random order. Chance is one in `symbols`.
    """

    class Config(Options):
        """Options of `missing_symbol`."""

        symbols: Annotated[int, Field(ge=6)] = 16
        """Number of symbols."""

    layout = "next_token"

    def __init__(self, config: Config):
        super().__init__(config)
        self.vocab_size, self.seq_len = config.symbols + 1, config.symbols

    def sample(self, n, *, split, seed, start=0):
        check_request(n, split, start)
        keys = random.row_keys(split, seed, start, n)  # a row depends on its key and on nothing else
        order = strings.draw_for_split(keys, split, self._order)  # no order of symbols is in two splits
        inputs, targets = order.copy(), np.full(order.shape, IGNORE)
        inputs[:, -1], targets[:, -1] = 0, order[:, -1]
        return Batch(torch.from_numpy(inputs), torch.from_numpy(targets))

    def _order(self, keys):
        return 1 + np.argsort(random.bits(keys, self.seq_len), axis=1)

    def render(self, batch, row=0, predictions=None):
        lines = [f"named    {' '.join(map(str, batch.inputs[row, :-1].tolist()))}"]
        lines += [f"missing  {batch.targets[row, -1].item()}"]
        if predictions is not None:
            lines += [f"said     {predictions[row, -1].item()}"]
        return "\n".join(lines)
