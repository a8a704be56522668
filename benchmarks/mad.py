"""The six questions of MAD (Poli et al. 2024, arXiv 2403.17844), on a stated share of the published training.

Published: 12,800 training rows shown 200 times over in batches of 128, at width 128 with two mixers and two channel
mixers, the best of six settings of AdamW, its score the mean over tasks of the mean over their settings. Here a
training sees as many rows as `share` of that, or as the budget lets it; each row is new, so that nothing is learned by
heart but `memorization`, and settings that differ in the number of rows have no meaning and are left out. Test is read
once for each training; where several learning rates were asked for, validation chooses.

Short of the published training only what was learned, 85 % at least, is shown as a score: a lower figure says how far
the training came, not what the layer can do. An average is shown where every task has a score.
"""

from __future__ import annotations

import functools
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from zoo.benchmarks.cells import NO_AVERAGE, Measured, NoFigure, Request, Table, cell, chance_in, pivot, spread
from zoo.benchmarks.records import OK, Record, figure
from zoo.benchmarks.subjects import Subject
from zoo.benchmarks.training import chance_of, check_layers, fields_of, layers_of, median_of, require_learned, trained
from zoo.core.errors import unknown
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
    *,
    layers: str,
    width: int,
    share: float,
    batch_size: int,
    rates: Sequence[float],
    decays: Sequence[float],
    training: Mapping[str, Any],
    seeds: int,
) -> Measured:
    """The figures of one setting: those of the training that validation prefers."""
    length = create_task(task, **setting.options).seq_len
    _, laws = request.built(subject, width, length)
    steps = max(1, round(share * setting.rows * EPOCHS / batch_size))
    options = {
        "train.steps": steps,
        "train.batch_size": batch_size,
        "train.warmup_steps": min(50, steps // 10),
        "train.eval_every": max(1, steps // 4),
        "train.eval_rows": TEST_ROWS // 10,
        "train.test_rows": TEST_ROWS,
        **training,
    }
    best: list[dict[str, Any]] = []
    for seed in range(seeds):
        results = []
        for lr in rates:
            for decay in decays:
                own = {**options, "train.lr": lr, "train.weight_decay": decay, "train.seed": seed}
                asked = {"name": task, **setting.options}
                with tempfile.TemporaryDirectory() as scratch:
                    folder = Path(scratch, "run")
                    results.append(trained(request, folder, task=asked, layers=layers, width=width, options=own))
        best.append(max(results, key=lambda result: result["validation"]["accuracy"]))
    right = [result["test"]["accuracy"] for result in best]
    reached = [result["steps"] * batch_size / (setting.rows * EPOCHS) for result in best]
    if min(reached) < 1:  # of the published training, whose scores count whatever they are
        trained_on = f"{statistics.median(reached):.2%} of the published training"
        require_learned(best, right, f"{trained_on} in {median_of(best, 'seconds'):.1f} s")
    figures = {
        "accuracy": figure(right),
        "train_seconds": figure([result["seconds"] for result in best]),
        "share_reached": figure(reached),
    }
    return figures, fields_of(best[0], laws)


def cells(
    request: Request,
    *,
    names: Sequence[str],
    variations: bool,
    layers: str,
    width: int,
    share: float,
    **rest: Any,
) -> Iterator[Record]:
    """The records of all subjects: one for each setting of each task, and their average, named if not of all of MAD's.

    Args:
        request: what is measured, and how; the budget is of one training.
        names: tasks of MAD, all if none.
        variations: whether beside the baselines.
        layers: of the model, with `{mixer}` for the subject.
        width: D.
        share: of the published training.
        **rest: of `score`.
    """
    tasks = chosen(names)
    check_layers(layers)
    request.check([width], 1)
    of_all = {"share": share, "width": width, "layers": layers}
    asked = {
        "seeds": rest["seeds"],
        "test_rows": rest["training"].get("train.test_rows", TEST_ROWS),
        "batch_size": rest["batch_size"],
        "learning_rates": list(rest["rates"]),
        "weight_decays": list(rest["decays"]),
        **{k: v for k, v in rest["training"].items() if k != "train.test_rows"},
    }
    for subject in request.at(width):
        pattern = layers_of(subject, layers, width)
        scores: dict[str, list[float]] = {}
        whole = True
        for name, cls in tasks.items():
            settings = [s for s in cls.mad_settings() if s.changed != "rows"] if variations else cls.mad_settings()[:1]
            for setting in settings:
                run = functools.partial(
                    score, request, subject, name, setting, layers=pattern, width=width, share=share, **rest
                )
                at = {"task": name, "variation": label(setting), **of_all}
                chance = chance_of({"name": name, **setting.options})
                made = cell(request, "mad", subject, at, run, layer=pattern, conditions=asked, chance=chance)
                if made.status == OK:
                    scores.setdefault(name, []).append(made.figures["accuracy"]["value"])
                else:
                    whole = False
                yield made
        at = {"task": AVERAGE, "variation": "all" if variations else BASELINE, **of_all}
        if len(tasks) < len(mad_tasks()):
            at["of"] = ", ".join(tasks)
        run = functools.partial(_average, scores, whole)
        yield cell(request, "mad", subject, at, run, layer=pattern, conditions=asked)


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
        return r.setting["task"]
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


def tables(found: Sequence[Record]) -> list[Table]:
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
