"""A training step of TRM in the authors' Sudoku configuration, beside the authors' own code.

    python -m zoo.benchmarks.studies.trm_step REPOSITORY [--threads 2] [--repeats 7]

REPOSITORY is a checkout of SamsungSAILMontreal/TinyRecursiveModels. One supervision step, loss and backward pass (no
optimizer) of the MLP form: width 512, 81 cells behind 16 places, 3 cycles of 6 updates, 32 puzzles, bfloat16, the same
weights and puzzles on both sides. All take turns in one process; the least and the median of their times are kept.
The floor is the step's matrix products at the rate of a large bfloat16 product.
"""

from __future__ import annotations

import argparse
import pathlib
import statistics
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from zoo import tasks
from zoo.benchmarks.studies.harness import Data, Study, facts
from zoo.interop.trm import from_authors
from zoo.models.recursive import RecursiveModel
from zoo.objectives import create_objective

ROWS, SIDE = 32, 2048
CONFIG: dict[str, Any] = {
    "batch_size": ROWS,
    "seq_len": 81,
    "puzzle_emb_ndim": 512,
    "num_puzzle_identifiers": 1,
    "vocab_size": 11,
    "H_cycles": 3,
    "L_cycles": 6,
    "H_layers": 0,
    "L_layers": 2,
    "hidden_size": 512,
    "expansion": 4,
    "num_heads": 8,
    "pos_encodings": "none",
    "mlp_t": True,
    "puzzle_emb_len": 16,
    "halt_max_steps": 16,
    "halt_exploration_prob": 0.0,
}


class Theirs:
    """The authors' model and loss; every call is one step and gives the loss of a puzzle."""

    def __init__(self, repository: pathlib.Path, inputs: Tensor, targets: Tensor):
        sys.path.insert(0, str(repository))
        kind = import_module("models.recursive_reasoning.trm").TinyRecursiveReasoningModel_ACTV1
        self.model = kind(CONFIG)
        self.head = import_module("models.losses").ACTLossHead(self.model, "stablemax_cross_entropy").train()
        self.batch = {"inputs": inputs, "labels": targets, "puzzle_identifiers": torch.zeros(ROWS, dtype=torch.int64)}

    def __call__(self) -> float:
        carry = self.head.initial_carry(self.batch)
        _, loss, *_ = self.head(return_keys=[], carry=carry, batch=self.batch)
        (loss / ROWS).backward()
        self.model.zero_grad()
        return loss.item() / ROWS


class Ours:
    """The same step here."""

    def __init__(self, weights: Mapping[str, Tensor], task: tasks.Task, batch: tasks.Batch, *, recompute: bool = False):
        self.model: RecursiveModel = from_authors(weights, CONFIG).train()
        self.model.recompute = recompute
        self.objective = create_objective("deep_supervision", task, causal=False, exploration=0.0)
        self.data, self.generator = self.objective.encode(batch), torch.Generator()

    def __call__(self) -> float:
        with torch.autocast("cpu", torch.bfloat16):
            (update,) = self.objective.updates(self.model, self.data, {}, self.generator)
        update.loss.backward()
        self.model.zero_grad()
        return update.loss.item()

    def flops(self) -> float:
        """Of the matrix products of one step: all cycles forward, the last backward too, which is twice the work."""
        forward = ROWS * CONFIG["seq_len"] * self.model.flops_per_token(CONFIG["seq_len"])
        return forward * (1 + 2 / CONFIG["H_cycles"])


def measured(repository: pathlib.Path, repeats: int) -> Data:
    torch.manual_seed(0)
    task = tasks.create_task("sudoku", size=9)
    batch = task.sample(ROWS, split="train", seed=0)
    theirs = Theirs(repository, batch.inputs, batch.targets)
    ours = Ours(theirs.model.state_dict(), task, batch)
    a, b = torch.randn(2, SIDE, SIDE).bfloat16()
    forms: dict[str, Callable[[], object]] = {
        "theirs": theirs,
        "ours": ours,
        "ours, recomputing": Ours(theirs.model.state_dict(), task, batch, recompute=True),
        "large product": lambda: a @ b,
    }
    losses = {name: form() for name, form in forms.items() if name != "large product"}
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(repeats):
        for name, form in forms.items():
            start = time.perf_counter()
            form()
            seconds[name].append(time.perf_counter() - start)
    rate = 2 * SIDE**3 / statistics.median(seconds.pop("large product"))
    steps = {
        name: {
            "median_s": statistics.median(times),
            "least_s": min(times),
            "loss": losses[name],
            "share_of_matmul_rate": ours.flops() / statistics.median(times) / rate,
        }
        for name, times in seconds.items()
    }
    return {"steps": steps, "flops": ours.flops(), "matmul_rate": rate, "floor_s": ours.flops() / rate}


def markdown(report: Data) -> str:
    at, steps = report["machine"], report["steps"]
    lines = [
        "# A training step of TRM beside the authors' code",
        "",
        textwrap.fill(
            f"{at['cpu']}, {at['threads']} threads, torch {at['versions']['torch']}, bfloat16, {ROWS} puzzles "
            "of 9x9 Sudoku, width 512, 3 cycles of 6 updates, MLP form; forward and backward pass of one supervision "
            f"step. The step's matrix products are {report['flops'] / 1e12:.2f} TFLOP; a product of {SIDE} x {SIDE} "
            f"matrices runs at {report['matmul_rate'] / 1e12:.2f} TFLOP/s in the same process. At that rate they alone "
            f"take {report['floor_s']:.2f} s, {report['floor_s'] / steps['theirs']['median_s']:.2f} of the authors' "
            "time.",
            width=120,
        ),
        "",
        "| code | s, median | s, least | over theirs | share of the matmul rate | loss |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, m in steps.items():
        ratio = m["median_s"] / steps["theirs"]["median_s"]
        lines.append(
            f"| {name} | {m['median_s']:.2f} | {m['least_s']:.2f} | {ratio:.2f} | {m['share_of_matmul_rate']:.0%} | "
            f"{m['loss']:.4f} |"
        )
    return "\n".join(lines) + "\n"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("repository", type=pathlib.Path, help="a checkout of the authors' repository")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)


def measure(args: argparse.Namespace, old: Data) -> Iterator[Data]:
    torch.set_num_threads(args.threads)
    yield {"machine": facts(), "repeats": args.repeats, **measured(args.repository, args.repeats)}


STUDY = Study("trm_step", __doc__, arguments, measure, markdown)

if __name__ == "__main__":
    STUDY.main()
