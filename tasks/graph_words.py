"""Random graphs whose nodes have words as names (Allen-Zhu 2025, arXiv 2512.17351: Depo and Brevo)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from pydantic import PositiveInt

from zoo.core.errors import UsageError
from zoo.core.options import Options
from zoo.tasks import random
from zoo.tasks.protocol import Split
from zoo.tasks.strings import Tokens

_MOST_WORDS = 2**31 - 1
FEWEST_NODES = 3


class WordOptions(Options):
    """Options of the words that name nodes."""

    letters: PositiveInt = 32
    """Number of different letters of a word."""
    min_word: PositiveInt = 1
    """Fewest letters of a word."""
    max_word: PositiveInt = 1
    """Most letters of a word. Lengths are uniform."""


class Words:
    """Words of letters. The last letter of a word has tokens of its own, so that words need no space between them.

    Args:
        task: whose words, for messages.
        options: their letters and lengths.
        first: the first token of a letter.
        count: words of a row, at most.
    """

    def __init__(self, task: str, options: WordOptions, first: int, count: int):
        self.letters, self.shortest, self.longest = options.letters, options.min_word, options.max_word
        if self.shortest > self.longest:
            raise UsageError(f"{task}: min_word={self.shortest} is more than max_word={self.longest}.")
        sizes = [self.letters**length for length in range(self.shortest, self.longest + 1)]
        self.number = sum(sizes)
        if self.number > _MOST_WORDS:
            raise UsageError(
                f"{task}: letters={self.letters} with max_word={self.longest} are {self.number:,} words, more than"
                f" {_MOST_WORDS:,}."
            )
        if self.number < (count if len(sizes) == 1 else 2 * count):  # words of unequal frequency are drawn anew
            told = f"letters={self.letters} with min_word={self.shortest}, max_word={self.longest}"
            half = "" if len(sizes) == 1 else ", at most half of them in a row"
            raise UsageError(f"{task}: {told} gives {self.number} words{half}, too few for {count} nodes.")
        self._sizes = np.array(sizes)
        self._before = np.cumsum([0, *sizes[:-1]])
        self._powers = self.letters ** np.arange(self.longest)
        self.first = first
        self.last = first if self.longest == 1 else first + self.letters
        """The first token of a last letter."""
        self.vocab_size = self.last + self.letters

    def draw(self, keys: random.Keys, count: int) -> Tokens:
        """(n, count) the numbers of different words for each of n keys, in random order."""
        if len(self._sizes) == 1:
            return random.distinct(keys, count, self.number)
        draws = 2 * count + 8
        while True:
            lengths = random.below(random.bits(random.fold(keys, 0), draws), len(self._sizes))
            inside = random.below(random.bits(random.fold(keys, 1), draws), self._sizes[lengths])
            numbers = self._before[lengths] + inside
            repeated = random.repeats(numbers)
            rank = np.cumsum(~repeated, axis=1)
            if (rank[:, -1] >= count).all():
                return numbers[~repeated & (rank <= count)].reshape(len(keys), count)
            draws *= 2

    def spelt(self, numbers: Tokens) -> Tokens:
        """(..., longest) the tokens of words from their numbers, padded with zeros; a number below 0 is no word."""
        kind = np.searchsorted(self._before, numbers, side="right") - 1
        kind = np.maximum(kind, 0)
        digits = (numbers - self._before[kind])[..., None] // self._powers % self.letters
        place = np.arange(self.longest)
        end = (self.shortest + kind - 1)[..., None]
        tokens = np.where(place == end, self.last, self.first) + digits
        return np.where((place <= end) & (numbers >= 0)[..., None], tokens, 0)

    def is_last(self, tokens: Tokens) -> NDArray[np.bool_]:
        """Where a word ends."""
        return tokens >= self.last

    def read(self, tokens: Tokens) -> tuple[Tokens, Tokens]:
        """(n, L) number of the word that ends at each position of rows (n, L), -1 where none does, and (n, L) how many
        ended before it. All tokens that are no letter stand between words."""
        letter, ends = tokens >= self.first, self.is_last(tokens)
        place = np.arange(tokens.shape[1])
        starts = letter & ~np.pad(letter & ~ends, ((0, 0), (1, 0)))[:, :-1]
        at = place - np.maximum.accumulate(np.where(starts, place, 0), axis=1)
        value = (tokens - np.where(ends, self.last, self.first)) * self._powers[np.minimum(at, self.longest - 1)]
        total = np.cumsum(np.where(letter, value, 0), axis=1)
        before = np.maximum.accumulate(np.where(starts, total - np.where(letter, value, 0), 0), axis=1)
        kind = np.clip(at + 1 - self.shortest, 0, len(self._before) - 1)
        numbers = np.where(ends, self._before[kind] + total - before, -1)
        return numbers, np.cumsum(ends, axis=1) - ends

    def name(self, token: int) -> str:
        """A letter: a number, in brackets where the word goes on."""
        return f"{token - self.last}" if token >= self.last else f"({token - self.first})"


def sizes(keys: random.Keys, most: int, split: Split) -> Tokens:
    """(n,) numbers of nodes: in training from 3 to `most`, i with a probability proportional to 1 / (i + sqrt(most));
    in the other splits always `most`."""
    if split != "train":
        return np.full(len(keys), most)
    choices = np.arange(FEWEST_NODES, most + 1)
    share = np.cumsum(1 / (choices + most**0.5))
    return choices[np.searchsorted(share / share[-1], random.uniform(random.bits(keys, 1))[:, 0])]
