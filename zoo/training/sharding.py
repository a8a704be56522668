"""Models whose weights lie in pieces in several processes, by PyTorch's FSDP2 (`fully_shard`).

Every step of the pattern is a unit: its weights are gathered for the time in which it computes. All other weights are
one more unit, which is gathered for a whole pass.
"""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from zoo.backbone import Backbone
from zoo.objectives.base import Update, at_least_float32
from zoo.training.group import Group, Stepping

warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)  # no step is written into


class _Whole(nn.Module):
    """A model as the unit of FSDP2 around its steps: what it calls finds the model's own weights gathered."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, call: Callable[[], Tensor | None]) -> Tensor | None:
        return call()


class Sharded:
    """A model in pieces, from now on: each of its parameters is a `DTensor`, cut along its first axis.

    Weights are gathered in the type in which they are trained, and autocast computes as it does in one process; sums of
    gradients are taken in float32 at least. Gradients are sums over the processes, since losses are shares already.

    Args:
        group: the processes.
        processes: their group in torch.
        model: on the device "meta"; afterwards on `device`, with weights of no value.
        device: of this process.
    """

    def __init__(self, group: Group, processes: Any, model: nn.Module, device: torch.device):
        dtype = next(model.parameters()).dtype
        reduce = at_least_float32(torch.empty(0, dtype=dtype)).dtype
        how: dict[str, Any] = {
            "mesh": DeviceMesh.from_group(processes, device.type),
            "mp_policy": MixedPrecisionPolicy(
                reduce_dtype=None if reduce == dtype else reduce, cast_forward_inputs=False
            ),
        }
        self._group = group
        self._networks = [m for m in model.children() if isinstance(m, Backbone)]
        self._units: list[list[Any]] = []
        for network in self._networks:
            with_weights = [step for step in network.steps if any(True for _ in step.parameters())]
            self._units.append([fully_shard(step, reshard_after_forward=True, **how) for step in with_weights])
        self._root = cast(Any, fully_shard(_Whole(model), reshard_after_forward=False, **how))
        before = self._root
        for unit in itertools.chain(*self._units):
            # What is gathered ahead in the backward pass. FSDP2's own guess counts the passes of evaluations too, which
            # processes make in unequal number: their messages would not match.
            unit.set_modules_to_backward_prefetch([before])
            before = unit
        self._root.set_modules_to_backward_prefetch([before])
        for unit in (self._root, *itertools.chain(*self._units)):
            unit.set_force_sum_reduction_for_comms(True)
            unit.set_gradient_divide_factor(1.0)
        model.to_empty(device=device)
        with torch.no_grad():
            self._root(lambda: None)  # FSDP2 takes the first module that is called for the outermost one
        self._root.reshard()

    def stepping(self, parts: int) -> Stepping:
        """What takes updates of the model out of an objective."""
        return _Stepping(self._group, self._root, parts)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Each process may call the model within, without gradients, as often as it likes; all leave with the last one.

        Before each pass through the layers a process announces it. One that is done gathers weights with the others,
        pass by pass, and computes nothing, until all are done.
        """
        hooks = [network.register_forward_pre_hook(self._announcing(i)) for i, network in enumerate(self._networks)]
        with self._group.contact():
            self._root.unshard()
        try:
            yield
            for hook in hooks:
                hook.remove()
            with self._group.contact():
                while number := self._group.largest(0)[0]:
                    for unit in self._units[number - 1]:
                        unit.unshard()
                        unit.reshard()
        finally:
            for hook in hooks:
                hook.remove()
            self._root.reshard()
            if hasattr(self._root, "reset_iter_state"):  # from torch 2.13 on: forget these passes
                self._root.reset_iter_state()

    def _announcing(self, i: int) -> Callable[..., None]:
        def announce(*_: Any) -> None:
            self._group.largest(i + 1)

        return announce


class _Stepping(Stepping):
    """Updates under FSDP2: each process comes to its rows of the gradients, summed over all."""

    def __init__(self, group: Group, root: Any, parts: int):
        self._group, self._root, self._parts, self._part = group, root, parts, 0

    def next(self, updates: Iterator[Update]) -> Update | None:
        found: list[Update] = []

        def call() -> Tensor | None:
            found.extend(update for update in [next(updates, None)] if update is not None)
            return found[0].loss if found else None

        self._root.set_requires_gradient_sync(self._part == self._parts - 1)
        with self._group.contact():
            loss = self._root(call)
        if not found:
            self._root.reshard()
            return None
        self._part = (self._part + 1) % self._parts
        return replace(found[0], loss=loss)


__all__ = ["Sharded"]
