"""Trees of operators in compiled loops: random ones within bounds, and their values."""

from __future__ import annotations

import numpy as np

from zoo.tasks.kernels.random import below, compiled, word

MIN, MAX, MED, SUM, CLOSE, DIGIT = 1, 2, 3, 4, 5, 6
_MOST_WORK = 2_000_000


@compiled
def write(keys, least, max_depth, max_args, share, tokens):
    """Fill each row of (n, L) zeros with a random tree of `least` to L tokens, from one key each.

    Trees are drawn one after another until one has such a length. Returns whether every row found one.
    """
    most = tokens.shape[1]
    threshold = np.uint64(share * 2.0**53)
    left = np.empty(max_depth + 1, dtype=np.int64)  # arguments still to be written at each depth
    state = np.empty(1, dtype=np.uint64)
    for i in range(len(tokens)):
        state[0] = keys[i]
        work = 0
        while True:
            tokens[i, 0] = MIN + below(state, 4)
            left[1] = 2 + below(state, max_args - 1)
            depth, at, due = 1, 1, left[1] + 1  # `due`: tokens without which the tree cannot end
            while depth > 0 and at + due <= most:
                if left[depth] == 0:
                    tokens[i, at] = CLOSE
                    depth -= 1
                else:
                    left[depth] -= 1
                    if depth + 1 < max_depth and (word(state) >> np.uint64(11)) < threshold:
                        tokens[i, at] = MIN + below(state, 4)
                        depth += 1
                        left[depth] = 2 + below(state, max_args - 1)
                        due += left[depth] + 1
                    else:
                        tokens[i, at] = DIGIT + below(state, 10)
                at += 1
                due -= 1
            if depth == 0 and at >= least:
                tokens[i, at:] = 0
                break
            work += at
            if work > _MOST_WORK:
                return False
    return True


@compiled
def evaluate(tokens):
    """(n,) value and (n,) greatest depth of trees (n, L)."""
    n, width = tokens.shape
    values, depths = np.empty(n, dtype=np.int64), np.empty(n, dtype=np.int64)
    counts = np.zeros((width + 1, 10), dtype=np.int64)  # of each digit among the arguments at each depth
    operators = np.empty(width + 1, dtype=np.int64)
    for i in range(n):
        depth, deepest = 0, 0
        for token in tokens[i]:
            if token == 0:
                break
            if token < CLOSE:
                depth += 1
                deepest = max(deepest, depth)
                operators[depth] = token
                counts[depth] = 0
                continue
            value = token - DIGIT
            if token == CLOSE:
                value = _apply(operators[depth], counts[depth])
                depth -= 1
            counts[depth, value] += 1
            values[i] = value
        depths[i] = deepest
    return values, depths


@compiled
def _apply(operator, counts):
    """The value of an operator from how often each digit is among its arguments."""
    total, size = 0, 0
    for digit in range(10):
        total += digit * counts[digit]
        size += counts[digit]
    if operator == SUM:
        return total % 10
    if operator == MIN:
        return _ranked(counts, 0)
    if operator == MAX:
        return _ranked(counts, size - 1)
    return (_ranked(counts, (size - 1) // 2) + _ranked(counts, size // 2)) // 2


@compiled
def _ranked(counts, rank):
    """The digit of a rank from 0 on."""
    for digit in range(10):
        rank -= counts[digit]
        if rank < 0:
            return digit
    return 9
