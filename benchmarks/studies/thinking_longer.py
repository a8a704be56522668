"""Thinking longer, and from more starts, than in training: exact answers of a recursive model against both.

    python -m zoo.benchmarks.studies.thinking_longer [RUN] [--train-steps 600] [--puzzles 256]
        [--steps 1 2 4 8 16] [--starts 1 4 8] [--threads 1]

Without a RUN one is made: the recipe sudoku-6x6-trm with random starts, for a fixed number of steps.

Depth is the number of supervision steps, breadth the number of starts. One start is the model's own; several are drawn
at random, and one answer is taken: that of which the halting head is surest, or that which has settled
(`objective.vote`). "Any" is what a vote could reach at best. Every start is thought through once, to the most steps;
the votes are those of its first steps and starts: figures are those of `zoo eval RUN --split test
objective.eval_steps=8 objective.starts=4`. Intervals are of 95 %, over the problems that differ up to the task's
symmetry. Times are of the supervision steps alone, for one puzzle, all starts together, in batches of
`train.eval_batch_size`; they are in the JSON only, as the work of other programs lengthens them.
"""

from __future__ import annotations

import argparse
import collections
import json
import pathlib
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from zoo.benchmarks.studies.harness import Data, Study
from zoo.core.errors import UsageError
from zoo.models.recursive import RecursiveModel
from zoo.objectives.base import create_objective
from zoo.objectives.deep_supervision import DeepSupervision
from zoo.objectives.thinking import WINDOW
from zoo.report import static
from zoo.report.charts import Axis, Chart, Panel, Row, Series
from zoo.statistics import clustered_interval
from zoo.tasks.protocol import IGNORE, Batch, split_rows
from zoo.training import machine
from zoo.training.evaluation import held_out
from zoo.training.loading import OpenRun, open_run
from zoo.training.options import Experiment
from zoo.training.recipes import read_experiment
from zoo.training.train import train

STEPS, STARTS, PUZZLES, TRAIN_STEPS = (1, 2, 4, 8, 16), (1, 4, 8), 256, 600
VOTES = ("halt", "settled")
NAMED = {"own": "1 start", "halt": "halting head", "settled": "settled", "any": "any right"}


def experiment(train_steps: int) -> Experiment:
    """The run that is made where none is given."""
    overrides = {
        "name": "sudoku-6x6-random-starts",
        "objective.random_start": True,
        "objective.eval_steps": 4,
        "train.steps": train_steps,
        "train.time_budget": None,
        "train.target": None,
        "train.eval_every": train_steps,
        "train.eval_rows": 100,
        "train.eval_batch_size": 128,
        "train.test_rows": 100,
    }
    return read_experiment("sudoku-6x6-trm", overrides)


class Tried:
    """What one start comes to, for n puzzles, at each number of steps asked for.

    Attributes:
        right: (n,) bool by steps.
        worth: (n,) by steps of each vote.
        seconds: of thinking, by steps.
    """

    def __init__(self) -> None:
        self.right: dict[int, Tensor] = {}
        self.worth: dict[str, dict[int, Tensor]] = {vote: {} for vote in VOTES}
        self.seconds: dict[int, float] = {}


def objectives(run: OpenRun, steps: int, starts: int) -> dict[str, DeepSupervision]:
    """The run's objective with as many steps: of its own start, and of random ones under each vote."""
    given = {**run.parts.objective.config.changed(), "name": "deep_supervision", "eval_steps": steps}
    several = {vote: {**given, "starts": max(starts, 2), "vote": vote} for vote in VOTES}
    options: dict[str, Any] = {"own": {**given, "starts": 1, "vote": "halt"}, **several}
    made: dict[str, Any] = {}
    for name, each in options.items():
        made[name] = create_objective(each, run.parts.task, causal=False)
    return made


@torch.no_grad()
def tried(run: OpenRun, batch: Batch, steps: Sequence[int], starts: int) -> Iterator[Tried]:
    """The model's own start, then `starts` random ones."""
    made = objectives(run, max(2, *steps), starts)
    model: Any = run.model.eval()
    device = model.answer_init.device
    data = made["own"].encode(batch).to(device)
    own = [made["own"].walk(model, data, attempt) for attempt in made["own"].attempts()]
    random = [made["halt"].walk(model, data, attempt) for attempt in made["halt"].attempts()] if starts > 1 else []
    asked = batch.targets != IGNORE
    for attempt in (*own, *random):
        found, recent, seconds = Tried(), collections.deque[Any](maxlen=WINDOW + 1), 0.0
        for step in range(1, max(steps) + 1):
            with machine.autocast(run.precision, device):
                started = time.perf_counter()
                recent.append(next(attempt)[1])
                seconds += time.perf_counter() - started
                if step not in steps:
                    continue
                answer = made["halt"].answer(model.logits(recent[-1].hidden), batch).cpu()
                found.worth["halt"][step] = recent[-1].halt.float().cpu()
                if step > 1:
                    found.worth["settled"][step] = -made["settled"].moved(model, recent).float().cpu()
            found.right[step] = ((answer == batch.targets) | ~asked).all(1)
            found.seconds[step] = seconds
        yield found


def joined(parts: Sequence[Sequence[Tried]]) -> list[Tried]:
    """The starts of several batches, as those of one."""
    whole = []
    for same in zip(*parts, strict=True):
        one = Tried()
        for step in same[0].right:
            one.right[step] = torch.cat([t.right[step] for t in same])
            one.seconds[step] = sum(t.seconds[step] for t in same)
            for vote in VOTES:
                if step in same[0].worth[vote]:
                    one.worth[vote][step] = torch.cat([t.worth[vote][step] for t in same])
        whole.append(one)
    return whole


def figures(
    found: Sequence[Tried], steps: Sequence[int], starts: Sequence[int], problems: Tensor
) -> list[dict[str, Any]]:
    """A row for each number of steps and of starts: the share of puzzles solved by each vote, and the time of one.

    With the 95 % interval of each share, over the problems (n,) that the puzzles are.
    """
    rows = []
    for step in steps:
        for n in starts:
            chosen = found[:1] if n == 1 else found[1 : n + 1]
            right = torch.stack([t.right[step] for t in chosen])
            exact = {"own": right[0]} if n == 1 else {"any": right.any(0)}
            for vote in VOTES if n > 1 else ():
                if step in chosen[0].worth[vote]:
                    best = torch.stack([t.worth[vote][step] for t in chosen]).argmax(0)
                    exact[vote] = right.gather(0, best[None]).squeeze(0)
            shares = {name: each.double().mean().item() for name, each in exact.items()}
            intervals = {name: clustered_interval(each.numpy(), problems.numpy()) for name, each in exact.items()}
            seconds = sum(t.seconds[step] for t in chosen) / right.shape[1]
            row = {"steps": step, "starts": n, "exact": shares, "interval": intervals}
            rows.append({**row, "ms_per_puzzle": round(1e3 * seconds, 3)})
    return rows


def measured(path: pathlib.Path, puzzles: int, steps: Sequence[int], starts: Sequence[int]) -> Data:
    """The report about one run.

    Raises:
        UsageError: no such run, or one that no recursive model was trained in.
    """
    run = open_run(path)
    objective, model = run.parts.objective, run.model
    if not isinstance(objective, DeepSupervision):
        raise UsageError(f"{path} was taught by {objective.name}: thinking longer is for runs of deep_supervision.")
    assert isinstance(model, RecursiveModel)
    parts = []
    size = run.config.eval_batch_size or run.config.batch_size
    rows = held_out(run.parts.task, "test", puzzles)
    problems = run.parts.task.problems(rows)
    for batch in split_rows(rows, size):
        parts.append(list(tried(run, batch, steps, max(starts))))
        print(f"{sum(len(p[0].right[steps[0]]) for p in parts)} of {puzzles} puzzles", flush=True)
    return {
        "run": path.name,
        "task": {"name": run.parts.task.name, **run.parts.task.config.changed()},
        "pattern": run.parts.model.pattern,
        "n_parameters": model.n_parameters(),
        "recursion": model.recursion.changed(),
        "trained_steps": model.recursion.max_steps,
        "random_start": objective.config.random_start,
        "puzzles": puzzles,
        "problems": len(problems.unique()),
        "seed": run.config.seed,
        "train_steps": json.loads((path / "result.json").read_text())["best_step"],
        "precision": run.precision,
        "machine": machine.describe_machine(model.answer_init.device),
        "versions": machine.versions(),
        "commit": machine.commit(),
        "rows": figures(joined(parts), steps, starts, problems),
    }


def columns(report: Data) -> list[tuple[int, str]]:
    """(starts, vote) of the columns: what there are figures of at the most steps."""
    last = report["rows"][-1]["steps"]
    order = list(NAMED)
    rows = [row for row in report["rows"] if row["steps"] == last]
    return [(row["starts"], vote) for row in rows for vote in sorted(row["exact"], key=order.index)]


def markdown(report: Data) -> str:
    """The report as a page."""
    by = {(row["steps"], row["starts"]): row for row in report["rows"]}
    steps = sorted({row["steps"] for row in report["rows"]})
    task = ", ".join(f"{k}={v}" for k, v in report["task"].items() if k != "name")
    taught = "random starts" if report["random_start"] else "its own start"
    heads = [NAMED[vote] if n == 1 else f"{n}: {NAMED[vote]}" for n, vote in columns(report)]
    lines = [
        "# Thinking longer, from more starts",
        "",
        f"`{report['task']['name']}` ({task}), {report['puzzles']} rows of the test split, which are "
        f"{report['problems']} problems up to the task's symmetry. One model (1 seed: {report['seed']}), "
        f"`{report['run']}`: `{report['pattern']}`, {report['n_parameters']:,} parameters, {report['train_steps']:,} "
        f"steps of training with at most {report['trained_steps']} supervision steps a puzzle, from {taught}.",
        f"{report['machine']['cpu']}, {report['machine']['threads']} thread(s), {report['precision']}. Made by "
        f"`{report['command']}`.",
        "",
        "Exact answers in per cent, by supervision steps; of several random starts, that of the start the vote takes.",
        "In brackets, the 95 % interval over the problems, clustered where several rows are one; it does not cover",
        "what another seed of the training would change. The work is steps times starts.",
        "",
        "| steps | " + " | ".join(heads) + " |",
        "|---:|" + "---:|" * len(heads),
    ]
    for step in steps:
        cells = [_share(by[step, n], vote) for n, vote in columns(report)]
        lines.append(f"| {step} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", "![Exact answers against steps and starts](thinking_longer.svg)", ""])


def _share(row: dict[str, Any], vote: str) -> str:
    if vote not in row["exact"]:
        return ""
    low, high = (f"{100 * edge:.0f}" for edge in row["interval"][vote])
    return f"{100 * row['exact'][vote]:.1f} ({low} to {high})"


def svg(report: Data) -> str:
    """Exact answers against supervision steps, and against those of all starts together."""
    chosen = columns(report)
    rows = [
        Row(f"{n}-{vote}", NAMED[vote] if n == 1 else f"{n} starts, {NAMED[vote]}", i)
        for i, (n, vote) in enumerate(chosen)
    ]

    def panel(title: str, *, each: bool) -> Panel:
        series = []
        for row, (n, vote) in zip(rows, chosen, strict=True):
            found = [r for r in report["rows"] if r["starts"] == n and vote in r["exact"]]
            steps = [float(r["steps"] * (1 if each else n)) for r in found]
            series.append(Series(row.id, steps, [r["exact"][vote] for r in found]))
        trained = report["trained_steps"] if each else None
        axes = Axis(title, "length", log=True), Axis("exact answers", "percent")
        return Panel("lines", *axes, series, trained=trained)

    panels: list[Any] = [
        panel("supervision steps (dotted: in training)", each=True),
        panel("supervision steps, all starts together", each=False),
    ]
    return static.svg(Chart("thinking-longer", "Exact answers against steps and starts", "", panels), rows)


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=pathlib.Path, nargs="?", help="a run of deep_supervision, by default one is made")
    parser.add_argument("--train-steps", type=int, default=TRAIN_STEPS, help="of the run that is made")
    parser.add_argument("--puzzles", type=int, default=PUZZLES)
    parser.add_argument("--steps", type=int, nargs="+", default=list(STEPS))
    parser.add_argument("--starts", type=int, nargs="+", default=list(STARTS))
    parser.add_argument("--threads", type=int, help="by default as in training")


def measure(args: argparse.Namespace, old: Data) -> Iterator[Data]:
    if min(args.puzzles, args.train_steps, *args.steps, *args.starts) < 1:
        raise UsageError("puzzles, train-steps, steps and starts are whole numbers from 1")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    steps, starts = sorted(set(args.steps)), sorted(set(args.starts))
    with tempfile.TemporaryDirectory() as scratch:
        made = experiment(args.train_steps)
        path = args.run or train(made, {"out": f"{scratch}/{made.name}"}).path
        report = measured(path, args.puzzles, steps, starts)
    chosen = [str(args.run)] if args.run else ["--train-steps", str(args.train_steps)]
    lists = ["--steps", *map(str, steps), "--starts", *map(str, starts)]
    command = ["python -m zoo.benchmarks.studies.thinking_longer", *chosen, "--puzzles", str(args.puzzles), *lists]
    yield report | {"command": " ".join(command)}


STUDY = Study("thinking_longer", __doc__, arguments, measure, markdown, svg)

if __name__ == "__main__":
    STUDY.main()
