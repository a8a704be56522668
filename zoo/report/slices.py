"""Scores by slice: by length, number of pairs, difficulty, or other slices of the task."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from zoo.report import units
from zoo.report.runs import Run


def slices_of(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Slices with several values, and those values, in numeric order where they are numbers."""
    found: dict[str, set[str]] = {}
    for run in runs:
        slices = run.scores()[0].get("slices")
        for name in slices if isinstance(slices, dict) else ():
            found.setdefault(name, set()).update(slice_scores(run, name))
    return {name: in_order(values) for name, values in found.items() if len(values) > 1}


def in_order(values: Collection[str]) -> list[str]:
    """The values of a slice, in numeric order where they are numbers."""
    return sorted(values, key=float) if as_numbers(list(values)) else sorted(values)


def slice_scores(run: Run, name: str) -> dict[str, float]:
    """Accuracy by value of one slice, if the run has it."""
    slices = run.scores()[0].get("slices")
    by_value = slices.get(name) if isinstance(slices, dict) else None
    if not isinstance(by_value, dict):
        return {}
    scores = {v: units.number(f.get("accuracy")) for v, f in by_value.items() if isinstance(f, dict)}
    return {v: a for v, a in scores.items() if a is not None}


def as_numbers(values: Sequence[str]) -> list[float] | None:
    """The values of a slice as numbers, None where they are words."""
    try:
        return [float(v) for v in values]
    except ValueError:
        return None
