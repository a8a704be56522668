"""Choosing the best of what a query sees, and fixing that choice where rounding must not change it.

Results of an op that attends to a few chosen steps differ by more than rounding where rounding changes which of two
steps scores higher. Checks in lower precision therefore run within `fixed_choices`, under which the choice depends on
the places of the steps alone. A router that scores a token in float32 from that token alone (`moe`) needs no such help.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import Tensor

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
