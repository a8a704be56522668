"""Errors and warnings that a person reads: one line, with what was given, what is allowed and the likely mistake."""

from __future__ import annotations

import contextlib
import difflib
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path


class UsageError(ValueError):
    """Wrong input from a person. Its text is one line; the `zoo` command prints it and exits with status 2."""


class RunError(RuntimeError):
    """A run that cannot continue though its input is right: a full disk, a loss that is not finite. One line."""


class Diverged(RunError):
    """A training whose loss or weights are no longer finite."""


class UsageWarning(UserWarning):
    """Something that was left aside, and why. Its text is one line; the `zoo` command prints it on standard error."""


def closest(given: str, allowed: Iterable[str]) -> str:
    """`" Did you mean 'x'?"` where a name is near enough, else an empty string."""
    near = difflib.get_close_matches(str(given), list(allowed), n=1, cutoff=0.6)
    return f" Did you mean {near[0]!r}?" if near else ""


def unknown(kind: str, given: object, allowed: Iterable[str]) -> UsageError:
    """The error for a name that is not one of `allowed`."""
    allowed = list(allowed)
    listing = ", ".join(allowed) or "none"
    return UsageError(f"Unknown {kind} {quoted(given)}.{closest(str(given), allowed)} Available: {listing}.")


def raised_at(error: BaseException, folder: str | Path) -> str:
    """` (own.py, line 3)`: the last line of a file in a folder that an error came through; empty if there is none."""
    files = [(Path(frame.filename), frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    lines = [f" ({file.name}, line {line})" for file, line in files if file.parent == Path(folder)]
    return lines[-1] if lines else ""


def quoted(value: object, most: int = 100) -> str:
    """A value as in Python, for an error message; cut where it is long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # too many digits, or a value that holds itself
        return f"a {type(value).__name__} that cannot be shown"
    return text if len(text) <= most else f"{text[:most]}..."


@contextlib.contextmanager
def refuse_oversize(what: str) -> Iterator[None]:
    """Turn what torch and Python say of sizes beyond 64 bits into a `UsageError` about `what`."""
    try:
        yield
    except (RuntimeError, TypeError, OverflowError) as error:
        if isinstance(error, OverflowError) or "overflow" in str(error).lower():
            raise UsageError(f"{what}: a size is beyond what any tensor can hold.") from None
        raise
