"""What runs are called beside each other: by name, and by the settings, seeds or folders that tell them apart."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

from zoo.core.run_files import dotted
from zoo.report.runs import Run
from zoo.report.units import printable
from zoo.training.train_options import BOOKKEEPING

ASIDE = {"name", "out", "seed", "train.seed", "train.log_every", *BOOKKEEPING} - {"train.time_budget"}
"""Keys of a config that change neither what is learned nor when it ends, but for the seed."""
_FEW, _SHORT = 3, 40
"""How many settings tell runs of one name apart in their labels, and in how many letters."""


def labels(runs: Sequence[Run]) -> list[str]:
    """A distinct name for each run: its own; where several share it, with seeds, with settings or with folders."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.name, []).append(run)
    told = {id(run): label for group in groups.values() for run, label in zip(group, _labels(group), strict=True)}
    return [told[id(run)] for run in runs]


def _labels(group: Sequence[Run]) -> list[str]:
    """The labels of runs of one name."""
    if len(group) == 1:
        return [group[0].name]
    keys = differing(group)
    if not keys and len({str(run.seed) for run in group}) == len(group):
        return [printable(f"{run.name} (seed {run.seed})") for run in group]
    each = [in_words(run, keys) for run in group]
    if 0 < len(keys) <= _FEW and max(map(len, each)) <= _SHORT:
        seeds = len({str(run.seed) for run in group}) > 1
        told = [
            f"{run.name} ({text}{f', seed {run.seed}' if seeds else ''})" for run, text in zip(group, each, strict=True)
        ]
        if len(set(told)) == len(group):
            return list(map(printable, told))
    above = os.path.commonpath([other.path.resolve().parent for other in group])
    where = [run.path.resolve().relative_to(above) for run in group]
    # Of a recipe's variants, whose folders are called as they are, the folder says it all: `recipe/variant`.
    return [
        printable(str(path) if path.name == run.name and len(path.parts) > 1 else f"{run.name} ({path})")
        for run, path in zip(group, where, strict=True)
    ]


def config_key(run: Run) -> str:
    """What runs of one config have in common."""
    return json.dumps(settings(run), sort_keys=True, default=str)


def settings(run: Run) -> dict[str, Any]:
    """The config by dotted keys, without what is left aside."""
    config = run.config
    whole = {**config, **{k: run.section(k) for k in ("task", "model", "objective", "train") if run.section(k)}}
    if steps := extended_at(run):
        whole["extended_at"] = ", ".join(map(str, steps))
    return {k: v for k, v in dotted(whole) if k not in ASIDE}


def extended_at(run: Run) -> list[Any]:
    """The steps at which a run was given another length, where its learning rate is not that of one training since."""
    extended = run.result.get("extended")
    if not isinstance(extended, list) or run.section("train").get("schedule") == "constant":
        return []
    return [each.get("step") for each in extended if isinstance(each, dict)]


def differing(runs: Sequence[Run]) -> list[str]:
    """The keys in which runs differ."""
    every = [settings(run) for run in runs]
    keys = dict.fromkeys(key for each in every for key in each)
    return [key for key in keys if len({json.dumps(each.get(key), default=str) for each in every}) > 1]


def in_words(run: Run, keys: Sequence[str]) -> str:
    """Settings of a run, such as `lr=0.001`, empty without keys; whole keys where their last parts are alike."""
    last = [key.rpartition(".")[2] for key in keys]
    short = len(set(last)) == len(last)
    own = settings(run)
    return printable(", ".join(f"{s if short else key}={own.get(key)}" for key, s in zip(keys, last, strict=True)))


def task_names(runs: Sequence[Run]) -> list[str]:
    """A name for each run's task: the task's own, with the options in which tasks of this name differ."""
    tasks = [run.section("task") for run in runs]
    names = []
    for task in tasks:
        like = [other for other in tasks if other.get("name") == task.get("name")]
        differing = {k: v for k, v in task.items() if any(other.get(k) != v for other in like)}
        options = ", ".join(f"{k}={v}" for k, v in differing.items())
        names.append(printable(f"{task.get('name', 'unknown')}{f' ({options})' if options else ''}"))
    return names
