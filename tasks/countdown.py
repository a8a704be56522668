"""Countdown: a target from given numbers (Gandhi et al., "Stream of Search", COLM 2024, arXiv 2404.03683)."""

from __future__ import annotations

from typing import Annotated

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from zoo.core.errors import UsageError
from zoo.core.options import Options
from zoo.tasks import random, strings
from zoo.tasks.protocol import IGNORE, SPLITS, Batch, Split, Task, check_request, names_of, register, take

BLANK, PLUS, MINUS, TIMES, OVER, NUMBER = 1, 2, 3, 4, 5, 6
SIGNS = {PLUS: "+", MINUS: "-", TIMES: "*", OVER: "/"}
_MAX_REDRAWS = 10_000
_NUMBERS, _SHAPE, _SIGNS, _ORDER = range(4)  # purposes of the random numbers of a try
_HOW_MANY = _MAX_REDRAWS  # as a purpose of those of a row, which tries follow
_MOST_VALUE = 10**9  # of what stands in between
_MOST_NUMBERS = 6


@register("countdown")
class Countdown(Task):
    """Write an expression of given numbers that has a given value.

    min_numbers=3, max_numbers=3, largest=9, max_target=20, as a person sees it and as tokens (1 blank, 2 to 5 are
    `+ - * /`, the number v is 5 + v, `.` is `IGNORE`):

        ```
                 5  2  4  = 18      2  4  5 + *      2 * (4 + 5) = 18
        inputs  10  7  9  23  1 1 1 1 1
        targets  .  .  .   .  7 9 10 2 4
        ```

    A row is the numbers in random order, the target, and blank cells for the answer. The answer is in postfix form (an
    operator stands behind its two values), which takes no brackets: 2k - 1 cells for k numbers. Right is every
    expression that uses each number once, has the target as its value, and only whole positive numbers in between. It
    is checked step by step on a stack. The targets are the expression with which the row was made. Cells of a wrong
    answer are compared with these for `accuracy`.

    A model that predicts all cells at once, or reads true cells before the cell it predicts, may mix two right answers
    into a wrong one; one that reads its own answer need not (`next_token` does so for this layout, `masked_diffusion`
    too). Chance is next to 0. Numbers and target are in one split, in any order of the numbers. Slices: `numbers`, how
    many there are, and `products`, how many of the operators of the targets are `*` or `/`.
    """

    class Config(Options):
        """Options of `countdown`."""

        min_numbers: Annotated[int, Field(ge=2, le=_MOST_NUMBERS)] = 3
        """Fewest numbers."""
        max_numbers: Annotated[int, Field(ge=2, le=_MOST_NUMBERS)] = 4
        """Most numbers. How many a row has is uniform."""
        largest: Annotated[int, Field(ge=4, le=1000)] = 30
        """Largest of the given numbers, which are uniform from 1 on, and may repeat."""
        max_target: Annotated[int, Field(ge=10, le=10_000)] = 100
        """Largest target."""

    layout = "fill_in"
    blank = BLANK
    many_answers = "the expression with which the target was made"
    config: Config

    def __init__(self, config: Config):
        super().__init__(config)
        c = config
        if c.min_numbers > c.max_numbers:
            raise UsageError(f"countdown: min_numbers={c.min_numbers} is more than max_numbers={c.max_numbers}.")
        self.most = c.max_numbers
        self.seq_len = 3 * self.most
        self.vocab_size = NUMBER + max(c.largest, c.max_target)
        instances = float(c.largest) ** c.min_numbers / 2
        strings.check_instances(self.name, instances, f"largest={c.largest} with min_numbers={c.min_numbers}")

    def sample(self, n: int, *, split: Split, seed: int, start: int = 0) -> Batch:
        check_request(n, split, start)
        c, keys, left = self.config, random.row_keys(split, seed, start, n), np.arange(n)
        count = c.min_numbers + random.below(random.fold(keys, _HOW_MANY), c.max_numbers - c.min_numbers + 1)
        inputs, targets = np.zeros((n, self.seq_len), dtype=np.int64), np.full((n, self.seq_len), IGNORE)
        for attempt in range(_MAX_REDRAWS):
            numbers, expression, value = self._draw(random.fold(keys[left], attempt), count[left])
            rows = np.concatenate([numbers, value[:, None]], axis=1)
            found = (value >= 1) & (value <= c.max_target)
            found &= random.split_of(_names(rows)) == SPLITS.index(split)
            here = left[found]
            inputs[here, : self.most + 1] = np.where(rows > 0, NUMBER - 1 + rows, 0)[found]
            inputs[here, self.most + 1 :] = np.where(expression > 0, BLANK, 0)[found]
            targets[here, self.most + 1 :] = np.where(expression > 0, expression, IGNORE)[found]
            left = left[~found]
            if not len(left):
                break
        else:
            told = f"{c.min_numbers} to {c.max_numbers} numbers up to {c.largest} and targets up to {c.max_target}"
            raise UsageError(f"countdown: found no row of {told} for the split {split!r}.")
        slices = {
            "numbers": (inputs[:, : self.most] > 0).sum(1),
            "products": ((targets == TIMES) | (targets == OVER)).sum(1),
        }
        return Batch(
            torch.from_numpy(inputs), torch.from_numpy(targets), {k: torch.from_numpy(v) for k, v in slices.items()}
        )

    def _draw(
        self, keys: random.Keys, count: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Expressions of `count` (n,) numbers.

        Returns:
            The numbers (n, most) in random order, 0 where there are fewer; the tokens (n, 2 most - 1), 0 behind their
            end; and the values (n,), 0 where one in between is not allowed.
        """
        c, n = self.config, len(keys)
        numbers = 1 + random.below(random.bits(random.fold(keys, _NUMBERS), self.most), c.largest)
        shape, signs = (random.bits(random.fold(keys, tag), 2 * self.most - 1) for tag in (_SHAPE, _SIGNS))
        tokens = np.zeros((n, 2 * self.most - 1), dtype=np.int64)
        stack = np.ones((n, self.most), dtype=np.int64)
        depth, used, good, rows = np.zeros(n, np.int64), np.zeros(n, np.int64), np.ones(n, bool), np.arange(n)
        for i in range(2 * self.most - 1):
            here = i < 2 * count - 1
            operate = here & (depth >= 2) & ((used == count) | (shape[:, i] >> np.uint64(63) > 0))
            push = here & ~operate
            a, b = stack[rows, np.maximum(depth - 2, 0)], stack[rows, np.maximum(depth - 1, 0)]
            results = np.stack([_applied(sign, a, b) for sign in SIGNS], axis=1)
            allowed = (results > 0) & (results <= max(c.max_target, c.largest) ** 2)
            rank = np.where(allowed, (signs[:, i, None] ^ random.mix(np.arange(4))) >> np.uint64(1), 2**64 - 1)
            chosen = rank.argmin(1)
            good &= ~operate | allowed.any(1)
            value = np.where(operate, results[rows, chosen], numbers[rows, np.minimum(used, self.most - 1)])
            tokens[:, i] = np.where(operate, PLUS + chosen, np.where(push, NUMBER - 1 + value, 0))
            depth += np.where(operate, -1, push)
            used += push
            stack[rows, depth - 1] = np.where(here, value, stack[rows, depth - 1])
        there = np.arange(self.most) < count[:, None]
        order = np.where(there, random.bits(random.fold(keys, _ORDER), self.most) >> np.uint64(1), np.uint64(2**64 - 1))
        shown = np.take_along_axis(np.where(there, numbers, 0), order.argsort(1), axis=1)
        return shown, tokens, np.where(good, stack[:, 0], 0)

    def problems(self, batch: Batch) -> Tensor:
        """Numbers, in any order, and target."""
        return names_of(_names(np.maximum(batch.inputs.cpu().numpy()[:, : self.most + 1] - NUMBER + 1, 0)))

    def is_right(self, batch: Batch, answers: Tensor) -> Tensor:
        """Whether the expression uses each number once and its value is the target."""
        inputs = batch.inputs.cpu().numpy()
        said = np.where(batch.scored.cpu().numpy(), answers.cpu().numpy(), 0)[:, self.most + 1 :]
        numbers = np.sort(inputs[:, : self.most], axis=1)
        used = np.sort(np.where(said >= NUMBER, said, 0), axis=1)[:, -self.most :]
        right = evaluated(said) == inputs[:, self.most] - NUMBER + 1
        return torch.from_numpy(right & (used == numbers).all(1)).to(answers.device)

    def right_cells(self, batch: Batch, answers: Tensor) -> Tensor:
        """All cells of a right expression, else those that equal their targets."""
        return super().right_cells(batch, answers) | self.is_right(batch, answers)[:, None]

    def render(self, batch: Batch, row: int = 0, predictions: Tensor | None = None) -> str:
        tokens, scored = batch.inputs[row].tolist(), batch.scored[row]
        numbers = " ".join(self.spell(token) for token in tokens[: self.most] if token)
        target = self.spell(tokens[self.most])
        answer = batch.targets[row][scored].tolist()
        lines = {"numbers": numbers, "target": target, "answer": self._text(answer)}
        if predictions is not None:
            right = self.is_right(take(batch, slice(row, row + 1)), predictions[row : row + 1])
            said = self._text(predictions[row][scored].tolist())
            lines["predicted"] = f"{said}: {'right' if right else 'wrong'}"
        return "\n".join(f"{name:<11}{text}" for name, text in lines.items())

    def _text(self, expression: list[int]) -> str:
        """An expression as its tokens, and where they make one, with brackets and its value."""
        words = " ".join(map(self.spell, expression))
        stack: list[str] = []
        for token in expression:
            if token in SIGNS and len(stack) > 1:
                right, left = stack.pop(), stack.pop()
                stack.append(f"({left} {SIGNS[token]} {right})")
            elif token >= NUMBER:
                stack.append(self.spell(token))
            else:
                return words
        value = int(evaluated(np.array([expression]))[0])
        if len(stack) != 1 or not value:
            return words
        whole = stack[0]
        return f"{words}   {whole[1:-1] if whole.startswith('(') else whole} = {value}"

    def spell(self, token: int) -> str:
        return SIGNS.get(token, str(token - NUMBER + 1) if NUMBER <= token < self.vocab_size else "?")


def evaluated(expressions: NDArray[np.int64]) -> NDArray[np.int64]:
    """(n,) values of expressions in postfix form (n, L), padded with 0 at the end; 0 for what is none.

    Every value in between is a whole number from 1 to a billion, or there is none.
    """
    n, length = expressions.shape
    stack = np.ones((n, length + 1), dtype=np.int64)
    depth, good, ended, rows = np.zeros(n, np.int64), np.ones(n, bool), np.zeros(n, bool), np.arange(n)
    for token in expressions.T:
        number, sign = token >= NUMBER, (token >= PLUS) & (token < NUMBER)
        ended |= token == 0
        good &= (number | sign | (token == 0)) & ~(ended & (token != 0)) & (~sign | (depth >= 2))
        a, b = stack[rows, np.maximum(depth - 2, 0)], stack[rows, np.maximum(depth - 1, 0)]
        value = np.select(
            [token == kind for kind in SIGNS], [_applied(kind, a, b) for kind in SIGNS], token - NUMBER + 1
        )
        depth = np.where(sign, np.maximum(depth - 1, 1), depth + number)
        good &= ended | ((value >= 1) & (value <= _MOST_VALUE))
        top = np.maximum(depth - 1, 0)
        stack[rows, top] = np.where((number | sign) & good, value, stack[rows, top])
    return np.where(good & (depth == 1), stack[:, 0], 0)


def _applied(sign: int, a: NDArray[np.int64], b: NDArray[np.int64]) -> NDArray[np.int64]:
    """(n,) a sign's values of pairs; 0 or less for those that are no positive whole number."""
    if sign == PLUS:
        return a + b
    if sign == MINUS:
        return a - b
    if sign == TIMES:
        return a * b
    return np.where(a % b == 0, a // b, 0)


def _names(rows: NDArray[np.int64]) -> random.Keys:
    """(n,) a hash of numbers, in any order, and the target in the last column."""
    numbers = random.mix(random.mix(rows[:, :-1]).sum(1))
    return random.fold(numbers, rows[:, -1])
