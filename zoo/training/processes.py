"""The processes that train one model together, each on its rows of every batch: torch's process group."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from zoo.core.errors import RunError, UsageError, quoted
from zoo.core.run_files import at_key, differing
from zoo.objectives.base import Objective
from zoo.tasks import random
from zoo.training.data_parallel import DataParallel
from zoo.training.failures import failed_as, failure_kind, is_lost
from zoo.training.group import Group, Stepping
from zoo.training.machine import choose_device
from zoo.training.randomness import seed_device
from zoo.training.train_options import TrainConfig

T = TypeVar("T")

JOIN_SECONDS = 120.0  # for all processes to start and find each other: large clusters import slowly
SILENCE_SECONDS = 600.0  # after which a process that does not answer counts as lost
FAREWELL_SECONDS = 10.0  # in which the processes end together
_ORDER = 2**62  # the purpose of the random numbers within layers, apart from those of rows and epochs


class Processes(Group):
    """Several processes of `torch.distributed`, joined already; each holds the whole model."""

    def __init__(self) -> None:
        import torch.distributed as dist

        self._dist = dist
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        wait = timedelta(seconds=SILENCE_SECONDS)
        self._control = dist.new_group(backend="gloo", timeout=wait)  # for what is decided on the CPU
        self._data = dist.new_group(timeout=wait)  # for tensors, wherever they are

    def rows(self, n: int) -> slice:
        each = n // self.size
        return slice(self.rank * each, (self.rank + 1) * each)

    def agreed(self, prepare: Callable[[], T], statement: Callable[[T], Mapping[str, Any]]) -> T:
        found: T | None = None
        problem, told = None, None
        try:
            found = prepare()
            told = statement(found)
        except UsageError as error:
            problem = str(error)
        everywhere = self._gather((problem, told))
        problems = [(i, text) for i, (text, _) in enumerate(everywhere) if text is not None]
        if problems:
            i, text = problems[0]
            raise UsageError(text if i == 0 else f"Process {i} of {self.size}: {text}")
        assert found is not None
        first = everywhere[0][1]
        for i, (_, other) in enumerate(everywhere):
            for key in differing(first, other)[:1]:
                values = f"{quoted(at_key(first, key))} in process 0, {quoted(at_key(other, key))} in process {i}"
                raise UsageError(f"The processes differ in {key}: {values}. Start all of them in the same way.")
        return found

    def told(self, action: Callable[[], T]) -> T:
        message: list[Any] = [None]
        failed: Exception | None = None
        if self.leads:
            try:
                message = [(action(), None, None)]
            except (RunError, UsageError) as error:
                failed, message = error, [(None, failure_kind(error), str(error))]
        with self.contact():
            self._dist.broadcast_object_list(message, src=0, group=self._control, device=torch.device("cpu"))
        if failed is not None:
            raise failed
        result, kind, text = message[0]
        if kind is not None:
            raise failed_as(kind, text)
        return result

    def largest(self, *numbers: int) -> list[int]:
        found = torch.tensor(numbers, dtype=torch.int64)
        with self.contact():
            self._dist.all_reduce(found, op=self._dist.ReduceOp.MAX, group=self._control)
        return found.tolist()

    def total(self, tensor: Tensor) -> Tensor:
        found = tensor.clone()
        with self.contact():
            self._dist.all_reduce(found, group=self._data)
        return found

    def gathered(self, items: list[T]) -> list[list[T]]:
        return self._gather(items)

    def _gather(self, item: Any) -> list[Any]:
        found: list[Any] = [None] * self.size
        with self.contact():
            self._dist.all_gather_object(found, item, group=self._control)
        return found

    @torch.no_grad()
    def share(self, module: nn.Module) -> None:
        with self.contact():
            for tensor in (*module.parameters(), *module.buffers()):
                self._dist.broadcast(tensor.detach(), src=0, group=self._data)

    def seed_step(self, seed: int, step: int, device: torch.device) -> None:
        key = random.fold(random.fold(random.row_keys("train", seed, step, 1), _ORDER), self.rank)
        seed_device(int(key[0]) & (2**63 - 1), device)

    def stepping(self, model: nn.Module, parts: int) -> Stepping:
        return DataParallel(self, self._data, model, parts)

    @contextlib.contextmanager
    def contact(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, UsageError | RunError) or not is_lost(error):
                raise
            lost = (
                f"no answer in {SILENCE_SECONDS:.0f} s"
                if "timed out" in str(error).lower()
                else "its connection is closed"
            )
            raise RunError(f"Another process of this training has ended or hangs ({lost}).") from None


_groups: list[Processes] = []


def join() -> Group:
    """The processes that this one was started with by `torchrun` or `zoo train --processes`, or itself alone.

    Raises:
        UsageError: the others are not there.
    """
    if not several():
        return Group()
    if not _groups:
        _connect()
        _groups.append(Processes())
    return _groups[0]


def several() -> bool:
    """Whether this process was started as one of several."""
    return "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"


def check_shared(size: int, config: TrainConfig, objective: Objective) -> None:
    """Refuse a training that this number of processes cannot share.

    Raises:
        UsageError: the batch does not divide, the objective reads it whole, or there are too few GPUs.
    """
    if size == 1:
        return
    device, here = choose_device(config.device).type, int(os.environ.get("LOCAL_WORLD_SIZE", size))
    if device == "mps" or (device == "cuda" and here > torch.cuda.device_count()):
        told = "MPS serves one" if device == "mps" else f"there are {torch.cuda.device_count()} GPUs"
        raise UsageError(f"{here} processes on this machine are too many, as {told}: set train.device=cpu.")
    n = config.batch_size
    if n % size:
        near = f"{n // size * size} or {-(-n // size) * size}" if n > size else str(size)
        told = f"which read as many rows each; train.batch_size={near} can"
        raise UsageError(f"train.batch_size={n} cannot be divided among {size} processes, {told}.")
    if config.accumulate > n // size:
        told = f"each of {size} processes has {n // size} rows of a batch, and every part needs one"
        raise UsageError(f"train.accumulate={config.accumulate} is too large: {told}.")
    if not objective.takes_rows():
        told = f"{objective.name} reads a batch whole: its method updates has no argument rows"
        raise UsageError(f"{size} processes cannot share a batch: the objective {told}.")


def _connect() -> None:
    import torch.distributed as dist

    if dist.is_initialized():  # by the script that calls `zoo.train`
        return
    local = int(os.environ.get("LOCAL_RANK", "0"))
    backend = "gloo"
    if torch.cuda.is_available():
        if local < torch.cuda.device_count():  # with fewer GPUs than processes, they may train on the CPU
            torch.cuda.set_device(local)
        backend = "cpu:gloo,cuda:nccl"
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=JOIN_SECONDS))
    except (RuntimeError, ValueError) as error:
        where = f"{os.environ.get('MASTER_ADDR', '(MASTER_ADDR is not set)')}:{os.environ.get('MASTER_PORT', '')}"
        told = " ".join(str(error).split())[:160]
        n = quoted(os.environ.get("WORLD_SIZE"))[1:-1]
        raise UsageError(f"The {n} processes of the training did not meet at {where} ({told}).") from None
    atexit.register(_leave)


def _leave() -> None:
    """End together: the first to end would have a launcher kill the others, before the leading one has said why."""
    import torch.distributed as dist

    with contextlib.suppress(Exception):
        sys.stderr.flush()
        control = _groups[0]._control if _groups else None
        dist.monitored_barrier(control, timeout=timedelta(seconds=FAREWELL_SECONDS))
    with contextlib.suppress(Exception):
        dist.destroy_process_group()


__all__ = ["Processes", "check_shared", "join", "several"]
