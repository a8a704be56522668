"""The plots and the table of what `zoo bench` measured: a row for each layer, whatever benchmarks it was in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from zoo.report.charts import TEXT, Axis, Chart, HeatMap, Panel, Row, Series
from zoo.report.leaderboard import Cell, Column, cells_of
from zoo.report.measurements import MIXER, OK, Measurement
from zoo.report.slices import as_numbers
from zoo.report.units import number

RATE = Axis("tokens a second", "count", log=True)
LENGTH = Axis("length", "length", log=True)
CONTEXT = Axis("context", "length", log=True)
ACCURACY = Axis("accuracy", "percent")

_ASIDE = ("batch_size",)  # follows from the length; no setting of its own
_OF_SUBJECTS = "layers"  # in older records the pattern of the model with the subject in it, not of the setting
_PLACE = ("precision", "device", "threads")


class Subject(NamedTuple):
    """A layer in the table: its row, whether it is someone else's, its cells, and where it has no figures and why."""

    row: Row
    is_peer: bool
    cells: list[Cell]
    remarks: list[str]


@dataclass(frozen=True)
class _Curve:
    """A figure over a setting.

    Attributes:
        where: settings that a measurement must have.
        over: the setting on the x axis.
    """

    benchmark: str
    figure: str
    x: Axis
    y: Axis
    over: str
    where: Mapping[str, Any]
    title: str


_THROUGHPUT = (
    _Curve("throughput", "tokens_per_second", LENGTH, RATE, "length", {"direction": "train"}, "training"),
    _Curve("throughput", "tokens_per_second", LENGTH, RATE, "length", {"direction": "forward"}, "forward only"),
)
_MEMORY = (
    _Curve(
        "memory", "peak_bytes", LENGTH, Axis("peak memory", "size", log=True), "length", {"part": "training"},
        "training step",
    ),
    _Curve(
        "memory", "state_bytes", CONTEXT, Axis("state of one sequence", "size", log=True), "length",
        {"part": "state"}, "state",
    ),
)  # fmt: skip
_DECODE = (
    _Curve("decode", "tokens_per_second", CONTEXT, RATE, "context", {"part": "prefill"}, "prefill"),
    _Curve("decode", "tokens_per_second", CONTEXT, RATE, "context", {"part": "step"}, "one token after another"),
)
_EFFECTIVE = _Curve("long-context", "effective_length", LENGTH, Axis("effective length", "length"), "", {}, "")
_MAD = _Curve("mad", "accuracy", LENGTH, ACCURACY, "", {"task": "average"}, "")
_CURVES = {
    "bench-throughput": (
        "Throughput against length", "Tokens a second of one layer. Bars reach from the first quartile to the third.",
        _THROUGHPUT,
    ),
    "bench-memory": (
        "Memory against length", "Peak memory of a training step, and what one sequence carries. "
        "Hollow points were not measured: the layer's own formula says them.",
        _MEMORY,
    ),
    "bench-decode": (
        "Reading and writing against context", "Tokens a second at a context. "
        "Hollow points: from a cache of random keys and values instead of a prefill.",
        _DECODE,
    ),
}  # fmt: skip


def rows_of(measurements: Sequence[Measurement]) -> list[Row]:
    """A row for each subject, the zoo's own first."""
    peers = {m.name: m.is_peer for m in measurements}
    return [Row(f"layer-{i}", name, i) for i, name in enumerate(sorted(peers, key=lambda name: peers[name]))]


def charts(measurements: Sequence[Measurement]) -> list[Chart]:
    """Every plot that the measurements have data for."""
    ids = {row.label: row.id for row in rows_of(measurements)}
    drawn = [
        Chart(name, title, caption, [panel for curve in curves for panel in _panels(curve, measurements, ids)])
        for name, (title, caption, curves) in _CURVES.items()
    ]
    drawn += [
        Chart(
            "bench-long-context", "Length generalisation",
            "Accuracy at lengths up to many times those trained on; columns right of the line are longer. "
            "Models that had not learned at their own length are left out.",
            _length_maps(measurements, ids),
        ),
        Chart(
            "bench-effective-length", "Effective length",
            "The largest of the lengths tested at which the median accuracy is at least 85%.",
            _bars(_EFFECTIVE, measurements, ids),
        ),
        Chart(
            "bench-depth", "Where the needle lies",
            "Accuracy by length and by depth of what is asked for: a map for each layer, the first twelve shown.",
            _depth_maps(measurements, ids),
        ),
        Chart(
            "bench-mad", "MAD", "Accuracy on each synthetic task of MAD's suite, averaged over its variations; only of "
            "layers that learned each of them.",
            [*_mad_map(measurements, ids), *_bars(_MAD, measurements, ids)],
        ),
    ]  # fmt: skip
    return [chart for chart in drawn if chart.panels]


def table(measurements: Sequence[Measurement]) -> tuple[list[Column], list[Subject]]:
    """The columns that have data and a line for each subject. A column shows the setting that most subjects share."""
    rows = rows_of(measurements)
    columns, by_column = [], []
    for curve, title, best in (
        (_THROUGHPUT[0], "train\ntok/s", "max"),
        (_THROUGHPUT[1], "forward\ntok/s", "max"),
        (_MEMORY[0], "training\nmemory", "min"),
        (_MEMORY[1], "state", "min"),
        (_DECODE[0], "prefill\ntok/s", "max"),
        (_DECODE[1], "decode\ntok/s", "max"),
        (_EFFECTIVE, "effective\nlength", "max"),
        (_MAD, "MAD", "max"),
    ):  # fmt: skip
        found = _fairest(curve, measurements)
        if found:
            setting, values = found
            key = f"{curve.benchmark}_{curve.where.get('part') or curve.where.get('direction') or ''}_{curve.figure}"
            told = ", ".join(filter(None, [_in_words(setting), _how_many(curve, measurements)]))
            column = Column(key, title, TEXT[curve.y.unit], best, told)  # type: ignore[arg-type]
            columns.append(column)
            by_column.append(cells_of(column, [values.get(row.label) for row in rows]))
    return columns, [
        Subject(row, any(m.is_peer for m in own), list(cells), _remarks(own))
        for row, *cells in zip(rows, *by_column, strict=True)
        for own in [[m for m in measurements if m.name == row.label]]
    ]


def _how_many(curve: _Curve, measurements: Iterable[Measurement]) -> str:
    """Of how many values the figures of a curve are, empty where they do not say."""
    known = sorted({int(n) for m in _chosen(curve, measurements) if (n := m.figure(curve.figure, "n")) is not None})
    if not known:
        return ""
    many = f"{known[0]} to {known[-1]}" if len(known) > 1 else f"{known[0]}"
    return f"one value each (n = {many})" if known == [1] else f"medians of {many} values"


def _remarks(own: Iterable[Measurement]) -> list[str]:
    found = Counter(
        f"{m.benchmark}: {m.status}{f' ({why})' if (why := str(m.record.get('why') or '')) else ''}"
        for m in own
        if m.status != OK
    )
    return [remark if n == 1 else f"{remark}, {n} settings" for remark, n in found.items()]


def _fairest(curve: _Curve, measurements: Iterable[Measurement]) -> tuple[dict[str, Any], dict[str, float]] | None:
    """The setting in which most subjects have the figure, the largest of equals, and the figures in it."""
    groups: dict[tuple[Any, ...], tuple[dict[str, Any], dict[str, float]]] = {}
    for m in _chosen(curve, measurements):
        setting = _setting(m)
        value = m.figure(curve.figure)
        if value is not None:
            groups.setdefault(_key(setting), (setting, {}))[1][m.name] = value
    sizes = ("length", "context", "width")
    return max(groups.values(), key=lambda g: (len(g[1]), *(number(g[0].get(k)) or 0 for k in sizes)), default=None)


def _panels(curve: _Curve, measurements: Iterable[Measurement], ids: Mapping[str, str]) -> list[Panel | HeatMap]:
    groups: dict[tuple[Any, ...], tuple[dict[str, Any], list[Measurement]]] = {}
    for m in _chosen(curve, measurements):
        setting = {k: v for k, v in _setting(m).items() if k != curve.over}
        groups.setdefault(_key(setting), (setting, []))[1].append(m)
    every = [setting for setting, _ in groups.values()]
    panels: list[Panel | HeatMap] = []
    for setting, found in groups.values():
        series = [s for s in (_series(curve, found, name, row) for name, row in ids.items()) if s is not None]
        if series:
            panels.append(Panel("lines", curve.x, curve.y, series, title=_title(curve.title, setting, every)))
    return panels


def _series(curve: _Curve, found: Iterable[Measurement], name: str, row: str) -> Series | None:
    points = sorted(
        (x, y, m.figure(curve.figure, "low") or y, m.figure(curve.figure, "high") or y, m.how(curve.figure))
        for m in found
        if m.name == name
        and (x := number(m.setting.get(curve.over))) is not None
        and (y := m.figure(curve.figure)) is not None
        and y > 0  # no place for a state of 0 on a logarithmic axis
    )
    return Series(row, *map(list, zip(*points, strict=True))) if points else None  # type: ignore[arg-type]


def _chosen(curve: _Curve, measurements: Iterable[Measurement]) -> list[Measurement]:
    return [
        m
        for m in measurements
        if m.benchmark == curve.benchmark and all(m.setting.get(k) == v for k, v in curve.where.items())
    ]


def _length_maps(measurements: Iterable[Measurement], ids: Mapping[str, str]) -> list[Panel | HeatMap]:
    maps: list[Panel | HeatMap] = []
    for title, train_length, found in _tests_by_length(measurements):
        lengths = sorted({int(m.setting["length"]) for m in found})
        scores = {(m.name, int(m.setting["length"])): m.figure("accuracy") for m in found}
        names = [name for name in ids if any(m.name == name for m in found)]
        maps.append(
            HeatMap(
                LENGTH, ACCURACY, [str(n) for n in lengths], [ids[name] for name in names],
                [[scores.get((name, n)) for n in lengths] for name in names], title=_with_chance(title, found),
                trained=None if train_length is None else sum(n <= train_length for n in lengths),
            )
        )  # fmt: skip
    return maps


def _depth_maps(measurements: Iterable[Measurement], ids: Mapping[str, str]) -> list[Panel | HeatMap]:
    maps: list[Panel | HeatMap] = []
    for title, train_length, found in _tests_by_length(measurements):
        for name, row in ids.items():
            own = sorted((m for m in found if m.name == name), key=lambda m: int(m.setting["length"]))
            by_length = {int(m.setting["length"]): _slice(m, "depth") for m in own}
            by_length = {length: scores for length, scores in by_length.items() if scores}
            depths = _in_order({depth for scores in by_length.values() for depth in scores})
            if len(depths) > 1:
                maps.append(
                    HeatMap(
                        LENGTH, Axis("depth"), [str(n) for n in by_length], depths,
                        [[scores.get(depth) for scores in by_length.values()] for depth in depths],
                        title=f"{name}{': ' if title else ''}{title}", row=row,
                        trained=None if train_length is None else sum(n <= train_length for n in by_length),
                    )
                )  # fmt: skip
    return maps


def _tests_by_length(measurements: Iterable[Measurement]) -> list[tuple[str, float | None, list[Measurement]]]:
    """Tests of long contexts by what was trained: a title, the length in training, and the measurements."""
    groups: dict[tuple[Any, ...], tuple[dict[str, Any], list[Measurement]]] = {}
    for m in measurements:
        if m.benchmark == "long-context" and number(m.setting.get("length")) and m.figure("accuracy") is not None:
            setting = {k: v for k, v in _setting(m).items() if k != "length"}
            groups.setdefault(_key(setting), (setting, []))[1].append(m)
    every = [setting for setting, _ in groups.values()]
    return [
        (_title(str(setting.get("task") or ""), setting, every), number(setting.get("train_length")), found)
        for setting, found in groups.values()
    ]


def _with_chance(title: str, found: Iterable[Measurement]) -> str:
    """A title, with what chance gives where that is one figure."""
    known = {m.chance for m in found if m.chance is not None}
    return f"{title}{' ' if title else ''}(chance {known.pop():.0%})" if len(known) == 1 else title


def _mad_map(measurements: Sequence[Measurement], ids: Mapping[str, str]) -> list[Panel | HeatMap]:
    scores: dict[str, dict[str, float]] = {}
    for m in measurements:
        if m.benchmark == "mad" and m.setting.get("task") == "average" and m.status == OK:
            scores.setdefault(m.name, {}).update(_slice(m, "task"))
    tasks = sorted({task for by_task in scores.values() for task in by_task})
    names = [name for name in ids if scores.get(name)]
    if not tasks:
        return []
    values = [[scores[name].get(task) for task in tasks] for name in names]
    heads = [
        _with_chance(task, [m for m in measurements if m.benchmark == "mad" and m.setting.get("task") == task])
        for task in tasks
    ]
    return [HeatMap(Axis("task"), ACCURACY, heads, [ids[name] for name in names], values)]


def _bars(curve: _Curve, measurements: Iterable[Measurement], ids: Mapping[str, str]) -> list[Panel | HeatMap]:
    groups: dict[tuple[Any, ...], tuple[dict[str, Any], dict[str, float]]] = {}
    for m in _chosen(curve, measurements):
        value = m.figure(curve.figure)
        if value is not None:
            setting = _setting(m)
            groups.setdefault(_key(setting), (setting, {}))[1][m.name] = value
    every = [setting for setting, _ in groups.values()]
    return [
        Panel(
            "bars", curve.y, Axis(""), [Series(row, [values[name]], []) for name, row in ids.items() if name in values],
            title=_title(curve.y.title, setting, every),
        )
        for setting, values in groups.values()
    ]  # fmt: skip


def _slice(m: Measurement, name: str) -> dict[str, float]:
    slices = m.record.get("slices")
    by_value = slices.get(name) if isinstance(slices, dict) else None
    if not isinstance(by_value, dict):
        return {}
    scores = {v: number(f.get("accuracy")) for v, f in by_value.items() if isinstance(f, dict)}
    return {v: share for v, share in scores.items() if share is not None}


def _in_order(values: set[str]) -> list[str]:
    return sorted(values, key=float) if as_numbers(list(values)) else sorted(values)


def _setting(m: Measurement) -> dict[str, Any]:
    """What has to agree before figures compare."""
    own = {k: v for k, v in m.setting.items() if k not in _ASIDE and (k != _OF_SUBJECTS or MIXER in str(v))}
    return own | {k: v for k in _PLACE if (v := m.record.get(k)) is not None}


def _key(setting: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(sorted((k, str(v)) for k, v in setting.items()))


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
