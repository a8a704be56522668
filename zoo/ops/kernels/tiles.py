"""How many units a program takes at once."""

from __future__ import annotations

import triton

LEAST = 16  # of each side of a product


def tile(n: int, most: int | None = None) -> int:
    """The power of two that holds n units, `LEAST` at least and `most` at most."""
    units = max(LEAST, triton.next_power_of_2(n))
    return units if most is None else min(units, most)
