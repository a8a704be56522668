"""What every shipped recipe reaches on this machine, and in what time.

    python -m zoo.benchmarks.studies.recipes [--budget 1800] [--only sudoku-4x4 text:diffusion ...] [--threads 1]

Each variant is `zoo train RECIPE` in a process of its own, one after the other; training stops at the recipe's own end
or after the budget, whichever comes first, and the table says which. Time is that of the whole run, evaluation and test
included: by the clock, and the processor's, which the machine's other work does not lengthen. (Recipes of state
tracking are for `zoo.benchmarks.studies.state_tracking`; those for GPUs run where they are named.) Rows of runs not
made this time are kept.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

from zoo.benchmarks.studies.harness import Data, Study
from zoo.benchmarks.studies.state_tracking import RECIPES as STATE_TRACKING
from zoo.recipes import list_recipes
from zoo.training.recipes import read_recipe

ENDED = {"target": "target reached", "finished": "all its steps", "time_budget": "stopped by the clock"}
FOR_GPUS = ("arc-trm", "maze-30x30-trm", "sudoku-9x9-fast", "sudoku-9x9-trm")
LEARNED = 0.01
"""The share of exact answers from which a run counts as one that has learned its task; `text` has bits instead."""


def names(recipe: str) -> list[str | None]:
    """A recipe's variants; [None] where it has none."""
    return list(read_recipe(recipe).get("variants", [None]))


def measured(recipe: str, variant: str | None, budget: float, threads: int | None) -> dict[str, Any]:
    """The row of one run."""
    own = read_recipe(recipe)["train"].get("time_budget", budget)
    overrides = [f"train.time_budget={min(own, budget)}", *([] if threads is None else [f"train.threads={threads}"])]
    environment = os.environ | ({} if threads is None else {"OMP_NUM_THREADS": str(threads)})
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "zoo", "train", recipe, "--quiet", f"out={folder}/run", *overrides]
        command += [] if variant is None else ["--variant", variant]
        before = _processor()
        subprocess.run(command, check=True, env=environment)
        spent = _processor() - before
        found = next(pathlib.Path(folder).rglob("result.json"))
        return row(recipe, json.loads(found.read_text())) | {
            "processor_seconds": round(spent, 1),
            "load": round(os.getloadavg()[2], 1),
        }


def _processor() -> float:
    """Seconds that all processes started and ended so far have computed, each core for itself."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def row(recipe: str, result: dict[str, Any]) -> dict[str, Any]:
    """The figures that the table shows."""
    test, train = result["test"], result["train"]
    return {
        "recipe": recipe if result["name"] == recipe else f"{recipe}, {result['name']}",
        "pattern": result["model"]["pattern"],
        "d_model": result["model"]["d_model"],
        "n_parameters": result["n_parameters"],
        "status": result["status"],
        "steps": result["steps"],
        "batch_size": train["batch_size"],
        "optimizer": train["optimizer"],
        "seconds": round(result["seconds"], 1),
        "test": {k: v for k, v in test.items() if k != "slices"},
        "tokens_per_second": result["tokens_per_second"],
        "precision": result["precision"],
        "commit": result["commit"],
        "machine": f"{result['machine']['cpu']}, {result['machine']['threads']} threads",
    }


def scores(r: dict[str, Any]) -> tuple[str, str, str]:
    """Exact answers, accuracy, and valid answers or bits; of a run that had not learned its task, that it had not."""
    t = r["test"]
    if "bits_per_byte" in t:
        return "", f"{t['accuracy']:.2%}", f"{t['bits_per_byte']:.3f}"
    if t["exact"] < LEARNED:
        return "not learned", "", ""
    if r["status"] == "time_budget" and "target" in read_recipe(r["recipe"].partition(",")[0])["train"]:
        return "stopped by the clock", "", ""
    interval = "" if t.get("exact_low") is None else f" ({t['exact_low']:.1%} to {t['exact_high']:.1%})"
    return f"{t['exact']:.2%}{interval}", f"{t['accuracy']:.2%}", f"{t['valid']:.1%}" if "valid" in t else ""


def tested(r: dict[str, Any]) -> str:
    """How many test rows there were, and how many problems they are where those are fewer."""
    n, found = r["test"]["n_rows"], r["test"]["n_problems"]
    return f"{n:,}" if found == n else f"{n:,}: {found:,} problems"


def markdown(data: Data) -> str:
    """The table as a page."""
    lines = [
        "# What the recipes reach",
        "",
        "Every row is one run: 1 seed (0), so small differences between rows say nothing. The figures are of unseen",
        "test rows, read once with the weights that validation chose. `exact`: share of rows with every answer right,",
        "with its 95 % interval over the test problems where the run recorded one. `accuracy`: share of right answers.",
        "`valid`: the answer is a shortest path, the expected one or another. `bits`: bits a byte, exact left to",
        "right, an estimate of an upper bound under diffusion. `test rows`: where they are fewer problems, up to the",
        "task's own symmetry, their number; such a score rests on those. The 2,000 rows of 4x4 Sudoku are 15 puzzles.",
        "",
        "A run with fewer than 1 % exact answers is *not learned*; one that the clock stopped before its recipe's",
        "target has no score either. `cwm-tiny`, `text` and `star-graph, next_token` have no target and always end by",
        "the clock: their figures say how far that time led. The runs of `sudoku-9x9-easy`, `n-queens` and",
        "`star-graph` had the options of the recipe before it had its name, but 300 s instead of 400 for `star-graph,",
        "next_token`. Time is that of the whole run, evaluation",
        "and test included, by the clock and of the processor. `load`: mean number of processes at work in the last",
        "quarter of an hour, on 2 cores; where there were more than two, the clock's time is longer than that of a run",
        "alone. Steps and times are those of",
        "the commit named (`+`: with changes that were not committed). Later kernels round otherwise, and a run may",
        "then need some evaluations more or fewer: `mqar-demo, conv-attention` took 225 steps at commit a7e4af3.",
        "",
        "At width 64 `mha` has one head. `gqa` of width 128 has two heads of queries and one of keys and values, which",
        "is `mqa`.",
        "",
        "| recipe | layers | parameters | exact | accuracy | valid, bits | test rows | time | processor | load | on "
        "| ended | commit |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in (r for name in sorted(data) for r in data[name]):
        layers = r["pattern"].replace("|", "\\|")
        spent = f"{r['processor_seconds']:.0f} s" if "processor_seconds" in r else ""
        machine = f"{r['machine'].replace(' threads', '')} threads, {r['precision']}".replace(" 1 threads", " 1 thread")
        lines.append(
            f"| {r['recipe']} | `{layers}` | {r['n_parameters']:,} | {' | '.join(scores(r))} | {tested(r)} "
            f"| {r['seconds']:.0f} s, {r['steps']:,} steps | {spent} | {r.get('load', '')} | {machine} "
            f"| {ENDED[r['status']]} | {r['commit'][:7]}{'+' * r['commit'].endswith('+')} |"
        )
    return "\n".join(lines) + "\n"


def arguments(parser: argparse.ArgumentParser) -> None:
    default = [name for name in list_recipes() if name not in (*STATE_TRACKING, *FOR_GPUS)]
    every = [name for recipe in list_recipes() for name in (recipe, *(f"{recipe}:{v}" for v in names(recipe) if v))]
    parser.add_argument("--budget", type=float, default=1800, help="most seconds of training for each")
    parser.add_argument("--only", nargs="*", choices=every, default=default, metavar="RECIPE[:VARIANT]")
    parser.add_argument("--threads", type=int, help="of each run, by default torch's choice")


def measure(args: argparse.Namespace, old: Data) -> Iterator[Data]:
    rows: dict[str, list[dict[str, Any]]] = dict(old)
    for chosen in args.only:
        recipe, _, variant = chosen.partition(":")
        for name in [variant] if variant else names(recipe):
            new = measured(recipe, name, args.budget, args.threads)
            kept = [r for r in rows.get(recipe, []) if r["recipe"] != new["recipe"]]
            rows[recipe] = sorted([*kept, new], key=lambda r: r["recipe"])
            yield rows


STUDY = Study("recipes", __doc__, arguments, measure, markdown)

if __name__ == "__main__":
    STUDY.main()
