"""Lists of words of which some come more often (Hsieh et al., "RULER", COLM 2024), with small vocabularies."""

from __future__ import annotations

import math
from typing import Annotated

import numpy as np
import torch
from pydantic import Field, PositiveInt

from zoo.core.errors import UsageError
from zoo.tasks import random, strings
from zoo.tasks.haystack import PAD, LongContext, QuestionOptions, Rows, Tokens, Vocabulary
from zoo.tasks.protocol import register


@register("cwe")
class CommonWords(LongContext):
    """Find the words that appear more often than the others.

    With seq_len=16, n_common=2, n_words=4, ratio=3, words=8, as a person sees it and as tokens (1 is `?`, words are 2
    to 9, `.` is `IGNORE`):

        ```
                 w0 w3 w0 w1 w1 w0 w1 w5 w1 w0 w0 w1 w0 w1  ? w0
        inputs    2  5  2  3  3  2  3  7  3  2  2  3  2  3  1  2
        targets   .  .  .  .  .  .  .  .  .  .  .  .  .  .  2  3
        ```

    A row has `n_words` different words of a vocabulary of `words`: `n_common` words appear equally often, and the
    others equally often (to within one, if the length needs this) and `ratio` times less. The answer is the common
    words, in order of their numbers.

    Chance is one in `words` for each token. Rows in different splits differ in their sets of words. The score has
    `contained`, the share of common words that are somewhere in the answer, the figure published as RULER's. In
    RULER words appear 30 and 3 times (6 and 1 below 4096 tokens), 10 of them are common, and longer lists have more
    different words. Slices: `length`.
    """

    class Config(QuestionOptions):
        """Options of `cwe`."""

        n_common: PositiveInt = 4
        """Number of common words."""
        n_words: PositiveInt = 20
        """Number of different words in a row."""
        ratio: Annotated[int, Field(ge=3)] = 10
        """A common word appears this number of times as often as another word."""
        words: PositiveInt = 32
        """Number of words in the vocabulary."""

    config: Config

    @staticmethod
    def written(references: tuple[str, ...]) -> str:
        return " ".join(f"{number}. {word}" for number, word in enumerate(references, 1))

    def _prepare(self) -> None:
        c = self.config
        if not 2 * c.n_common <= c.n_words <= c.words:
            told = f"from 2 * n_common={2 * c.n_common} to words={c.words}"
            raise UsageError(f"cwe: n_words={c.n_words} is not allowed: it should be {told}.")
        self.vocabulary = Vocabulary(question=["?"], words=c.words)
        self.question_length, self.answer_length = 1, c.n_common
        self._share = c.n_common * c.ratio + c.n_words - c.n_common
        told = f"{c.n_common} words {c.ratio} times as often as {c.n_words - c.n_common} others"
        self.require_room(self._share, told)
        sets = math.comb(c.words, c.n_common) * math.comb(c.words - c.n_common, c.n_words - c.n_common)
        strings.check_instances(self.name, float(sets), f"words={c.words} with n_words={c.n_words}")

    def _counts(self, room: Tokens) -> Tokens:
        c = self.config
        often = room // self._share
        rest = room % self._share
        common = often * c.ratio + rest // c.n_common
        counts = np.repeat(np.stack([common, often], 1), [c.n_common, c.n_words - c.n_common], axis=1)
        counts[:, c.n_common :] += np.arange(c.n_words - c.n_common) < (rest % c.n_common)[:, None]
        return counts

    def _plan(self, keys: random.Keys, room: Tokens) -> Tokens:
        c = self.config
        words = self.vocabulary.first["words"] + random.distinct(keys, c.n_words, c.words)
        return np.concatenate([np.sort(words[:, : c.n_common], 1), np.sort(words[:, c.n_common :], 1)], axis=1)

    def _rows(self, keys: random.Keys, room: Tokens, plan: Tokens) -> Rows:
        context = _shuffled(keys, room, plan, self._counts(room))
        question = np.full((len(plan), 1), self.vocabulary.first["question"])
        return Rows(context, question, plan[:, : self.config.n_common], {})


@register("fwe")
class FrequentWords(LongContext):
    """Find the most frequent words of a list in which frequencies fall as a power of the rank.

    With seq_len=16, n_asked=1, words=200, as a person sees it and as tokens (1 is `?`, 2 the noise, words are 3 to 202,
    `.` is `IGNORE`):

        ```
                   …   …   …   …   …   …   …   …   …   …   …   … w47 w176 w47  ?
        inputs     2   2   2   2   2   2   2   2   2   2   2   2  50  179  50  1
        targets    .   .   .   .   .   .   .   .   .   .   .   .   .    .   . 50
        ```

    The word of rank k = 1, 2, ... appears H k^-alpha / zeta(alpha) times in a list of H words, rounded down. The first
    is the noise, which also fills the places that rounding leaves. The answer is the `n_asked` words of the next ranks,
    most frequent first.

    Chance is one in `words` for each token. Rows in different splits differ in the answer. The score has `contained`,
    the share of right words that are somewhere in the answer, the figure published as RULER's (alpha 2.0, 3 words).
    Slices: `length`.
    """

    class Config(QuestionOptions):
        """Options of `fwe`."""

        alpha: Annotated[float, Field(gt=1, le=10)] = 2.0
        """Exponent of the power law of frequencies."""
        n_asked: PositiveInt = 3
        """Number of words in the answer."""
        words: PositiveInt = 64
        """Number of words, without the noise."""

    config: Config

    def _prepare(self) -> None:
        c = self.config
        if c.words < c.n_asked:
            raise UsageError(f"fwe: words={c.words} is fewer than n_asked={c.n_asked}.")
        self.vocabulary = Vocabulary(question=["?"], noise=["…"], words=c.words)
        self.question_length, self.answer_length = 1, c.n_asked
        strings.check_instances(
            self.name, float(math.perm(c.words, min(c.n_asked, 20))), f"words={c.words} with n_asked={c.n_asked}"
        )
        zeta = float(torch.special.zeta(torch.tensor(c.alpha, dtype=torch.float64), 1))
        self._shares = np.arange(1, c.words + 2) ** -c.alpha / zeta
        steps = -np.diff([*self._shares[1:], 0.0])[: c.n_asked]
        told = f"n_asked={c.n_asked} words of different frequencies with alpha={c.alpha}"
        self.require_room(math.ceil(1 / steps.min()), told)

    def _plan(self, keys: random.Keys, room: Tokens) -> Tokens:
        return random.distinct(keys, self.config.n_asked, self.config.words)

    def _rows(self, keys: random.Keys, room: Tokens, plan: Tokens) -> Rows:
        c, first = self.config, self.vocabulary.first
        rank = random.uniform(random.bits(random.fold(keys, 0), c.words))
        np.put_along_axis(rank, plan, np.arange(-c.n_asked, 0.0), axis=1)
        words = first["words"] + np.argsort(rank, axis=1)
        noise, question = (np.full((len(plan), 1), first[name]) for name in ("noise", "question"))
        counts = (room[:, None] * self._shares).astype(np.int64)
        counts[:, 0] += room - counts.sum(1)
        context = _shuffled(random.fold(keys, 1), room, np.concatenate([noise, words], axis=1), counts)
        return Rows(context, question, first["words"] + plan, {})


def _shuffled(keys: random.Keys, room: Tokens, words: Tokens, counts: Tokens) -> Tokens:
    """(n, H) lists in which words (n, k) come so often (n, k), which sums to the room (n,) of each row."""
    from zoo.tasks.kernels.shuffle import shuffle_rows

    context = np.full((len(words), int(room.max())), PAD)
    context[np.arange(context.shape[1]) < room[:, None]] = np.repeat(words.ravel(), counts.ravel())
    shuffle_rows(context, room, keys)
    return context
