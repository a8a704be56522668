"""Needles in a haystack (Kamradt, 2023; in the forms of Hsieh et al., "RULER", COLM 2024), with a small vocabulary."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from pydantic import PositiveInt

from zoo.core.errors import UsageError
from zoo.tasks import random
from zoo.tasks.haystack import PAD, Haystack, HaystackOptions, Needles, Tokens, Vocabulary
from zoo.tasks.protocol import register

_MOST_KEYS = 2**31 - 1


@register("niah")
class NeedleInAHaystack(Haystack):
    """Find keys in a long context and answer with their values.

    With seq_len=14, n_keys=2, filler_vocab=4, key_vocab=4, value_vocab=4, as a person sees it and as tokens (1 is `?`,
    fillers are 2 to 5, keys 6 to 9, values 10 to 13, `.` is `IGNORE`):

        ```
                 k3 v1                   k0 v0        ? k0
        inputs    9 11  4  4  3  4  5  5  6 10  4  4  1  6
        targets   .  .  .  .  .  .  .  .  .  .  .  .  . 10
        ```

    A needle is a key and its value, each of one token or several (`key_length`, `value_length`). A row hides `n_keys`
    keys with `n_values` values each, every value in a separate needle. The question has `n_queries` of the keys. The
    answer is the values of its first key, in their order in the row, then those of its second key, and so on, after all
    keys or each after its key. The needles of these keys are at the places that `depth` sets, the others anywhere. The
    haystack consists of random filler tokens, of filler tokens in a cycle, or of needles with other keys.

    Chance is one in `value_vocab` for each token. Rows in different splits differ in their needles, their places or
    the question. The score has `contained`, the share of values that are somewhere in the answer, the figure published
    as RULER's. Slices: `depth`, the tenth of the haystack, from 0 to 9, of the first needle in question, and `length`.
    """

    class Config(HaystackOptions):
        """Options of `niah`."""

        haystack: Literal["random", "repeated", "needles"] = "random"  # type: ignore[assignment]
        """The tokens between the needles: random filler, all filler tokens in a cycle, or needles with other keys."""
        n_keys: PositiveInt | None = None
        """Keys in the haystack; by default `n_queries`."""
        n_values: PositiveInt = 1
        """Values of each key."""
        n_queries: PositiveInt = 1
        """Keys in the question."""
        asked: Literal["together", "in_turn"] = "together"
        """All keys, then all values; or each key followed by its values, from which models learn faster."""
        key_vocab: PositiveInt = 32
        """Number of different tokens in keys."""
        key_length: PositiveInt = 1
        """Tokens of a key."""
        value_vocab: PositiveInt = 32
        """Number of different tokens in values."""
        value_length: PositiveInt = 1
        """Tokens of a value."""

    config: Config
    has_depth = True

    def _prepare(self) -> None:
        c = self.config
        self.n_keys = c.n_queries if c.n_keys is None else c.n_keys
        if c.haystack == "needles":
            if self.n_keys != c.n_queries:
                raise UsageError('niah: haystack="needles" is made of other keys already: leave n_keys out.')
            self.unit = c.key_length + c.value_length
        if self.n_keys < c.n_queries:
            raise UsageError(f"niah: n_queries={c.n_queries} asks for more keys than n_keys={c.n_keys} hides.")
        powers = [c.key_vocab**place for place in range(min(c.key_length, 32))]
        self._powers = np.array([power for power in powers if power < _MOST_KEYS or power == 1])
        self._key_count = min(c.key_vocab**c.key_length, _MOST_KEYS)
        if self._key_count < self.n_keys + (c.haystack == "needles"):
            raise UsageError(
                f"niah: key_vocab={c.key_vocab} with key_length={c.key_length} gives {self._key_count} keys, fewer"
                f" than the row needs ({self.n_keys + (c.haystack == 'needles')})."
            )
        self.vocabulary = Vocabulary(question=["?"], filler=c.filler_vocab, key=c.key_vocab, value=c.value_vocab)
        self.question_length = 1 + c.n_queries * c.key_length
        self.answer_length = c.n_queries * c.n_values * c.value_length
        self.reference_length = c.value_length
        self.needle_length = c.key_length + c.value_length
        needles = self.n_keys * c.n_values
        self.require_room(needles * self.needle_length, f"{needles} needles of {self.needle_length} tokens")
        self.chains = np.arange(needles) // c.n_values  # so the values of a key come in the order of the answer
        self.steered = self.chains < c.n_queries
        asked = math.perm(self._key_count, c.n_queries) * float(c.value_vocab) ** min(self.answer_length, 50)
        self.require_instances(asked, f"key_vocab={c.key_vocab} with value_vocab={c.value_vocab}")

    def _order(self) -> Tokens:
        c, every = self.config, super()._order()
        if c.asked == "together":
            return every
        names = every[1 : self.question_length].reshape(c.n_queries, -1)
        values = every[self.question_length :].reshape(c.n_queries, -1)
        return np.concatenate([[0], np.concatenate([names, values], axis=1).ravel()])

    def _needles(self, keys: random.Keys) -> Needles:
        c, n = self.config, len(keys)
        numbers = random.distinct(random.fold(keys, 0), self.n_keys, self._key_count)
        names = np.repeat(self._spelt(numbers), c.n_values, axis=1)
        drawn = random.below(random.bits(random.fold(keys, 1), names.shape[1] * c.value_length), c.value_vocab)
        values = self.vocabulary.first["value"] + drawn.reshape(n, -1, c.value_length)
        asked = np.flatnonzero(self.steered)
        question = self._spelt(numbers[:, : c.n_queries]).reshape(n, -1)
        return Needles(
            np.concatenate([names, values], axis=2),
            np.broadcast_to(self.steered, names.shape[:2]),
            np.concatenate([np.full((n, 1), self.vocabulary.first["question"]), question], axis=1),
            values[:, asked].reshape(n, -1),
        )

    def _spelt(self, numbers: Tokens) -> Tokens:
        """(..., key_length) keys from their numbers: their digits, and behind those what follows from the number."""
        c = self.config
        digits = numbers[..., None] // self._powers % c.key_vocab
        if c.key_length > len(self._powers):
            rest = random.bits(
                random.mix(numbers.astype(np.uint64)).reshape(numbers.shape), c.key_length - len(self._powers)
            )
            digits = np.concatenate([digits, random.below(rest, c.key_vocab)], axis=-1)
        return self.vocabulary.first["key"] + digits

    def _fill(self, context: Tokens, keys: random.Keys, rest: Tokens, question: Tokens) -> None:
        c = self.config
        if c.haystack == "needles":
            place = np.cumsum(context == PAD, axis=1) - 1 - rest[:, None]
            count = context.shape[1] // self.unit
            hay = self._hay(random.fold(keys, 1), count, question)
            inside = (context == PAD) & (place >= 0) & (place < hay.shape[1])
            row, at = np.nonzero(inside)
            context[row, at] = hay[row, place[row, at]]
        super()._fill(context, keys, rest, question)

    def _hay(self, keys: random.Keys, count: int, question: Tokens) -> Tokens:
        """(n, count * unit) needles whose keys are not in the question."""
        c, n = self.config, len(keys)
        digits = question[:, 1:].reshape(n, c.n_queries, c.key_length) - self.vocabulary.first["key"]
        taken = np.sort((digits[..., : len(self._powers)] * self._powers).sum(2), axis=1)
        numbers = random.below(random.bits(random.fold(keys, 0), count), self._key_count - c.n_queries)
        for number in taken.T:  # what is left to draw from, numbered anew
            numbers += numbers >= number[:, None]
        values = random.below(random.bits(random.fold(keys, 1), count * c.value_length), c.value_vocab)
        values = self.vocabulary.first["value"] + values.reshape(n, count, c.value_length)
        return np.concatenate([self._spelt(numbers), values], axis=2).reshape(n, -1)
