"""The plots of runs: each a function from runs to panels, none where no run has the data for it.

To add a plot, write its function and enter it in `PLOTS`: the page and `save_plots` follow.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from zoo.report import units
from zoo.report.charts import Axis, Chart, HeatMap, Panel, Row, Series, running_mean, thinned
from zoo.report.labels import labels
from zoo.report.leaderboard import ordered
from zoo.report.runs import Run
from zoo.report.slices import as_numbers, slice_scores, slices_of

TIME = Axis("training time", "duration", log=True)
TOKENS = Axis("tokens trained", "count")
VALIDATION = Axis("validation accuracy", "percent")
ACCURACY = Axis("accuracy", "percent")
ERROR = Axis("error, as a share of the trivial predictor's", "percent")
STATE = Axis("state of one sequence", "size", log=True)

_LENGTHS = re.compile(r"len|distance|depth|hops|position")
_ASIDE = re.compile(r"vocab_size|max_len|seed|steps$|_every$|_seconds$|_rows$|time_budget|threads|keep|eval_")
_PROGRESS = {"seconds": TIME, "tokens": TOKENS}
_SETTINGS = 4  # the most settings that are worth a panel each


class Plot(NamedTuple):
    """An entry of the gallery: a name for links and files, a heading, how to read it, and its panels."""

    name: str
    title: str
    caption: str
    panels: Callable[[Sequence[Run]], list[Panel | HeatMap]]


def rows_of(runs: Sequence[Run]) -> list[Row]:
    """A row for each run, in the leaderboard's order."""
    runs = ordered(runs)
    return [Row(f"run-{i}", label, i) for i, label in enumerate(labels(runs))]


def charts(runs: Sequence[Run]) -> list[Chart]:
    """Every plot that the runs have data for."""
    runs = ordered(runs)
    drawn = [Chart(plot.name, plot.title, plot.caption, plot.panels(runs)) for plot in PLOTS]
    return [chart for chart in drawn if chart.panels]


def accuracy_by_state(runs: Sequence[Run]) -> list[Panel | HeatMap]:
    """Accuracy against bytes of state, with the Pareto front: what nothing smaller does as well."""
    series = _points(runs, "state_bytes", "accuracy")  # a state of 0 has no place on a logarithmic axis
    return [Panel("points", STATE, ACCURACY, series, front=True)] if series else []


def accuracy_by_time(runs: Sequence[Run]) -> list[Panel | HeatMap]:
    """Validation accuracy against seconds of training."""
    return _curves(runs, "validation", "seconds", "accuracy", TIME, VALIDATION)


def accuracy_by_tokens(runs: Sequence[Run]) -> list[Panel | HeatMap]:
    """Validation accuracy against tokens trained."""
    return _curves(runs, "validation", "tokens", "accuracy", TOKENS, VALIDATION)


def error_by_time(runs: Sequence[Run]) -> list[Panel | HeatMap]:
    """Validation error against seconds of training, and against tokens."""
    found = [_curves(runs, "validation", x, "mse_ratio", axis, ERROR) for x, axis in _PROGRESS.items()]
    return [panel for panels in found for panel in panels]


def error_by_state(runs: Sequence[Run]) -> list[Panel | HeatMap]:
    """Error against bytes of state."""
    series = _points(runs, "state_bytes", "mse_ratio")
    return [Panel("points", STATE, ERROR, series)] if series else []


def loss_curves(runs: Sequence[Run]) -> list[Panel | HeatMap]:
    """Training loss, a running mean, against tokens trained; logarithmic where it is positive and falls far."""
    (panel,) = _curves(runs, "train", "tokens", "loss", TOKENS, Axis("training loss"), smooth=True) or [None]
    if panel is None:
        return []
    losses = [y for series in panel.series for y in series.y]
    loss = Axis("training loss", log=0 < 5 * min(losses) < max(losses))
    return [Panel("lines", TOKENS, loss, panel.series)]


def throughput(runs: Sequence[Run]) -> list[Panel | HeatMap]:
    """Tokens a second in training and in decoding."""
    return _bars(runs, "count", tokens_per_second="training, tokens/s", decode_tokens_per_second="decoding, tokens/s")


def memory(runs: Sequence[Run]) -> list[Panel | HeatMap]:
    """Peak memory of training and the state of one sequence."""
    return _bars(runs, "size", peak_memory_bytes="peak while training", state_bytes="state of one sequence")


def accuracy_by_slice(runs: Sequence[Run]) -> list[Panel | HeatMap]:
    """Accuracy by number of pairs, difficulty, or whatever else the task slices by in numbers."""
    panels: list[Panel | HeatMap] = []
    for name, values in slices_of(runs).items():
        numbers = as_numbers(values)
        if not numbers:
            continue
        series = []
        for i, run in enumerate(runs):
            scores = slice_scores(run, name)
            if scores:
                known = [(x, scores[v]) for x, v in zip(numbers, values, strict=True) if v in scores]
                series.append(Series(f"run-{i}", *map(list, zip(*known, strict=True))))  # type: ignore[arg-type]
        axis = Axis(name.replace("_", " "), log=0 < 16 * numbers[0] <= numbers[-1])
        panels.append(Panel("lines", axis, ACCURACY, series))
    return panels


def accuracy_by_length(runs: Sequence[Run]) -> list[Panel | HeatMap]:
    """Heat maps of accuracy by length: of slices that are lengths or distances, and of `accuracy_32`, `accuracy_64`."""
    maps: list[Panel | HeatMap] = [
        _heat_map(name.replace("_", " "), values, {i: slice_scores(run, name) for i, run in enumerate(runs)}, None)
        for name, values in slices_of(runs).items()
        if _LENGTHS.search(name) or as_numbers(values) is None
    ]
    scores = {i: _by_length(run) for i, run in enumerate(runs)}
    lengths = sorted({length for by_length in scores.values() for length in by_length}, key=int)
    if len(lengths) > 1:
        trained = {v for i in scores if scores[i] and (v := units.number(runs[i].section("task").get("length")))}
        within = sum(int(length) <= min(trained) for length in lengths) if len(trained) == 1 else None
        maps.append(_heat_map("length", lengths, scores, within))
    return maps


def accuracy_by_setting(runs: Sequence[Run]) -> list[Panel | HeatMap]:
    """Accuracy against each number of the config that was swept: learning rate, width, number of heads."""
    settings = [_numbers({k: v for k, v in run.config.items() if k in ("model", "train")}) for run in runs]
    panels: list[Panel | HeatMap] = []
    for key in dict.fromkeys(key for numbers in settings for key in numbers):
        values = [numbers.get(key) for numbers in settings]
        distinct = {v for v in values if v is not None}
        if len(distinct) < 3 or len(panels) == _SETTINGS or _ASIDE.search(key):
            continue
        series = [
            Series(f"run-{i}", [x], [y])
            for i, (run, x) in enumerate(zip(runs, values, strict=True))
            if x is not None and (y := run.figure("accuracy")) is not None
        ]
        if len(series) > 2:
            axis = Axis(key, log=0 < 4 * min(distinct) <= max(distinct))
            panels.append(Panel("points", axis, ACCURACY, series, sweep=True))
    return panels


def _curves(
    runs: Sequence[Run], split: str, x: str, y: str, x_axis: Axis, y_axis: Axis, *, smooth: bool = False
) -> list[Any]:
    series = []
    for i, run in enumerate(runs):
        xs, ys = run.series(split, x, y)
        if smooth:
            ys = running_mean(ys, max(1, len(ys) // 40))
        points = thinned([(a, b) for a, b in zip(xs, ys, strict=True) if a > 0 or not x_axis.log])
        if points:
            series.append(Series(f"run-{i}", [a for a, _ in points], [b for _, b in points]))
    return [Panel("lines", x_axis, y_axis, series)] if series else []


def _points(runs: Sequence[Run], x: str, y: str) -> list[Series]:
    pairs = [(i, run.figure(x), run.figure(y)) for i, run in enumerate(runs)]
    return [Series(f"run-{i}", [a], [b]) for i, a, b in pairs if a and b is not None]


def _bars(runs: Sequence[Run], unit: Any, **panels: str) -> list[Panel | HeatMap]:
    drawn: list[Panel | HeatMap] = []
    for key, title in panels.items():
        series = [Series(f"run-{i}", [v], []) for i, run in enumerate(runs) if (v := run.figure(key)) is not None]
        if series:
            drawn.append(Panel("bars", Axis(title, unit), Axis(""), series, title=title))
    return drawn


def _heat_map(name: str, values: list[str], scores: dict[int, dict[str, float]], trained: int | None) -> HeatMap:
    known = {i: by_value for i, by_value in scores.items() if by_value}
    return HeatMap(
        Axis(name),
        ACCURACY,
        values,
        [f"run-{i}" for i in known],
        [[by_value.get(v) for v in values] for by_value in known.values()],
        trained=trained,
    )


def _by_length(run: Run) -> dict[str, float]:
    """What a task's score says as `accuracy_32`: the accuracy at length 32."""
    found = {}
    for key, value in run.scores()[0].items():
        if (match := re.fullmatch(r"accuracy_(\d+)", key)) and (share := units.number(value)) is not None:
            found[match[1]] = share
    return found


def _numbers(config: Any, above: str = "") -> dict[str, float]:
    """The numbers of a config by their dotted keys, as an override names them."""
    if isinstance(config, dict):
        return {k: v for key, value in config.items() for k, v in _numbers(value, f"{above}.{key}".strip(".")).items()}
    value = units.number(config)
    return {} if value is None else {above: value}


PLOTS = (
    Plot(
        "accuracy-by-state", "Accuracy against state size",
        "The state that a model carries from token to token (logarithmic), and its accuracy. "
        "The dashed line is the Pareto front of the rows shown: on it, nothing smaller does as well.",
        accuracy_by_state,
    ),
    Plot(
        "accuracy-by-time", "Accuracy against training time",
        "Validation accuracy as the clock runs (logarithmic). Further left is sooner.",
        accuracy_by_time,
    ),
    Plot(
        "accuracy-by-tokens", "Accuracy against tokens",
        "The same against tokens trained: speed of the machine aside, who learns from less?",
        accuracy_by_tokens,
    ),
    Plot(
        "error-by-time", "Error against training",
        "Validation error as a share of the trivial predictor's: 100% is no better than it. Lower and further left is "
        "better.",
        error_by_time,
    ),
    Plot(
        "error-by-state", "Error against state size",
        "The state that a model carries from step to step (logarithmic), and its error. Lower and further left is "
        "better.",
        error_by_state,
    ),
    Plot(
        "loss", "Training loss",
        "What training brought down: a running mean of the loss.",
        loss_curves,
    ),
    Plot(
        "throughput", "Throughput",
        "Tokens a second: many at once in training, one after another in decoding. Longer is better.",
        throughput,
    ),
    Plot(
        "memory", "Memory",
        "Most memory in use while training, and the state that one sequence carries. Shorter is better.",
        memory,
    ),
    Plot(
        "accuracy-by-slice", "Accuracy by slice",
        "The same score, split by how hard the example is.",
        accuracy_by_slice,
    ),
    Plot(
        "accuracy-by-length", "Generalisation",
        "Accuracy by length, distance or kind of example; right of the line is longer than what was trained on.",
        accuracy_by_length,
    ),
    Plot(
        "accuracy-by-setting", "Accuracy by setting",
        "Numbers of the config that differ between these runs. Other settings may differ too: hide those that do.",
        accuracy_by_setting,
    ),
)  # fmt: skip
"""The gallery, in the order of the page."""
