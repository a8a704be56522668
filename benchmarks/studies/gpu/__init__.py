"""What a machine with a GPU gives, by one command: `make gpu`, or `python -m zoo.benchmarks.studies.gpu`.

Every part runs in a process of its own with its own limit, and its rows are kept as they come: see `study`.
"""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    """STUDY, imported when it is first used: `__main__` looks for what it needs before."""
    if name != "STUDY":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from zoo.benchmarks.studies.gpu.study import STUDY

    return STUDY
