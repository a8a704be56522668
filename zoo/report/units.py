"""Numbers as people read them: three significant digits and a unit."""

from __future__ import annotations

import math
from typing import Any

MISSING = "—"
"""Stands where a run has no figure."""


def number(value: Any) -> float | None:
    """`value` where it is a finite number (as JSON gave it), else None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value


def percent(share: float) -> str:
    """`"99.8%"`. Only a perfect score reads 100%, and only a zero reads 0%."""
    if 0.9995 <= share < 1:
        return ">99.9%"
    if 0 < share < 0.0005:
        return "<0.1%"
    return f"{100 * share:.1f}%"


def duration(seconds: float) -> str:
    """`"41.2 s"`, `"3.4 min"`, `"2.1 h"`; the larger unit from two of it on."""
    for scale, unit in ((3600, "h"), (60, "min")):
        if seconds >= 2 * scale:
            return f"{seconds / scale:.1f}".removesuffix(".0") + f" {unit}"
    return f"{_short(seconds)} s"


def count(value: float) -> str:
    """`"412k"`, `"1.23M"`; exact below 10,000."""
    if value < 10_000:
        return f"{value:,.0f}" if value >= 100 or value == int(value) else _short(value)
    return _scaled(value, 1000, ("", "k", "M", "G", "T", "P"))


def size(n_bytes: float) -> str:
    """`"16.5 KiB"`, in powers of 1024."""
    return _scaled(n_bytes, 1024, (" B", " KiB", " MiB", " GiB", " TiB", " PiB"))


def length(n_tokens: float) -> str:
    """`"64K"` for multiples of 1024, as lengths are named; others as `count` has them."""
    if n_tokens >= 1024 and n_tokens % 1024 == 0:
        return _scaled(n_tokens, 1024, ("", "K", "M", "G"))
    return count(n_tokens)


def plain(value: float) -> str:
    """A number without a unit, in three digits."""
    return f"{value:.3g}"


def _scaled(value: float, base: int, units: tuple[str, ...]) -> str:
    power = 0
    # What is shown picks the unit: 999,999 is 1M, not 1000k.
    while power + 1 < len(units) and max(round(value), float(f"{value:.3g}") if base == 1000 else 0) >= base:
        value, power = value / base, power + 1
    return _short(value) + units[power]


def _short(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 999.5 else f"{value:.3g}"


def printable(value: object) -> str:
    """One line without control characters, whatever was given."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(str(value).split()))
