"""Context-free grammars in levels in compiled loops: random strings, their probabilities, and what may come next.

A symbol of level l is replaced by 2 or 3 symbols of level l + 1, by one of its rules; symbols of the last level are
the letters. `rules` (depth, S, R, 3) has the symbols of rules, -1 for a third one that is not there; `counts`
(depth, S) has how many rules a symbol has, each as probable as the others. Level 0 has one symbol, number 0.
"""

from __future__ import annotations

import numpy as np

from zoo.tasks.kernels.random import below, compiled


@compiled
def write(rules, counts, keys, tokens):
    """Fill the start of each row of (n, L) zeros with the letters, from 1 on, of a random string, from one key each."""
    depth = len(rules)
    level, symbol = np.empty(3 * depth + 1, dtype=np.int64), np.empty(3 * depth + 1, dtype=np.int64)
    state = np.empty(1, dtype=np.uint64)
    for i in range(len(keys)):
        state[0] = keys[i]
        level[0], symbol[0], top, at = 0, 0, 1, 0
        while top:
            top -= 1
            here, which = level[top], symbol[top]
            if here == depth:
                tokens[i, at] = 1 + which
                at += 1
                continue
            rule = rules[here, which, below(state, counts[here, which])]
            for k in range(2, -1, -1):
                if rule[k] >= 0:
                    level[top], symbol[top] = here + 1, rule[k]
                    top += 1


@compiled
def parse(tokens, rules, counts):
    """Natural logarithms of the probabilities of strings (n,), and what may follow (n, L + 1, S + 1).

    Strings (n, L) are letters from 1 on, padded with zeros; any other number is a letter of no string. [i, t, s] says
    whether letter s may come behind the first t letters, and [i, t, S] whether the string may end there.
    """
    n, width = tokens.shape
    depth, symbols = len(rules), rules.shape[1]
    logs = np.empty(n)
    may = np.zeros((n, width + 1, symbols + 1), dtype=np.bool_)
    longest = 3 ** (depth - 1) - 2 ** (depth - 1) + 1  # lengths of what a symbol of level 1 may become
    inside = np.zeros((depth + 1, width + 1, longest, symbols))  # [level, start, length - shortest, symbol]
    pairs = np.zeros((depth + 1, width + 1, 2 * longest, symbols, symbols))  # of two symbols side by side
    due = np.zeros((depth + 1, width + 1, symbols), dtype=np.bool_)  # whether a symbol may begin here
    whole = np.zeros(width + 1)  # of level 0, by its length
    for i in range(n):
        size = 0
        while size < width and tokens[i, size] != 0:
            size += 1
        inside[:, : size + 1], pairs[:, : size + 1], due[:, : size + 1], whole[:] = 0.0, 0.0, False, 0.0
        for t in range(size):
            if 1 <= tokens[i, t] <= symbols:
                inside[depth, t, 0, tokens[i, t] - 1] = 1.0
        for level in range(depth, 0, -1):
            least, most = 2 ** (depth - level), 3 ** (depth - level)
            for t in range(size - 2 * least + 1):
                for a in range(least, min(most, size - t - least) + 1):
                    for first in range(symbols):
                        left = inside[level, t, a - least, first]
                        if left == 0.0:
                            continue
                        for b in range(least, min(most, size - t - a) + 1):
                            for second in range(symbols):
                                right = inside[level, t + a, b - least, second]
                                if right > 0.0:
                                    pairs[level, t, a + b - 2 * least, first, second] += left * right
            above = level - 1
            shortest, furthest = 2 * least, 3 * most
            for t in range(size - shortest + 1 if above else min(1, size - shortest + 1)):
                for length in range(shortest, min(furthest, size - t) + 1):
                    for symbol in range(symbols if above else 1):
                        total = 0.0
                        for k in range(counts[above, symbol]):
                            rule = rules[above, symbol, k]
                            if rule[2] < 0:
                                if length <= 2 * most:
                                    total += pairs[level, t, length - 2 * least, rule[0], rule[1]]
                                continue
                            for a in range(max(least, length - 2 * most), min(most, length - 2 * least) + 1):
                                left = inside[level, t, a - least, rule[0]]
                                if left > 0.0:
                                    total += left * pairs[level, t + a, length - a - 2 * least, rule[1], rule[2]]
                        total /= counts[above, symbol]
                        if above:
                            inside[above, t, length - shortest, symbol] = total
                        else:
                            whole[length] = total
        logs[i] = np.log(whole[size]) if whole[size] > 0.0 else -np.inf
        due[0, 0, 0] = True
        for level in range(depth):
            least, most = 2 ** (depth - level - 1), 3 ** (depth - level - 1)
            for t in range(size + 1):
                for symbol in range(symbols):
                    if not due[level, t, symbol]:
                        continue
                    for k in range(counts[level, symbol]):
                        rule = rules[level, symbol, k]
                        due[level + 1, t, rule[0]] = True
                        for a in range(least, min(most, size - t) + 1):
                            if inside[level + 1, t, a - least, rule[0]] > 0.0:
                                due[level + 1, t + a, rule[1]] = True
                        if rule[2] >= 0:
                            for a in range(2 * least, min(2 * most, size - t) + 1):
                                if pairs[level + 1, t, a - 2 * least, rule[0], rule[1]] > 0.0:
                                    due[level + 1, t + a, rule[2]] = True
        for t in range(size + 1):
            for symbol in range(symbols):
                may[i, t, symbol] = due[depth, t, symbol]
            may[i, t, symbols] = whole[t] > 0.0
    return logs, may
