"""What plots are made of: runs with their looks, curves, bars, legends, axes with readable ticks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from zoo.report import units
from zoo.report.leaderboard import ordered
from zoo.report.runs import Run, labels
from zoo.report.style import FAINT, INK, Look

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 5.0, 3.2  # inches: small, so that text stays readable on a phone
_LONGEST_LABEL = 24
_SECONDS = (0.1, 0.3, 1, 3, 10, 30, 60, 180, 600, 1800, 3600, 3 * 3600, 10 * 3600, 30 * 3600, 100 * 3600)

_UNITS: dict[float, str] = {60: "1 min", 3600: "1 h"}


class Styled(NamedTuple):
    """A run with its label and its look."""

    run: Run
    label: str
    look: Look


def styled(runs: Sequence[Run]) -> list[Styled]:
    """The runs in the leaderboard's order, each with a look and a label short enough for a plot."""
    runs = ordered(runs)
    names = [_shortened(label) for label in labels(runs)]
    return [Styled(run, name, Look.of(i)) for i, (run, name) in enumerate(zip(runs, names, strict=True))]


def _shortened(label: str) -> str:
    half = _LONGEST_LABEL // 2
    return label if len(label) <= _LONGEST_LABEL else f"{label[: half - 1]}…{label[-half:]}"


def new_figure() -> tuple[Figure, Axes]:
    """An empty figure with one pair of axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    return figure, figure.subplots()


def curves(
    runs: Sequence[Run], split: str, x: str, y: str, *, positive_x: bool = False, smooth: bool = False
) -> tuple[Figure, Axes] | None:
    """A curve for each run that has both figures of the split, with a legend; None where none has."""
    figure, axes = new_figure()
    drawn = []
    for i, each in enumerate(styled(runs)):
        xs, ys = each.run.series(split, x, y)
        if smooth:
            ys = running_mean(ys, max(1, len(ys) // 40))
        points = _thin([(a, b) for a, b in zip(xs, ys, strict=True) if a > 0 or not positive_x])
        if points:
            axes.plot(*zip(*points, strict=True), gid=f"run-{i}", clip_on=False, **each.look.line(len(points)))
            drawn.append(each)
    if not drawn:
        return None
    legend(figure, drawn)
    return figure, axes


def running_mean(values: Sequence[float], width: int) -> list[float]:
    """Mean of the last `width` values at each place, of fewer at the start."""
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    return [(sums[i + 1] - sums[max(0, i + 1 - width)]) / min(i + 1, width) for i in range(len(values))]


def _thin(points: list[tuple[float, float]], most: int = 400) -> list[tuple[float, float]]:
    """At most about `most` points, the last one among them: more would only make the page heavy."""
    step = max(1, math.ceil(len(points) / most))
    return points[(len(points) - 1) % step :: step]


def bars(runs: Sequence[Run], panels: Sequence[tuple[str, str]], text: Callable[[float], str]) -> Figure | None:
    """Bars of one or more figures, given as (key, title), side by side; None where no run has any."""
    from matplotlib.figure import Figure

    each = styled(runs)
    panels = [(key, title) for key, title in panels if any(s.run.figure(key) is not None for s in each)]
    if not panels:
        return None
    places = range(len(each))
    figure = Figure(figsize=(WIDTH, 0.9 + 0.36 * len(each)), layout="constrained")
    row = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (key, title) in zip(row, panels, strict=True):
        values = [s.run.figure(key) for s in each]
        texts = [units.MISSING if v is None else text(v) for v in values]
        drawn = axes.barh(places, [v or 0 for v in values], 0.62, color=[s.look.colour for s in each])
        for i, bar in enumerate(drawn):
            bar.set_gid(f"run-{i}-{key}")
        axes.bar_label(drawn, texts, padding=4, color=INK, fontsize=9.5)
        axes.set_title(title, color=FAINT)
        axes.margins(x=0.34)  # room for the figures
        axes.set_xticks([])
        axes.grid(visible=False)
        axes.spines["bottom"].set_visible(False)
    row[0].set_yticks(places, [s.label for s in each], color=INK)
    row[0].invert_yaxis()
    return figure


def legend(figure: Figure, runs: Sequence[Styled], *, lines: bool = True) -> None:
    """A legend below the axes, for which the figure grows."""
    from matplotlib.lines import Line2D

    looks = [s.look.line(1) | {"markevery": None} | ({} if lines else {"linestyle": "none"}) for s in runs]
    handles = [Line2D([], [], **look) for look in looks]
    columns = max(1, min(len(runs), 70 // (8 + max(len(s.label) for s in runs))))
    figure.set_figheight(figure.get_figheight() + 0.2 * math.ceil(len(runs) / columns))
    figure.legend(
        handles, [s.label for s in runs], loc="outside lower left", ncols=columns, handlelength=2.6, columnspacing=1.6
    )


def seconds_axis(axes: Axes) -> None:
    """A logarithmic x axis of training time."""
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    ticks = [t for t in _SECONDS if low <= t <= high]
    axes.set_xticks(ticks if len(ticks) > 1 else [low * 1.1, high / 1.1])
    axes.xaxis.set_major_formatter(lambda x, _: _UNITS.get(x) or units.duration(x))
    axes.minorticks_off()
    axes.set_xlabel("training time")


def tokens_axis(axes: Axes) -> None:
    """An x axis of tokens trained."""
    axes.xaxis.set_major_formatter(lambda x, _: units.count(max(x, 0)))
    axes.set_xlabel("tokens trained")


def loss_axis(axes: Axes) -> None:
    """A y axis of losses, logarithmic where those drawn are positive and far apart."""
    from matplotlib.ticker import LogLocator, NullFormatter

    low, high = axes.dataLim.intervaly
    if 0 < 5 * low < high:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")


def percent_axis(axes: Axes) -> None:
    """A y axis from 0 to 100 %."""
    axes.set_ylim(0, 1.02)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
    axes.yaxis.set_major_formatter(lambda y, _: f"{100 * y:.0f}%")


def size_axis(axes: Axes) -> None:
    """Ticks at powers of two on a logarithmic x axis of bytes."""
    low, high = axes.get_xlim()
    powers = range(math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1)
    axes.set_xticks([2**p for p in powers][:: math.ceil(len(powers) / 6) or 1], minor=False)
    axes.xaxis.set_major_formatter(lambda x, _: units.size(x))
    axes.minorticks_off()
