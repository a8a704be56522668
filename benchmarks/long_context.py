"""Accuracy by length and depth of what was learned on short rows.

setting   task, options (of the task, in words), width, layers (of the whole model, {mixer} for the subject),
          train_length, length (of the test; 0 stands for the whole)
figures   of a test: accuracy, exact, seconds, with slices such as `depth`; of the whole: effective_length (the largest
          length tested whose median accuracy is at least 85 %, with the same of the quartiles, 0 where theirs is at
          none), train_seconds, train_steps, learned (the share of the seeds that reached 85 % on validation). Of a
          training that had not learned there are none
"""

from __future__ import annotations

import functools
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import model_validator

from zoo.benchmarks.cells import NOT_OFFERED, Ladder, Measured, NoFigure, Request, cell
from zoo.benchmarks.options import (
    MOST_TOKENS,
    BenchmarkOptions,
    Count,
    Lengths,
    Pairs,
    Seconds,
    Seeds,
    Training,
    Width,
    option,
    pairs,
    training_options,
)
from zoo.benchmarks.subjects import Subject
from zoo.benchmarks.tables import chance_in, pivot, short, spread
from zoo.benchmarks.training import (
    ENOUGH,
    check_layers,
    fields_of,
    layers_of,
    median_of,
    require_learned,
    trained,
)
from zoo.core.errors import UsageError, unknown
from zoo.report.bench import by_setting, slice_of, with_chance
from zoo.report.benchmark import ACCURACY, LENGTH, Benchmark, Curve, Head, Plot, Table, benchmarks
from zoo.report.chance import chance_of
from zoo.report.charts import Axis, HeatMap, Panel
from zoo.report.records import OK, Figure, Record, figure
from zoo.report.slices import in_order
from zoo.report.units import MISSING, number, percent
from zoo.tasks.protocol import create_task, named
from zoo.tasks.protocol import registry as tasks
from zoo.training.evaluation import evaluate_run

SOLVED = 0.99
LENGTHS = ("seq_len", "length")
"""What tasks call the option for the length of their rows."""

PRESETS: dict[str, dict[str, Any]] = {
    "niah": {
        "task": "niah",
        "set": {"n_queries": 8, "asked": "in_turn", "key_vocab": 8, "value_vocab": 8, "min_length": 34},
        "layers": "short_conv {mixer} swiglu",
        "width": 64,
        "length": 64,
        "times": "1,4,16,64",
        "rows": 128,
        "train": {"train.lr": 5e-3, "train.eval_every": 50, "train.eval_rows": 256},
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
    fields = tasks[named(task)[0]].Config.model_fields
    return next((option for option in LENGTHS if option in fields), None)


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


def check_times(times: Sequence[int], length: int) -> None:
    """Refuse tests that are longer than any row may be.

    Raises:
        UsageError: they are.
    """
    if max(times) > (most := MOST_TOKENS // length):
        given = ",".join(map(str, times))
        raise UsageError(f"--times {given!r:.60} is not allowed: it should be at most {most:,}.")


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

    def effective(self) -> Figure | None:
        """The figure of the largest length with enough right, None if there is none."""
        by_length = {length: figure(of_seeds) for length, of_seeds in self.accuracy.items()}

        def reach(which: Literal["value", "low", "high"]) -> int:
            return max((length for length, right in by_length.items() if right[which] >= ENOUGH), default=0)

        if not reach("value"):
            return None
        spread: Figure = {"value": reach("value"), "low": reach("low"), "high": reach("high"), "n": len(self.folders)}
        return {**figure(0.0), **spread}


def _mean_slices(of_seeds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The slices of several tests of the same rows: the mean accuracy of each value, and its rows."""
    return {
        name: {
            value: {"accuracy": statistics.fmean(s[name][value]["accuracy"] for s in of_seeds), "n": first["n"]}
            for value, first in values.items()
        }
        for name, values in of_seeds[0].items()
    }


def _like(made: Record) -> Any:
    def none() -> Measured:
        raise NoFigure(made.status, made.why)

    return none


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


def length_maps(found: Sequence[Record], ids: Mapping[str, str]) -> list[Panel | HeatMap]:
    """Accuracy by subject and length, a map for each training."""
    maps: list[Panel | HeatMap] = []
    for title, trained_at, tests in _tests(found):
        lengths = sorted({r.setting["length"] for r in tests})
        scores = {(r.title, r.setting["length"]): r.value("accuracy") for r in tests}
        names = [name for name in ids if any(r.title == name for r in tests)]
        values = [[scores.get((name, n)) for n in lengths] for name in names]
        within = None if trained_at is None else sum(n <= trained_at for n in lengths)
        columns, title = [str(n) for n in lengths], with_chance(title, tests)
        maps.append(HeatMap(LENGTH, ACCURACY, columns, [ids[name] for name in names], values, title, trained=within))
    return maps


def depth_maps(found: Sequence[Record], ids: Mapping[str, str]) -> list[Panel | HeatMap]:
    """Accuracy by depth and length, a map for each subject, where the task tells the depth."""
    maps: list[Panel | HeatMap] = []
    for title, trained_at, tests in _tests(found):
        for name, row in ids.items():
            own = sorted((r for r in tests if r.title == name), key=lambda r: int(r.setting["length"]))
            by_length = {r.setting["length"]: scores for r in own if (scores := slice_of(r, "depth"))}
            depths = in_order({depth for scores in by_length.values() for depth in scores})
            if len(depths) > 1:
                values = [[scores.get(depth) for scores in by_length.values()] for depth in depths]
                within = None if trained_at is None else sum(n <= trained_at for n in by_length)
                columns, heading = [str(n) for n in by_length], f"{name}{': ' if title else ''}{title}"
                maps.append(HeatMap(LENGTH, Axis("depth"), columns, depths, values, heading, row, within))
    return maps


def _tests(found: Sequence[Record]) -> list[tuple[str, float | None, list[Record]]]:
    """Tests by what was trained: a title, the length in training, and the records."""
    tests = [r for r in found if number(r.setting.get("length")) and r.value("accuracy") is not None]
    return [
        (title, number(own[0].setting.get("train_length")), own)
        for task in dict.fromkeys(str(r.setting.get("task") or "") for r in tests)
        for title, own in by_setting([r for r in tests if str(r.setting.get("task") or "") == task], task, ("length",))
    ]


EFFECTIVE = Curve("effective_length", Axis("effective length", "length"))


@benchmarks.register("long_context")
class LongContext(Benchmark):
    """Accuracy by length and depth of what was learned on short rows, and the effective length.

    Each subject is put into a small token model and trained on rows of one length, until validation reaches 99 % or the
    budget is over. The weights that validation chose are then tested on unseen rows of that length and of its
    multiples, as far as the budget goes each time. The effective length is the largest of the lengths tested at which
    at least 85 % of the scored tokens are right, and ≥ where that is the longest that was tested; of several seeds, it
    is that of the median accuracy at each length, with those of the quartiles behind it. A model that was below 85 % on
    validation when its training ended is not tested: nothing follows from it about length.
    """

    class Config(BenchmarkOptions):
        preset: str | None = option(None, f"Settings with which small models learn in seconds: {', '.join(PRESETS)}.")
        task: str = option("niah", "A task with an option for the length of its rows.")
        set: Pairs = option({}, "Option of the task.")
        layers: str = option("2*({mixer} swiglu)", "Pattern of the model; {mixer} is replaced by each mixer.")
        width: Width = option(64, "Width of the model.")
        length: Count = option(64, "Length of training rows.")
        times: Lengths = option(
            "1,2,4,8,16,32,64", "Lengths of test rows as multiples of --length, separated by commas."
        )
        rows: Count = option(256, "Rows of each test.")
        tokens: Count = option(16384, "Tokens of a test batch, from which its number of rows follows.")
        train: Training = option({}, "Option of the training, such as lr=1e-3.")
        seeds: Seeds = option(1, "Number of seeds, from 0, over which the spread is shown.")
        budget: Seconds = option(60.0, "Seconds for each training, and for each test.")

        @model_validator(mode="before")
        @classmethod
        def _fill_in(cls, given: Any) -> Any:
            """What is given takes the place of its part of the preset; of another task, the preset's options go."""
            settings = preset(given.get("preset"))
            if given.get("task", settings.get("task")) != settings.get("task"):
                settings = {**settings, "set": {}}
            merged = settings | given
            if "set" in merged:
                merged["set"] = {**settings.get("set", {}), **pairs(given.get("set", {}))}
            if "train" in merged:
                merged["train"] = {**settings.get("train", {}), **training_options(given.get("train", {}))}
            return merged

        @model_validator(mode="after")
        def _is_within_reach_of_tests(self) -> Any:
            check_times(self.times, self.length)
            return self

    title = "Long contexts"
    peers = False
    order = 4
    plots: ClassVar[Sequence[Plot]] = (
        Plot(
            "bench-long-context",
            "Length generalisation",
            "Accuracy at lengths up to many times those trained on; columns right of the line are longer. "
            "Models that had not learned at their own length are left out.",
            (length_maps,),
        ),
        Plot(
            "bench-effective-length",
            "Effective length",
            "The largest of the lengths tested at which the median accuracy is at least 85%.",
            (EFFECTIVE,),
        ),
        Plot(
            "bench-depth",
            "Where the needle lies",
            "Accuracy by length and by depth of what is asked for: a map for each layer (a page shows twelve).",
            (depth_maps,),
        ),
    )
    heads: ClassVar[Sequence[Head]] = (Head("effective\nlength", EFFECTIVE, "max"),)

    def cells(self, request: Request) -> Iterator[Record]:
        config = self.config
        lengths = [config.length * n for n in config.times]
        option = check_task(config.task, config.set, lengths)
        check_layers(config.layers)
        request.check([config.width], config.length)
        given = {"name": config.task, **config.set, option: config.length}
        of_all = {
            "task": config.task,
            "options": ", ".join(f"{k}={v}" for k, v in config.set.items()),
            "width": config.width,
            "layers": config.layers,
            "train_length": config.length,
        }
        asked = {"seeds": config.seeds, "test_rows": config.rows, **config.train}
        chance = chance_of(given)
        for subject in request.at(config.width):
            pattern = layers_of(subject, config.layers, config.width)
            known: dict[str, Any] = {"layer": pattern, "conditions": asked, "chance": chance}
            with tempfile.TemporaryDirectory() as scratch:
                tested = Tested(request, subject, Path(scratch), option, config.seeds)
                whole = functools.partial(tested.train, given, pattern, config.width, config.train)
                made = cell(request, self.label(), subject, {**of_all, "length": 0}, whole, **known)
                ladder = Ladder(request.budget)
                for length in lengths:
                    setting = {**of_all, "length": length}
                    run = functools.partial(tested.test, length, config.rows, config.tokens)
                    run = functools.partial(ladder.climb, length, run) if made.status == OK else _like(made)
                    yield cell(request, self.label(), subject, setting, run, **known)
                if made.status == OK and (effective := tested.effective()):
                    made.figures["effective_length"] = effective
                yield made

    @classmethod
    def tables(cls, found: Sequence[Record]) -> list[Table]:
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
                took = own is not None and "train_seconds" in own.figures
                row.append(_effective(own, [r for r in tests if r.label == row[0] and r.status == OK]))
                row.append(spread(own, "train_seconds", "{:.0f} s".format) if own and took else MISSING)
                if seeds > 1:
                    row.append(_learned(own))
            head = [*table.head, "effective length", "training", *(["learned"] if seeds > 1 else [])]
            made.append(Table(table.title, head, table.rows))
        return made
