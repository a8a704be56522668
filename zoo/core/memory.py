"""How much memory there is, and numbers of bytes in words."""

from __future__ import annotations

import os


def total_memory() -> int:
    """Bytes of the machine's memory; 0 where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 0


def gib(n_bytes: float) -> str:
    """A number of bytes in words."""
    return f"{n_bytes / 2**30:,.0f} GiB"
