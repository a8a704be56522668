"""Prefix expressions in compiled loops: random ones with given numbers of operators, and their values."""

from __future__ import annotations

import numpy as np

from zoo.tasks.kernels.random import below, compiled, mix

PLUS, MINUS, TIMES, DIVIDE = 1, 2, 3, 4
_SALT = np.uint64(0x9D3F)


@compiled
def write(counts, operators, modulus, first, keys, tokens):
    """Fill each tokens[i, : 2 * counts[i] + 1] of (n, L) zeros with a random expression, from one key each.

    An expression with k operators has one of `operators`, uniform, then a left part with 0 to k - 1 of the other
    operators, uniform, then the right part. Numbers are uniform from `first`, the token of 0, on.
    """
    stack = np.empty(tokens.shape[1] + 2, dtype=np.int64)  # operators of the expressions that are still to be written
    state = np.empty(1, dtype=np.uint64)
    for i in range(len(counts)):
        state[0] = keys[i]
        stack[0], depth, at = counts[i], 1, 0
        while depth > 0:
            depth -= 1
            left = stack[depth]
            if left == 0:
                tokens[i, at] = first + below(state, modulus)
            else:
                tokens[i, at] = operators[below(state, len(operators))]
                part = below(state, left)
                stack[depth] = left - 1 - part
                stack[depth + 1] = part
                depth += 2
            at += 1


@compiled
def evaluate(tokens, inverses, first):
    """Values (n,) of prefix expressions (n, L), padded with zeros, -1 where one divides by 0; their depths (n,); and
    names (n,), which stay as they are where the two sides of + and * are exchanged.

    `inverses` (modulus,) are those of the numbers, 0 where there is none.
    """
    n, width = tokens.shape
    modulus = len(inverses)
    found, depths = np.empty(n, dtype=np.int64), np.empty(n, dtype=np.int64)
    names = np.empty(n, dtype=np.uint64)
    values, levels = np.empty(width + 1, dtype=np.int64), np.empty(width + 1, dtype=np.int64)
    hashes = np.empty(width + 1, dtype=np.uint64)
    for i in range(n):
        top, defined = 0, True
        for at in range(width - 1, -1, -1):  # from the end every operator finds its sides on the stack, left on top
            token = tokens[i, at]
            if token == 0:
                continue
            if token >= first:
                values[top], levels[top], hashes[top] = token - first, 0, mix(np.uint64(token) + _SALT)
                top += 1
                continue
            a, b = values[top - 1], values[top - 2]
            left, right = hashes[top - 1], hashes[top - 2]
            if token == PLUS:
                value, name = (a + b) % modulus, left + right
            elif token == MINUS:
                value, name = (a - b) % modulus, left - mix(right)
            elif token == TIMES:
                value, name = a * b % modulus, left + right
            else:
                value, name = a * inverses[b] % modulus, left - mix(right)
                defined = defined and inverses[b] > 0
            top -= 1
            values[top - 1], hashes[top - 1] = value, mix(name ^ mix(np.uint64(token)))
            levels[top - 1] = 1 + max(levels[top - 1], levels[top])
        found[i], depths[i], names[i] = values[0] if defined else -1, levels[0], hashes[0]
    return found, depths, names
