"""Taught on short rows, asked on long ones: accuracy by length and depth, and the effective length.

Each subject is put into a small token model and trained on rows of one length, until validation reaches 99 % or the
budget is over. The weights that validation chose are then tested on unseen rows of that length and of its multiples, as
far as the budget goes each time. The effective length is the largest of the lengths tested at which at least 85 % of
the scored tokens are right, and ≥ where that is the longest that was tested; of several seeds, it is that of the median
accuracy at each length, with those of the quartiles behind it. A model that was below 85 % on validation when its
training ended is not tested: nothing follows from it about length.
"""

from __future__ import annotations

import functools
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from zoo.benchmarks.cells import (
    NOT_OFFERED,
    Ladder,
    Measured,
    NoFigure,
    Request,
    Table,
    cell,
    chance_in,
    pivot,
    short,
    spread,
)
from zoo.benchmarks.records import OK, Record, figure
from zoo.benchmarks.subjects import Subject
from zoo.benchmarks.training import (
    ENOUGH,
    chance_of,
    check_layers,
    fields_of,
    layers_of,
    median_of,
    require_learned,
    trained,
)
from zoo.core.errors import UsageError, unknown
from zoo.report.units import MISSING, percent
from zoo.tasks.protocol import create_task
from zoo.tasks.protocol import registry as tasks
from zoo.training.evaluation import evaluate_run

SOLVED = 0.99
LENGTHS = ("seq_len", "length")
"""What tasks call the option for the length of their rows."""

PRESETS: dict[str, dict[str, Any]] = {
    "niah": {
        "task": "niah",
        "options": {"n_queries": 8, "asked": "in_turn", "key_vocab": 8, "value_vocab": 8, "min_length": 34},
        "layers": "short_conv {mixer} swiglu",
        "width": 64,
        "length": 64,
        "times": "1,4,16,64",
        "rows": 128,
        "training": {"train.lr": 5e-3, "train.eval_every": 50, "train.eval_rows": 256},
    }
}
"""Settings by name at which small models learn a task in seconds: what stands for options that are not given."""


def preset(name: str | None) -> dict[str, Any]:
    """The settings of a preset, none without a name.

    Raises:
        UsageError: an unknown one.
    """
    if name is None:
        return {}
    if name not in PRESETS:
        raise unknown("preset", name, PRESETS)
    return PRESETS[name]


def length_option(task: str) -> str | None:
    """The option of a task for the length of its rows, None if it has none."""
    return next((option for option in LENGTHS if option in tasks[task].Config.model_fields), None)


def check_task(name: str, options: Mapping[str, Any], lengths: Sequence[int]) -> str:
    """The option for the length of a task's rows.

    Raises:
        UsageError: a task without one, or that does not take these options at every one of these lengths.
    """
    option = length_option(name)
    if option is None:
        fitting = [other for other in tasks.names() if length_option(other)]
        raise UsageError(f"--task {name!r} has no length to be varied. Tasks that have: {', '.join(fitting)}.")
    if option in options:
        raise UsageError(f"--set {option} is not allowed: the lengths are those of --length and --times.")
    for length in lengths:
        create_task(name, **{**options, option: length})
    return option


class Tested:
    """One subject: its trainings, one for each seed, and their tests."""

    def __init__(self, request: Request, subject: Subject, folder: Path, length_option: str, seeds: int):
        self.request, self.subject = request, subject
        self.folders = [folder / str(seed) for seed in range(seeds)]
        self.length_option = length_option
        self.fields: dict[str, Any] = {}
        self.accuracy: dict[int, list[float]] = {}

    def train(self, task: Mapping[str, Any], layers: str, width: int, options: Mapping[str, Any]) -> Measured:
        """The figures of the trainings."""
        _, laws = self.request.built(self.subject, width, int(task[self.length_option]))
        options = {"train.target": {"metric": "accuracy", "value": SOLVED}, **options}
        results = [
            trained(
                self.request, folder, task=task, layers=layers, width=width, options={**options, "train.seed": seed}
            )
            for seed, folder in enumerate(self.folders)
        ]
        self.fields = fields_of(results[0], laws)
        right = [r["validation"]["accuracy"] for r in results]
        after = f"{median_of(results, 'steps'):.0f} steps in {median_of(results, 'seconds'):.0f} s"
        require_learned(results, right, after)
        figures = {
            "train_seconds": figure([r["seconds"] for r in results]),
            "train_steps": figure([r["steps"] for r in results]),
            "learned": {**figure(sum(a >= ENOUGH for a in right) / len(right)), "n": len(right)},
        }
        return figures, self.fields

    def test(self, length: int, rows: int, tokens: int) -> Measured:
        """The figures of the tests at a length."""
        overrides = {
            f"task.{self.length_option}": length,
            "train.test_rows": rows,
            "train.eval_batch_size": max(1, min(rows, tokens // length)),
        }
        scores, seconds = [], []
        try:
            for folder in self.folders:
                started = time.perf_counter()
                scores.append(evaluate_run(folder, overrides, split="test"))
                seconds.append(time.perf_counter() - started)
        except UsageError as error:
            raise NoFigure(NOT_OFFERED, str(error)) from None
        self.accuracy[length] = [score["accuracy"] for score in scores]
        figures = {k: figure([score[k] for score in scores]) for k in ("accuracy", "exact")}
        figures["seconds"] = figure(seconds)
        return figures, {**self.fields, "slices": _mean_slices([score["slices"] for score in scores])}

    def effective(self) -> dict[str, Any] | None:
        """The figure of the largest length with enough right, None if there is none."""
        by_length = {length: figure(of_seeds) for length, of_seeds in self.accuracy.items()}
        reach = {
            which: max((length for length, right in by_length.items() if right[which] >= ENOUGH), default=0)
            for which in ("value", "low", "high")
        }
        return {**figure(0.0), **reach, "n": len(self.folders)} if reach["value"] else None


def _mean_slices(of_seeds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The slices of several tests of the same rows: the mean accuracy of each value, and its rows."""
    return {
        name: {
            value: {"accuracy": statistics.fmean(s[name][value]["accuracy"] for s in of_seeds), "n": first["n"]}
            for value, first in values.items()
        }
        for name, values in of_seeds[0].items()
    }


def cells(
    request: Request,
    *,
    task: str,
    options: Mapping[str, Any],
    layers: str,
    width: int,
    train_length: int,
    times: Sequence[int],
    rows: int,
    tokens: int,
    training: Mapping[str, Any],
    seeds: int,
) -> Iterator[Record]:
    """The records of all subjects.

    Args:
        request: what is measured, and how.
        task: its name.
        options: of the task, but for its length.
        layers: of the model, with `{mixer}` for the subject.
        width: D.
        train_length: L.
        times: lengths of the tests, in L.
        rows: of a test.
        tokens: of a batch of tests.
        training: keys and values of an experiment, such as `train.lr`.
        seeds: trainings of each subject.
    """
    option = check_task(task, options, [train_length * n for n in times])
    check_layers(layers)
    request.check([width], train_length)
    given = {"name": task, **options, option: train_length}
    of_all = {
        "task": task,
        "options": ", ".join(f"{k}={v}" for k, v in options.items()),
        "width": width,
        "layers": layers,
        "train_length": train_length,
    }
    asked = {"seeds": seeds, "test_rows": rows, **training}
    chance = chance_of(given)
    for subject in request.at(width):
        pattern = layers_of(subject, layers, width)
        known: dict[str, Any] = {"layer": pattern, "conditions": asked, "chance": chance}
        with tempfile.TemporaryDirectory() as scratch:
            tested = Tested(request, subject, Path(scratch), option, seeds)
            whole = functools.partial(tested.train, given, pattern, width, training)
            made = cell(request, "long-context", subject, {**of_all, "length": 0}, whole, **known)
            ladder = Ladder(request.budget)
            for length in (train_length * n for n in times):
                setting = {**of_all, "length": length}
                run = functools.partial(tested.test, length, rows, tokens)
                run = functools.partial(ladder.climb, length, run) if made.status == OK else _like(made)
                yield cell(request, "long-context", subject, setting, run, **known)
            if made.status == OK and (effective := tested.effective()):
                made.figures["effective_length"] = effective
            yield made


def _like(made: Record) -> Any:
    def none() -> Measured:
        raise NoFigure(made.status, made.why)

    return none


def tables(found: Sequence[Record]) -> list[Table]:
    """Accuracy by length with the effective length, and by depth and length where the task tells the depth."""
    made = []
    keys = ("task", "options", "width", "layers", "train_length")
    for setting in dict.fromkeys(tuple(r.setting.get(k) for k in keys) for r in found):
        rows = [r for r in found if tuple(r.setting.get(k) for k in keys) == setting]
        task, options, width, layers, trained_at = setting
        tests = [r for r in rows if r.setting["length"]]
        chance = chance_in(rows)
        title = f"{task}{f' ({options})' if options else ''}, trained at length {trained_at}"
        table = pivot(
            f"{title}, {layers}, width {width}: accuracy by length of the test",
            tests,
            lambda r: r.setting["length"],
            lambda r: spread(r, "accuracy", percent),
            functools.partial(_head, chance),
        )
        whole = {r.label: r for r in rows if not r.setting["length"]}
        seeds = max((r.conditions.get("seeds") or 1 for r in rows), default=1)
        for row in table.rows:
            own = whole.get(row[0])
            row.append(_effective(own, [r for r in tests if r.label == row[0] and r.status == OK]))
            row.append(
                spread(own, "train_seconds", "{:.0f} s".format) if own and "train_seconds" in own.figures else MISSING
            )
            if seeds > 1:
                row.append(_learned(own))
        head = [*table.head, "effective length", "training", *(["learned"] if seeds > 1 else [])]
        made.append(Table(table.title, head, table.rows))
    return made


def _head(chance: str, length: int) -> str:
    return f"{short(length)} ({chance})" if chance else short(length)


def _effective(whole: Record | None, tests: Sequence[Record]) -> str:
    """The effective length as it is read: beyond the lengths tested, below them, or not known."""
    if whole is None or whole.status != OK:
        return MISSING
    if "effective_length" not in whole.figures:
        return f"< {short(min(r.setting['length'] for r in tests))}" if tests else MISSING
    most = max((r.setting["length"] for r in tests), default=0)

    def text(length: float) -> str:
        return f"{'≥ ' if length >= most else ''}{short(int(length))}" if length else "none"

    return spread(whole, "effective_length", text)


def _learned(whole: Record | None) -> str:
    """How many of the seeds reached what counts as learned."""
    if whole is None or "learned" not in whole.figures:
        return MISSING
    share = whole.figures["learned"]
    return f"{round(share['value'] * share['n'])} of {share['n']}"


def by_depth(tests: Sequence[Record]) -> dict[str, dict[tuple[str, int], float]]:
    """Accuracy by name, then by (depth, length), of tests that were sliced by depth."""
    found: dict[str, dict[tuple[str, int], float]] = {}
    for r in tests:
        for depth, figures in r.slices.get("depth", {}).items():
            found.setdefault(r.label, {})[depth, r.setting["length"]] = figures["accuracy"]
    return found
