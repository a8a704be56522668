"""The six questions of MAD (Poli et al. 2024, arXiv 2403.17844).

setting   task, variation ("baseline", or such as "vocab_size=32"), share (of the published training), width, layers
figures   accuracy, train_seconds, share_reached; and one record with task "average": accuracy (the mean over tasks of
          the mean over their variations), with slices `task`, and `of` in the setting: of which tasks, where not of
          all six. Short of the published training there are figures only of what was learned (85 %)
"""

from __future__ import annotations

import functools
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from zoo.benchmarks.cells import NO_AVERAGE, Measured, NoFigure, Request, cell
from zoo.benchmarks.options import BenchmarkOptions, Count, Numbers, Seconds, Seeds, Share, Training, Width, option
from zoo.benchmarks.subjects import Subject
from zoo.benchmarks.tables import chance_in, pivot, spread
from zoo.benchmarks.training import check_layers, fields_of, layers_of, median_of, require_learned, trained
from zoo.core.errors import unknown
from zoo.report.bench import bars, by_setting, slice_of, with_chance
from zoo.report.benchmark import ACCURACY, Benchmark, Curve, Head, Plot, Table, benchmarks
from zoo.report.chance import chance_of
from zoo.report.charts import Axis, HeatMap, Panel
from zoo.report.records import OK, Record, figure
from zoo.report.units import percent
from zoo.tasks.mad import TEST_ROWS, MADTask, Setting, mad_tasks
from zoo.tasks.protocol import create_task

EPOCHS, BATCH = 200, 128
BASELINE, AVERAGE = "baseline", "average"


def chosen(names: Sequence[str]) -> dict[str, type[MADTask]]:
    """The tasks of these names, all of MAD's if there is none.

    Raises:
        UsageError: a task that is not MAD's.
    """
    known = mad_tasks()
    for name in names:
        if name not in known:
            raise unknown("task of MAD", name, known)
    return {name: known[name] for name in names} if names else known


def label(setting: Setting) -> str:
    """How a record calls a setting."""
    return ", ".join(f"{k}={v}" for k, v in setting.options.items()) or BASELINE


def score(
    request: Request,
    subject: Subject,
    task: str,
    setting: Setting,
    layers: str,
    config: Any,
) -> Measured:
    """The figures of one setting, by `MAD.Config`: those of the training that validation prefers."""
    length = create_task(task, **setting.options).seq_len
    _, laws = request.built(subject, config.width, length)
    steps = max(1, round(config.share * setting.rows * EPOCHS / config.batch_size))
    options = {
        "train.steps": steps,
        "train.batch_size": config.batch_size,
        "train.warmup_steps": min(50, steps // 10),
        "train.eval_every": max(1, steps // 4),
        "train.eval_rows": TEST_ROWS // 10,
        "train.test_rows": TEST_ROWS,
        **config.train,
    }
    best: list[dict[str, Any]] = []
    for seed in range(config.seeds):
        results = []
        for lr in config.lr:
            for decay in config.weight_decay:
                own = {**options, "train.lr": lr, "train.weight_decay": decay, "train.seed": seed}
                asked = {"name": task, **setting.options}
                with tempfile.TemporaryDirectory() as scratch:
                    folder = Path(scratch, "run")
                    results.append(trained(request, folder, task=asked, layers=layers, width=config.width, options=own))
        best.append(max(results, key=lambda result: result["validation"]["accuracy"]))
    right = [result["test"]["accuracy"] for result in best]
    reached = [result["steps"] * config.batch_size / (setting.rows * EPOCHS) for result in best]
    if min(reached) < 1:  # of the published training, whose scores count whatever they are
        trained_on = f"{statistics.median(reached):.2%} of the published training"
        require_learned(best, right, f"{trained_on} in {median_of(best, 'seconds'):.1f} s")
    figures = {
        "accuracy": figure(right),
        "train_seconds": figure([result["seconds"] for result in best]),
        "share_reached": figure(reached),
    }
    return figures, fields_of(best[0], laws)


def _average(scores: Mapping[str, Sequence[float]], whole: bool) -> Measured:
    if not whole:
        raise NoFigure(NO_AVERAGE, "some of its tasks have no score")
    means = {name: statistics.fmean(values) for name, values in scores.items()}
    slices = {"task": {name: {"accuracy": mean} for name, mean in means.items()}}
    return {"accuracy": figure(statistics.fmean(means.values()))}, {"slices": slices}


def column(r: Record) -> str | None:
    """The task of a record, or of which ones it is the average; None for one of a single task, whose score it is."""
    of = r.setting.get("of")
    if of is None:
        return r.setting.get("task")
    return f"{AVERAGE} of {of}" if "," in of else None


def headed(found: Sequence[Record]) -> dict[str | None, str]:
    """The heads of the columns, each with what chance gives there."""
    columns: dict[str | None, list[Record]] = {}
    for r in found:
        columns.setdefault(_column(r), []).append(r)
    return {
        name: f"{name} ({chance})" if (chance := chance_in(rows)) else f"{name}"
        for name, rows in columns.items()
        if name is not None
    }


def _column(r: Record) -> str | None:
    task, variation = r.setting["task"], r.setting["variation"]
    return column(r) if task == AVERAGE or variation == BASELINE else f"{task}, {variation}"


def task_map(found: Sequence[Record], ids: Mapping[str, str]) -> list[Panel | HeatMap]:
    """Accuracy by subject and task, averaged over the task's variations, of what was learned."""
    maps: list[Panel | HeatMap] = []
    for title, own in by_setting(found, aside=("task", "variation", "of")):
        scores: dict[str, dict[str, list[float]]] = {}
        for r in own:
            if r.setting.get("task") != AVERAGE and (right := r.value("accuracy")) is not None:
                scores.setdefault(r.title, {}).setdefault(str(r.setting.get("task")), []).append(right)
        for r in own:
            if r.setting.get("task") == AVERAGE and r.status == OK:
                for task, mean in slice_of(r, "task").items():
                    scores.setdefault(r.title, {}).setdefault(task, [mean])
        tasks = sorted({task for by_task in scores.values() for task in by_task})
        names = [name for name in ids if name in scores]
        if tasks:
            means = [
                [statistics.fmean(v) if (v := scores[name].get(task)) else None for task in tasks] for name in names
            ]
            heads = [with_chance(task, [r for r in own if r.setting.get("task") == task]) for task in tasks]
            maps.append(HeatMap(Axis("task"), ACCURACY, heads, [ids[name] for name in names], means, title))
    return maps


MEAN = Curve("accuracy", ACCURACY, where={"task": AVERAGE})


def averages(found: Sequence[Record], ids: Mapping[str, str]) -> list[Panel | HeatMap]:
    """The averages as bars, but for those of a single task, whose score they are."""
    return [*bars(MEAN, [r for r in found if column(r) is not None], ids)]


@benchmarks.register("mad")
class MAD(Benchmark):
    """The six tasks of MAD on a share of the published training, or those named by --task, and their average.

    Published (Poli et al. 2024, arXiv 2403.17844): 12,800 training rows shown 200 times over in batches of 128, at
    width 128 with two mixers and two channel mixers, the best of six settings of AdamW, its score the mean over tasks
    of the mean over their settings. Here a training sees as many rows as `share` of that, or as the budget lets it;
    each row is new, so that nothing is learned by heart but `memorization`, and settings that differ in the number of
    rows have no meaning and are left out. Test is read once for each training; where several learning rates were
    given, validation chooses.

    The published training cannot be afforded here: `zoo bench mad --share 1` is all of it. So this page ranks no
    layers. It shows the tasks, and what a small share of the training learned within seconds.

    Short of the published training only what was learned, 85 % at least, is shown as a score: a lower figure says how
    far the training came, not what the layer can do. An average is shown where every task has a score.
    """

    class Config(BenchmarkOptions):
        task: tuple[str, ...] = option((), "Only this task. May be repeated.")
        variations: bool = option(False, "Also the published variations of each task.")
        share: Share = option(0.01, "Share of the published training, such as 0.01.")
        layers: str = option("2*({mixer} swiglu)", "Pattern of the model; {mixer} is replaced by each mixer.")
        width: Width = option(128, "Width of the model.")
        batch_size: Count = option(BATCH, "Rows of a training batch.")
        lr: Numbers = option("1e-3", "Learning rates to choose from, separated by commas.")
        weight_decay: Numbers = option("0", "Weight decays to choose from, separated by commas.")
        train: Training = option({}, "Option of the training, such as lr=1e-3.")
        seeds: Seeds = option(1, "Number of seeds, from 0, over which the spread is shown.")
        budget: Seconds = option(60.0, "Seconds for each training.")

    title = "MAD"
    peers = False
    order = 5
    plots: ClassVar[Sequence[Plot]] = (
        Plot(
            "bench-mad",
            "MAD",
            "Accuracy on each synthetic task of MAD's suite that a layer learned, averaged over its variations.",
            (task_map, averages),
        ),
    )
    heads: ClassVar[Sequence[Head]] = (Head("MAD", MEAN, "max"),)

    def cells(self, request: Request) -> Iterator[Record]:
        config = self.config
        tasks = chosen(config.task)
        check_layers(config.layers)
        request.check([config.width], 1)
        of_all = {"share": config.share, "width": config.width, "layers": config.layers}
        asked = {
            "seeds": config.seeds,
            "test_rows": config.train.get("train.test_rows", TEST_ROWS),
            "batch_size": config.batch_size,
            "learning_rates": list(config.lr),
            "weight_decays": list(config.weight_decay),
            **{k: v for k, v in config.train.items() if k != "train.test_rows"},
        }
        for subject in request.at(config.width):
            pattern = layers_of(subject, config.layers, config.width)
            scores: dict[str, list[float]] = {}
            whole = True
            for name, cls in tasks.items():
                settings = cls.mad_settings()[:1]
                if config.variations:
                    settings = [s for s in cls.mad_settings() if s.changed != "rows"]
                for setting in settings:
                    run = functools.partial(score, request, subject, name, setting, pattern, config)
                    at = {"task": name, "variation": label(setting), **of_all}
                    chance = chance_of({"name": name, **setting.options})
                    made = cell(request, self.label(), subject, at, run, layer=pattern, conditions=asked, chance=chance)
                    if made.status == OK:
                        scores.setdefault(name, []).append(made.figures["accuracy"]["value"])
                    else:
                        whole = False
                    yield made
            at = {"task": AVERAGE, "variation": "all" if config.variations else BASELINE, **of_all}
            if len(tasks) < len(mad_tasks()):
                at["of"] = ", ".join(tasks)
            run = functools.partial(_average, scores, whole)
            yield cell(request, self.label(), subject, at, run, layer=pattern, conditions=asked)

    @classmethod
    def tables(cls, found: Sequence[Record]) -> list[Table]:
        """Accuracy by task and setting, with the average."""
        made = []
        keys = ("share", "width", "layers")
        for setting in dict.fromkeys(tuple(r.setting[k] for k in keys) for r in found):
            rows = [r for r in found if tuple(r.setting[k] for k in keys) == setting and column(r) is not None]
            share, width, layers = setting
            title = f"MAD at {share:.2%} of the published training asked for; {layers}, width {width}: test accuracy"
            heads = headed(rows)
            made.append(pivot(title, rows, _column, lambda r: spread(r, "accuracy", percent), heads.__getitem__))
        return made
