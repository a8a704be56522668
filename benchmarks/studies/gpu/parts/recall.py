"""How long small models train until they recall: the recipe `mqar-demo` to 99 %."""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping
from typing import Any

import zoo
from zoo.benchmarks.studies.gpu.part import Items, Part, Row, Settings
from zoo.benchmarks.studies.harness import table

RECIPE = "mqar-demo"
VARIANTS = ("conv-attention", "attention", "conv-mamba2", "gated-deltanet")
TOY = {"train.steps": 4, "train.batch_size": 8, "train.eval_every": 2, "train.eval_rows": 16, "train.test_rows": 16}


def trained(variant: str, settings: Settings) -> Row:
    """One training from nothing."""
    changes: dict[str, Any] = {"out": str(settings.folder / "recall" / variant), "train.device": settings.device}
    changes |= TOY if settings.toy else {}
    began = time.perf_counter()
    result = zoo.train(RECIPE, changes, variant=variant, fresh=True, quiet=True)
    whole = time.perf_counter() - began
    kept = ("status", "steps", "seconds_to_target", "seconds", "backends", "precision", "n_parameters")
    found = {f"run_{key}" if key == "status" else key: result.data.get(key) for key in kept}
    return found | {"whole_s": whole, "accuracy": result.metrics["test"].get("accuracy")}


def items(settings: Settings) -> Items:
    return {
        variant: functools.partial(trained, variant, settings) for variant in VARIANTS[: 1 if settings.toy else None]
    }


def lines(rows: Mapping[str, Row]) -> list[str]:
    shown = []
    for variant, row in rows.items():
        if "whole_s" in row:
            reached = row["seconds_to_target"]
            target = f"{reached:.1f}" if reached is not None else f"not reached ({row['run_status']})"
            shown.append([variant, target, str(row["steps"]), f"{row['whole_s']:.1f}", f"{row['accuracy']:.1%}"])
    head = ["variant", "s to 99 % in validation", "steps", "s with everything", "accuracy on the test rows"]
    return table(head, shown) if shown else []


PART = Part(
    name="recall",
    title="Recall",
    about="Small models on associative recall (`mqar-demo`), from nothing to 99 %: one training each, so no spread.",
    share=25,
    item_seconds=60,
    items=items,
    lines=lines,
)
