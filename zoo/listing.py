"""What can be named, each with a line about it."""

from __future__ import annotations

import fnmatch
import inspect
from typing import Any

from zoo.core.described import Described, described, described_within
from zoo.core.errors import UsageError, unknown
from zoo.core.registry import Registry
from zoo.models.budget import ABOUT_BUDGETS
from zoo.models.config import ModelConfig
from zoo.models.families import families
from zoo.objectives.base import objectives
from zoo.pattern import (
    Loop,
    LoopOptions,
    Parallel,
    Repeat,
    Shared,
    SharedOptions,
    Shortcut,
    list_mixers,
    parse,
)
from zoo.protocol import mixers, norms
from zoo.recipes import headline, list_recipes, list_sweeps, recipe_text, sweep_text
from zoo.report.benchmark import in_order
from zoo.report.solved import solved
from zoo.residual import residuals
from zoo.sweeps.config import SweepConfig
from zoo.tasks.presets import PRESETS
from zoo.tasks.protocol import registry as tasks
from zoo.training.options import Experiment
from zoo.training.recipes import read_recipe

KINDS = (
    "mixers",
    "nodes",
    "models",
    "tasks",
    "objectives",
    "norms",
    "residuals",
    "recipes",
    "sweeps",
    "benchmarks",
    "options",
)
NODES: dict[str, type] = {
    "N*(...)": Repeat,
    "a | b": Parallel,
    "shortcut(branch, body)": Shortcut,
    "loop(n, body)": Loop,
    "shared(name, body)": Shared,
}
PLAIN: dict[str, Registry[Any]] = {"objectives": objectives, "norms": norms, "residuals": residuals}


def listing(what: str, pattern: str = "*") -> list[dict[str, Any]]:
    """Entries with `name`, `about` and what else there is to say.

    Raises:
        UsageError: nothing of that kind is listed.
    """
    if what not in KINDS:
        raise unknown("list", what, KINDS)
    if what == "mixers":
        return [{"name": n, "kind": mixers[n].kind, "about": _about(mixers[n])} for n in list_mixers(pattern)]
    if what == "tasks":
        own = [{"name": n, "layout": tasks[n].layout, "about": _about(tasks[n])} for n in tasks.names(pattern)]
        return [*own, *(_preset(n) for n in fnmatch.filter(PRESETS, pattern) if n not in tasks)]
    if what == "nodes":
        nodes = [{"name": name, "about": _about(cls)} for name, cls in NODES.items()]
        for node, options in (("loop", LoopOptions), ("shared", SharedOptions)):
            nodes += [each._replace(name=f"{node}(..., {each.name}=)")._asdict() for each in described(options)]
        return [node for node in nodes if fnmatch.fnmatchcase(str(node["name"]), pattern)]
    if what in PLAIN:
        registry = PLAIN[what]
        return [{"name": n, "about": _about(registry[n])} for n in registry.names(pattern)]
    if what == "benchmarks":
        shown = fnmatch.filter([cls.label() for cls in in_order()], pattern)
        return [{"name": cls.label(), "about": _about(cls)} for cls in in_order() if cls.label() in shown]
    if what == "options":
        return [each._asdict() for each in all_options() if fnmatch.fnmatchcase(each.name, pattern)]
    if what == "models":
        return [_model(n) for n in families.names(pattern)]
    if what == "sweeps":
        return [{"name": n, "about": headline(sweep_text(n))} for n in fnmatch.filter(list_sweeps(), pattern)]
    names = fnmatch.filter(list_recipes(), pattern)
    return [
        {"name": n, "variants": list(read_recipe(n).get("variants") or {}), "about": headline(recipe_text(n))}
        for n in names
    ]


def solved_tasks(pattern: str = "*") -> tuple[list[dict[str, Any]], list[str]]:
    """The runs in the tree that solved a task, each with `name` of the task, and the tasks that none solved."""
    names = tasks.names(pattern)
    found = [
        {
            "name": run.task,
            **run._asdict(),
            "about": f"{' '.join(run.words)}: {run.known}; {run.problem} ({run.source})",
        }
        for run in solved()
        if run.task in names
    ]
    return found, sorted(set(names) - {run["name"] for run in found})


def all_options() -> list[Described]:
    """Every option of an experiment that does not depend on its task or objective, and of a sweep (`sweep.`)."""
    of_model = described_within(ModelConfig, "model.")
    budgets = (Described(f"model.{name}", "int", "None", about) for name, about in ABOUT_BUDGETS.items())
    return [*described_within(Experiment), *of_model, *budgets, *described_within(SweepConfig, "sweep.")]


def _model(name: str) -> dict[str, Any]:
    """A family's size; its parameters are not counted, for which it would have to be built."""
    try:
        config = ModelConfig(**families.options(name))
    except UsageError as error:  # of a family of one's own
        return {"name": name, "about": f"cannot be made: {error}"}
    patterns = [config.pattern, config.recursion.outer if config.recursion else None]
    words = [word for pattern in patterns if pattern for word in parse(pattern).words()]
    n = sum(mixers[word.name].kind == "sequence" for word in words)
    sizes = {"d_model": config.d_model, "sequence_mixers": n}
    return {"name": name, **sizes, "pattern": config.pattern, "about": f"d_model {config.d_model}, {n} sequence mixers"}


def _preset(name: str) -> dict[str, Any]:
    """A published name of a task."""
    task, options, about = PRESETS[name]
    given = " ".join([task, *(f"{option}={value}" for option, value in options.items())])
    return {"name": name, "layout": tasks[task].layout, "about": f"RULER: {about} ({given})."}


def _about(thing: type) -> str:
    """The first paragraph of a class's own docstring."""
    own = inspect.cleandoc(thing.__doc__ or "(it has no docstring)")
    return " ".join(own.split("\n\n")[0].split())
