"""Several paths of thinking about the same puzzles, and which of their answers is taken."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from zoo.tasks.protocol import Symmetry

Vote = Literal["halt", "first", "settled", "majority"]


class Attempt(NamedTuple):
    """One path of thinking, before it is walked.

    Attributes:
        number: of all attempts, which names its random stream.
        start: which of the starts.
        symmetry: the form of the puzzles that it thinks about; None for the puzzles themselves.
    """

    number: int
    start: int
    symmetry: Symmetry | None = None


class Path(NamedTuple):
    """Where one path of thinking has led for n rows, in the rows' own coordinates.

    Attributes:
        logits: (n, T, V) of the last supervision step.
        answer: (n, L) token ids.
        sure: (n,) logit of the halting head at that step.
        steps: (n,) int64 supervision steps until the halting head first said "right"; one more than there are where it
            never did.
        moved: (n,) mean change of the logits over the last steps, where it is needed.
        answers: (S, n, L) the answer after every supervision step, where it is needed.
        halts: (S, n) the logits of the halting head then.
    """

    logits: Tensor
    answer: Tensor
    sure: Tensor
    steps: Tensor
    moved: Tensor | None = None
    answers: Tensor | None = None
    halts: Tensor | None = None


def agreeing(paths: Sequence[Path]) -> Tensor:
    """(P, n) int64: how many paths have the answer of each path, itself among them."""
    answers = torch.stack([path.answer for path in paths])
    return torch.stack([(answers == answer).all(-1).sum(0) for answer in answers])


def chosen(paths: Sequence[Path], vote: Vote) -> Tensor:
    """(n,) int64: the path that is taken for each row; of equals the first.

    Args:
        paths: one or more.
        vote: "halt": that of which the halting head is surest. "first": that whose halting head first said "right", of
            several at the same step the surest; the surest where none did. "settled": that whose logits moved least.
            "majority": that whose answer most paths have, of several the surest.
    """
    sure = torch.stack([path.sure for path in paths])
    if vote == "halt":
        return sure.argmax(0)
    if vote == "settled":
        moved = [path.moved for path in paths if path.moved is not None]
        return torch.stack(moved).argmin(0)
    first = torch.stack([path.steps for path in paths]) if vote == "first" else -agreeing(paths)
    return sure.masked_fill(first > first.amin(0), -torch.inf).argmax(0)


def taken(paths: Sequence[Path], vote: Vote, what: str) -> Tensor:
    """One field of the paths that are taken, rows in its first dimension, or in its second one (`answers`, `halts`).

    A path that ended early stays as it was then.
    """
    choice = chosen(paths, vote)
    fields = [getattr(path, what) for path in paths]
    if what in ("answers", "halts"):
        longest = max(len(field) for field in fields)
        fields = [torch.cat([f, f[-1:].expand(longest - len(f), *f.shape[1:])]).transpose(0, 1) for f in fields]
    picked = torch.stack(fields)[choice, torch.arange(len(choice), device=choice.device)]
    return picked.transpose(0, 1) if what in ("answers", "halts") else picked


__all__ = ["Attempt", "Path", "Vote", "agreeing", "chosen", "taken"]
