"""Random strings of tokens: of random length, drawn for a split, shown in columns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from zoo.core.errors import UsageError
from zoo.tasks import random
from zoo.tasks.protocol import IGNORE, SPLITS, Batch, Split

Tokens = NDArray[np.int64]
Answers = Literal["last", "all"]

MIN_INSTANCES = 200  # below this, a split of an eighth may be empty
_MAX_REDRAWS = 10_000
_COEFFICIENTS = random.mix(0xF1A6)


def check_instances(task: str, instances: float, what: str) -> None:
    """Raises UsageError where there are too few different rows for disjoint splits."""
    if instances < MIN_INSTANCES:
        told = f"too few for disjoint splits (at least {MIN_INSTANCES})"
        raise UsageError(f"{task}: {what} gives only {instances:.0f} different rows, {told}.")


def fingerprint(tokens: Tokens) -> random.Keys:
    """(n,) one number for each string (n, L), the same whatever the width L to which it is padded with zeros."""
    return (tokens.astype(np.uint64) * random.bits(_COEFFICIENTS, tokens.shape[1])).sum(1)


def draw_for_split(
    row_keys: random.Keys,
    split: Split,
    draw: Callable[[random.Keys], Tokens],
    named: Callable[[Tokens], random.Keys] = fingerprint,
) -> Tokens:
    """(n, L) strings, each drawn again until it belongs to `split`.

    Args:
        row_keys: (n,) the rows' keys.
        split: which split.
        draw: strings (m, L), padded with zeros, from keys (m,); a string must depend on its key only.
        named: one number for each string (m, L), by which it belongs to a split; a symmetry keeps the number.
    """
    tokens: Tokens | None = None
    left = np.arange(len(row_keys))
    for attempt in range(_MAX_REDRAWS):
        drawn = draw(random.fold(row_keys[left], attempt))
        found = random.split_of(named(drawn)) == SPLITS.index(split)
        if tokens is None:
            tokens = drawn
        tokens[left[found]] = drawn[found]
        left = left[~found]
        if not len(left):
            return tokens
    raise UsageError(f"No string falls into the split {split!r}: allow more lengths.")


def keys_for_split(row_keys: random.Keys, split: Split) -> random.Keys:
    """(n,) the numbers from which rows of real vectors are made, each drawn again until it belongs to `split`."""
    keys, left, attempt = row_keys.copy(), np.arange(len(row_keys)), 0
    while len(left):
        keys[left] = random.fold(row_keys[left], attempt)
        left = left[random.split_of(keys[left]) != SPLITS.index(split)]
        attempt += 1
    return keys


def length_bucket(lengths: Tokens) -> Tokens:
    """Lengths rounded up to the next of 1, 2, 3, 4, 6, 8, 12, 16, 24, ..."""
    power = 2 ** np.ceil(np.log2(np.maximum(lengths, 1))).astype(np.int64)
    return np.where(lengths * 4 <= power * 3, power * 3 // 4, power)


def packed(tokens: Tokens) -> Tokens:
    """(n, L) tokens with the zeros between them moved to the end of each row."""
    kept = tokens > 0
    found = np.zeros_like(tokens)
    row, at = kept.nonzero()
    found[row, (np.cumsum(kept, axis=1) - 1)[row, at]] = tokens[row, at]
    return found


def continued(tokens: Tokens, asked: NDArray[np.bool_]) -> tuple[Tokens, Tokens]:
    """Inputs and targets (n, L) of texts (n, L + 1), padded with zeros, whose `asked` tokens are predicted.

    The last token of a text is not read back.
    """
    targets = np.where(asked[:, 1:], tokens[:, 1:], IGNORE)
    ended = np.pad(tokens[:, 2:] == 0, ((0, 0), (0, 1)), constant_values=True)
    inputs = tokens[:, :-1].copy()
    inputs[:, 1:][(ended & asked[:, 1:])[:, :-1]] = 0
    return inputs, targets


def since(begin: NDArray[np.bool_], end: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """(n, L) whether a position is behind a `begin` (n, L) that no `end` (n, L) has followed yet."""
    place = np.arange(begin.shape[1])
    last = [np.maximum.accumulate(np.where(marks, place, -1), axis=1) for marks in (begin, end)]
    return (last[0] > last[1]) & ~begin


def answers_at(values: Tokens, asked: NDArray[np.bool_], answers: Answers) -> Tokens:
    """Targets (n, L): `values` at all positions that have an answer, or only at the last such position of each row."""
    if answers == "last":
        after = np.cumsum(asked[:, ::-1], axis=1)[:, ::-1]
        asked = asked & (after == 1)
    return np.where(asked, values, IGNORE)


def scaled(batch: Batch, predictions: Tensor, chance: float) -> Tensor:
    """(n,) accuracy of each row, scaled so that `chance` is 0 and all right is 1."""
    asked = batch.targets != IGNORE
    accuracy = ((predictions == batch.targets) & asked).sum(1).double() / asked.sum(1)
    return (accuracy - chance) / (1 - chance)


def columns(lines: Mapping[str, Sequence[str]], width: int = 100) -> str:
    """Titled lines of equally many cells, aligned in columns and folded at `width` characters."""
    margin = max(map(len, lines)) + 2
    cells = list(zip(*lines.values(), strict=True))
    widths = [max(map(len, column)) + 1 for column in cells]
    blocks, at = [], 0
    while at < len(cells):
        end, used = at, margin
        while end < len(cells) and (end == at or used + widths[end] <= width):
            used += widths[end]
            end += 1
        rows = [
            title.ljust(margin) + "".join(c[i].rjust(w) for c, w in zip(cells[at:end], widths[at:end], strict=True))
            for i, title in enumerate(lines)
        ]
        blocks.append("\n".join(row.rstrip() for row in rows))
        at = end
    return "\n\n".join(blocks)


def named(
    batch: Batch, row: int, predictions: Tensor | None, name: Callable[[int], str]
) -> tuple[list[str], list[str], list[str] | None]:
    """Inputs, targets ("" where there is none) and predictions of a row, each token by its name."""
    targets = ["" if target == IGNORE else name(target) for target in batch.targets[row].tolist()]
    said = None if predictions is None else [name(p) for p in predictions[row].tolist()]
    return [name(token) for token in batch.inputs[row].tolist()], targets, said


def picture(
    inputs: Sequence[str], targets: Sequence[str], predictions: Sequence[str] | None, titles: tuple[str, str]
) -> str:
    """A row as columns: inputs over targets ("" where there is none) over predictions, wrong ones marked `!`."""
    lines = {titles[0]: list(inputs), titles[1]: list(targets)}
    if predictions is not None:
        pairs = zip(targets, predictions, strict=True)
        lines["predicted"] = ["" if not t else p if p == t else p + "!" for t, p in pairs]
    return columns(lines)
