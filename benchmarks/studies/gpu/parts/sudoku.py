"""A slice of `sudoku-9x9-fast`, which continues from its checkpoint: exact accuracy over time."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping
from typing import Any

import zoo
from zoo.benchmarks.studies.gpu.part import Items, Part, Row, Settings
from zoo.benchmarks.studies.harness import table
from zoo.core.run_files import METRICS
from zoo.training.stopping import Interrupted
from zoo.training.watch import Watch

RECIPE = "sudoku-9x9-fast"
FULL: dict[str, Any] = {"train.compile": True, "train.eval_every": 100, "train.eval_rows": 512}
PATTERN = 'token_mlp(length=17, d_hidden=16, norm_axis="time", inner_norm=True) swiglu(d_hidden=16, inner_norm=True)'
TOY: dict[str, Any] = {
    "task": {"name": "sudoku", "size": 4, "n_puzzles": 16},
    "model.pattern": PATTERN,
    "model.d_model": 16,
    "model.recursion": {"cycles": 2, "updates": 1, "max_steps": 2, "prefix": 1},
    "train.steps": 8,
    "train.batch_size": 4,
    "train.ema_start": 4,
    "train.eval_every": 2,
    "train.eval_rows": 8,
    "train.test_rows": 8,
    "train.log_every": 1,
}
MARGIN = 0.2
"""Share of the part's seconds that is left for its start and for the checkpoint."""
SLICE = 8
"""How often a slice at toy size may ask whether it ends, once a batch or more: it ends before its steps do."""


class Until(Watch):
    """Ends a training at a moment, or when it was asked a number of times, with a checkpoint."""

    def __init__(self, end: float, most: float):
        self.end, self.most = end, most

    def stops(self) -> bool:
        self.most -= 1
        return time.perf_counter() >= self.end or self.most < 0


def trained(settings: Settings) -> Row:
    """A slice, from the last checkpoint in the folder of the run or from the start."""
    folder = settings.folder / "sudoku" / "run"
    changes = {"out": str(folder), "train.device": settings.device, **(TOY if settings.toy else FULL)}
    began = time.perf_counter()
    watch = Until(began + settings.seconds * (1 - MARGIN), SLICE if settings.toy else float("inf"))
    ended = None
    with contextlib.suppress(Interrupted):  # after a checkpoint
        ended = zoo.train(RECIPE, changes, quiet=True, watch=watch)
    logged = [json.loads(line) for line in (folder / METRICS).read_text(encoding="utf-8").splitlines() if line]
    kept = ("step", "seconds", "exact", "accuracy", "loss", "tokens_per_second")
    curve = [{key: line.get(key) for key in kept} for line in logged if line["split"] == "validation"]
    found: Row = {"curve": curve, "step": max((line["step"] for line in logged), default=0)}
    found["train"] = [{key: line.get(key) for key in kept} for line in logged if line["split"] == "train"][-1:]
    found |= {"slice_s": time.perf_counter() - began, "more": ended is None}
    return found if ended is None else found | {"test": ended.metrics["test"], "run_status": ended.status}


def items(settings: Settings) -> Items:
    return {RECIPE: lambda: trained(settings)}


def lines(rows: Mapping[str, Row]) -> list[str]:
    row = rows.get(RECIPE, {})
    if "curve" not in row:
        return []
    state = "goes on in the next session" if row["more"] else f"ended ({row['run_status']})"
    told = [f"Step {row['step']} so far; the run {state}. Seconds are of all slices, without evaluations of test rows."]
    shown = [
        [f"{at['step']:,}", f"{at['seconds']:.0f}", f"{at['exact'] or 0:.1%}", f"{at['accuracy'] or 0:.1%}"]
        for at in row["curve"]
    ]
    told += ["", *table(["step", "s", "puzzles solved", "cells right"], shown)] if shown else []
    if "test" in row:
        told += ["", f"On the test rows: {row['test'].get('exact') or 0:.1%} of puzzles."]
    return told


PART = Part(
    name="sudoku",
    title="Sudoku in slices",
    about=(
        "The recipe `sudoku-9x9-fast`, compiled, in slices that continue from the checkpoint: exact accuracy on 512 "
        "validation puzzles over time. Published for the same model on other puzzles: 87 % after 41 minutes on one RTX "
        "5090."
    ),
    share=60,
    item_seconds=1e6,
    items=items,
    lines=lines,
)
