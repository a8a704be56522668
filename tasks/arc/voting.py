"""Voting: of the answers given to a puzzle under its augmentations, the most frequent ones are its guesses."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from zoo.tasks.arc.grids import Grid


class Vote(NamedTuple):
    """One answer, mapped back to the puzzle as it is.

    Attributes:
        puzzle: its name.
        question, answer: of the test pair.
        given: the answer that was given.
        confidence: in it, any number; the more the better.
    """

    puzzle: str
    question: Grid
    answer: Grid
    given: Grid
    confidence: float = 0.0


class Guess(NamedTuple):
    """A grid, how many votes it has, and their confidence on average."""

    grid: Grid
    votes: int
    confidence: float


class Ballot(NamedTuple):
    """All that was voted on one test pair, the best guess first.

    Attributes:
        puzzle: its name.
        question, answer: of the test pair.
        guesses: by votes, then by confidence, then by which was seen first.
    """

    puzzle: str
    question: Grid
    answer: Grid
    guesses: list[Guess]

    def solved(self, guesses: int = 2) -> bool:
        """Whether the answer is among the first `guesses` guesses."""
        return any(_key(guess.grid) == _key(self.answer) for guess in self.guesses[:guesses])


def count_votes(votes: Iterable[Vote]) -> list[Ballot]:
    """The ballots of the test pairs that were voted on, in the order in which they came."""
    pairs: dict[tuple, list[Vote]] = {}
    for vote in votes:
        pairs.setdefault((vote.puzzle, _key(vote.question)), []).append(vote)
    ballots = []
    for of_pair in pairs.values():
        grids: dict[tuple, list[Vote]] = {}
        for vote in of_pair:
            grids.setdefault(_key(vote.given), []).append(vote)
        guesses = [Guess(v[0].given, len(v), sum(x.confidence for x in v) / len(v)) for v in grids.values()]
        guesses.sort(key=lambda guess: (-guess.votes, -guess.confidence))  # stable: else the first seen
        ballots.append(Ballot(of_pair[0].puzzle, of_pair[0].question, of_pair[0].answer, guesses))
    return ballots


def two_guesses(ballots: list[Ballot]) -> float:
    """Share of the test pairs whose answer is one of their two best guesses."""
    return sum(ballot.solved() for ballot in ballots) / len(ballots)


def _key(grid: Grid) -> tuple[tuple[int, ...], bytes]:
    return grid.shape, grid.tobytes()
