"""Bracketed expressions in compiled loops: random ones of given lengths, and their values."""

from __future__ import annotations

import numpy as np

from zoo.tasks.kernels.random import below, compiled

PLUS, MINUS, TIMES, EQUALS, NUMBER = 1, 2, 3, 4, 5


@compiled
def write(lengths, modulus, keys, tokens):
    """Fill each tokens[i, :lengths[i]] of (n, L) zeros with a random expression, from one key each.

    Of 5 tokens and more it is `(left op right)`, the length of `left` uniform; shorter ones are d, -d, (d) and (-d).
    """
    opening, closing = NUMBER + modulus, NUMBER + modulus + 1
    # What is still to be written: a length > 0 for an expression, -token for a token.
    stack = np.empty(4 * tokens.shape[1] + 8, dtype=np.int64)
    state = np.empty(1, dtype=np.uint64)
    for i in range(len(lengths)):
        state[0] = keys[i]
        stack[0], depth, at = lengths[i], 1, 0
        while depth > 0:
            depth -= 1
            item = stack[depth]
            if item >= 5:
                left = 1 + below(state, item - 4)
                stack[depth] = -closing
                stack[depth + 1] = item - 3 - left
                stack[depth + 2] = -(1 + below(state, 3))
                stack[depth + 3] = left
                stack[depth + 4] = -opening
                depth += 5
            elif item >= 3:
                stack[depth] = -closing
                stack[depth + 1] = item - 2
                stack[depth + 2] = -opening
                depth += 3
            elif item == 2:
                stack[depth] = 1
                stack[depth + 1] = -MINUS
                depth += 2
            else:
                tokens[i, at] = NUMBER + below(state, modulus) if item == 1 else -item
                at += 1


@compiled
def evaluate(tokens, modulus):
    """(n,) values of expressions in brackets (n, L), each ended by `=`."""
    opening, closing = NUMBER + modulus, NUMBER + modulus + 1
    n, width = tokens.shape
    found = np.empty(n, dtype=np.int64)
    values, operators = np.empty(width + 1, dtype=np.int64), np.zeros(width + 1, dtype=np.int64)
    for i in range(n):
        n_values, depth, negative, operand = 0, 0, False, True  # `operand`: a value is due, so `-` is its sign
        for token in tokens[i]:
            if token == EQUALS:
                break
            if token == opening:
                operators[depth] = 0
                depth += 1
            elif token == closing:
                depth -= 1
                if operators[depth]:
                    n_values -= 1
                    left, right = values[n_values - 1], values[n_values]
                    if operators[depth] == TIMES:
                        values[n_values - 1] = left * right % modulus
                    else:
                        values[n_values - 1] = (left + right if operators[depth] == PLUS else left - right) % modulus
            elif token >= NUMBER:
                values[n_values] = (NUMBER - token if negative else token - NUMBER) % modulus
                n_values += 1
                negative, operand = False, False
            elif operand:
                negative = True
            else:
                operators[depth - 1] = token
                operand = True
        found[i] = values[0]
    return found
