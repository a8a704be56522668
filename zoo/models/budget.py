"""The width of a model for a number of parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from zoo.core.errors import UsageError
from zoo.protocol import MIN_WIDTH

WITHIN = 1024
"""A pattern that takes no width up to here takes none."""
UNEVEN = 64
"""The number of heads follows from the width, so that counts rise and fall within this number of channels."""


def largest_width(count: Callable[[int], int], budget: int) -> int:
    """The largest even width whose model has at most `budget` parameters, by bisection.

    Args:
        count: parameters of the model of a width, from 16; a UsageError where its options do not take that width.
        budget: number of parameters.

    Raises:
        UsageError: no width is narrow enough, or the error of the narrowest model where none can be made.
    """
    known: dict[int, int | UsageError] = {}

    def size(width: int) -> int | UsageError:
        if width not in known:
            try:
                known[width] = count(width)
            except UsageError as error:
                known[width] = error
        return known[width]

    def first(widths: Iterable[int]) -> int | None:
        return next((w for w in widths if not isinstance(size(w), UsageError)), None)

    def fits(width: int) -> bool:
        found = size(width)
        return not isinstance(found, UsageError) and found <= budget

    best = first(range(MIN_WIDTH, WITHIN + 1, 2))
    if best is None:
        error = size(MIN_WIDTH)
        assert isinstance(error, UsageError)
        raise error
    if not fits(best):
        raise UsageError(
            f"n_parameters={budget} is too few: at d_model={best}, the least, this model has {size(best)}."
        )
    beyond = 2 * best
    while (width := first(range(beyond, 2 * beyond, 2))) is not None and fits(width):
        best, beyond = width, 2 * width
    while beyond - best > 2:  # `best` fits; from `beyond` on, nothing that is known does
        middle = (best + beyond) // 4 * 2
        width = first([*range(middle, best, -2), *range(middle + 2, beyond, 2)])
        if width is None:
            break
        best, beyond = (width, beyond) if fits(width) else (best, width)
    return max(w for w in range(best, best + UNEVEN + 1, 2) if fits(w))
