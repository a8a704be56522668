"""How much the order of unmasking decides: one masked diffusion model, its answers written in every order.

    python -m zoo.benchmarks.studies.unmasking_order [--size 4] [--steps 150] [--run FOLDER] [--rows 2000]
        [--passes 0 4] [--bounds 0.1] [--learned 240]

Trains a small model on Sudoku of 4x4, 6x6 or 9x9 (or takes a finished run of any task that masked_diffusion teaches),
and answers the same unseen puzzles in each order: cell by cell, and in fewer passes, several cells at once. With
`--learned`, a policy of the order is trained on the frozen model, and its order is measured too. Kim et al. 2025
(arXiv 2502.06768, table 2) have the same model of 6 M parameters solve 6.9 % of their 9x9 puzzles in random order,
18.5 % surest cell first, and 89.5 % widest margin first.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

from zoo.benchmarks.studies.harness import Data, Study
from zoo.core.run_files import read_whole_config, run_of
from zoo.training import checkpoint
from zoo.training.evaluation import evaluate_run
from zoo.training.machine import cpu_name
from zoo.training.train import train

ORDERS = ("random", "confidence", "margin", "entropy", "low_confidence")
SETS: dict[int, dict[str, Any]] = {
    4: {
        "task": {"max_givens": 5},
        "model": {"pattern": "4*(mha(n_heads=4, rope=False) swiglu)", "d_model": 128},
        "steps": 150,
    },
    6: {
        "task": {"minimal": True},
        "model": {"pattern": "2*(mha(n_heads=4, rope=False) swiglu)", "d_model": 64},
        "steps": 300,
        "schedule": 1000,
    },
    9: {
        "task": {"n_givens": 36},
        "model": {"pattern": "4*(mha(n_heads=4, rope=False) swiglu)", "d_model": 128},
        "steps": 500,
    },
}
"""By the size of the puzzles: which, the model, and steps that are too few to solve every puzzle in every order, with
the length of the schedule that they are the first of, where it is longer."""
PUBLISHED = {"random": 6.88, "confidence": 18.51, "margin": 89.49}
"""Per cent of the puzzles of Kim et al. 2025, by a model that was taught for longer on larger ones."""


def experiment(size: int, steps: int) -> dict[str, Any]:
    """A model that is taught for too short a time to solve every puzzle in every order."""
    return {
        "name": "unmasking-order",
        "task": {"name": "sudoku", "size": size, **SETS[size]["task"]},
        "model": {**SETS[size]["model"], "causal": False, "positions": "learned"},
        "objective": "masked_diffusion",
        "train": {
            "steps": max(steps, SETS[size].get("schedule", steps)),
            "batch_size": 128,
            "optimizer": "muon",
            "lr": 2e-3,
            "muon_lr": 1e-2,
            "precision": "bfloat16",
            "ema": 0.99,
            "eval_every": steps,
            "checkpoint_every": steps,
            "keep": 20,
            "eval_rows": 100,
            "test_rows": 100,
            "metric": "exact",
        },
    }


def order_training(run: pathlib.Path, batches: int) -> dict[str, Any]:
    """The training of a policy for the model of a run, which stays as it is."""
    config = read_whole_config(run_of(run))
    return {
        "name": "learned-order",
        "task": config["task"],
        "model": config["model"] | {"unmasking_policy": {}},
        "objective": {"name": "masked_diffusion", "unmasking_order": {}},
        "init": str(run),
        "train": {
            "steps": batches,
            "batch_size": 16,
            "lr": 3e-3,
            "warmup_steps": 10,
            "weight_decay": 0.0,
            "schedule": "cosine",
            "clip": 1.0,
            "eval_every": 40,
            "eval_rows": 256,
            "eval_batch_size": 256,
            "test_rows": 100,
            "metric": "exact",
        },
    }


def measured(run: pathlib.Path, order: str, passes: int, rows: int, bound: float | None = None) -> dict[str, Any]:
    """The score of one order; 0 passes are one for every cell, unless a bound on entropies decides."""
    how = {"objective.order": order, "objective.steps": passes or None, "objective.entropy_bound": bound}
    score = evaluate_run(run, how | {"train.test_rows": rows}, split="test")
    kept = ("exact", "exact_low", "exact_high", "accuracy", "n_rows", "n_problems")
    named = order if bound is None else f"{order}, bound {bound}"
    return {"order": named, "passes": passes, **{k: score[k] for k in kept}}


def markdown(data: Data) -> str:
    """The page."""
    lines = ["# The order of unmasking"]
    for found in data["sets"].values():
        lines += ["", *_section(found)]
    return "\n".join(lines) + "\n"


def _section(data: Data) -> list[str]:
    passes = sorted({r["passes"] for r in data["rows"]})
    by = {(r["order"], r["passes"]): r for r in data["rows"]}
    n, problems = data["rows"][0]["n_rows"], data["rows"][0]["n_problems"]
    task = ", ".join(
        f"{k}={v}" for k, v in data["task"].items() if v not in (None, False, 0) and k not in ("name", "augment")
    )
    titles = ["one cell a pass" if p == 0 else f"{p} passes" for p in passes]
    size = data["task"]["size"]
    longer = data.get("schedule", data["steps"]) > data["steps"]
    schedule = f" (the first of a schedule of {data['schedule']:,})" if longer else ""
    lines = [
        f"## {size}x{size}",
        "",
        f"Exact answers of one model (1 seed: {data['seed']}) to the same {n:,} test rows of `{data['task']['name']}`",
        f"({task}), unmasked in every order. The rows are {problems:,} problems up to the task's symmetry.",
        f"`{data['pattern']}`, {data['n_parameters']:,} parameters, {data['steps']:,} steps of {data['batch_size']}",
        f"rows{schedule}, too few to solve every puzzle in every order. In brackets,",
        "the 95 % interval over the problems, clustered where several rows are one; it does not cover what another",
        "seed of the training would change.",
        f"Made by `{data['command']}`.",
        "",
        "| order | " + " | ".join(titles) + " | published, of 9x9 and a model of 6 M (arXiv 2502.06768, table 2) |",
        "|---|" + "---|" * (len(passes) + 1),
    ]
    for order in dict.fromkeys(r["order"] for r in data["rows"]):
        cells = [_share(by[order, p]) if (order, p) in by else "" for p in passes]
        published = f"{PUBLISHED[order]:.1f}%" if order in PUBLISHED else ""
        lines.append(f"| {order} | {' | '.join(cells)} | {published} |")
    if (learned := data.get("learned")) is not None:
        lines += [
            "",
            f"The learned order: {learned['batches']:,} batches of {learned['batch_size']} puzzles with",
            f"{learned['group']} answers each (1 seed: {learned['seed']}), in {learned['seconds'] / 60:.0f} minutes on",
            f"a busy machine; the policy has {learned['n_parameters']:,} parameters. {_gain(by)}",
            "Hong et al. 2025 (arXiv 2510.05725) publish 11.2 points more than confidence, with LLaDA-8B on puzzles.",
        ]
    return lines


def _gain(by: dict[tuple[str, int], dict[str, Any]]) -> str:
    learned, start = by["learned", 0], by["confidence", 0]
    points, inside = 100 * (learned["exact"] - start["exact"]), learned["exact_low"] <= start["exact"]
    said = "within the interval, so no gain is seen" if inside else "above the interval"
    return f"It began as confidence, and ended {points:+.1f} points from it: {said}."


def _share(row: dict[str, Any]) -> str:
    return f"{row['exact']:.1%} ({row['exact_low']:.1%} to {row['exact_high']:.1%})"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", type=pathlib.Path, help="a finished run, by default one that is made")
    parser.add_argument("--order-run", type=pathlib.Path, help="a finished run of unmasking_order on that run")
    parser.add_argument("--steps", type=int, help="of training, where a run is made")
    parser.add_argument("--size", type=int, choices=list(SETS), default=4, help="of the puzzles, where a run is made")
    parser.add_argument("--learned", type=int, default=0, metavar="BATCHES", help="train the order too, for so long")
    parser.add_argument("--bounds", type=float, nargs="*", default=[], help="on entropies, in the order of entropy")
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--passes", type=int, nargs="*", default=[0, 4], help="0: one for every cell")


def measure(args: argparse.Namespace, old: Data) -> Iterator[Data]:
    steps = args.steps or SETS[args.size]["steps"]
    chosen = f"--run {args.run}" if args.run else f"--size {args.size} --steps {steps}"
    how = f"{chosen} --rows {args.rows} --passes {' '.join(map(str, args.passes))}"
    how += f" --learned {args.learned}" if args.learned else ""
    how += f" --bounds {' '.join(map(str, args.bounds))}" if args.bounds else ""
    with tempfile.TemporaryDirectory() as scratch:
        made = experiment(args.size, steps) | {"out": f"{scratch}/run"}
        run = args.run or train(made).path / "checkpoints" / f"step_{steps}"
        result = json.loads((run_of(run) / "result.json").read_text())
        rows = [measured(run, order, passes, args.rows) for passes in args.passes for order in ORDERS]
        rows += [measured(run, "entropy", 0, args.rows, bound) for bound in args.bounds]
        found = {
            "task": read_whole_config(run_of(run))["task"],
            "pattern": result["model"]["pattern"],
            "n_parameters": result["n_parameters"],
            "steps": checkpoint.step_of(run) or result["steps"],
            "schedule": result["train"]["steps"],
            "batch_size": result["train"]["batch_size"],
            "seed": result["seed"],
            "seconds": result["seconds"],
            "machine": f"{cpu_name()} (threads: {result['machine']['threads']})",
            "commit": result["commit"],
            "command": f"python -m zoo.benchmarks.studies.unmasking_order {how}",
            "rows": rows,
        }
        if args.learned or args.order_run:
            taught = args.order_run or train(order_training(run, args.learned) | {"out": f"{scratch}/order"}).path
            done = json.loads((taught / "result.json").read_text())
            rows += [measured(taught, "learned", passes, args.rows) for passes in args.passes]
            found["learned"] = {
                "batches": done["steps"],
                "batch_size": done["train"]["batch_size"],
                "group": read_whole_config(taught)["objective"]["unmasking_order"]["group"],
                "seed": done["seed"],
                "seconds": done["seconds"],
                "n_parameters": done["n_parameters"] - result["n_parameters"],
            }
        yield {"sets": {**old.get("sets", {}), str(found["task"]["size"]): found}}


STUDY = Study("unmasking_order", __doc__, arguments, measure, markdown)

if __name__ == "__main__":
    STUDY.main()
