"""How much the order of unmasking decides: one masked diffusion model, its answers written in every order.

    python -m zoo.benchmarks.studies.unmasking_order [--size 4] [--steps 150] [--run FOLDER] [--rows 2000]
        [--passes 0 4]

Trains a small model on Sudoku of 4x4 or 6x6 (or takes a finished run of any task that masked_diffusion teaches), and
answers the same unseen puzzles in each order: cell by cell, and in fewer passes, several cells at once. Kim et al. 2025
(arXiv 2502.06768, table 2) have the same model of 6 M parameters solve 6.9 % of their 9x9 puzzles in random order,
18.5 % surest cell first, and 89.5 % widest margin first.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any, get_args, get_type_hints

from zoo.benchmarks.studies.harness import Data, Study
from zoo.core.run_files import read_whole_config
from zoo.objectives.unmasking import Unmasking
from zoo.training.evaluation import evaluate_run
from zoo.training.machine import cpu_name
from zoo.training.train import train

ORDERS: tuple[str, ...] = get_args(get_type_hints(Unmasking)["order"])
TASKS: dict[int, dict[str, Any]] = {4: {"max_givens": 5}, 6: {"minimal": True}}
"""Options of the puzzles by size."""
PUBLISHED = {"random": 6.88, "confidence": 18.51, "margin": 89.49}
"""Per cent of the puzzles of Kim et al. 2025, by a model that was taught for longer on larger ones."""


def experiment(size: int, steps: int) -> dict[str, Any]:
    """A model that is taught for too short a time to solve every puzzle in every order."""
    return {
        "name": "unmasking-order",
        "task": {"name": "sudoku", "size": size, **TASKS[size]},
        "model": {
            "pattern": "4*(mha(n_heads=4, rope=False) swiglu)",
            "d_model": 128,
            "causal": False,
            "positions": "learned",
        },
        "objective": "masked_diffusion",
        "train": {
            "steps": steps,
            "batch_size": 128,
            "optimizer": "muon",
            "lr": 2e-3,
            "muon_lr": 1e-2,
            "precision": "bfloat16",
            "ema": 0.99,
            "eval_every": steps,
            "eval_rows": 100,
            "test_rows": 100,
            "metric": "exact",
        },
    }


def measured(run: pathlib.Path, order: str, passes: int, rows: int) -> dict[str, Any]:
    """The score of one order; 0 passes are one for every cell."""
    overrides = {"objective.order": order, "objective.steps": passes or None, "train.test_rows": rows}
    score = evaluate_run(run, overrides, split="test")
    kept = ("exact", "exact_low", "exact_high", "accuracy", "n_rows", "n_problems")
    return {"order": order, "passes": passes, **{k: score[k] for k in kept}}


def markdown(data: Data) -> str:
    """The page."""
    passes = sorted({r["passes"] for r in data["rows"]})
    by = {(r["order"], r["passes"]): r for r in data["rows"]}
    n, problems = data["rows"][0]["n_rows"], data["rows"][0]["n_problems"]
    task = ", ".join(
        f"{k}={v}" for k, v in data["task"].items() if v not in (None, False) and k not in ("name", "augment")
    )
    titles = ["one cell a pass" if p == 0 else f"{p} passes" for p in passes]
    lines = [
        "# The order of unmasking",
        "",
        f"Exact answers of one model (1 seed: {data['seed']}) to the same {n:,} test rows of `{data['task']['name']}`",
        f"({task}), unmasked in every order. The rows are {problems:,} problems up to the task's symmetry.",
        f"`{data['pattern']}`, {data['n_parameters']:,} parameters, {data['steps']:,} steps of {data['batch_size']}",
        "rows, too few to solve every puzzle in every order. In brackets, the 95 % interval over the problems,",
        "clustered where several rows are one; it does not cover what another seed of the training would change.",
        f"Made by `{data['command']}`.",
        "",
        "| order | " + " | ".join(titles) + " | published, of 9x9 and a model of 6 M (arXiv 2502.06768, table 2) |",
        "|---|" + "---|" * (len(passes) + 1),
    ]
    for order in dict.fromkeys(r["order"] for r in data["rows"]):
        cells = [_share(by[order, p]) for p in passes]
        published = f"{PUBLISHED[order]:.1f}%" if order in PUBLISHED else ""
        lines.append(f"| {order} | {' | '.join(cells)} | {published} |")
    return "\n".join(lines) + "\n"


def _share(row: dict[str, Any]) -> str:
    return f"{row['exact']:.1%} ({row['exact_low']:.1%} to {row['exact_high']:.1%})"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", type=pathlib.Path, help="a finished run, by default one that is made")
    parser.add_argument("--steps", type=int, default=150, help="of training, where a run is made")
    parser.add_argument("--size", type=int, choices=list(TASKS), default=4, help="of the puzzles, where a run is made")
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--passes", type=int, nargs="*", default=[0, 4], help="0: one for every cell")


def measure(args: argparse.Namespace, old: Data) -> Iterator[Data]:
    chosen = f"--run {args.run}" if args.run else f"--size {args.size} --steps {args.steps}"
    how = f"{chosen} --rows {args.rows} --passes {' '.join(map(str, args.passes))}"
    with tempfile.TemporaryDirectory() as scratch:
        run = args.run or train(experiment(args.size, args.steps) | {"out": f"{scratch}/run"}).path
        result = json.loads((run / "result.json").read_text())
        yield {
            "task": read_whole_config(run)["task"],
            "pattern": result["model"]["pattern"],
            "n_parameters": result["n_parameters"],
            "steps": result["steps"],
            "batch_size": result["train"]["batch_size"],
            "seed": result["seed"],
            "seconds": result["seconds"],
            "machine": f"{cpu_name()} (threads: {result['machine']['threads']})",
            "commit": result["commit"],
            "command": f"python -m zoo.benchmarks.studies.unmasking_order {how}",
            "rows": [measured(run, order, passes, args.rows) for passes in args.passes for order in ORDERS],
        }


STUDY = Study("unmasking_order", __doc__, arguments, measure, markdown)

if __name__ == "__main__":
    STUDY.main()
