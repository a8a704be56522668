"""Wall clock from process start until a model remembers: multi-query recall, to 99 % of the validation answers.

    python -m zoo.benchmarks.studies.time_to_solve [--seeds 5] [--budget 60] [--mixers "*"]

Vocabulary 256, length 64, 4 pairs, power_a 0.01, random non-queries. Every run is `zoo train` in a process of its own,
timed from its start to its exit, so imports, data, evaluation and any compilation count. First the recommended recipe
at each seed; then every sequence mixer, alone and behind a short convolution, with the same settings and a budget:
attention with four heads at least, and of words that are the same layer only one.
`share` is the rate of matrix products that training needs (3 times those of the forward pass, each token at its own
context, the head at the asked positions only) over that of large float32 products on this machine.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import torch

from zoo.benchmarks.studies.harness import Data, Study
from zoo.benchmarks.subjects import with_heads
from zoo.models.create import create_model
from zoo.pattern import list_mixers, parse
from zoo.report.layers import joined, same_layers
from zoo.training.doctor import examine
from zoo.training.recipes import read_recipe

RECIPE, VARIANT = "mqar-demo", "conv-attention"
PATTERNS = ("{mixer}", "short_conv {mixer}")


def run(folder: pathlib.Path, *overrides: str) -> dict[str, Any]:
    """One training in a process of its own, to its `result.json` and `wall_seconds`."""
    command = [
        sys.executable,
        "-m",
        "zoo",
        "train",
        RECIPE,
        "--variant",
        VARIANT,
        "--quiet",
        f"out={folder}",
        *overrides,
    ]
    start = time.perf_counter()
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    wall = time.perf_counter() - start
    files = list(folder.rglob("result.json"))
    if not files:
        raise RuntimeError(f"{' '.join(command)} failed: {process.stderr.strip()[-500:]}")
    return json.loads(files[0].read_text()) | {"wall_seconds": wall}


def training_flops(result: dict[str, Any]) -> float:
    """Operations in the matrix products of a whole training."""
    length, asked = result["task"]["seq_len"], result["task"]["n_pairs"]
    with torch.device("meta"):
        model = create_model(result["model"])
    mixing = sum(model.backbone.flops_per_token(t) for t in range(1, length + 1)) / length
    head = 2 * model.config.d_model * model.config.vocab_size * asked / length
    return 3 * (mixing + head) * result["tokens"]


def row(result: dict[str, Any], rate: float) -> dict[str, Any]:
    """The figures of one run that the tables show."""
    return {
        "pattern": result["model"]["pattern"],
        "d_model": result["model"]["d_model"],
        "seed": result["seed"],
        "solved": result["status"] == "target",
        "commit": result["commit"],
        "wall_seconds": round(result["wall_seconds"], 2),
        "train_seconds": round(result["seconds"], 2),
        "steps": result["steps"],
        "accuracy": result["validation"]["accuracy"],
        "n_parameters": result["n_parameters"],
        "state_bytes": result["state_bytes"],
        "tokens_per_second": round(result["tokens_per_second"]),
        "share": training_flops(result) / result["seconds"] / rate,
    }


def markdown(report: Data) -> str:
    """The report as a page."""
    walls = [r["wall_seconds"] for r in report["recommended"]]
    commits = sorted({r["commit"].rstrip("+")[:7] for r in [*report["recommended"], *report["mixers"]]})
    lines = [
        "# Time to solve",
        "",
        "Multi-query recall (vocabulary 256, length 64, 4 pairs, power_a 0.01, random non-queries) to 99 % of",
        "validation answers. Wall clock of the whole process: start, imports, training, evaluation, exit.",
        f"Machine: {report['machine']['cpu']}, {report['machine']['threads']} threads, "
        f"{report['machine']['matmul_flops'] / 1e9:.0f} GFLOP/s in large float32 products.",
        f"Commits: {', '.join(commits)}. Later kernels round otherwise, and a seed may then need some evaluations more",
        "or fewer: seed 0 of the recommended recipe took 225 steps at commit a7e4af3.",
        "",
        f"Recommended (`zoo train {RECIPE} --variant {VARIANT}`): median **{statistics.median(walls):.1f} s**, "
        f"worst **{max(walls):.1f} s** over seeds {', '.join(str(r['seed']) for r in report['recommended'])}.",
        "",
        *_table([(f"`{r['pattern']}`", r) for r in report["recommended"]]),
        "",
        "Every mixer, alone and behind a short convolution, with the recipe's learning rate: 1 seed each, and one",
        "learning rate for all. So this says which of them are solved at once with these settings, and not what the",
        "others could do with other rates, more time or more layers. A run that the clock stopped has no accuracy.",
        "Words that stand for the same layer at this width are one row, with the figures of the first; `swa` is that",
        "layer too where its window is no shorter than the rows, as here.",
        "",
        *_table(_by_layer(report["mixers"])),
    ]
    measured = {word.name for r in report["mixers"] for word in parse(r["pattern"]).words()}
    if missing := [name for name in list_mixers(kind="sequence") if name not in measured]:
        lines += ["", f"Not measured: {', '.join(f'`{name}`' for name in missing)}."]
    return "\n".join(lines) + "\n"


def _by_layer(rows: list[dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """Rows with their names; of those of the same layer the first, with the names of all."""
    by_pattern = {r["pattern"]: r for r in rows}
    groups = same_layers(by_pattern, rows[0]["d_model"])
    return [(joined([f"`{pattern}`" for pattern in group]), by_pattern[group[0]]) for group in groups]


def _table(rows: list[tuple[str, dict[str, Any]]]) -> list[str]:
    lines = [
        "| pattern | seed | ended | wall s | train s | steps | accuracy | tokens/s | matmul share | state |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, r in rows:
        ended, accuracy = ("solved", f"{r['accuracy']:.1%}") if r["solved"] else ("stopped by the clock", "")
        lines.append(
            f"| {name} | {r['seed']} | {ended} | {r['wall_seconds']:.1f} | {r['train_seconds']:.1f} | {r['steps']} "
            f"| {accuracy} | {r['tokens_per_second']:,} | {r['share']:.1%} | {r['state_bytes'] / 1024:.1f} KiB |"
        )
    return lines


def patterns(mixers: str, width: int) -> list[str]:
    """Every mixer alone, then behind a short convolution, each layer once and attention with several heads."""
    found = [p.format(mixer=mixer) for mixer in list_mixers(mixers, kind="sequence") for p in PATTERNS]
    return [group[0] for group in same_layers([str(with_heads(parse(p), width)) for p in found], width)]


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seeds", type=int, default=5, help="seeds 0, 1, ... of the recommended recipe")
    parser.add_argument("--budget", type=float, default=60, help="seconds of training for each mixer")
    parser.add_argument("--mixers", default="*", help="a shell pattern")


def measure(args: argparse.Namespace, old: Data) -> Iterator[Data]:
    examined = examine()
    machine = examined["machine"] | {
        "versions": examined["versions"],
        "matmul_flops": 1e9 * examined["matmul_gflops"]["cpu float32"]["2048"],
    }
    wanted = [("recommended", f"seed {seed}", [f"train.seed={seed}"]) for seed in range(args.seeds)]
    limits = [f"train.time_budget={args.budget}", "train.steps=100000"]
    for layers in patterns(args.mixers, read_recipe(RECIPE)["model"]["d_model"]):
        wanted.append(("mixers", layers, [f"model.pattern={layers}", *limits]))
    report: Data = {"recommended": [], "mixers": [], **old, "machine": machine}
    with tempfile.TemporaryDirectory() as scratch:
        for group, name, overrides in wanted:
            folder = pathlib.Path(scratch) / name.replace(" ", "-")
            r = row(run(folder, *overrides), machine["matmul_flops"])
            rows = {(other["pattern"], other["seed"]): other for other in report[group]}
            report[group] = list({**rows, (r["pattern"], r["seed"]): r}.values())
            print(f"{name:32} {r['accuracy']:6.1%} {r['wall_seconds']:6.1f} s  {r['steps']} steps", flush=True)
            yield report


STUDY = Study("time_to_solve", __doc__, arguments, measure, markdown)

if __name__ == "__main__":
    STUDY.main()
