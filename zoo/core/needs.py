"""What the parts of an experiment need of its model, and how the needs of several parts become one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from zoo.core.errors import UsageError


class Need(NamedTuple):
    """One need.

    Attributes:
        value: a size, which a larger one meets too, or whether something has to be there.
        why: whose need it is and what for, as the end of an error message; without a full stop.
    """

    value: int | bool
    why: str


class Needs(NamedTuple):
    """The needs of a part; None where it leaves the choice to the others.

    Attributes:
        recursion: whether the model thinks in steps.
        vocab_size: number of token ids.
        inputs: numbers of a real vector that the model reads at each step; exactly this number.
        outputs: numbers that the model gives for each step; exactly this number.
        length: number of tokens that the model reads at once.
        decoder: whether the model predicts every token of a row from the features of its last.
        n_puzzles: number of puzzles of each of which the model learns something, where it learns of any.
        timespans: whether the model reads the time between tokens.
        prefix: whether the model has places for what it learns of each puzzle.
        unmasking_policy: whether the model has a policy of which masked cell is unmasked next.
        halting: whether a token model has a halting head.
    """

    recursion: Need | None = None
    vocab_size: Need | None = None
    inputs: Need | None = None
    outputs: Need | None = None
    length: Need | None = None
    decoder: Need | None = None
    n_puzzles: Need | None = None
    timespans: Need | None = None
    prefix: Need | None = None
    unmasking_policy: Need | None = None
    halting: Need | None = None


def merge(parts: Iterable[Needs]) -> Needs:
    """The needs of all parts: of sizes the largest, the first of equal ones.

    Raises:
        UsageError: one part needs what another cannot have.
    """
    merged: dict[str, Need] = {}
    for needs in parts:
        for name, need in needs._asdict().items():
            other = merged.get(name)
            if need is None:
                continue
            if other is not None and isinstance(need.value, bool) and other.value != need.value:
                raise UsageError(f"These do not go together: {other.why}; {need.why}.")
            if other is None or need.value > other.value:
                merged[name] = need
    return Needs(**merged)


__all__ = ["Need", "Needs", "merge"]
