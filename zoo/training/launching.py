"""One training by several processes of this machine, started and watched by torch's launcher."""

from __future__ import annotations

import logging
import os
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path

from zoo.core.errors import UsageError
from zoo.training.child import COMMAND
from zoo.training.processes import several

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


def check_processes(n: int | None) -> None:
    """Refuse a number of processes that cannot be started here.

    Raises:
        UsageError: less than one, or this process is one of several already.
    """
    if n is None:
        return
    if n < 1:
        raise UsageError(f"--processes={n} is not allowed: it should be at least 1.")
    if several():
        raise UsageError("--processes starts processes, and torchrun has started them already: leave one of them out.")


def run_processes(n: int, arguments: Sequence[str]) -> int:
    """Run the `zoo` command in n processes that train one model, and return the exit status of the training.

    If one of them is killed, the launcher ends the others. Signals are passed on to all. If this process is killed, the
    others stop as at SIGTERM: with a checkpoint.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the processes say it themselves
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(cores // n, 1)))  # they share the cores
    root = str(Path(__file__).resolve().parents[2])  # where this `zoo` lies, installed or not
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=n,
        run_id=str(uuid.uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    try:
        elastic_launch(config, sys.executable)("-P", "-c", CHILD, str(os.getpid()), root, *arguments)
    except SignalException as error:
        return 128 + int(error.sigval)
    except ChildFailedError as error:
        status = next(failure.exitcode for _, failure in sorted(error.failures.items()))
        return 128 - status if status < 0 else status
    return 0


__all__ = ["check_processes", "run_processes"]
