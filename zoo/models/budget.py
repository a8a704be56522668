"""The width of a model for a budget: of parameters, of bytes of state, or of FLOPs for a token."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from zoo.core.errors import UsageError, quoted
from zoo.protocol import MAX_WIDTH, MIN_WIDTH

ABOUT_BUDGETS = {
    "n_parameters": "in place of d_model: the width is the largest with at most this number of parameters",
    "state_bytes": "in place of d_model: the largest width whose state takes at most this many bytes after "
    "context_length tokens",
    "flops_per_token": "in place of d_model: the largest width with at most this many FLOPs a token at context_length",
    "context_length": "number of tokens for state_bytes and flops_per_token",
}
"""The options of a budget, each with its meaning."""
BUDGETS = ("n_parameters", "state_bytes", "flops_per_token")
"""What can be given in place of a width."""
SIZES = ("d_model", *ABOUT_BUDGETS)
"""The options that say how wide a model is."""
MOST = 2**40

WITHIN = 1024
"""A pattern that takes no width up to here takes none."""
UNEVEN = 64
"""The number of heads follows from the width, so that counts rise and fall within this number of channels."""


class Budget(NamedTuple):
    """What the width of a model follows from.

    Attributes:
        option: one of `BUDGETS`.
        amount: the most that the model may have of it.
        context_length: tokens after which the state is measured and a token's FLOPs are counted; None where neither is.
    """

    option: str
    amount: int
    context_length: int | None = None


def read_budget(source: Mapping[str, Any], before: Budget | None = None) -> Budget | None:
    """The budget among the options of a model, else the one `before`, unless the options give the width.

    Raises:
        UsageError: a budget beside another or beside a width, one out of range, or one that needs a context length.
    """
    given = {k: source[k] for k in SIZES if source.get(k) is not None}
    context = given.pop("context_length", None)
    if len(given) > 1:
        told = " and ".join(f"{k}={quoted(v)}" for k, v in given.items())
        raise UsageError(f"{told} are both given: one follows from the other.")
    if context is not None and not given.keys() & {"state_bytes", "flops_per_token"}:
        raise UsageError("model: context_length belongs to state_bytes or flops_per_token, which are not given.")
    if not given:
        return before
    ((option, amount),) = given.items()
    if option == "d_model":
        return None
    if context is None and before is not None:
        context = before.context_length
    if option != "n_parameters" and context is None:
        raise UsageError(f"model: {option} depends on the number of tokens read: give context_length as well.")
    return Budget(option, _whole(option, amount), None if context is None else _whole("context_length", context))


def _whole(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MOST:
        allowed = f"a whole number from 1 to {MOST:,}"
        raise UsageError(f"model: {name}={quoted(value)} is not allowed: it should be {allowed}.")
    return value


def largest_width(count: Callable[[int], int], budget: Budget) -> int:
    """The largest even width whose model stays within a budget, by bisection.

    Args:
        count: what the model of a width has of it, from width 16; a UsageError where its options do not take that
            width.
        budget: the most that it may have.

    Raises:
        UsageError: no width is narrow enough, any is, or the error of the narrowest model where none can be made.
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
        return not isinstance(found, UsageError) and found <= budget.amount

    best = first(range(MIN_WIDTH, WITHIN + 1, 2))
    if best is None:
        error = size(MIN_WIDTH)
        assert isinstance(error, UsageError)
        raise error
    if not fits(best):
        raise UsageError(
            f"{budget.option}={budget.amount} is too few: at d_model={best}, the least, this model has {size(best)}."
        )
    beyond = 2 * best
    while (width := first(range(beyond, 2 * beyond, 2))) is not None and fits(width):
        best, beyond = width, 2 * width
        if beyond > MAX_WIDTH:
            told = f"at d_model={best} this model has {size(best)}"
            raise UsageError(f"{budget.option}={budget.amount} sets no width: {told}.")
    while beyond - best > 2:  # `best` fits; from `beyond` on, nothing that is known does
        middle = (best + beyond) // 4 * 2
        width = first([*range(middle, best, -2), *range(middle + 2, beyond, 2)])
        if width is None:
            break
        best, beyond = (width, beyond) if fits(width) else (best, width)
    return max(w for w in range(best, best + UNEVEN + 1, 2) if fits(w))
