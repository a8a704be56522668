"""Which words have solved which tasks, from the runs whose figures are in the tree (`docs/results/data`)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from zoo.core.errors import UsageError
from zoo.pattern import list_mixers
from zoo.training.recipes import read_recipe

DATA = Path(__file__).parents[1] / "results"
"""A link to the folder of the results in a clone, a copy of it in a wheel."""
EXACT, ACCURACY = 0.95, 0.99
"""The shares of exact answers, or of right tokens, from which a run that had no target counts as one that solved."""


class Solved(NamedTuple):
    """One run that solved a task.

    Attributes:
        task: the task's name.
        words: the sequence mixers of the model.
        pattern: the model's layers.
        problem: the recipe or the options, which say what exactly was solved.
        known: the figure by which it is known, of how many rows and seeds.
        source: the file that has the run, and its commit.
    """

    task: str
    words: tuple[str, ...]
    pattern: str
    problem: str
    known: str
    source: str


def solved() -> list[Solved]:
    """The runs that solved a task, by task and words.

    Raises:
        UsageError: the results are not there, or cannot be read.
    """
    found = [run for read in (_time_to_solve, _state_tracking, _recipes, _long_context) for run in read()]
    return sorted(found, key=lambda run: (run.task, run.words, run.problem))


def _time_to_solve() -> Iterator[Solved]:
    """Runs to 99 % of validation answers."""
    data = _json("time_to_solve.json")
    for row in [*data["recommended"], *data["mixers"]]:
        if row["solved"]:
            known = f"{row['accuracy']:.1%} of validation answers, seed {row['seed']}, {row['steps']} steps"
            yield _run("mqar", row["pattern"], "4 pairs, length 64", known, "time_to_solve.json", row["commit"])


def _state_tracking() -> Iterator[Solved]:
    """Runs that reached the recipe's target at the longer lengths."""
    for recipe, rows in _json("state_tracking.json").items():
        task = read_recipe(recipe)["task"]["name"]
        for name, row in rows.items():
            if row["status"] == "target":
                figures = {"at lengths of training": row["trained"], "at longer lengths": row["longer"]}
                told = [f"{figure:.3f} {where}" for where, figure in figures.items() if figure is not None]
                known = f"scaled accuracy {', '.join(told)}, seed 0"
                problem = f"recipe {recipe}, {name}"
                yield _run(task, row["pattern"], problem, known, "state_tracking.json", row["commit"])


def _recipes() -> Iterator[Solved]:
    """Runs of recipes that reached their target, or `EXACT`."""
    for recipe, rows in _json("recipes.json").items():
        task = read_recipe(recipe)["task"]["name"]
        for row in rows:
            test = row["test"]
            if row["status"] == "target" or test.get("exact", 0.0) >= EXACT:
                told = f"{test['n_rows']:,} test rows"
                if test["n_problems"] != test["n_rows"]:
                    told += f" ({test['n_problems']:,} problems)"
                known = f"{test['exact']:.1%} exact, {test['accuracy']:.1%} of answers, of {told}, seed 0"
                yield _run(task, row["pattern"], f"recipe {row['recipe']}", known, "recipes.json", row["commit"])


def _long_context() -> Iterator[Solved]:
    """Models with `ACCURACY` at the length of their training."""
    for line in _text("long-context.jsonl").splitlines():
        row = json.loads(line)
        setting = row["setting"]
        at_home = setting.get("length") == setting.get("train_length")
        if row["status"] == "ok" and at_home and row["figures"]["accuracy"]["value"] >= ACCURACY:
            seeds, rows = row["conditions"]["seeds"], row["conditions"]["test_rows"]
            known = f"{row['figures']['accuracy']['value']:.1%} of answers, of {rows} test rows, seeds: {seeds}"
            problem = f"length {setting['length']}, {setting['options']}"
            yield _run(setting["task"], row["layer"], problem, known, "long-context.jsonl", row["commit"])


def _run(task: str, pattern: str, problem: str, known: str, source: str, commit: str) -> Solved:
    named = set(re.findall(r"[a-z]\w*", pattern))  # those within others too, as in bidirectional(short_conv)
    words = named.intersection(list_mixers(kind="sequence"))
    plus = "+" if commit.endswith("+") else ""
    return Solved(task, tuple(sorted(words)), pattern, problem, known, f"{source}, commit {commit[:7]}{plus}")


def _json(name: str) -> Any:
    return json.loads(_text(name))


def _text(name: str) -> str:
    path = DATA / name
    if not path.exists():
        told = "a clone needs symbolic links (git config core.symlinks true, then git checkout zoo/results)"
        raise UsageError(f"The results of runs are not beside the package ({path}): {told}.")
    return path.read_text(encoding="utf-8")
