"""Choosing the best of what a query sees, and fixing that choice where rounding must not change it.

Results of an op that attends to a few chosen steps differ by more than rounding where rounding changes which of two
steps scores higher. Checks in lower precision therefore run within `fixed_choices`, under which the choice depends on
the places of the steps alone. A router that scores a token in float32 from that token alone (`moe`) needs no such help.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from zoo.ops.derivatives import traced

_depth = 0  # of the whole process, as backward passes on a GPU choose again in threads of their own


@contextlib.contextmanager
def fixed_choices() -> Iterator[None]:
    """Within it, ops choose steps by their places, whatever their scores."""
    global _depth
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1


def fixed() -> bool:
    """Whether choices are fixed."""
    return _depth > 0


def to_choose_by(scores: Tensor, seen: Tensor) -> Tensor:
    """The scores by which steps are chosen: those given, or within `fixed_choices` a number of each place.

    Args:
        scores: (..., S), steps in order of time.
        seen: (..., S) bool, what the query of a row sees. The number depends on how many steps it sees, and on which of
            them a step is, so that a cut sequence, a cache and a packed row choose the same.
    """
    if not _depth:
        return scores
    number, count = seen.cumsum(-1), seen.sum(-1, keepdim=True)
    return (number * 40503 + count * 30011) % 65521 + 0.0 * scores


def choose(scores: Tensor, seen: Tensor, top_k: int, always: Tensor | None = None) -> Tensor:
    """Which steps (or blocks) a query attends to, (..., T, S) bool: among those seen the `top_k` of largest score, of
    equals the latest; all of them where there are no more.

    Args:
        scores: (..., T, S), steps in order of time.
        seen: as scores, or with axes of 1, bool.
        top_k: less than S.
        always: as `seen`, bool: those that come before all others, whatever their scores.
    """
    scores = to_choose_by(scores.detach(), seen)
    if always is not None:
        scores = scores.masked_fill(always, torch.inf)
    scores = scores.masked_fill(~seen, -torch.inf)
    least = scores.topk(top_k, sorted=False).values.amin(-1, keepdim=True)
    above, equal = scores > least, (scores == least) & seen
    room = top_k - above.sum(-1, keepdim=True)
    if traced() or (equal.sum(-1, keepdim=True) > room).any():
        equal = equal & (equal.flip(-1).cumsum(-1).flip(-1) <= room)
    return above | equal


def chosen_rows(chosen: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The numbers (..., T, top_k) of the chosen steps, padded with zeros, and how many there are, (..., T)."""
    count = chosen.sum(-1)
    if not traced() and bool((count == top_k).all()):
        return chosen.nonzero()[:, -1].view(*count.shape, top_k), count
    steps = torch.arange(chosen.shape[-1], device=chosen.device)
    return torch.where(chosen, steps, -1).topk(top_k).values.clamp(min=0), count
