"""The plots: each a function from runs to a matplotlib figure, or None where no run has the data for it.

All draw the runs in the leaderboard's order, so that a run looks the same in every plot and in the table. To add a
plot, write its function and enter it in `PLOTS`: the page and `save_plots` follow.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from zoo.report import units
from zoo.report.files import write_atomically
from zoo.report.leaderboard import ordered
from zoo.report.pareto import pareto_front
from zoo.report.runs import Run, labels
from zoo.report.style import FAINT, INK, Look, house_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WIDTH, _HEIGHT = 5.6, 3.5  # inches: small, so that text stays readable on a phone
_SECONDS = (0.1, 0.3, 1, 3, 10, 30, 60, 180, 600, 1800, 3600, 3 * 3600, 10 * 3600, 30 * 3600, 100 * 3600)


class Styled(NamedTuple):
    """A run with its label and its look."""

    run: Run
    label: str
    look: Look


class Plot(NamedTuple):
    """An entry of the gallery.

    Attributes:
        name: of the file and in links.
        title: a heading.
        caption: how to read it.
        draw: runs to figure, or None where there is nothing to draw.
        describe: the same in words, for those who hear the page.
    """

    name: str
    title: str
    caption: str
    draw: Callable[[Sequence[Run]], Figure | None]
    describe: Callable[[Sequence[Run]], str]


def accuracy_by_time(runs: Sequence[Run]) -> Figure | None:
    """Validation accuracy against seconds of training, on a logarithmic axis."""
    with house_style():
        drawn = _curves(runs, "validation", "seconds", "accuracy", positive_x=True)
        if drawn is None:
            return None
        figure, axes = drawn
        axes.set(xscale="log", xlabel="training time", ylabel="validation accuracy")
        _percent_axis(axes)
        low, high = axes.get_xlim()
        ticks = [t for t in _SECONDS if low <= t <= high]
        axes.set_xticks(ticks if len(ticks) > 1 else [low * 1.1, high / 1.1], minor=False)
        axes.xaxis.set_major_formatter(lambda x, _: units.duration(x))
        axes.minorticks_off()
        return figure


def accuracy_by_tokens(runs: Sequence[Run]) -> Figure | None:
    """Validation accuracy against tokens trained."""
    with house_style():
        drawn = _curves(runs, "validation", "tokens", "accuracy")
        if drawn is None:
            return None
        figure, axes = drawn
        axes.set(xlabel="tokens trained", ylabel="validation accuracy")
        axes.xaxis.set_major_formatter(lambda x, _: units.count(max(x, 0)))
        _percent_axis(axes)
        return figure


def loss_curves(runs: Sequence[Run]) -> Figure | None:
    """Training loss, a running mean, against tokens trained, on a logarithmic axis."""
    with house_style():
        drawn = _curves(runs, "train", "tokens", "loss", smooth=True)
        if drawn is None:
            return None
        figure, axes = drawn
        axes.set(xlabel="tokens trained", ylabel="training loss")
        axes.xaxis.set_major_formatter(lambda x, _: units.count(max(x, 0)))
        if min(min(line.get_ydata(), default=1) for line in axes.lines) > 0:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
            axes.yaxis.set_minor_formatter(lambda y, _: "")
        return figure


def accuracy_by_state(runs: Sequence[Run]) -> Figure | None:
    """Accuracy against bytes of state, with the Pareto front: what nothing smaller does as well."""
    points = _with(_styled(runs), "state_bytes", "accuracy")
    points = [(s, (size, accuracy)) for s, (size, accuracy) in points if size > 0]  # 0 has no place on a log axis
    if not points:
        return None
    with house_style():
        figure, axes = _figure()
        axes.set(xscale="log", xlabel="state of one sequence", ylabel="accuracy")
        front = [points[i][1] for i in pareto_front([at for _, at in points])]
        sizes = [size for _, (size, _) in points]
        low, high = min(sizes) / 1.8, max(sizes) * 1.8
        steps = [(front[0][0], 0.0), *front, (high, front[-1][1])]
        corners = [corner for (_, below), (x, y) in pairwise(steps) for corner in ((x, below), (x, y))]
        axes.plot(*zip(*corners, strict=True), color=FAINT, linewidth=1.2, linestyle=(0, (4, 2)), zorder=1, gid="front")
        for i, (styled, (x, y)) in enumerate(points):
            axes.plot(x, y, marker=styled.look.marker, color=styled.look.colour, markersize=9, linestyle="none",
                      markeredgecolor="white", gid=f"run-{i}", clip_on=False, zorder=3)  # fmt: skip
        axes.set_xlim(low, high)
        _percent_axis(axes)
        _size_axis(axes)
        _label_points(figure, axes, [(styled.label, x, y) for styled, (x, y) in points], corners)
        return figure


def throughput(runs: Sequence[Run]) -> Figure | None:
    """Tokens a second in training and in decoding, as bars."""
    panels = [("tokens_per_second", "training, tokens/s"), ("decode_tokens_per_second", "decoding, tokens/s")]
    return _bars(runs, panels, units.count)


def memory(runs: Sequence[Run]) -> Figure | None:
    """Peak memory of training and the state of one sequence, as bars."""
    return _bars(runs, [("peak_memory_bytes", "peak while training"), ("state_bytes", "state of one sequence")], units.size)


def accuracy_by_slice(runs: Sequence[Run]) -> Figure | None:
    """Accuracy by length, number of pairs or whatever the task slices by, one panel for each that has several values."""
    panels = slices_of(runs)
    if not panels:
        return None
    with house_style():
        from matplotlib.figure import Figure

        styled = _styled(runs)
        figure = Figure(figsize=(_WIDTH, _HEIGHT * len(panels)), layout="constrained")
        rows = figure.subplots(len(panels), 1, squeeze=False)
        for axes, (name, values) in zip(rows[:, 0], panels.items(), strict=True):
            numeric = _numbers(values)
            at = dict(zip(values, numeric or range(len(values)), strict=True))
            for i, s in enumerate(styled):
                scores = _slice_scores(s.run, name)
                shown = [v for v in values if v in scores]
                if shown:
                    axes.plot([at[v] for v in shown], [scores[v] for v in shown],
                              gid=f"run-{i}-{name}", clip_on=False, **s.look.line(len(shown)))  # fmt: skip
            axes.set(xlabel=name.replace("_", " "), ylabel="accuracy")
            if numeric and numeric[0] > 0 and numeric[-1] / numeric[0] >= 16:
                axes.set_xscale("log")
                axes.minorticks_off()
            if len(values) <= 10:
                axes.set_xticks(list(at.values()), list(at))
            else:
                axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
            _percent_axis(axes)
        _legend(figure, styled)
        return figure


def slices_of(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Slices with several values, and those values, in numeric order where they are numbers."""
    found: dict[str, set[str]] = {}
    for run in runs:
        slices = run.scores()[0].get("slices")
        for name in slices if isinstance(slices, dict) else ():
            found.setdefault(name, set()).update(_slice_scores(run, name))

    def order(values: set[str]) -> list[str]:
        try:
            return sorted(values, key=float)
        except ValueError:
            return sorted(values)

    return {name: order(values) for name, values in found.items() if len(values) > 1}


def _numbers(values: list[str]) -> list[float] | None:
    try:
        return [float(v) for v in values]
    except ValueError:
        return None


def _slice_scores(run: Run, name: str) -> dict[str, float]:
    slices = run.scores()[0].get("slices")
    by_value = slices.get(name) if isinstance(slices, dict) else None
    if not isinstance(by_value, dict):
        return {}
    scores = {v: units.number(f.get("accuracy")) for v, f in by_value.items() if isinstance(f, dict)}
    return {v: a for v, a in scores.items() if a is not None}


def _styled(runs: Sequence[Run]) -> list[Styled]:
    runs = ordered(runs)
    shortened = [label if len(label) <= 30 else label[:14] + "…" + label[-15:] for label in labels(runs)]
    return [Styled(run, label, Look.of(i)) for i, (run, label) in enumerate(zip(runs, shortened, strict=True))]


def _with(styled: Sequence[Styled], *keys: str) -> list[tuple[Styled, tuple[float, ...]]]:
    found = [(s, tuple(s.run.figure(key) for key in keys)) for s in styled]
    return [(s, figures) for s, figures in found if None not in figures]  # type: ignore[misc]


def _figure() -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, _HEIGHT), layout="constrained")
    return figure, figure.subplots()


def _curves(
    runs: Sequence[Run], split: str, x: str, y: str, *, positive_x: bool = False, smooth: bool = False
) -> tuple[Figure, Axes] | None:
    figure, axes = _figure()
    drawn = []
    for i, styled in enumerate(_styled(runs)):
        xs, ys = styled.run.series(split, x, y)
        if smooth:
            ys = running_mean(ys, max(1, len(ys) // 40))
        kept = [(a, b) for a, b in zip(xs, ys, strict=True) if a > 0 or not positive_x]
        if kept:
            xs, ys = zip(*_thin(kept), strict=True)
            axes.plot(xs, ys, gid=f"run-{i}", clip_on=False, **styled.look.line(len(xs)))
            drawn.append(styled)
    if not drawn:
        return None
    _legend(figure, drawn)
    return figure, axes


def running_mean(values: Sequence[float], width: int) -> list[float]:
    """Mean of the last `width` values at each place, of fewer at the start."""
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    return [(sums[i + 1] - sums[max(0, i + 1 - width)]) / min(i + 1, width) for i in range(len(values))]


def _thin(points: list[tuple[float, float]], most: int = 400) -> list[tuple[float, float]]:
    """At most about `most` points, the last one among them: more would only make the page heavy."""
    step = math.ceil(len(points) / most)
    return points[(len(points) - 1) % step :: step]


def _bars(runs: Sequence[Run], panels: list[tuple[str, str]], text: Callable[[float], str]) -> Figure | None:
    styled = _styled(runs)
    panels = [(key, title) for key, title in panels if any(s.run.figure(key) is not None for s in styled)]
    if not panels:
        return None
    with house_style():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(_WIDTH, 0.9 + 0.36 * len(styled)), layout="constrained")
        row = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axes, (key, title) in zip(row, panels, strict=True):
            values = [s.run.figure(key) for s in styled]
            bars = axes.barh(range(len(styled)), [v or 0 for v in values], 0.62, color=[s.look.colour for s in styled])
            axes.bar_label(bars, [units.MISSING if v is None else text(v) for v in values], padding=4, color=INK, fontsize=9.5)
            axes.set_title(title, color=FAINT)
            axes.margins(x=0.34)  # room for the figures
            axes.set_xticks([])
            axes.grid(visible=False)
            axes.spines["bottom"].set_visible(False)
        row[0].set_yticks(range(len(styled)), [s.label for s in styled], color=INK)
        row[0].invert_yaxis()
        return figure


def _legend(figure: Figure, styled: Sequence[Styled]) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], **{**s.look.line(1), "markevery": None}) for s in styled]
    columns = max(1, min(len(styled), 80 // (8 + max(len(s.label) for s in styled))))
    figure.set_figheight(figure.get_figheight() + 0.2 * math.ceil(len(styled) / columns))
    figure.legend(
        handles, [s.label for s in styled], loc="outside lower left", ncols=columns, handlelength=2.6, columnspacing=1.6
    )


def _percent_axis(axes: Axes) -> None:
    axes.set_ylim(0, 1.02)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
    axes.yaxis.set_major_formatter(lambda y, _: f"{100 * y:.0f}%")


def _size_axis(axes: Axes) -> None:
    low, high = axes.get_xlim()
    powers = range(math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1)
    axes.set_xticks([2**p for p in powers][:: math.ceil(len(powers) / 6) or 1], minor=False)
    axes.xaxis.set_major_formatter(lambda x, _: units.size(x))
    axes.minorticks_off()


def _label_points(
    figure: Figure, axes: Axes, points: list[tuple[str, float, float]], line: list[tuple[float, float]]
) -> None:
    """Names beside their points, each at the first place around its point where it covers no other thing or `line`."""
    from matplotlib.transforms import Bbox

    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # what is measured now must not move any more
    renderer = figure._get_renderer()  # type: ignore[attr-defined]
    limits = axes.get_window_extent(renderer)
    pixels = [axes.transData.transform((x, y)) for _, x, y in points]
    marks = [Bbox.from_bounds(px - 5, py - 5, 10, 10) for px, py in pixels]
    taken = [*marks, *(Bbox(pair).padded(1) for pair in pairwise(axes.transData.transform(line)))]
    for (label, x, y), own in zip(points, marks, strict=True):
        for dx, dy, side in _places():
            text = axes.annotate(label, (x, y), (dx, dy), textcoords="offset points", ha=side, va="center", fontsize=9.5)
            box = text.get_window_extent(renderer).padded(1)
            inside = limits.x0 <= box.x0 and box.x1 <= limits.x1 and limits.y0 <= box.y0 and box.y1 <= limits.y1
            if inside and not any(box.overlaps(other) for other in taken if other is not own):
                break
            text.remove()
        else:  # no room at all: better above another than nowhere
            text = axes.annotate(label, (x, y), (9, 0), textcoords="offset points", va="center", fontsize=9.5)
            box = text.get_window_extent(renderer)
        taken.append(box)


def _places() -> Iterator[tuple[float, float, str]]:
    """Offsets in points and the side of the text that meets them, the best first."""
    yield from ((9, 0, "left"), (-9, 0, "right"))
    for dy in range(11, 80, 11):
        yield from ((0, -dy, "center"), (9, -dy, "left"), (-9, -dy, "right"), (0, dy, "center"), (9, dy, "left"), (-9, dy, "right"))


def _ends(x: str, unit: Callable[[float], str], what: str, split: str = "validation", y: str = "accuracy"):
    """A description that says where each curve ends."""

    def describe(runs: Sequence[Run]) -> str:
        parts = []
        for s in _styled(runs):
            xs, ys = s.run.series(split, x, y)
            if xs:
                value = units.percent(ys[-1]) if y == "accuracy" else f"{ys[-1]:.3g}"
                parts.append(f"{s.label} ends at {value} after {unit(xs[-1])}")
        return f"Line plot of {what}: {'; '.join(parts)}."

    return describe


def _values(what: str, **keys: Callable[[float], str]):
    """A description that lists the figures of each run."""

    def describe(runs: Sequence[Run]) -> str:
        parts = []
        for s in _styled(runs):
            shown = [text(v) for key, text in keys.items() if (v := s.run.figure(key)) is not None]
            if shown:
                parts.append(f"{s.label} {', '.join(shown)}")
        return f"{what}: {'; '.join(parts)}."

    return describe


def _describe_slices(runs: Sequence[Run]) -> str:
    parts = []
    for name, values in slices_of(runs).items():
        for s in _styled(runs):
            scores = _slice_scores(s.run, name)
            if scores:
                worst = min(scores, key=lambda v: scores[v])
                parts.append(f"{s.label} is weakest at {name} {worst} with {units.percent(scores[worst])}")
    return f"Line plot of accuracy by slice: {'; '.join(parts)}."


PLOTS = (
    Plot(
        "accuracy-by-time", "Accuracy against training time",
        "Validation accuracy as the clock runs (logarithmic). Further left is sooner.",
        accuracy_by_time, _ends("seconds", units.duration, "validation accuracy against training time"),
    ),
    Plot(
        "accuracy-by-tokens", "Accuracy against tokens",
        "The same against tokens trained: speed of the machine aside, who learns from less?",
        accuracy_by_tokens, _ends("tokens", lambda x: f"{units.count(x)} tokens", "validation accuracy against tokens"),
    ),
    Plot(
        "loss", "Training loss",
        "A running mean of the training loss, on a logarithmic scale.",
        loss_curves, _ends("tokens", lambda x: f"{units.count(x)} tokens", "training loss", "train", "loss"),
    ),
    Plot(
        "accuracy-by-state", "Accuracy against state size",
        "What a model carries from token to token (logarithmic), and what it makes of it. "
        "The dashed line is the Pareto front: on it, nothing smaller does as well.",
        accuracy_by_state, _values("Scatter plot of state and accuracy", state_bytes=units.size, accuracy=units.percent),
    ),
    Plot(
        "throughput", "Throughput",
        "Tokens a second: many at once in training, one after another in decoding. Longer is better.",
        throughput,
        _values("Bars of training and decoding speed in tokens a second",
                tokens_per_second=units.count, decode_tokens_per_second=units.count),
    ),
    Plot(
        "memory", "Memory",
        "Most memory in use while training, and the state that one sequence carries. Shorter is better.",
        memory,
        _values("Bars of peak training memory and state", peak_memory_bytes=units.size, state_bytes=units.size),
    ),
    Plot(
        "accuracy-by-slice", "Accuracy by slice",
        "The same score, split by how hard the example is.",
        accuracy_by_slice, _describe_slices,
    ),
)  # fmt: skip
"""The gallery, in the order of the page."""


def save_plots(runs: Sequence[Run], folder: str | Path, formats: Sequence[str] = ("png", "svg")) -> list[Path]:
    """Every plot that the runs have data for, as files with a title, overwriting older ones.

    Raises:
        UsageError: the folder cannot be written.
    """
    written = []
    for plot in PLOTS:
        figure = plot.draw(runs)
        if figure is None:
            continue
        with house_style():
            # Above the figure's edge, where no layout can put anything in its way: "tight" makes room.
            figure.text(0.02, 1.01, plot.title, weight="bold", size=12)
            for suffix in formats:
                out = io.BytesIO()
                plain = {"Date": None} if suffix == "svg" else None  # the same runs give the same file
                figure.savefig(out, format=suffix, dpi=200, facecolor="white", bbox_inches="tight", metadata=plain)
                written.append(write_atomically(Path(folder) / f"{plot.name}.{suffix}", out.getvalue()))
    return written
