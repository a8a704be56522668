"""Several trainings one after another, each in a process of its own, so that memory is measured from a fresh start."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from zoo.core.errors import RunError, UsageError
from zoo.training.callbacks import Callback
from zoo.training.child import COMMAND
from zoo.training.compiling import check_compilation
from zoo.training.failures import LostProcess, tell_launcher
from zoo.training.joining import launched, several
from zoo.training.launching import check_processes, run_processes
from zoo.training.processes import check_shared, join
from zoo.training.recipes import parse_overrides, read_experiments
from zoo.training.result import Result
from zoo.training.stopping import Interrupted
from zoo.training.tracking import trackers
from zoo.training.train import train

CHILD = (
    """
import os, signal, sys, threading
def outlive_nobody():
    while os.read(lifeline, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
lifeline = int(sys.argv.pop(1))
if lifeline >= 0:
    threading.Thread(target=outlive_nobody, daemon=True).start()
"""
    + COMMAND
)


def run_zoo(arguments: Sequence[str]) -> int:
    """Run the `zoo` command in a child process with this one's terminal and return its exit status.

    Ctrl-C reaches the child too, which ends in its own way; this process waits for it. If this process is killed, the
    system closes its end of a pipe, and the child, which waits at the other, stops as at SIGTERM: with a checkpoint.
    """
    root = str(Path(__file__).resolve().parents[2])  # where this `zoo` lies, installed or not
    if os.name == "nt":  # where pipes are not handed down
        reading, writing = -1, -1
    else:
        reading, writing = os.pipe()
    command = [sys.executable, "-P", "-c", CHILD, str(reading), root, *arguments]
    child = subprocess.Popen(command, pass_fds=[reading] if reading >= 0 else [])
    asked: list[int] = []

    def forward(number: int, frame: object) -> None:
        asked.append(number)
        if os.name != "nt" or number == signal.SIGTERM:  # Windows has Ctrl-C for a whole console only
            child.send_signal(number)  # a child that got the terminal's own Ctrl-C takes this one as the same

    old = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        status = child.wait()
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
        for end in (reading, writing):
            if end >= 0:
                os.close(end)
    if asked:
        return 128 + asked[0]
    return 128 - status if status < 0 else status


class Launched(NamedTuple):
    """Exit status, and lines that say what came out."""

    status: int
    lines: list[str]


def train_recipe(
    source: str,
    overrides: Sequence[str],
    variants: Sequence[str],
    *,
    resume: bool,
    fresh: bool,
    quiet: bool,
    track: Sequence[str] = (),
    processes: int | None = None,
    max_restarts: int | None = None,
) -> Launched:
    """Train one experiment here, or several, each in a child process; an interruption ends them all.

    `track` names the trackers that the runs' records are sent to. With `processes`, that number of processes trains
    each experiment, and is started again up to `max_restarts` times when one of them is lost. Of processes that train
    together, the leading one raises the errors and has the lines.

    Raises:
        UsageError: any wrong input, in any variant, before the first is trained.
    """
    if several():
        how: dict[str, Any] = {"processes": processes, "max_restarts": max_restarts, "track": track}
        return _one_of_several(source, overrides, variants, resume=resume, fresh=fresh, quiet=quiet, **how)
    check_processes(processes, max_restarts, fresh=fresh)
    experiments = read_experiments(source, parse_overrides(overrides), variants)
    callbacks = trackers(track)
    flags = [flag for flag, on in (("--resume", resume), ("--fresh", fresh), ("--quiet", quiet)) if on]
    flags += [word for name in track for word in ("--track", name)]
    if len(experiments) == 1 and processes in (None, 1):
        name = next(iter(experiments)) or None
        changes = parse_overrides(overrides)
        result = train(source, changes, variant=name, resume=resume, fresh=fresh, quiet=quiet, callbacks=callbacks)
        return Launched(0, [summary(result)])
    for experiment in experiments.values():
        parts = experiment.build()
        check_compilation(experiment.train)
        check_shared(processes or 1, experiment.train, parts.objective, parts.model)
    if len(experiments) == 1 and processes is not None:
        chosen = ["--variant", name] if (name := next(iter(experiments))) else []
        command = ["train", source, *overrides, *chosen, *flags]
        return Launched(run_processes(processes, command, max_restarts=max_restarts or 0), [])
    for option, number in (("--processes", processes), ("--max-restarts", max_restarts)):
        flags += [] if number is None else [option, str(number)]
    failed = 0
    for name in experiments:
        status = run_zoo(["train", source, *overrides, "--variant", name, *flags])
        if status >= 128:
            return Launched(status, [])
        failed = failed or status
    folder = next(iter(experiments.values())).folder.parent
    return Launched(failed, [f"Compare them with: zoo compare {folder}"])


def _one_of_several(
    source: str,
    overrides: Sequence[str],
    variants: Sequence[str],
    *,
    processes: int | None,
    max_restarts: int | None,
    track: Sequence[str],
    **how: Any,
) -> Launched:
    """Train one experiment with the other processes that torch's launcher has started."""
    group = None
    try:
        group = join()
        check_processes(processes, max_restarts, fresh=bool(how["fresh"]))
        if len(variants) > 1:
            raise UsageError("Several processes train one experiment: give one --variant.")
        variant = variants[0] if variants else None
        callbacks: list[Callback] = []
        group.told(lambda: callbacks.extend(trackers(track)))
        result = train(source, parse_overrides(overrides), variant=variant, callbacks=callbacks, **how)
    except (UsageError, RunError, Interrupted) as error:
        tell_launcher(error)
        if isinstance(error, LostProcess):
            speaks = error.speaks and not launched()
        elif group is None:
            speaks = os.environ.get("LOCAL_RANK", "0") == "0"
        else:
            speaks = group.leads
        if speaks:
            raise
        status = error.exit_status if isinstance(error, Interrupted) else 1 if isinstance(error, RunError) else 2
        return Launched(status, [])
    return Launched(0, [summary(result)] if group.leads else [])


def summary(result: Result) -> str:
    """One line about a training that has ended."""
    score, test = result.metrics["validation"], result.metrics["test"]
    name, second = ("mse", "mse_ratio") if "mse" in score else ("accuracy", "exact")
    figures = f"validation {name} {score[name]:.4f}, test {name} {test[name]:.4f}, {second} {test[second]:.4f}"
    ended = f"{result.status} at step {result.data['steps']} after {result.data['seconds']:.1f} s"
    cut = result.data.get("train")
    if result.status == "time_budget" and isinstance(cut, dict):
        seconds, steps = cut.get("time_budget"), cut.get("steps")
        ended += f" (train.time_budget={seconds} ended it before train.steps={steps}; null sets no limit)"
    return f"{result.path}: {ended}; {figures}"
