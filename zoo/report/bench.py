"""The plots and the table of what `zoo bench` measured: a row for each layer, whatever benchmarks it was in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from zoo.report.benchmark import Benchmark, Curve, in_order
from zoo.report.charts import TEXT, Axis, Chart, HeatMap, Panel, Row, Series
from zoo.report.leaderboard import Cell, Column, cells_of
from zoo.report.records import OK, Record, own_setting
from zoo.report.units import number, printable

_ASIDE = ("batch_size",)  # follows from the length; no setting of its own


class Subject(NamedTuple):
    """A layer in the table: its row, whether it is someone else's, its cells, and where it has no figures and why."""

    row: Row
    is_peer: bool
    cells: list[Cell]
    remarks: list[str]


def rows_of(found: Sequence[Record]) -> list[Row]:
    """A row for each subject, the zoo's own first."""
    peers = {r.title: r.peer for r in found}
    return [Row(f"layer-{i}", name, i) for i, name in enumerate(sorted(peers, key=lambda name: peers[name]))]


def charts(found: Sequence[Record]) -> list[Chart]:
    """Every plot that the records have data for."""
    return [chart for cls, own in _by_benchmark(found) for chart in charts_of(cls, own, rows_of(found))]


def charts_of(cls: type[Benchmark], found: Sequence[Record], rows: Sequence[Row]) -> list[Chart]:
    """The plots of one benchmark that its records have data for."""
    ids = {row.label: row.id for row in rows}
    drawn = []
    for plot in cls.plots:
        panels: list[Panel | HeatMap] = []
        for part in plot.parts:
            if isinstance(part, Curve):
                panels += _lines(part, found, ids) if part.over else bars(part, found, ids)
            else:
                panels += part(found, ids)
        drawn.append(Chart(plot.name, plot.title, plot.caption, panels))
    return [chart for chart in drawn if chart.panels]


def _by_benchmark(found: Sequence[Record]) -> list[tuple[type[Benchmark], list[Record]]]:
    """The records of each benchmark that is known here."""
    named = {r.benchmark for r in found}
    return [(cls, [r for r in found if r.benchmark == cls.label()]) for cls in in_order() if cls.label() in named]


def table(found: Sequence[Record]) -> tuple[list[Column], list[Subject]]:
    """The columns that have data and a line for each subject. A column shows the setting that most subjects share."""
    rows = rows_of(found)
    columns, by_column = [], []
    for cls, records in _by_benchmark(found):
        for head in cls.heads:
            curve = head.curve
            if fairest := _fairest(curve, records):
                setting, values = fairest
                key = f"{cls.label()}_{curve.where.get('part') or curve.where.get('direction') or ''}_{curve.figure}"
                told = ", ".join(filter(None, [_in_words(setting), _how_many(curve, records)]))
                column = Column(key, head.title, TEXT[curve.y.unit], head.best, told)
                columns.append(column)
                by_column.append(cells_of(column, [values.get(row.label) for row in rows]))
    return columns, [
        Subject(row, any(r.peer for r in own), list(cells), _remarks(own))
        for row, *cells in zip(rows, *by_column, strict=True)
        for own in [[r for r in found if r.title == row.label]]
    ]


def _how_many(curve: Curve, found: Iterable[Record]) -> str:
    """Of how many values the figures of a curve are, empty where they do not say."""
    known = sorted({int(n) for r in _chosen(curve, found) if (n := r.value(curve.figure, "n")) is not None})
    if not known:
        return ""
    many = f"{known[0]} to {known[-1]}" if len(known) > 1 else f"{known[0]}"
    return f"one value each (n = {many})" if known == [1] else f"medians of {many} values"


def _remarks(own: Iterable[Record]) -> list[str]:
    found = Counter(
        f"{printable(r.benchmark)}: {r.status}{f' ({r.why})' if r.why else ''}" for r in own if r.status != OK
    )
    return [remark if n == 1 else f"{remark}, {n} settings" for remark, n in found.items()]


def _fairest(curve: Curve, found: Iterable[Record]) -> tuple[dict[str, Any], dict[str, float]] | None:
    """The setting in which most subjects have the figure, the largest of equals, and the figures in it."""
    groups = [(setting, values) for setting, own in _groups(_chosen(curve, found)) if (values := _values(curve, own))]
    sizes = ("length", "context", "width")
    return max(groups, key=lambda g: (len(g[1]), *(number(g[0].get(k)) or 0 for k in sizes)), default=None)


def _chosen(curve: Curve, found: Iterable[Record]) -> list[Record]:
    return [r for r in found if all(r.setting.get(k) == v for k, v in curve.where.items())]


def _values(curve: Curve, found: Iterable[Record]) -> dict[str, float]:
    """The figure of each subject that has it."""
    return {r.title: value for r in found if (value := r.value(curve.figure)) is not None}


def _lines(curve: Curve, found: Iterable[Record], ids: Mapping[str, str]) -> list[Panel]:
    panels = []
    for title, own in by_setting(_chosen(curve, found), curve.title, aside=(curve.over,)):
        series = [s for s in (_series(curve, own, name, row) for name, row in ids.items()) if s is not None]
        if series:
            panels.append(Panel("lines", curve.x, curve.y, series, title=title))
    return panels


def _series(curve: Curve, found: Iterable[Record], name: str, row: str) -> Series | None:
    points = sorted(
        (x, y, r.value(curve.figure, "low") or y, r.value(curve.figure, "high") or y, r.how(curve.figure))
        for r in found
        if r.title == name
        and (x := number(r.setting.get(curve.over))) is not None
        and (y := r.value(curve.figure)) is not None
        and y > 0  # no place for a state of 0 on a logarithmic axis
    )
    return Series(row, *map(list, zip(*points, strict=True))) if points else None  # type: ignore[arg-type]


# ---- for what benchmarks draw themselves


def bars(curve: Curve, found: Iterable[Record], ids: Mapping[str, str]) -> list[Panel]:
    """A figure of each subject as bars, a panel for every setting."""
    chosen = [r for r in _chosen(curve, found) if r.value(curve.figure) is not None]
    panels = []
    for title, own in by_setting(chosen, curve.title or curve.y.title):
        values = _values(curve, own)
        series = [Series(row, [values[name]], []) for name, row in ids.items() if name in values]
        panels.append(Panel("bars", curve.y, Axis(""), series, title=title))
    return panels


def by_setting(found: Iterable[Record], what: str = "", aside: Sequence[str] = ()) -> list[tuple[str, list[Record]]]:
    """Records whose figures compare, together, in order of appearance.

    Each group has a title: `what`, and the settings in which the groups differ.

    Args:
        found: the records.
        what: is drawn.
        aside: settings that need not agree.
    """
    groups = _groups(found, aside)
    every = [setting for setting, _ in groups]
    return [(_title(what, setting, every), own) for setting, own in groups]


def _groups(found: Iterable[Record], aside: Sequence[str] = ()) -> list[tuple[dict[str, Any], list[Record]]]:
    """Records whose figures compare, and the settings that they share."""
    groups: dict[tuple[Any, ...], tuple[dict[str, Any], list[Record]]] = {}
    for r in found:
        own = {k: v for k, v in own_setting(r).items() if k not in (*_ASIDE, *aside)}
        setting = own | {"precision": r.precision, "device": r.device, "threads": r.threads}
        groups.setdefault(tuple(sorted((k, str(v)) for k, v in setting.items())), (setting, []))[1].append(r)
    return list(groups.values())


def with_chance(title: str, found: Iterable[Record]) -> str:
    """A title, with what chance gives where that is one figure."""
    known = {r.chance for r in found if r.chance is not None}
    return f"{title}{' ' if title else ''}(chance {known.pop():.0%})" if len(known) == 1 else title


def slice_of(r: Record, name: str, figure: str = "accuracy") -> dict[str, float]:
    """A figure by the values of a slice."""
    scores = {v: number(figures.get(figure)) for v, figures in r.slices.get(name, {}).items()}
    return {v: share for v, share in scores.items() if share is not None}


def _title(what: str, setting: Mapping[str, Any], every: Sequence[Mapping[str, Any]]) -> str:
    """`what`, and the settings in which the panels differ."""
    differing = {k: v for k, v in setting.items() if len({str(other.get(k)) for other in every}) > 1 and v != what}
    return ", ".join(filter(None, [what, _in_words(differing)]))


def _in_words(setting: Mapping[str, Any]) -> str:
    words: list[str] = []
    for key, value in setting.items():
        if isinstance(value, bool):
            words.append(key if value else f"not {key}")
        else:
            words.append(f"{key.replace('_', ' ')} {value}")
    return ", ".join(words)
