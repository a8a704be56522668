"""The plots of a comparison of trials: a look for each word, whatever its seed or learning rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import polars as pl

from zoo.report.charts import Axis, Chart, HeatMap, Panel, Row, Series, thinned
from zoo.report.runs import ENDED
from zoo.report.trials.compare import Comparison
from zoo.report.trials.figures import figure, selection, unit_of
from zoo.report.trials.groups import Group, named
from zoo.report.trials.source import value
from zoo.report.units import number
from zoo.statistics import Interval, t_interval

_COSTS = (
    ("state_bytes", Axis("state of one sequence", "size", log=True)),
    ("seconds", Axis("training time", "duration", log=True)),
)
_RATIO = 4  # of the largest cost to the least, from which on steps are ratios
_POINTS = 120  # of a curve: a band has three times as many


def rows_of(comparison: Comparison, prefix: str) -> list[Row]:
    """A row for each group, in order: the look follows the word, the marker and dash the other keys."""
    by = comparison.by
    at = next((i for i, key in enumerate(by) if key.startswith("words.") or key in ("model.pattern", "name")), 0)
    words = list(dict.fromkeys(group.names[at] for group in comparison.groups)) if by else [""]
    others = list(dict.fromkeys(group.names[:at] + group.names[at + 1 :] for group in comparison.groups))
    rows = []
    for i, group in enumerate(comparison.groups):
        look = words.index(group.names[at]) if by else 0
        rows.append(Row(f"{prefix}-{i}", group.label, look, others.index(group.names[:at] + group.names[at + 1 :])))
    return rows


def charts(comparison: Comparison, rows: Sequence[Row]) -> list[Chart]:
    """Every plot that the trials have data for; ids begin with those of the rows."""
    prefix = rows[0].id.rpartition("-")[0]
    metric = comparison.metric
    drawn = (
        Chart(
            f"{prefix}-means", f"{metric.capitalize()} by group",
            _about_means(comparison),
            _means(comparison, rows),
        ),
        Chart(
            f"{prefix}-curves", "Learning curves",
            "The mean over seeds on validation rows, and Student's t interval (95%) as a band where at most 8 groups "
            "are shown. A seed that met its target keeps its last figure.",
            _curves(comparison, rows),
        ),
        Chart(
            f"{prefix}-cost", f"{metric.capitalize()} against cost",
            "Bars are 95% intervals."
            + ("" if comparison.lower else " The dashed line is the Pareto front of the rows shown: on it, nothing "
            "cheaper has a better mean."),
            _costs(comparison, rows), wide=True,
        ),
        Chart(
            f"{prefix}-choice", f"Validation {selection(comparison.trials.rows)} by {', '.join(comparison.best)}",
            "What was tried: the mean over seeds of each value, with Student's t interval (95%).",
            _tried(comparison, rows),
        ),
        Chart(f"{prefix}-map", *_map(comparison, rows)),
    )  # fmt: skip
    return [chart for chart in drawn if chart.panels]


def _about_means(comparison: Comparison) -> str:
    about = "The mean of each group with its 95% interval, and a small point for each seed."
    if any(group.learning.none for group in comparison.groups):
        about += " Groups of which no seed learned are left out."
    if comparison.chance is not None:
        about += f" The dashed line is {'the trivial predictor' if comparison.lower else 'chance'}."
    return about


def _means(comparison: Comparison, rows: Sequence[Row]) -> list[Panel | HeatMap]:
    axis = Axis(comparison.metric, comparison.unit)
    series = [
        Series(
            row.id,
            [group.estimate.mean],
            [],
            *_edges([group.estimate.interval], [group.estimate.mean]),
            each=group.scores.figures.tolist() if len(group.scores.seeds) > 1 else [],
        )
        for group, row in zip(comparison.groups, rows, strict=True)
        if group.estimate is not None and group.scores is not None and not group.learning.none
    ]
    return [Panel("dots", axis, Axis(""), series, mark=comparison.chance)] if series else []


def _costs(comparison: Comparison, rows: Sequence[Row]) -> list[Panel | HeatMap]:
    axis = Axis(comparison.metric, comparison.unit)
    panels: list[Panel | HeatMap] = []
    for column, cost in _COSTS:
        series = []
        for group, row in zip(comparison.groups, rows, strict=True):
            price = group.middle(column)
            if group.estimate is None or group.learning.none or not price:
                continue
            mean = group.estimate.mean
            series.append(Series(row.id, [price], [mean], *_edges([group.estimate.interval], [mean])))
        if len(series) > 1:
            prices = [x for each in series for x in each.x]
            x = cost
            if max(prices) < _RATIO * min(prices):
                x = replace(cost, log=False, title=f"{cost.title}, s" if cost.unit == "duration" else cost.title)
            panels.append(Panel("points", x, axis, series, title=cost.title, front=not comparison.lower))
    return panels


def _curves(comparison: Comparison, rows: Sequence[Row]) -> list[Panel | HeatMap]:
    series = []
    for group, row in zip(comparison.groups, rows, strict=True):
        each = {}
        for trial in group.rows:
            found = comparison.trials.curves.get(int(trial["trial"]))
            if found is not None and comparison.metric in found.columns and "tokens" in found.columns:
                each[int(trial["trial"])] = (found, trial["status"] == "target")
        points = over_seeds(list(each.values()), comparison.metric)
        if points:
            if comparison.lower:  # an error is never below 0
                points = [(x, y, each and Interval(max(each.low, 0.0), each.high)) for x, y, each in points]
            kept = [points[int(i)] for i, _ in thinned([(float(i), 0.0) for i in range(len(points))], _POINTS)]
            x, y = [p[0] for p in kept], [p[1] for p in kept]
            series.append(Series(row.id, x, y, *_edges([p[2] for p in kept], y, comparison.unit)))
    axis = Axis(f"validation {comparison.metric}", comparison.unit)
    return [Panel("lines", Axis("tokens trained", "count"), axis, series, band=True)] if series else []


def over_seeds(curves: Sequence[tuple[pl.DataFrame, bool]], metric: str) -> list[tuple[float, float, Interval | None]]:
    """The mean validation curve of several seeds: tokens, mean and interval at each evaluation of any of them.

    Between two evaluations a seed has the figure of the earlier one. The curve ends where the first seed ends, those
    aside that met their target, which keep their last figure.

    Args:
        curves: of each seed, with whether it met its target.
        metric: the figure.
    """
    each: list[tuple[list[float], list[float]]] = []
    ends: list[float] = []
    for frame, met in curves:
        known = frame.filter(pl.col("split") == "validation").drop_nulls([metric, "tokens"])
        known = known.unique("step", keep="last").sort("step")
        if not len(known):
            continue
        x, y = known["tokens"].cast(pl.Float64).to_list(), known[metric].cast(pl.Float64).to_list()
        each.append((x, y))
        if not met:
            ends.append(x[-1])
    if not each:
        return []
    start, end = max(x[0] for x, _ in each), min(ends, default=max(x[-1] for x, _ in each))
    found = []
    for at in sorted({x for xs, _ in each for x in xs if start <= x <= end}):
        values = [ys[int(np.searchsorted(xs, at, side="right")) - 1] for xs, ys in each]
        found.append((at, float(np.mean(values)), t_interval(values)))
    return found


def _tried(comparison: Comparison, rows: Sequence[Row]) -> list[Panel | HeatMap]:
    """Validation figures against each value of the one key that was chosen, where its values are numbers."""
    if len(comparison.best) != 1:
        return []
    key, metric = comparison.best[0], selection(comparison.trials.rows)
    series = []
    for group, row in zip(comparison.groups, rows, strict=True):
        found: dict[float, list[float]] = {}
        for trial in _candidates(group):
            x, y = number(value(trial, key)), figure(trial, "validation", metric)
            if x is not None and y is not None:
                found.setdefault(x, []).append(y)
        if found:
            xs = sorted(found)
            ys = [float(np.mean(found[x])) for x in xs]
            series.append(Series(row.id, xs, ys, *_edges([t_interval(found[x]) for x in xs], ys, unit_of(metric))))
    values = {x for each in series for x in each.x}
    if len(values) < 2:
        return []
    axis = Axis(key, log=0 < 4 * min(values) <= max(values))
    return [Panel("lines", axis, Axis(f"validation {metric}", unit_of(metric)), series)]


def _map(comparison: Comparison, rows: Sequence[Row]) -> tuple[str, str, list[Panel | HeatMap]]:
    """Title, caption and the map over two keys: groups and the values tried, else the two keys of the groups."""
    if len(comparison.best) == 1 and comparison.by:
        key, metric = comparison.best[0], selection(comparison.trials.rows)
        cells = [_validation(group, key, metric) for group in comparison.groups]
        columns = _in_order({column for line in cells for column in line})
        title, caption = (
            f"Map of validation {metric} by {key}",
            "The mean over seeds of every value tried.",
        )
        lines, row = [row.id for row in rows], ""
    elif len(comparison.by) == 2:
        key, metric = comparison.by[1], comparison.metric
        of_line: dict[str, dict[str, float | None]] = {}
        for group in comparison.groups:
            mean = None if group.estimate is None else group.estimate.mean
            of_line.setdefault(group.names[0], {})[group.names[1]] = mean
        lines, cells, row = list(of_line), list(of_line.values()), "all"
        columns = _in_order({column for line in cells for column in line})
        title, caption = f"{metric.capitalize()} by {comparison.by[0]} and {key}", "The mean over seeds of each group."
    else:
        return "", "", []
    values = [[line.get(column) for column in columns] for line in cells]
    if len(columns) < 2 or not any(v is not None for line in values for v in line):
        return "", "", []
    y = Axis(comparison.by[0])
    return title, caption, [HeatMap(Axis(key), y, columns, lines, values, row=row, unit=unit_of(metric))]


def _validation(group: Group, key: str, metric: str) -> dict[str, float | None]:
    found: dict[str, list[float]] = {}
    for trial in _candidates(group):
        if (score := figure(trial, "validation", metric)) is not None:
            found.setdefault(named(value(trial, key)), []).append(score)
    return {text: float(np.mean(scores)) for text, scores in found.items()}


def _candidates(group: Group) -> list[Mapping[str, Any]]:
    """The trials among which the best value was chosen."""
    choosing = [row for row in group.every if row["stage"] == "choose"] or group.every
    return [row for row in choosing if row["status"] in ENDED]


def _in_order(values: set[str]) -> list[str]:
    try:
        return sorted(values, key=float)
    except ValueError:
        return sorted(values)


def _edges(
    intervals: Sequence[Interval | None], means: Sequence[float], unit: str = ""
) -> tuple[list[float], list[float]]:
    """The ends of intervals; of what has none its mean, which draws no bar."""
    if not any(intervals):
        return [], []
    pairs = [each or Interval(mean, mean) for each, mean in zip(intervals, means, strict=True)]
    if unit == "percent":
        pairs = [Interval(max(low, 0.0), min(high, 1.0)) for low, high in pairs]
    return [low for low, _ in pairs], [high for _, high in pairs]
