"""How the processes of one training find each other, and how they part."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import socket
import sys
import threading
import time
import uuid
from datetime import timedelta
from typing import Any

import torch

from zoo.core.errors import UsageError, quoted
from zoo.training.failures import LostProcess

JOIN_SECONDS = 120.0  # for all processes to start and find each other: large clusters import slowly
FAREWELL_SECONDS = 10.0  # in which the processes end together
LAUNCHER = "ZOO_LAUNCHER"
"""Environment variable of processes that `zoo train --processes` has started: the id of the process that did."""


def several() -> bool:
    """Whether this process was started as one of several."""
    return "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"


def launched() -> bool:
    """Whether `zoo train --processes` has started this process, and says itself that one of them was lost."""
    return LAUNCHER in os.environ


def in_agent() -> bool:
    """Whether torch's launcher keeps the store through which the processes meet; else process 0 does."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def connect() -> Any:
    """Join torch's process group, and return the store in which the processes met.

    None where the script that calls `zoo.train` has joined it already.

    Raises:
        UsageError: the others are not there.
    """
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    if dist.is_initialized():
        return None
    local = int(os.environ.get("LOCAL_RANK", "0"))
    backend = "gloo"
    if torch.cuda.is_available():
        if local < torch.cuda.device_count():  # with fewer GPUs than processes, they may train on the CPU
            torch.cuda.set_device(local)
        backend = "cpu:gloo,cuda:nccl"
    check_numbers()
    await_place()
    wait = timedelta(seconds=JOIN_SECONDS)
    _outlive_no_launcher()
    try:
        store, rank, size = next(iter(rendezvous("env://", timeout=wait)))
        store.set_timeout(wait)
        if in_agent():
            store = dist.PrefixStore(_start(store, rank, size), store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=wait)
    except (RuntimeError, ValueError) as error:
        raise _not_met(" ".join(str(error).split())[:160]) from None
    return store


def check_numbers() -> None:
    """Refuse an environment that gives this process no number among the others.

    Raises:
        UsageError: RANK or WORLD_SIZE is none, or the rank is not below it.
    """
    found = {}
    for name in ("RANK", "WORLD_SIZE"):
        text = os.environ[name]
        if not text.isdecimal():
            raise UsageError(f"{name}={quoted(text)[1:-1]} is not allowed: it should be a whole number.")
        found[name] = int(text)
    rank, size = found["RANK"], found["WORLD_SIZE"]
    if rank >= size:
        told = f"WORLD_SIZE={size} processes have the numbers 0 to {size - 1}" if size else "WORLD_SIZE is 0"
        raise UsageError(f"RANK={rank} is not allowed: {told}.")


def await_place() -> None:
    """Wait until somebody answers where the processes meet; torch would wait twice, and print its own stacks.

    Raises:
        UsageError: nobody does.
    """
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT", "")
    if address is None or not port.isdecimal() or (os.environ["RANK"] == "0" and not in_agent()):
        return  # torch says what is missing; or it is this process that answers
    until = time.monotonic() + JOIN_SECONDS
    while True:
        left = until - time.monotonic()
        try:
            with socket.create_connection((address, int(port)), timeout=max(left, 0.1)):
                return
        except (OSError, OverflowError, UnicodeError) as error:
            if left <= 0:
                reason = getattr(error, "strerror", None) or error
                raise _not_met(f"nobody answers there in {JOIN_SECONDS:.0f} s: {reason}") from None
        time.sleep(min(0.2, JOIN_SECONDS / 10))


def _not_met(why: str) -> UsageError:
    where = f"{os.environ.get('MASTER_ADDR', '(MASTER_ADDR is not set)')}:{os.environ.get('MASTER_PORT', '')}"
    return UsageError(f"The {os.environ['WORLD_SIZE']} processes of the training did not meet at {where} ({why}).")


def _start(store: Any, rank: int, size: int) -> str:
    """A name on which the processes of this start agree.

    The store of torch's launcher outlives a start, and has the addresses of processes that have ended, with which a
    second start would try to connect.
    """
    if rank:
        own = uuid.uuid4().hex
        store.set(f"zoo/hello/{rank}", own)
        name = store.get(f"zoo/answer/{own}").decode()
        store.set(f"zoo/{name}/{rank}", b"")
        return f"zoo/{name}"
    name, until = uuid.uuid4().hex, time.monotonic() + JOIN_SECONDS
    missing = set(range(1, size))
    while missing:
        for other in sorted(missing):
            if store.check([f"zoo/{name}/{other}"]):
                missing.remove(other)
            elif store.check([f"zoo/hello/{other}"]):
                store.set(f"zoo/answer/{store.get(f'zoo/hello/{other}').decode()}", name)
        if time.monotonic() > until:
            raise RuntimeError(f"process {min(missing)} has not come in {JOIN_SECONDS:.0f} s")
        time.sleep(0.01)
    return f"zoo/{name}"


def _outlive_no_launcher() -> None:
    """Stop as at SIGTERM, with a checkpoint, once torch's launcher has ended: nobody would wait for this process."""
    if os.name == "nt" or launched() or "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    launcher = os.getppid()

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def part_at_exit(control: Any) -> None:
    """Have this process wait at its end for the others, or not where one of them is lost.

    The first to end would have a launcher kill the others, before the leading one has said why.
    """
    atexit.register(_leave, control)


def _leave(control: Any) -> None:
    import torch.distributed as dist

    with contextlib.suppress(ValueError):  # of another thread than the main one
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # of a launcher, which would change the exit status
    with contextlib.suppress(Exception):
        sys.stderr.flush()
        if LostProcess.happened is None:
            dist.monitored_barrier(control, timeout=timedelta(seconds=FAREWELL_SECONDS))
        elif not (LostProcess.happened.speaks or launched()):
            time.sleep(min(2.0, FAREWELL_SECONDS))
    with contextlib.suppress(Exception):
        dist.destroy_process_group()


__all__ = ["LAUNCHER", "connect", "in_agent", "launched", "part_at_exit", "several"]
