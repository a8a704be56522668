"""Which mixers follow a state, and how far beyond the lengths they were taught on.

    python -m zoo.benchmarks.studies.state_tracking [--recipes parity s3 ...] [--only lstm ...] [--missing]
        [--budget 60] [--jobs 2]

Every variant of the recipes parity, s3, modular-arithmetic and event-xor: `zoo train` on one thread in a process of
its own, `--jobs` of them side by side, each stopped by its target or after the budget; then the test split again at
the lengths of training. About 25 minutes at most with the default options on 2 cores. Rows of runs not made this time
are kept, and `--missing` makes only those that have no row yet.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

from zoo.benchmarks.studies.harness import Data, Study, table
from zoo.training.recipes import read_recipe

RECIPES = ("parity", "s3", "modular-arithmetic", "event-xor")
LEARNED, STOPPED = 0.9, "stopped by the clock"
AS_TRAINED = {  # what makes test rows as long as those of training; event XOR has one length for all
    "parity": "task.test_lengths=null",
    "s3": "task.test_length=null",
    "modular-arithmetic": "task.test_lengths=null",
}


def variants(recipe: str) -> list[str]:
    """Names of a recipe's variants."""
    return list(read_recipe(recipe)["variants"])


def zoo(*arguments: str) -> str:
    """The output of a `zoo` command on one thread."""
    command = [sys.executable, "-m", "zoo", *arguments]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=one_thread)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr.strip()[-500:]}")
    return done.stdout


def measured(recipe: str, variant: str, budget: float | None, folder: pathlib.Path) -> dict[str, Any]:
    """The row of one run."""
    out = folder / recipe
    limits = [] if budget is None else [f"train.time_budget={budget}"]
    start = time.perf_counter()
    zoo("train", recipe, "--variant", variant, "--quiet", f"out={out}", "train.threads=1", *limits)
    result = json.loads((out / variant / "result.json").read_text())
    test = result["test"]
    trained = test
    if recipe in AS_TRAINED:
        trained = json.loads(zoo("eval", str(out / variant), "--split", "test", "--json", AS_TRAINED[recipe]))
    by_length = {k: v["scaled"] for k, v in test["slices"].get("length", {}).items()}
    by_position = {k.removeprefix("accuracy_"): v for k, v in test.items() if k.startswith("accuracy_")}
    return {
        "pattern": result["model"]["pattern"],
        "n_parameters": result["n_parameters"],
        "status": result["status"],
        "steps": result["steps"],
        "seconds": round(result["seconds"], 1),
        "wall_seconds": round(time.perf_counter() - start, 1),
        "trained": trained["scaled"],
        "longer": test["scaled"] if recipe in AS_TRAINED else None,
        "exact": test["exact"],
        "by_length": by_length or by_position,
        "tokens_per_second": round(result["tokens_per_second"]),
        "commit": result["commit"],
        "machine": result["machine"]["cpu"],
    }


def shown(value: float | None) -> str:
    """A figure, bold where all is right."""
    if value is None:
        return ""
    return f"**{value:.2f}**" if value > 0.995 else f"{value:.2f}"


def has_learned(row: dict[str, Any]) -> bool:
    """Whether a run learned its task at the lengths of training, so that its figures say something of the layer."""
    return row["trained"] >= LEARNED


def scores(report: dict[str, dict[str, dict[str, Any]]], recipe: str, variant: str) -> list[str]:
    """A run's cells in the first table."""
    if variant not in report[recipe]:
        return ["not run" if variant in variants(recipe) else "—"] * len(_parts(recipe))
    row = report[recipe][variant]
    if not has_learned(row):
        return [STOPPED if row["status"] == "time_budget" else "not learned"] * len(_parts(recipe))
    return [f"{shown(row[part])}{' †' * (row['status'] == 'time_budget')}" for part in _parts(recipe)]


def markdown(report: Data) -> str:
    """The report as a page."""
    recipes = [r for r in RECIPES if report.get(r)]
    names = dict.fromkeys(v for r in recipes for v in variants(r) if v in report[r])
    machines = {row["machine"] for r in recipes for row in report[r].values()}
    lines = [
        "# State tracking",
        "",
        "Scaled accuracy on 1,024 unseen rows (`event-xor`: 2,048), which is (accuracy - chance) / (1 - chance): 0 is",
        "guessing, 1 all right. First at the lengths of training, then at longer ones: `parity` and",
        "`modular-arithmetic` train on 3 to 40 tokens and test on 40 to 256, `s3` trains on 24 elements and tests on",
        "128; `event-xor` has up to 32 bits in both. So nothing is said of lengths beyond 256. One small model of one",
        "or two layers each (below, and in the recipes), trained on one thread until validation, at the longer",
        "lengths, reaches the recipe's target or its time is up.",
        "",
        "Every cell is one run: 1 seed (0). The models of a column have the same width, not the same number of",
        "parameters, and learning rates of the recipe, which were not searched for each. What a model did not learn",
        "here it may learn in more time, or from another seed.",
        "",
        f"- *{STOPPED}*: the time was up before the model had {LEARNED} of scaled accuracy at the lengths of training.",
        f"- *not learned*: the model had less than {LEARNED} there after all the steps of the recipe.",
        "- †: the clock ended this training before its target.",
        "- —: the recipe has no such variant. *not run*: the variant was not measured.",
        "",
        f"Machine: {', '.join(sorted(machines))}.",
        "",
    ]
    head = [""] + [f"{r}, {part}" if r in AS_TRAINED else r for r in recipes for part in _parts(r)]
    lines += table(head, [[n, *(cell for r in recipes for cell in scores(report, r, n))] for n in names])
    lines += [
        "",
        "## Training",
        "",
        "Parameters, seconds, steps, and how it ended: *solved*, the target was reached on validation; *clock*, the",
        "time was up; *steps*, all steps were taken. Seconds depend on the machine's other work, steps do not.",
        "",
    ]

    def cost(row: dict[str, Any] | None) -> str:
        if row is None:
            return ""
        ended = {"target": "*solved*", "time_budget": "clock", "finished": "steps"}[row["status"]]
        return f"{row['n_parameters']:,}; {row['seconds']:.0f} s, {row['steps']:,}, {ended}"

    lines += table(["", *recipes], [[n, *(cost(report[r].get(n)) for r in recipes)] for n in names])
    for r in recipes:
        lengths = sorted({int(k) for row in report[r].values() for k in row["by_length"]})
        what = "accuracy at positions up to" if r == "s3" else "scaled accuracy by length, up to"
        chance = " (chance is 0.17)" if r == "s3" else ""
        lines += ["", f"## {r}: {what}{chance}", ""]
        rows = [
            [f"{n}: `{row['pattern'].replace('|', chr(92) + '|')}`"]
            + [shown(row["by_length"].get(str(length))) for length in lengths]
            for n, row in ((n, report[r][n]) for n in names if n in report[r])
            if has_learned(row)
        ]
        lines += table(["", *map(str, lengths)], rows)
        if rest := [
            f"{n} `{report[r][n]['pattern']}`" for n in names if n in report[r] and not has_learned(report[r][n])
        ]:
            lines += ["", f"No row, as the training ended before they had learned: {'; '.join(rest)}."]
    return "\n".join(lines) + "\n"


def _parts(recipe: str) -> tuple[str, ...]:
    return ("trained", "longer") if recipe in AS_TRAINED else ("trained",)


def arguments(parser: argparse.ArgumentParser) -> None:
    known = list(dict.fromkeys(v for r in RECIPES for v in variants(r)))
    parser.add_argument("--recipes", nargs="*", choices=RECIPES, default=RECIPES)
    parser.add_argument("--only", nargs="*", choices=known, default=known, metavar="VARIANT", help=", ".join(known))
    parser.add_argument("--missing", action="store_true", help="only runs that have no row yet")
    parser.add_argument("--budget", type=float, help="seconds of training for each run, by default the recipe's")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, each on one thread")


def measure(args: argparse.Namespace, old: Data) -> Iterator[Data]:
    report = {r: {v: row for v, row in old.get(r, {}).items() if v in variants(r)} for r in RECIPES}
    wanted = [(r, v) for r in args.recipes for v in variants(r) if v in args.only]
    wanted = [(r, v) for r, v in wanted if not (args.missing and v in report[r])]
    with tempfile.TemporaryDirectory() as scratch, concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        runs = {pool.submit(measured, r, v, args.budget, pathlib.Path(scratch)): (r, v) for r, v in wanted}
        for run in concurrent.futures.as_completed(runs):
            recipe, variant = runs[run]
            report[recipe][variant] = row = run.result()
            longer = "" if row["longer"] is None else f"longer {row['longer']:6.3f}"
            name = f"{recipe} {variant}"
            print(
                f"{name:45} {row['trained']:6.3f} {longer:14} {row['seconds']:5.1f} s {row['steps']} steps", flush=True
            )
            yield report


STUDY = Study("state_tracking", __doc__, arguments, measure, markdown)

if __name__ == "__main__":
    STUDY.main()
