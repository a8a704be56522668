"""Shuffling in compiled loops."""

from __future__ import annotations

import numpy as np

from zoo.tasks.kernels.random import compiled, shuffle


@compiled
def shuffle_rows(tokens, lengths, keys):
    """Put the first lengths[i] tokens of each row (n, L) in random order, in place, from one key each."""
    state = np.empty(1, dtype=np.uint64)
    for i in range(len(tokens)):
        state[0] = keys[i]
        shuffle(state, tokens[i, : lengths[i]])
