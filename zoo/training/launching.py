"""One training by several processes of this machine, started and watched by torch's launcher."""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from zoo.core.errors import UsageError
from zoo.training.child import COMMAND
from zoo.training.joining import LAUNCHER, several

SAVE_SECONDS = 600  # for a checkpoint at SIGTERM, before torch's launcher kills the processes

CHILD = (
    """
import os, signal, sys, threading, time
def outlive_nobody():
    while os.getppid() == launcher:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)
launcher = int(sys.argv.pop(1))
if os.name != "nt":
    threading.Thread(target=outlive_nobody, daemon=True).start()
"""
    + COMMAND
)


def check_processes(n: int | None, max_restarts: int | None = None, *, fresh: bool = False) -> None:
    """Refuse a number of processes, or of restarts, that cannot be.

    Raises:
        UsageError: less than one, or this process is one of several already.
    """
    if max_restarts is not None:
        if n is None:
            told = "torchrun has an option of this name of its own" if several() else "give both"
            raise UsageError(f"--max-restarts={max_restarts} belongs to --processes: {told}.")
        if max_restarts < 0:
            raise UsageError(f"--max-restarts={max_restarts} is not allowed: it should be at least 0.")
    if fresh and (max_restarts or os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"):
        told = "delete the run folder yourself, or leave one of them out"
        raise UsageError(f"--fresh would delete the run again at every restart of --max-restarts: {told}.")
    if n is None:
        return
    if n < 1:
        raise UsageError(f"--processes={n} is not allowed: it should be at least 1.")
    if several():
        raise UsageError("--processes starts processes, and torchrun has started them already: leave one of them out.")


def run_processes(n: int, arguments: Sequence[str], *, max_restarts: int = 0) -> int:
    """Run the `zoo` command in n processes that train one model, and return the exit status of the training.

    If one of them is killed or does not answer, the launcher ends the others, and starts all again from the last
    checkpoint, up to `max_restarts` times; each start has a meeting place of its own. Wrong input, a signal, and an
    error that every start would meet end the training. Signals are passed on to all. If this process is killed, the
    others stop as at SIGTERM: with a checkpoint.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):  # the processes say it themselves
            logging.getLogger(name).setLevel(logging.CRITICAL)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(cores // n, 1)))  # they share the cores
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SAVE_SECONDS))
    os.environ[LAUNCHER] = str(os.getpid())
    root = str(Path(__file__).resolve().parents[2])  # where this `zoo` lies, installed or not
    try:
        for start in range(max_restarts + 1):
            with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as words:  # of the processes, on their end
                config = LaunchConfig(
                    min_nodes=1,
                    max_nodes=1,
                    nproc_per_node=n,
                    run_id=str(uuid.uuid4()),
                    rdzv_backend="c10d",
                    rdzv_endpoint="localhost:0",
                    max_restarts=0,
                    logs_specs=DefaultLogsSpecs(log_dir=words),
                )
                try:
                    elastic_launch(config, sys.executable)("-P", "-c", CHILD, str(os.getpid()), root, *arguments)
                    return 0
                except ChildFailedError as error:
                    end = ended(n, error.failures)
            if end.line is not None:
                again = f" All start again (restart {start + 1} of {max_restarts})."
                given_up = " The same command resumes the run."
                print(f"zoo: {end.line}{again if start < max_restarts else given_up}", file=sys.stderr, flush=True)
            if end.final:
                break
    except SignalException as error:
        return 128 + int(error.sigval)
    return end.status


class End(NamedTuple):
    """How a start of several processes ended.

    Attributes:
        status: exit status.
        final: whether another start would end in the same way.
        line: what no process has said.
    """

    status: int
    final: bool
    line: str | None


def ended(n: int, failures: Mapping[int, Any]) -> End:
    """How a start of n processes ended, from what torch's launcher knows of those that failed, the first one first.

    The others then lose it, or get the launcher's SIGTERM, and in the end its SIGKILL.
    """
    rank, first = next(iter(failures.items()))
    if first.exitcode == -signal.SIGTERM:  # from a person, before the process could answer it
        return End(128 + signal.SIGTERM, True, None)
    if first.exitcode < 0:
        known = -first.exitcode in {each.value for each in signal.Signals}  # not all real-time signals are
        name = signal.Signals(-first.exitcode).name if known else f"signal {-first.exitcode}"
        return End(128 - first.exitcode, False, f"Process {rank} of {n} was killed ({name}).")
    if "final" not in first.error_file_data:
        return End(first.exitcode, first.exitcode == 2, f"Process {rank} of {n} failed.")
    if first.error_file_data["final"]:  # which the leading process has said
        return End(first.exitcode, True, None)
    words = [failure.error_file_data for failure in failures.values()]
    named = [word["message"] for word in words if word.get("named")]  # by one that has waited in vain
    return End(first.exitcode, False, [*named, first.message][0])


__all__ = ["check_processes", "run_processes"]
