"""Addition digit by digit (Lee et al., ICLR 2024, arXiv 2307.03381; Zhou et al. 2024, arXiv 2402.09371)."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import PositiveInt, field_validator
from torch import Tensor

from zoo.core.errors import UsageError
from zoo.core.options import Options
from zoo.tasks import random, strings
from zoo.tasks.protocol import Batch, Split, Task, check_request, names_of, register

Digits = tuple[PositiveInt, PositiveInt]

ZERO, PLUS, EQUALS, END = 1, 11, 12, 13
_LENGTH, _SHORTER, _FIRST, _SECOND = range(4)  # purposes of a row's random numbers


@register("addition")
class Addition(Task):
    """Add two whole numbers, digit by digit.

    With max_digits=3, as a person sees it and as tokens (digits are 1 to 10, `+` is 11, `=` is 12, the end is 13, `.`
    is `IGNORE`):

        ```
                  5  8  +  6  7  =  1  2  5
        inputs    6  9 11  7  8 12  2  3  6  0  0  0
        targets   .  .  .  .  .  2  3  6 13  .  .  .
        ```

    Both numbers have equally many digits, unless `same_length` is off; the length is uniform. With
    `order="reverse_answer"` the sum is written from its last digit, and with `order="reverse_all"` the numbers too, so
    that every digit depends on digits at a fixed distance and one carry. `test_digits` and `validation_digits` test on
    longer numbers than those of training. 0 is padding.

    Chance is one in 10 for each digit. No pair of numbers, in either order, is in two splits. Slices: `digits` of the
    longer number, and `carries`, the longest chain of carries, each of which depends on the one before it, rounded up
    to the next of 0, 1, 2, 3, 4, 6, 8, 12, ...
    """

    class Config(Options):
        """Options of `addition`."""

        min_digits: PositiveInt = 1
        """Fewest digits of a number."""
        max_digits: PositiveInt = 10
        """Most digits of a number."""
        validation_digits: Digits | None = None
        """Fewest and most digits of validation, by default those of training."""
        test_digits: Digits | None = None
        """Fewest and most digits of test, by default those of training."""
        same_length: bool = True
        """Both numbers have equally many digits; otherwise one has at most as many as the other."""
        order: Literal["plain", "reverse_answer", "reverse_all"] = "plain"
        """Which numbers are written from the last digit: none, the sum, or all."""

        @field_validator("validation_digits", "test_digits", mode="before")
        @classmethod
        def _from_list(cls, value: Any) -> Any:
            return tuple(value) if isinstance(value, list) else value

    layout = "next_token"
    continues = True
    vocab_size = END + 1
    config: Config

    def __init__(self, config: Config):
        super().__init__(config)
        c = config
        trained = c.min_digits, c.max_digits
        self._digits: dict[Split, tuple[int, int]] = {
            "train": trained,
            "validation": c.validation_digits or trained,
            "test": c.test_digits or trained,
        }
        options = ("min_digits and max_digits", "validation_digits", "test_digits")
        for option, (low, high) in zip(options, self._digits.values(), strict=True):
            if low > high:
                raise UsageError(f"addition: {option}=({low}, {high}) should be the fewest digits, then the most.")
            pairs = sum(81 * 100.0 ** (digits - 1) / 2 for digits in range(low, min(high, 50) + 1))
            strings.check_instances(self.name, pairs, f"{option}=({low}, {high})")
        self.most = max(high for _, high in self._digits.values())
        self.seq_len = 3 * self.most + 3

    def sample(self, n: int, *, split: Split, seed: int, start: int = 0) -> Batch:
        check_request(n, split, start)
        keys = random.row_keys(split, seed, start, n)
        tokens = strings.draw_for_split(keys, split, lambda k: self._texts(k, split), self._names)
        asked = (np.cumsum(tokens == EQUALS, axis=1) > 0) & (tokens != EQUALS) & (tokens > 0)
        inputs, targets = strings.continued(tokens, asked)
        a, b = self._numbers(tokens)
        chain = strings.length_bucket(_chains(a, b))
        slices = {"digits": np.maximum(*((number >= 0).sum(1) for number in (a, b))), "carries": chain}
        slices["carries"][_chains(a, b) == 0] = 0
        return Batch(
            torch.from_numpy(inputs), torch.from_numpy(targets), {k: torch.from_numpy(v) for k, v in slices.items()}
        )

    def _texts(self, keys: random.Keys, split: Split) -> strings.Tokens:
        """(n, L + 1) both numbers and their sum."""
        c, n, (low, high) = self.config, len(keys), self._digits[split]
        longer = low + random.below(random.fold(keys, _LENGTH), high - low + 1)
        shorter = longer
        if not c.same_length:
            shorter = low + random.below(random.fold(keys, _SHORTER), longer - low + 1)
        turned = (random.fold(keys, _SHORTER) >> np.uint64(1)) & np.uint64(1) > 0
        lengths = np.where(turned, shorter, longer), np.where(turned, longer, shorter)
        a, b = (self._drawn(random.fold(keys, t), m) for t, m in zip((_FIRST, _SECOND), lengths, strict=True))
        total = added(a, b)
        of_numbers, of_sum = c.order == "reverse_all", c.order != "plain"
        plus, equals, end = (np.full((n, 1), mark) for mark in (PLUS, EQUALS, END))
        parts = [_written(a, of_numbers), plus, _written(b, of_numbers), equals, _written(total, of_sum), end]
        return strings.packed(np.concatenate(parts, axis=1))

    def _drawn(self, keys: random.Keys, lengths: NDArray[np.int64]) -> NDArray[np.int64]:
        """(n, most) digits of numbers from the last one on, -1 before the first, which is 0 in a single digit only."""
        words = random.bits(keys, self.most)
        place = np.arange(self.most)
        first = (place == lengths[:, None] - 1) & (lengths[:, None] > 1)
        digits = np.where(first, 1 + random.below(words, 9), random.below(words, 10))
        return np.where(place < lengths[:, None], digits, -1)

    def _numbers(self, tokens: strings.Tokens) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Both numbers of rows (n, L) as `_drawn` gives them."""
        plus, equals = ((tokens == mark).argmax(1)[:, None] for mark in (PLUS, EQUALS))
        found = []
        place = np.arange(self.most)
        for begin, end in ((np.zeros_like(plus), plus), (plus + 1, equals)):
            at = begin + place if self.config.order == "reverse_all" else end - 1 - place
            inside = (at >= begin) & (at < end)
            digits = np.take_along_axis(tokens, np.clip(at, 0, tokens.shape[1] - 1), axis=1) - ZERO
            found.append(np.where(inside, digits, -1))
        return found[0], found[1]

    def _names(self, tokens: strings.Tokens) -> random.Keys:
        """(n,) a hash of each pair of numbers, in either order."""
        a, b = (random.mix(strings.fingerprint(number + 1)) for number in self._numbers(tokens))
        return a + b

    def problems(self, batch: Batch) -> Tensor:
        """Pairs of numbers, in either order."""
        return names_of(self._names(batch.inputs.cpu().numpy()))

    def render(self, batch: Batch, row: int = 0, predictions: Tensor | None = None) -> str:
        tokens = batch.inputs[row].tolist()
        scored = batch.scored[row]
        answer = batch.targets[row][scored].tolist()
        question = " ".join(map(self.spell, tokens[: tokens.index(EQUALS) + 1]))
        lines = {"question": question, "answer": " ".join(map(self.spell, answer))}
        if predictions is not None:
            pairs = zip(predictions[row][scored].tolist(), answer, strict=True)
            lines["predicted"] = " ".join(self.spell(said) + "!" * (said != right) for said, right in pairs)
        return "\n".join(f"{name:<11}{text}" for name, text in lines.items())

    def spell(self, token: int) -> str:
        return ".0123456789+=;"[token] if 0 <= token < self.vocab_size else "?"


def added(a: NDArray[np.int64], b: NDArray[np.int64]) -> NDArray[np.int64]:
    """(n, m + 1) digits of the sums of numbers (n, m), from the last one on, -1 before the first."""
    n, most = a.shape
    total, carry = np.empty((n, most + 1), dtype=np.int64), np.zeros(n, dtype=np.int64)
    for i in range(most):
        column = np.maximum(a[:, i], 0) + np.maximum(b[:, i], 0) + carry
        total[:, i], carry = column % 10, column // 10
    total[:, most] = carry
    length = np.maximum((a >= 0).sum(1), (b >= 0).sum(1))
    place = np.arange(most + 1)
    beyond = (place > length[:, None]) | ((place == length[:, None]) & (total == 0))
    return np.where(beyond, -1, total)


def _chains(a: NDArray[np.int64], b: NDArray[np.int64]) -> NDArray[np.int64]:
    """(n,) the longest run of digits of which each passes on a carry."""
    n, most = a.shape
    carry, run, longest = np.zeros((3, n), dtype=np.int64)
    for i in range(most):
        carry = (np.maximum(a[:, i], 0) + np.maximum(b[:, i], 0) + carry) // 10
        run = np.where(carry > 0, run + 1, 0)
        longest = np.maximum(longest, run)
    return longest


def _written(number: NDArray[np.int64], reverse: bool) -> strings.Tokens:
    """Tokens of numbers whose digits come from the last one on."""
    tokens = np.where(number >= 0, ZERO + number, 0)
    return tokens if reverse else tokens[:, ::-1]
