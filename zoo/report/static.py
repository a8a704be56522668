"""Plots as files, drawn by matplotlib."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from zoo.core.files import write_output
from zoo.report import plots
from zoo.report.charts import TEXT, Axis, Chart, HeatMap, Panel, Row
from zoo.report.pareto import pareto_front
from zoo.report.runs import Run, as_runs
from zoo.report.style import FAINT, INK, Look, house_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 5.0, 3.2  # inches: small, so that text stays readable on a phone
_LONGEST_LABEL = 24
_MAPS_ACROSS = 3


def save_plots(
    runs: Sequence[Run | str | Path] | str | Path, folder: str | Path, formats: Sequence[str] = ("png", "svg")
) -> list[Path]:
    """Every plot that the runs have data for, as files with a title, overwriting older ones.

    Args:
        runs: what to compare, or the folders where it lies.
        folder: where to.
        formats: endings that matplotlib knows.

    Raises:
        UsageError: no run there, or the folder cannot be written.
    """
    runs = as_runs(runs)
    return save_charts(plots.charts(runs), plots.rows_of(runs), folder, formats)


def save_charts(
    charts: Sequence[Chart], rows: Sequence[Row], folder: str | Path, formats: Sequence[str] = ("png", "svg")
) -> list[Path]:
    """Charts as files, named as they are.

    Raises:
        UsageError: the folder cannot be written.
    """
    written = []
    for chart in charts:
        with house_style():
            figure = draw(chart, rows)
            # Above the figure's edge, where no layout can put anything in its way: "tight" makes room.
            figure.text(0.02, 1.01, chart.title, weight="bold", size=12)
            for suffix in formats:
                out = io.BytesIO()
                stamp = {"Date": None} if suffix == "svg" else None  # the same runs give the same file
                figure.savefig(out, format=suffix, dpi=200, facecolor="white", bbox_inches="tight", metadata=stamp)
                written.append(write_output(Path(folder) / f"{chart.name}.{suffix}", out.getvalue()))
    return written


def svg(chart: Chart, rows: Sequence[Row]) -> str:
    """A chart as the text of an SVG file; the same chart gives the same text."""
    from matplotlib import rcParams

    out = io.StringIO()
    with house_style():
        rcParams["svg.hashsalt"] = chart.name
        draw(chart, rows).savefig(out, format="svg", facecolor="white", metadata={"Date": None})
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def draw(chart: Chart, rows: Sequence[Row]) -> Figure:
    """A chart as a figure, with its panels stacked; several maps of one row each stand side by side."""
    from matplotlib.figure import Figure

    by_id = {row.id: row for row in rows}
    across = _MAPS_ACROSS if len(chart.panels) > 2 and all(_is_of_one_row(panel) for panel in chart.panels) else 1
    heights = [max(map(_height, chart.panels[i : i + across])) for i in range(0, len(chart.panels), across)]
    with house_style():
        size = WIDTH * (1 if across == 1 else 2), sum(heights)
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(len(heights), across, squeeze=False, height_ratios=heights).ravel()
        every, rest = grid[: len(chart.panels)], grid[len(chart.panels) :]
        for axes in rest:
            axes.axis("off")
        for axes, panel in zip(every, chart.panels, strict=True):
            if isinstance(panel, HeatMap):
                _heat_map(axes, panel, by_id)
            elif panel.kind == "bars":
                _bars(axes, panel, by_id)
            else:
                _curves(axes, panel, by_id)
            if panel.title:
                axes.set_title(panel.title, color=FAINT)
        _legend(figure, chart, by_id)
    return figure


def _height(panel: Panel | HeatMap) -> float:
    """Inches of a panel: more where there are many rows to tell apart."""
    if isinstance(panel, HeatMap):
        return 0.9 + 0.36 * len(panel.lines)
    n = len(panel.series)
    return 0.9 + 0.36 * n if panel.kind == "bars" else max(HEIGHT, 0.16 * n)


def _is_of_one_row(panel: Panel | HeatMap) -> bool:
    return isinstance(panel, HeatMap) and not panel.by_row


def _curves(axes: Axes, panel: Panel, rows: dict[str, Row]) -> None:
    if panel.front:
        _front(axes, panel)
    for series in panel.series:
        look = Look.of(rows[series.row].look).line(len(series.x))
        if panel.kind == "points":
            look |= {"linestyle": "none", "markersize": 9, "zorder": 3}
        axes.plot(series.x, series.y, gid=series.row, clip_on=False, **look)
        estimated = [i for i, note in enumerate(series.notes) if note]
        if estimated:
            at = [series.x[i] for i in estimated], [series.y[i] for i in estimated]
            axes.plot(*at, look["marker"], color="white", markeredgecolor=look["color"], clip_on=False, zorder=4)
        if series.low:
            below = [max(0.0, y - low) for y, low in zip(series.y, series.low, strict=True)]
            above = [max(0.0, high - y) for y, high in zip(series.y, series.high, strict=True)]
            spread = [below, above]
            axes.errorbar(series.x, series.y, yerr=spread, fmt="none", ecolor=look["color"], elinewidth=0.8)
    if panel.trained is not None:
        axes.axvline(panel.trained, color=FAINT, linewidth=0.8, linestyle=":")
    _axis(axes, "x", panel.x, sorted({x for series in panel.series for x in series.x}))
    _axis(axes, "y", panel.y)


def _front(axes: Axes, panel: Panel) -> None:
    points = [(s.x[0], s.y[0]) for s in panel.series]
    front = [points[i] for i in pareto_front(points)]
    end = 1.8 * max(x for x, _ in points)
    steps = [(front[0][0], 0.0), *front, (end, front[-1][1])]
    corners = [corner for (_, below), (x, y) in pairwise(steps) for corner in ((x, below), (x, y))]
    axes.plot(*zip(*corners, strict=True), color=FAINT, linewidth=1.2, linestyle=(0, (4, 2)), zorder=1, gid="front")


def _bars(axes: Axes, panel: Panel, rows: dict[str, Row]) -> None:
    each = [rows[series.row] for series in panel.series]
    values = [series.x[0] for series in panel.series]
    drawn = axes.barh(range(len(each)), values, 0.62, color=[Look.of(row.look).colour for row in each])
    axes.bar_label(drawn, [TEXT[panel.x.unit](v) for v in values], padding=4, color=INK, fontsize=9.5)
    axes.set_yticks(range(len(each)), [shortened(row.label) for row in each], color=INK)
    axes.invert_yaxis()
    axes.margins(x=0.2)  # room for the figures
    axes.set_xticks([])
    axes.grid(visible=False)
    axes.spines["bottom"].set_visible(False)


def _heat_map(axes: Axes, panel: HeatMap, rows: dict[str, Row]) -> None:
    values = [[math.nan if v is None else v for v in line] for line in panel.values]
    axes.imshow(values, cmap="cividis", vmin=0, vmax=1, aspect="auto")
    names = [shortened(rows[line].label) if panel.by_row else line for line in panel.lines]
    axes.set_yticks(range(len(names)), names, color=INK)
    axes.set_xticks(range(len(panel.columns)), panel.columns)
    axes.set(xlabel=panel.x.title, ylabel="" if panel.by_row else panel.y.title)
    axes.grid(visible=False)
    for i, line in enumerate(values):
        for j, value in enumerate(line):
            if not math.isnan(value):
                ink = "white" if value < 0.5 else "black"
                axes.text(j, i, f"{100 * value:.0f}", ha="center", va="center", fontsize=8.5, color=ink)
    if panel.trained is not None and 0 < panel.trained < len(panel.columns):
        axes.axvline(panel.trained - 0.5, color=INK, linewidth=2)


def _axis(axes: Axes, which: str, axis: Axis, values: Sequence[float] = ()) -> None:
    """Set up an axis; lengths have their ticks where there are `values`, if those are few."""
    ticks = getattr(axes, f"{which}axis")
    getattr(axes, f"set_{which}label")(axis.title)
    if axis.log:
        from matplotlib.ticker import FixedLocator, LogLocator, NullFormatter

        getattr(axes, f"set_{which}scale")("log", base=2 if axis.unit == "size" else 10)
        ticks.set_major_locator(LogLocator(2 if axis.unit == "size" else 10, (1.0,), numticks=7))
        low, high = getattr(axes.dataLim, f"interval{which}")
        if axis.unit == "length" and 0 < len(values) <= 8:
            ticks.set_major_locator(FixedLocator(values))
        elif axis.unit != "size" and high < 100 * low:
            ticks.set_major_locator(LogLocator(10, (1.0, 2.0, 5.0), numticks=7))
        ticks.set_minor_formatter(NullFormatter())
    if axis.unit == "percent":
        getattr(axes, f"set_{which}lim")(0, 1.02)
        ticks.set_major_formatter(lambda v, _: f"{100 * v:.0f}%")
    else:
        text = TEXT[axis.unit]
        ticks.set_major_formatter(lambda v, _: text(max(v, 0)))


def _legend(figure: Figure, chart: Chart, by_id: dict[str, Row]) -> None:
    """A legend below the axes, for which the figure grows."""
    from matplotlib.lines import Line2D

    panels = [panel for panel in chart.panels if isinstance(panel, Panel) and panel.kind != "bars"]
    rows = [by_id[row] for row in dict.fromkeys(series.row for panel in panels for series in panel.series)]
    if not rows:
        return
    plain = {"linestyle": "none"} if panels[0].kind == "points" else {}
    handles = [Line2D([], [], **Look.of(row.look).line(1) | {"markevery": None} | plain) for row in rows]
    names = [shortened(row.label) for row in rows]
    columns = max(1, min(len(rows), 62 // (8 + max(map(len, names)))))
    figure.set_figheight(figure.get_figheight() + 0.2 * math.ceil(len(rows) / columns))
    figure.legend(handles, names, loc="outside lower left", ncols=columns, handlelength=2.6, columnspacing=1.6)


def shortened(label: str) -> str:
    """A label as short as a plot needs it, its middle left out."""
    half = _LONGEST_LABEL // 2
    return label if len(label) <= _LONGEST_LABEL else f"{label[: half - 1]}…{label[-half:]}"
