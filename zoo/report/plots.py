"""The plots: each a function from runs to a matplotlib figure, or None where no run has the data for it.

All draw the runs in the leaderboard's order, so that a run looks the same in every plot and in the table. To add a
plot, write its function and enter it in `PLOTS`: the page and `save_plots` follow.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from zoo.report import descriptions, drawing, units
from zoo.report.files import write_atomically
from zoo.report.pareto import pareto_front
from zoo.report.runs import Run
from zoo.report.slices import as_numbers, slice_scores, slices_of
from zoo.report.style import FAINT, house_style

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
        drawn = drawing.curves(runs, "validation", "seconds", "accuracy", positive_x=True)
        if drawn is None:
            return None
        figure, axes = drawn
        axes.set_ylabel("validation accuracy")
        drawing.percent_axis(axes)
        drawing.seconds_axis(axes)
        return figure


def accuracy_by_tokens(runs: Sequence[Run]) -> Figure | None:
    """Validation accuracy against tokens trained."""
    with house_style():
        drawn = drawing.curves(runs, "validation", "tokens", "accuracy")
        if drawn is None:
            return None
        figure, axes = drawn
        axes.set_ylabel("validation accuracy")
        drawing.percent_axis(axes)
        drawing.tokens_axis(axes)
        return figure


def loss_curves(runs: Sequence[Run]) -> Figure | None:
    """Training loss, a running mean, against tokens trained."""
    with house_style():
        drawn = drawing.curves(runs, "train", "tokens", "loss", smooth=True)
        if drawn is None:
            return None
        figure, axes = drawn
        axes.set_ylabel("training loss")
        drawing.loss_axis(axes)
        drawing.tokens_axis(axes)
        return figure


def accuracy_by_state(runs: Sequence[Run]) -> Figure | None:
    """Accuracy against bytes of state, with the Pareto front: what nothing smaller does as well."""
    points = []
    for i, each in enumerate(drawing.styled(runs)):
        size, accuracy = each.run.figure("state_bytes"), each.run.figure("accuracy")
        if size and accuracy is not None:  # a state of 0 has no place on a logarithmic axis
            points.append((i, each, (size, accuracy)))
    if not points:
        return None
    with house_style():
        figure, axes = drawing.new_figure()
        axes.set(xscale="log", xlabel="state of one sequence", ylabel="accuracy")
        sizes = [size for _, _, (size, _) in points]
        low, high = min(sizes) / 1.8, max(sizes) * 1.8
        front = [points[i][2] for i in pareto_front([at for _, _, at in points])]
        steps = [(front[0][0], 0.0), *front, (high, front[-1][1])]
        corners = [corner for (_, below), (x, y) in pairwise(steps) for corner in ((x, below), (x, y))]
        axes.plot(*zip(*corners, strict=True), color=FAINT, linewidth=1.2, linestyle=(0, (4, 2)), zorder=1, gid="front")
        for i, each, (x, y) in points:
            look = each.look.line(1) | {"linestyle": "none", "markersize": 9, "zorder": 3}
            axes.plot(x, y, gid=f"run-{i}", clip_on=False, **look)
        axes.set_xlim(low, high)
        drawing.percent_axis(axes)
        drawing.size_axis(axes)
        drawing.legend(figure, [each for _, each, _ in points], lines=False)
        return figure


def throughput(runs: Sequence[Run]) -> Figure | None:
    """Tokens a second in training and in decoding, as bars."""
    panels = [("tokens_per_second", "training, tokens/s"), ("decode_tokens_per_second", "decoding, tokens/s")]
    with house_style():
        return drawing.bars(runs, panels, units.count)


def memory(runs: Sequence[Run]) -> Figure | None:
    """Peak memory of training and the state of one sequence, as bars."""
    with house_style():
        return drawing.bars(runs, [("peak_memory_bytes", "peak while training"), ("state_bytes", "state")], units.size)


def accuracy_by_slice(runs: Sequence[Run]) -> Figure | None:
    """Accuracy by length, number of pairs or whatever else the task slices by: a panel for each with several values."""
    panels = slices_of(runs)
    if not panels:
        return None
    with house_style():
        from matplotlib.figure import Figure

        styled = drawing.styled(runs)
        figure = Figure(figsize=(drawing.WIDTH, drawing.HEIGHT * len(panels)), layout="constrained")
        rows = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
        for panel, (axes, (name, values)) in enumerate(zip(rows, panels.items(), strict=True)):
            numbers = as_numbers(values)
            at = dict(zip(values, numbers or range(len(values)), strict=True))
            for i, each in enumerate(styled):
                scores = slice_scores(each.run, name)
                xs = [at[v] for v in values if v in scores]
                ys = [scores[v] for v in values if v in scores]
                if xs:
                    axes.plot(xs, ys, gid=f"run-{i}-{panel}", clip_on=False, **each.look.line(len(xs)))
            axes.set(xlabel=name.replace("_", " "), ylabel="accuracy")
            if numbers and 0 < 16 * numbers[0] <= numbers[-1]:
                axes.set_xscale("log")
                axes.minorticks_off()
            if len(values) <= 10:
                axes.set_xticks(list(at.values()), list(at))
            else:
                axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
            drawing.percent_axis(axes)
        drawing.legend(figure, styled)
        return figure


def _tokens(n: float) -> str:
    return f"{units.count(n)} tokens"


PLOTS = (
    Plot(
        "accuracy-by-time", "Accuracy against training time",
        "Validation accuracy as the clock runs (logarithmic). Further left is sooner.",
        accuracy_by_time, descriptions.ends("validation accuracy against training time", "seconds", units.duration),
    ),
    Plot(
        "accuracy-by-tokens", "Accuracy against tokens",
        "The same against tokens trained: speed of the machine aside, who learns from less?",
        accuracy_by_tokens, descriptions.ends("validation accuracy against tokens", "tokens", _tokens),
    ),
    Plot(
        "loss", "Training loss",
        "What training brought down: a running mean of the loss.",
        loss_curves, descriptions.ends("training loss", "tokens", _tokens, split="train", y="loss"),
    ),
    Plot(
        "accuracy-by-state", "Accuracy against state size",
        "What a model carries from token to token (logarithmic), and what it makes of it. "
        "The dashed line is the Pareto front: on it, nothing smaller does as well.",
        accuracy_by_state,
        descriptions.values("Scatter plot of state and accuracy", state_bytes=units.size, accuracy=units.percent),
    ),
    Plot(
        "throughput", "Throughput",
        "Tokens a second: many at once in training, one after another in decoding. Longer is better.",
        throughput,
        descriptions.values("Bars of training and decoding speed in tokens a second",
                            tokens_per_second=units.count, decode_tokens_per_second=units.count),
    ),
    Plot(
        "memory", "Memory",
        "Most memory in use while training, and the state that one sequence carries. Shorter is better.",
        memory,
        descriptions.values("Bars of peak memory and state", peak_memory_bytes=units.size, state_bytes=units.size),
    ),
    Plot(
        "accuracy-by-slice", "Accuracy by slice",
        "The same score, split by how hard the example is.",
        accuracy_by_slice, descriptions.weakest_slices,
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
