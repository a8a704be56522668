"""A figure for each benchmark: curves over length, heat maps of what was recalled."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from zoo.benchmarks.cells import chance_in, distinct, short
from zoo.benchmarks.long_context import by_depth
from zoo.benchmarks.mad import AVERAGE, column, headed
from zoo.benchmarks.records import OK, Record
from zoo.report.style import Look, house_style
from zoo.report.units import count, size

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Panel = tuple[str, str, str, Callable[[Record], bool]]  # title, setting on the x axis, figure, which records


def curves(found: Sequence[Record], panels: Sequence[Panel]) -> Figure:
    """Medians of each subject over a setting, both axes logarithmic, with bars from quartile to quartile."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    names = list(dict.fromkeys(r.label for r in found))
    looks = {name: Look.of(i) for i, name in enumerate(names)}
    height = max(4.0, 0.22 * len(names) + 0.6)
    figure = Figure(figsize=(4.6 * len(panels) + 2.2, height), layout="constrained")
    for axes, (title, x, y, wanted) in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels, strict=True):
        rows = [r for r in found if wanted(r) and r.status == OK and y in r.figures and r.figures[y]["value"] > 0]
        for name in dict.fromkeys(r.label for r in rows):
            points = sorted(((r.setting[x], r.figures[y]) for r in rows if r.label == name), key=lambda p: p[0])
            at = [p[0] for p in points]
            middle = [p[1]["value"] for p in points]
            low, high = ([p[1][k] for p in points] for k in ("low", "high"))
            spread = np.maximum(0, [np.subtract(middle, low), np.subtract(high, middle)])
            axes.plot(at, middle, label=name, **looks[name].line(len(at)))
            axes.errorbar(at, middle, yerr=spread, fmt="none", ecolor=looks[name].colour, elinewidth=0.8)
        ticks = sorted({r.setting[x] for r in rows})
        axes.set(title=title, xlabel=x, xscale="log", yscale="log")
        axes.set_xticks(ticks, [short(t) for t in ticks])
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(lambda value, _, y=y: size(value) if y.endswith("bytes") else count(value))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_minor_formatter(NullFormatter())
    handles: dict[str, Any] = {}
    for axes in figure.axes:
        handles |= {name: h for h, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside right center")
    return figure


def heat_map(axes: Any, values: dict[tuple[Any, Any], float], rows: Sequence[Any], columns: Sequence[Any]) -> None:
    """Shares from 0 to 1 in colours that differ in lightness too, each with its number; what is missing stays white."""
    table = np.array([[values.get((row, column), math.nan) for column in columns] for row in rows])
    axes.imshow(table, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    for (i, j), value in np.ndenumerate(table):
        if not math.isnan(value):
            colour = "white" if value < 0.6 else "black"
            axes.text(j, i, f"{100 * value:.0f}", ha="center", va="center", color=colour, fontsize=7.5)
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.grid(False)


def by_length_and_depth(found: Sequence[Record]) -> Figure:
    """Accuracy by length for all subjects, and by depth and length for each where the task tells the depth."""
    from matplotlib.figure import Figure

    tests = [r for r in found if r.setting["length"] and r.figures]
    names, lengths = list(dict.fromkeys(r.label for r in tests)), sorted(distinct(tests, "length"))
    whole = {(r.label, r.setting["length"]): r.figures["accuracy"]["value"] for r in tests}
    depths = by_depth(tests)
    across = 4
    down = -(-len(depths) // across)
    high = 0.3 * len(names) + 1.2
    figure = Figure(figsize=(11, high + 2.4 * down), layout="constrained")
    parts: Any = figure.subfigures(1 + bool(depths), 1, height_ratios=[high, 2.4 * down][: 1 + bool(depths)])
    top, *bottom = np.ravel(parts)
    axes = top.subplots()
    heat_map(axes, whole, names, lengths)
    axes.set_xticklabels([short(n) for n in lengths])
    chance = chance_in(tests)
    told = f" ({chance}); models that had learned" if chance else "; models that had learned"
    axes.set(title=f"Accuracy in percent by length of the test{told}", xlabel="length")
    if bottom:
        grid = bottom[0].subplots(down, across, squeeze=False, sharex=True, sharey=True)
        levels = sorted({depth for values in depths.values() for depth, _ in values}, key=_as_number)
        for axes, (name, values) in zip(grid.flat, depths.items(), strict=False):
            heat_map(axes, values, levels, lengths)
            axes.set_xticklabels([short(n) for n in lengths])
            axes.set_title(name)
        for axes in grid.flat[len(depths) :]:
            axes.axis("off")
        bottom[0].supylabel("depth of the needle, in tenths")
    return figure


def _as_number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.inf


def averages(found: Sequence[Record]) -> Figure:
    """Accuracy of each subject at each task, and the averages; where there are any, the best of them on top."""
    from matplotlib.figure import Figure

    rows = [r for r in found if r.figures and column(r) is not None]
    tasks = list(dict.fromkeys(column(r) for r in sorted(rows, key=lambda r: r.setting["task"] == AVERAGE)))
    means: dict[tuple[Any, Any], list[float]] = {}
    for r in rows:
        means.setdefault((r.label, column(r)), []).append(r.figures["accuracy"]["value"])
    values = {key: sum(v) / len(v) for key, v in means.items()}
    averaged = [t for t in tasks if t is not None and t.startswith(AVERAGE)][-1:]
    names = sorted(dict.fromkeys(r.label for r in rows), key=lambda n: [-values.get((n, t), -1.0) for t in averaged])
    figure = Figure(figsize=(1.25 * len(tasks) + 2, 0.3 * len(names) + 1.4), layout="constrained")
    axes = figure.subplots()
    heat_map(axes, values, names, tasks)
    heads = [headed([r for r in rows if column(r) == t]).get(t) or f"{t}" for t in tasks]
    axes.set_xticklabels([head.replace("_", "\n").replace(", ", ",\n").replace(" (", "\n(") for head in heads])
    axes.set(title="MAD: test accuracy in percent")
    return figure


def _throughput(found: Sequence[Record]) -> Figure:
    panels: list[Panel] = []
    for compiled in distinct(found, "compiled"):
        for direction, title in (("train", "Training"), ("forward", "Forward")):
            at = {"direction": direction, "compiled": compiled}
            what = f"{title}{', compiled' if compiled else ''}: tokens/s"
            panels.append((what, "length", "tokens_per_second", _in(at)))
    return curves(found, panels)


def _in(setting: Mapping[str, Any]) -> Callable[[Record], bool]:
    return lambda r: setting.items() <= r.setting.items()


def figure_of(benchmark: str, found: Iterable[Record]) -> Figure | None:
    """The figure of a benchmark's records, of the first width where there are several; None without figures."""
    found = list(found)
    widths = distinct(found, "width")
    found = [r for r in found if r.setting["width"] == widths[0]] if widths else []
    if not any(r.figures for r in found):
        return None
    with house_style():
        match benchmark:
            case "throughput":
                return _throughput(found)
            case "memory":
                peak: Panel = ("Training: peak bytes", "length", "peak_bytes", _in({"part": "training"}))
                return curves(found, [peak, ("State: bytes", "length", "state_bytes", _in({"part": "state"}))])
            case "decode":
                titles = {"prefill": "Prefill: tokens/s", "step": "Decoding: tokens/s"}
                return curves(found, [(t, "context", "tokens_per_second", _in({"part": p})) for p, t in titles.items()])
            case "long-context":
                return by_length_and_depth(found)
            case _:
                return averages(found)


def svg(benchmark: str, figure: Figure) -> str:
    """The figure as SVG; the same records give the same text."""
    from matplotlib import rcParams

    out = io.StringIO()
    with house_style():
        rcParams["svg.hashsalt"] = benchmark
        figure.savefig(out, format="svg", facecolor="white", metadata={"Date": None})
    return "\n".join(line.rstrip() for line in out.getvalue().rstrip("\n").split("\n")) + "\n"
