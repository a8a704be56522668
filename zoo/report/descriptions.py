"""Plots in words, read aloud to those who cannot see them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from zoo.report import units
from zoo.report.drawing import styled
from zoo.report.runs import Run
from zoo.report.slices import slice_scores, slices_of

Description = Callable[[Sequence[Run]], str]


def ends(
    what: str, x: str, unit: Callable[[float], str], *, split: str = "validation", y: str = "accuracy"
) -> Description:
    """A description that says where each curve ends."""

    def describe(runs: Sequence[Run]) -> str:
        parts = []
        for s in styled(runs):
            xs, ys = s.run.series(split, x, y)
            if xs:
                value = units.percent(ys[-1]) if y == "accuracy" else f"{ys[-1]:.3g}"
                parts.append(f"{s.label} ends at {value} after {unit(xs[-1])}")
        return f"Line plot of {what}: {'; '.join(parts)}."

    return describe


def values(what: str, **keys: Callable[[float], str]) -> Description:
    """A description that lists the figures of each run."""

    def describe(runs: Sequence[Run]) -> str:
        parts = []
        for s in styled(runs):
            shown = [text(v) for key, text in keys.items() if (v := s.run.figure(key)) is not None]
            if shown:
                parts.append(f"{s.label} {', '.join(shown)}")
        return f"{what}: {'; '.join(parts)}."

    return describe


def weakest_slices(runs: Sequence[Run]) -> str:
    """A description that says where each run does worst."""
    parts = []
    for name in slices_of(runs):
        for s in styled(runs):
            scores = slice_scores(s.run, name)
            if scores:
                worst = min(scores, key=lambda v: scores[v])
                parts.append(f"{s.label} is weakest at {name} {worst} with {units.percent(scores[worst])}")
    return f"Line plot of accuracy by slice: {'; '.join(parts)}."
