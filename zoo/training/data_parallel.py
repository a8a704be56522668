"""Updates of a model that every process holds whole, by PyTorch's DDP: gradients are added up over the processes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from zoo.objectives.base import Update
from zoo.training.group import Group, Stepping


class _Pass(nn.Module):
    """The forward pass of an update, as a module for DDP to follow: its output is the loss."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.unused = nn.Parameter(next(model.parameters()).detach()[:0])  # DDP warns where it finds none such
        self.update: Update | None = None

    def forward(self, updates: Iterator[Update]) -> Tensor:
        self.update = next(updates, None)
        if self.update is None:
            raise _Ended  # DDP then expects no backward pass
        return self.update.loss


class _Ended(Exception):
    """There are no further updates."""


class DataParallel(Stepping):
    """Updates under DDP: the gradients of all processes are added up during the backward pass.

    Those of experts that processes share out are added up afterwards, over the processes that hold the same.
    """

    def __init__(self, group: Group, processes: Any, model: nn.Module, parts: int, experts: Any = None):
        self._group, self._parts, self._part, self._experts = group, parts, 0, experts
        self._pass = _Pass(model)
        ddp = nn.parallel.DistributedDataParallel
        # Buffers follow from the same steps in every process: `Mixer.step_sums`.
        ignored = [name for name, _ in self._pass.named_buffers()]
        ignored += [f"model.{name}" for name in (experts.weights if experts else ())]
        ddp._set_params_and_buffers_to_ignore_for_model(self._pass, ignored)
        self._ddp = ddp(self._pass, process_group=processes, find_unused_parameters=True)
        self._ddp.register_comm_hook(processes, _added_up)

    def next(self, updates: Iterator[Update]) -> Update | None:
        self._ddp.require_backward_grad_sync = self._part == self._parts - 1
        try:
            with self._group.contact():
                loss = self._ddp(updates)
        except _Ended:
            return None
        self._part = (self._part + 1) % self._parts
        assert self._pass.update is not None
        update, self._pass.update = self._pass.update, None
        return replace(update, loss=loss)

    def finish(self) -> None:
        if self._experts is not None:
            with self._group.contact():
                self._experts.add_up()


def _added_up(group, bucket):  # DDP compares annotations with types, which those of this file are not
    """DDP's reduction without its division: the losses are shares of the whole batch's already."""
    work = torch.distributed.all_reduce(bucket.buffer(), group=group, async_op=True)
    return work.get_future().then(lambda done: done.value()[0])


__all__ = ["DataParallel"]
