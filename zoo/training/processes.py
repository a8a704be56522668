"""The processes that train one model together, each on its rows of every batch: torch's process group."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from zoo.core.errors import RunError, UsageError, quoted
from zoo.core.run_files import at_key, differing
from zoo.models.config import ModelConfig
from zoo.models.create import create_model
from zoo.objectives.base import Objective
from zoo.pieces import Pieces, ProcessLink
from zoo.protocol import Mixer
from zoo.tasks import random
from zoo.training.data_parallel import DataParallel
from zoo.training.failures import LostProcess, failed_as, failure_kind, is_lost
from zoo.training.group import Group, Stepping
from zoo.training.joining import connect, part_at_exit, several
from zoo.training.machine import choose_device
from zoo.training.randomness import seed_device
from zoo.training.roll import Roll
from zoo.training.shards import here, n_pieces, own_rows
from zoo.training.train_options import TrainConfig

T = TypeVar("T")

SILENCE_SECONDS = TrainConfig().timeout  # until the options of the training are known
_ORDER = 2**62  # the purpose of the random numbers within layers, apart from those of rows and epochs
_SHARDED = "_sharded"  # attribute of a model in pieces


class Processes(Group):
    """Several processes of `torch.distributed`, joined already; each holds the whole model.

    Args:
        store: in which the processes met; None where it is not known.
    """

    def __init__(self, store: Any = None) -> None:
        import torch.distributed as dist

        self._dist = dist
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._shared = 1  # processes that read the same rows
        self._sharers: Any = None  # processes that share out the experts of every layer with this one
        self._replicas: Any = None  # processes that hold the same experts as this one
        self._roll = Roll(store, self.rank, self.size)
        self._form(SILENCE_SECONDS)

    def _form(self, timeout: float) -> None:
        """Groups whose members count as lost when they have not answered for this number of seconds."""
        self._timeout, wait = timeout, timedelta(seconds=timeout)
        with self.contact():
            self._control = self._dist.new_group(backend="gloo", timeout=wait)  # for what is decided on the CPU
            # NCCL ends the process at its time-out: the one above, by which it can say why, is to come first.
            self._data = self._dist.new_group(timeout=2 * wait if torch.cuda.is_available() else wait)  # for tensors

    def set_timeout(self, seconds: float) -> None:
        if seconds != self._timeout:
            self._form(seconds)

    def cut_sequences(self, n: int) -> None:
        self._shared = n
        first = self.rank // n * n
        link = ProcessLink(range(first, first + n), self._data)
        self.pieces = Pieces(self.rank - first, (1,) * n, link) if n > 1 else None

    def share_experts(self, n: int) -> None:
        self._sharers, self._replicas = None, None
        wait = timedelta(seconds=self._timeout)
        with self.contact():  # every process takes part in making every group
            for first in range(0, self.size if n > 1 else 0, n):
                made = self._dist.new_group(list(range(first, first + n)), timeout=wait)
                self._sharers = made if first <= self.rank < first + n else self._sharers
            for first in range(n if n > 1 else 0):
                made = self._dist.new_group(list(range(first, self.size, n)), timeout=wait)
                self._replicas = made if self.rank % n == first else self._replicas

    def rows(self, n: int) -> slice:
        each = n // (self.size // self._shared)
        first = self.rank // self._shared * each
        return slice(first, first + each)

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

    def exchange(self, parts: list[Tensor], lengths: list[int]) -> list[Tensor]:
        wire = torch.cat(parts)
        found = wire.new_empty(sum(lengths))
        into, out = found.view(torch.uint8), wire.view(torch.uint8)  # of whatever type
        received, sent = ([n * wire.element_size() for n in each] for each in (lengths, map(len, parts)))
        with self.contact():
            self._dist.all_to_all_single(into, out, received, sent, group=self._data)
        return list(found.split(lengths))

    def cuts(self, config: TrainConfig) -> bool:
        return config.parallel == "fsdp" or config.expert_parallel > 1

    def cut(self, model: nn.Module, config: TrainConfig, device: torch.device) -> None:
        from zoo.training.experts import Experts, SharedExperts
        from zoo.training.sharding import Sharded

        experts = None if self._sharers is None else Experts(model, self._sharers, self._replicas, device)
        if config.parallel == "ddp" and experts is not None:
            held: Any = SharedExperts(self, self._data, model, experts, device)
        else:
            held = Sharded(self, self._data, model, device, experts)
        setattr(model, _SHARDED, held)  # which holds the model: both go together

    @torch.no_grad()
    def pour(self, values: Callable[[], nn.Module], *models: nn.Module) -> None:
        given: dict[str, Tensor] = {}

        def read() -> None:
            whole = values()
            given.update((*whole.named_parameters(), *whole.named_buffers()))

        self.told(read)
        for model in models:
            for name, tensor in (*model.named_parameters(), *model.named_buffers()):
                whole = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
                if self.leads:
                    whole.copy_(given[name])
                with self.contact():
                    self._dist.broadcast(whole, src=0, group=self._data)
                size = n_pieces(tensor)
                here(tensor).copy_(whole if size == 1 else whole[own_rows(len(whole), self.rank, size)])

    def together(self, model: nn.Module) -> contextlib.AbstractContextManager[None]:
        sharded = getattr(model, _SHARDED, None)
        return contextlib.nullcontext() if sharded is None else sharded.together()

    @torch.no_grad()
    def share(self, module: nn.Module) -> None:
        with self.contact():
            for tensor in (*module.parameters(), *module.buffers()):
                self._dist.broadcast(tensor.detach(), src=0, group=self._data)

    def seed_step(self, seed: int, step: int, device: torch.device) -> None:
        key = random.fold(random.fold(random.row_keys("train", seed, step, 1), _ORDER), self.rank)
        seed_device(int(key[0]) & (2**63 - 1), device)

    def stepping(self, model: nn.Module, parts: int) -> Stepping:
        sharded = getattr(model, _SHARDED, None)
        with self.contact():
            return DataParallel(self, self._data, model, parts) if sharded is None else sharded.stepping(parts)

    @contextlib.contextmanager
    def contact(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, UsageError | RunError) or not is_lost(error):
                raise
            timed_out = "timed out" in str(error).lower() or "timeout" in str(error).lower()
            LostProcess.happened = self._roll.call(self._timeout, silent=timed_out)
            raise LostProcess.happened from None


_groups: list[Processes] = []


def join() -> Group:
    """The processes that this one was started with by `torchrun` or `zoo train --processes`, or itself alone.

    Raises:
        UsageError: the others are not there.
    """
    if not several():
        return Group()
    if not _groups:
        _groups.append(Processes(connect()))
        part_at_exit(_groups[0]._control)
    return _groups[0]


def check_shared(size: int, config: TrainConfig, objective: Objective, model: ModelConfig) -> None:
    """Refuse a training that this number of processes cannot share.

    Raises:
        UsageError: the batch or the experts do not divide, the objective reads a batch whole, or there are too few
            GPUs.
    """
    if size == 1:
        for option in ("sequence_processes", "expert_parallel"):
            if (n := getattr(config, option)) > 1:
                raise UsageError(f"train.{option}={n}: start several processes: --processes {n}.")
        return
    device, here = choose_device(config.device).type, int(os.environ.get("LOCAL_WORLD_SIZE", size))
    if device == "mps" or (device == "cuda" and here > torch.cuda.device_count()):
        told = "MPS serves one" if device == "mps" else f"there are {torch.cuda.device_count()} GPUs"
        raise UsageError(f"{here} processes on this machine are too many, as {told}: set train.device=cpu.")
    if config.parallel == "fsdp" and config.compile:
        raise UsageError("train.compile is not allowed with train.parallel=fsdp: take train.parallel=ddp.")
    if (n := config.expert_parallel) > 1:
        if size % n:
            told = f"{size} processes cannot be divided into groups that share out the experts"
            raise UsageError(f"train.expert_parallel={n}: {told}: start a multiple of {n}.")
        _check_experts(n, model)
    n, shared = config.batch_size, config.sequence_processes
    if size % shared:
        told = f"{size} processes cannot be divided into groups that share a sequence"
        raise UsageError(f"train.sequence_processes={shared}: {told}: start a multiple of {shared}.")
    readers = size // shared
    who = f"{readers} groups of {shared} processes" if shared > 1 else f"{size} processes"
    if n % readers:
        near = f"{n // readers * readers} or {-(-n // readers) * readers}" if n > readers else str(readers)
        told = f"which read as many rows each; train.batch_size={near} can"
        raise UsageError(f"train.batch_size={n} cannot be divided among {who}, {told}.")
    if config.accumulate > n // readers:
        told = f"each of {who} has {n // readers} rows of a batch, and every part needs one"
        raise UsageError(f"train.accumulate={config.accumulate} is too large: {told}.")
    if shared > 1 and not objective.takes_pieces():
        told = f"the objective {objective.name} reads the sequences of {objective.task.name} whole"
        raise UsageError(f"train.sequence_processes={shared} is not allowed: {told}.")
    if shared > 1 and objective.length < shared:
        told = f"a sequence has {objective.length} tokens, and every process needs one"
        raise UsageError(f"train.sequence_processes={shared} is too large: {told}.")
    if objective.trains:
        told = f"{objective.name} trains {objective.trains.removesuffix('.')} alone: start one process"
        raise UsageError(f"{size} processes cannot share a batch: {told}.")
    if not objective.takes_rows():
        told = f"{objective.name} reads a batch whole: its method updates has no argument rows"
        raise UsageError(f"{size} processes cannot share a batch: the objective {told}.")


def _check_experts(n: int, config: ModelConfig) -> None:
    """Refuse a model whose experts n processes cannot share out evenly.

    Raises:
        UsageError: it has none, or their number does not divide.
    """
    told = f"train.expert_parallel={n} is not allowed"
    with torch.device("meta"):
        mixers = [module for module in create_model(config).modules() if isinstance(module, Mixer)]
    layers = [mixer for mixer in mixers if mixer.expert_weights]
    if not layers:
        raise UsageError(f"{told}: the model has no experts to share out. Put moe into its pattern, or leave it out.")
    for mixer in layers:
        experts = len(mixer.get_parameter(mixer.expert_weights[0]))
        if experts % n:
            fits = ", ".join(str(i) for i in range(1, experts + 1) if experts % i == 0)
            raise UsageError(f"{told}: it does not divide the {experts} experts of {mixer.name}. Choose from {fits}.")


__all__ = ["Processes", "check_shared", "join", "several"]
