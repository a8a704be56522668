"""Short trainings of token models, for benchmarks of what a layer learns."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zoo.benchmarks.cells import CLOCK, FAILED, NOT_LEARNED, NOT_OFFERED, NoFigure, Request
from zoo.benchmarks.subjects import Subject, with_heads
from zoo.core.errors import RunError, UsageError
from zoo.pattern import parse
from zoo.report.records import MIXER
from zoo.training.recipes import override
from zoo.training.train import train

ENOUGH = 0.85
"""The accuracy from which on something counts as learned."""
CHECKPOINT = 1e9  # seconds: such a training is over before it is worth one


def check_layers(template: str) -> None:
    """Refuse a pattern of a whole model that has no place for what is measured.

    Raises:
        UsageError: a template without `{mixer}`, or that is no pattern.
    """
    if MIXER not in template:
        raise UsageError(f"--layers {template!r} is not allowed: it should hold {MIXER}, such as '2*({MIXER} swiglu)'.")
    parse(template.replace(MIXER, "mlp"))


def layers_of(subject: Subject, template: str, width: int) -> str:
    """The pattern of a model of a width, with a subject's words in place of `{mixer}`.

    Raises:
        UsageError: a template without it, or that is no pattern.
    """
    check_layers(template)
    return str(with_heads(parse(template.replace(MIXER, subject.name)), width))


def require_learned(results: Sequence[Mapping[str, Any]], accuracies: Sequence[float], after: str) -> None:
    """Refuse to give figures of trainings that ended before their model had learned.

    Args:
        results: `result.json` of each seed.
        accuracies: of each seed.
        after: what was trained, in words.

    Raises:
        NoFigure: the median accuracy is below `ENOUGH`.
    """
    if statistics.median(accuracies) < ENOUGH:
        stopped = any(result["status"] == "time_budget" for result in results)
        raise NoFigure(CLOCK if stopped else NOT_LEARNED, f"below {ENOUGH:.0%} after {after}")


def median_of(results: Sequence[Mapping[str, Any]], key: str) -> float:
    """The median of a figure of several trainings."""
    return statistics.median(float(result[key]) for result in results)


def trained(
    request: Request,
    folder: Path,
    *,
    task: Mapping[str, Any],
    layers: str,
    width: int,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """`result.json` of a training that ends with its steps, with its target or with the budget.

    Raises:
        NoFigure: a model that does not fit the task, or whose loss is not finite.
    """
    experiment = {
        "out": str(folder),
        "task": dict(task),
        "model": {"pattern": layers, "d_model": width},
        "train": {
            "device": request.device,
            "precision": request.precision,
            "time_budget": request.budget,
            "checkpoint_seconds": CHECKPOINT,
        },
    }
    try:
        return dict(train(override(experiment, options), quiet=True).data)
    except UsageError as error:
        raise NoFigure(NOT_OFFERED, str(error)) from None
    except RunError as error:
        raise NoFigure(FAILED, str(error)) from None


def fields_of(result: Mapping[str, Any], laws: list[str]) -> dict[str, Any]:
    """What a record says of a training."""
    return {"laws": laws, "n_parameters": result["n_parameters"], "backends": result["backends"]}
