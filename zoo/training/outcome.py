"""What `result.json` says of a training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zoo.models.ends import Ends
from zoo.tasks.protocol import Batch
from zoo.training import machine
from zoo.training.data import any_rows
from zoo.training.fit import Parts
from zoo.training.options import Experiment
from zoo.training.session import Position


def outcome(
    experiment: Experiment,
    parts: Parts,
    model: Ends,
    at: Position,
    *,
    status: str | None,
    seconds: float,
    test: Mapping[str, Any],
    validation: Batch | None,
    rates: Mapping[str, float | None],
    memory: Mapping[str, int | None],
    processes: int,
    backends: Mapping[str, Any],
    precision: str,
) -> dict[str, Any]:
    """All figures of a training and what they rest on, as plain data.

    Args:
        experiment: its config.
        parts: what was made of it.
        model: of any weights.
        at: where it ended.
        status: how it ended.
        seconds: of training.
        test: the score on test, {} where it was not read.
        validation: the rows, None where there are none.
        rates: tokens per second, by their names in the result.
        memory: in bytes, likewise.
        processes: number of them.
        backends: the forms of each op that evaluation ran.
        precision: of the computation.
    """
    objective, context = parts.objective, parts.objective.length
    sections, seed = experiment.resolved(parts), experiment.train.seed
    rows = validation or any_rows(parts.task, 1, seed)
    return {
        "name": experiment.name,
        "status": status,
        **{k: sections[k] for k in ("task", "model", "objective", "train", "init") if k in sections},
        "seed": seed,
        "steps": at.step,
        **({"extended": [{"step": e.step, **e.changes} for e in at.extended]} if at.extended else {}),
        "best_step": at.best.step if at.best else None,
        "lost_best_step": at.lost_best,
        "tokens": at.tokens,
        "seconds": seconds,
        "seconds_to_target": at.seconds_to_target,
        "compile_seconds": at.compile_seconds,
        "validation": at.best.score if at.best else {},
        "test": dict(test),
        "n_parameters": model.n_parameters(),
        "state_bytes": model.state_bytes(1, context),
        "context_length": context,
        "flops_per_token": model.flops_per_token(context),
        "passes": objective.passes(model, rows),
        "loss_is_bound": objective.loss_is_bound,
        **rates,
        **memory,
        "machine": machine.describe_machine(machine.choose_device(experiment.train.device)) | {"processes": processes},
        "versions": machine.versions(),
        "backends": dict(backends),
        "precision": precision,
        "commit": machine.commit(),
    }


__all__ = ["outcome"]
