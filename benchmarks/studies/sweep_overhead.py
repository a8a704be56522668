"""What a sweep costs beside the trainings in it, by Ray and in one process.

    python -m zoo.benchmarks.studies.sweep_overhead [--trials 20] [--seconds 1.0] [--workers 2]

A trial is a training with a time budget of the given seconds, so that it takes these on any machine. After the first 2
trials of each worker, in which modules are imported and caches filled, `per_trial` is the time from one trial's end to
the next one's, times the number of workers, less the seconds that a training records; `share` is the same over those
seconds. The folder, checkpoints, the test rows, the speed of decoding, the store and messages count as overhead. `once`
is the time until the first trial has ended, less its training: the start of Ray, or nothing.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import zoo
from zoo.benchmarks.studies.harness import Data, Study, facts, shown_machine

EXPERIMENT: dict[str, Any] = {
    "task": {"name": "mqar", "vocab_size": 64, "seq_len": 16, "n_pairs": 2},
    "model": {"pattern": "short_conv mlp", "d_model": 16},
    "train": {
        "steps": 10**6,
        "batch_size": 16,
        "eval_every": 10**6,
        "eval_rows": 64,
        "test_rows": 256,
        "schedule": "constant",
    },
}


def measured(trials: int, seconds: float, workers: int, *, ray: bool) -> Data:
    """One sweep, in figures."""
    with tempfile.TemporaryDirectory() as folder:
        start, space = time.time(), {"train.seed": range(trials), "train.time_budget": seconds}
        done = zoo.sweep(EXPERIMENT, space, out=Path(folder, "sweep"), workers=workers, ray=ray, quiet=True)
        ends = sorted(path.stat().st_mtime for path in done.path.glob("trials/*/result.json"))
        each = done.trials()["seconds"].to_list()
    first, training = 2 * workers, sum(each) / len(each)
    per_trial = (ends[-1] - ends[first - 1]) / (trials - first) * workers - training
    figures = {"training_seconds": training, "per_trial": per_trial, "share": per_trial / training}
    return {"workers": workers, "trials": trials, **figures, "once": ends[0] - start - training}


def measure(arguments: argparse.Namespace, data: Data) -> Iterator[Data]:
    for way, workers in (("ray", arguments.workers), ("one process", 1)):
        trials = max(arguments.trials, 3 * workers)
        row = measured(trials, arguments.seconds, workers, ray=way == "ray")
        data = {**data, "machine": facts(), "ways": {**data.get("ways", {}), way: row}}
        yield data


def markdown(data: Data) -> str:
    rows = [
        f"| {way} | {row['workers']} | {row['trials']} | {row['training_seconds']:.2f} s | {row['per_trial']:.2f} s "
        f"| {100 * row['share']:.0f} % | {row['once']:.1f} s |"
        for way, row in data["ways"].items()
    ]
    head = "| way | workers | trials | seconds of a training | overhead of a trial | share | once |"
    head += "\n|---|--:|--:|--:|--:|--:|--:|"
    told = "`python -m zoo.benchmarks.studies.sweep_overhead` measures this page again; its first lines say how."
    runs = f"One run of each way. Machine: {shown_machine(data['machine'])}."
    return "\n".join(["# What a sweep costs beside its trainings", "", told, "", runs, "", head, *rows, ""])


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--trials", type=int, default=20, help="number of trials")
    parser.add_argument("--seconds", type=float, default=1.0, help="seconds of a training")
    parser.add_argument("--workers", type=int, default=2, help="workers of Ray")


STUDY = Study("sweep_overhead", __doc__, arguments, measure, markdown)

if __name__ == "__main__":
    STUDY.main()
