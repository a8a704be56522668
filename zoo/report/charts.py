"""Plots as data: what is drawn, on which axes, for which rows of the tables; nothing of how.

The page draws them by plotly in the reader's browser, `save_plots` by matplotlib into files. Both tell rows apart by
the row's look, so that a run looks the same in every plot and in the table.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from zoo.report import units

Unit = Literal["percent", "duration", "count", "size", "length", "plain"]


TEXT: dict[Unit, Callable[[float], str]] = {
    "percent": units.percent,
    "duration": units.duration,
    "count": units.count,
    "size": units.size,
    "length": units.length,
    "plain": units.plain,
}
"""How a value of each unit is read."""


@dataclass(frozen=True)
class Row:
    """What has a line in a table and a look in every plot: a run, or a layer that was measured.

    Attributes:
        id: unique on the page, and plain enough for an attribute.
        label: its name.
        look: index for `Look.of`: the colour, and the marker and dash that go with it.
        variant: added to the index of marker and dash, of rows that share a colour.
    """

    id: str
    label: str
    look: int
    variant: int = 0


@dataclass(frozen=True)
class Axis:
    """A title, the unit of the values, and whether steps are ratios."""

    title: str
    unit: Unit = "plain"
    log: bool = False


@dataclass(frozen=True)
class Series:
    """The points of one row.

    Attributes:
        row: id of the row.
        x, y: the points.
        low, high: ends of a bar or band round `y` (of dots round `x`): quartiles, or an interval; empty without one.
        each: of dots, the single values behind a mean; or empty.
        notes: a word on each point that was not simply measured ("formula"), "" on others; or empty.
    """

    row: str
    x: list[float]
    y: list[float]
    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    each: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Attributes:
        kind: curves, single points, or a bar or a dot for each row (then `x` holds the values and `y` is empty).
        front: whether to draw the Pareto front: lowest x, highest y.
        trained: a place on the x axis up to which models were trained; None without one.
        sweep: whether x is a setting that was swept, of no interest where rows share it.
        band: whether `low` and `high` of curves are drawn as a band.
        mark: of dots, a value of note on the x axis, such as chance; None without one.
    """

    kind: Literal["lines", "points", "bars", "dots"]
    x: Axis
    y: Axis
    series: list[Series]
    title: str = ""
    front: bool = False
    trained: float | None = None
    sweep: bool = False
    band: bool = False
    mark: float | None = None


@dataclass(frozen=True)
class HeatMap:
    """Figures as colours: shares from 0 to 1, others from the least to the largest.

    Attributes:
        columns: what stands above the columns.
        lines: what stands before the lines: ids of rows where `by_row`, else texts.
        values: a list for each line; None where nothing is known.
        row: id of the row that the whole map belongs to, "all" of none in particular, "" where lines have their own.
        unit: of the figures; percent for shares.
        trained: how many columns lie within what models were trained on; None where that is unknown.
    """

    x: Axis
    y: Axis
    columns: list[str]
    lines: list[str]
    values: list[list[float | None]]
    title: str = ""
    row: str = ""
    trained: int | None = None
    unit: Unit = "percent"
    kind: Literal["heat"] = "heat"

    @property
    def by_row(self) -> bool:
        return not self.row


@dataclass(frozen=True)
class Chart:
    """An entry of the gallery: a name for links, a heading, how to read it, its panels, and whether they stand side by
    side over the whole width."""

    name: str
    title: str
    caption: str
    panels: list[Panel | HeatMap]
    wide: bool = False

    def as_data(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return dataclasses.asdict(self)


def running_mean(values: Sequence[float], width: int) -> list[float]:
    """Mean of the last `width` values at each place, of fewer at the start."""
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    return [(sums[i + 1] - sums[max(0, i + 1 - width)]) / min(i + 1, width) for i in range(len(values))]


def thinned(points: Sequence[tuple[float, float]], most: int = 400) -> list[tuple[float, float]]:
    """At most about `most` points, the last one among them: more would only make the page heavy."""
    step = max(1, math.ceil(len(points) / most))
    return list(points[(len(points) - 1) % step :: step])


def describe(chart: Chart, rows: Sequence[Row]) -> str:
    """A chart in words, for those who hear the page."""
    names = {row.id: row.label for row in rows}
    return " ".join(_describe(panel, names) for panel in chart.panels)


def _describe(panel: Panel | HeatMap, names: dict[str, str]) -> str:
    head = f"{panel.title}: " if panel.title else ""
    if isinstance(panel, HeatMap):
        parts = []
        for line, values in zip(panel.lines, panel.values, strict=True):
            read = TEXT[panel.unit]
            known = [f"{read(v)} at {c}" for c, v in zip(panel.columns, values, strict=True) if v is not None]
            if known:
                parts.append(f"{names.get(line, line)} {' to '.join(dict.fromkeys((known[0], known[-1])))}")
        return f"{head}Heat map of {panel.y.title or 'accuracy'} by {panel.x.title}: {'; '.join(parts)}."
    x, y = TEXT[panel.x.unit], TEXT[panel.y.unit]
    parts = []
    for series in panel.series:
        name = names[series.row]
        if panel.kind in ("bars", "dots"):
            ends = f" ({x(series.low[0])} to {x(series.high[0])})" if panel.kind == "dots" and series.low else ""
            parts.append(f"{name} {x(series.x[0])}{ends}")
        elif panel.kind == "points":
            parts.append(f"{name} {', '.join(f'{y(b)} at {x(a)}' for a, b in zip(series.x, series.y, strict=True))}")
        else:
            parts.append(f"{name} ends at {y(series.y[-1])} after {x(series.x[-1])}")
    what = {"bars": "Bars of", "dots": "Means of", "points": "Scatter plot of", "lines": "Line plot of"}[panel.kind]
    subject = panel.x.title if panel.kind in ("bars", "dots") else f"{panel.y.title} against {panel.x.title}"
    return f"{head}{what} {subject}: {'; '.join(parts)}."
