"""Models whose weights lie in pieces in several processes, by PyTorch's FSDP2 (`fully_shard`).

Every step of the pattern is a unit: its weights are gathered for the time in which it computes. All other weights are
one more unit, which is gathered for a whole pass.
"""

from __future__ import annotations

import contextlib
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
from zoo.training.experts import Experts
from zoo.training.group import Group, Stepping
from zoo.training.together import called_together

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
        experts: of the model, where processes share them out: they are not cut once more.
    """

    def __init__(
        self, group: Group, processes: Any, model: nn.Module, device: torch.device, experts: Experts | None = None
    ):
        dtype = next(model.parameters()).dtype
        reduce = at_least_float32(torch.empty(0, dtype=dtype)).dtype
        how: dict[str, Any] = {
            "mesh": DeviceMesh.from_group(processes, device.type),
            "mp_policy": MixedPrecisionPolicy(
                reduce_dtype=None if reduce == dtype else reduce, cast_forward_inputs=False
            ),
            "ignored_params": set(experts.weights.values()) if experts else None,
        }
        self._group, self._model, self._device, self._experts = group, model, device, experts
        networks = [m for m in model.children() if isinstance(m, Backbone)]
        steps = [step for network in networks for step in network.steps if any(True for _ in step.parameters())]
        units: list[Any] = [fully_shard(step, reshard_after_forward=True, **how) for step in steps]
        self._root = cast(Any, fully_shard(_Whole(model), reshard_after_forward=False, **how))
        before = self._root
        for unit in units:
            # What is gathered ahead in the backward pass. FSDP2's own guess counts the passes of evaluations too, which
            # processes make in unequal number: their messages would not match.
            unit.set_modules_to_backward_prefetch([before])
            before = unit
        self._root.set_modules_to_backward_prefetch([before])
        for unit in (self._root, *units):
            unit.set_force_sum_reduction_for_comms(True)
            unit.set_gradient_divide_factor(1.0)
        model.to_empty(device=device)
        with torch.no_grad():
            self._root(lambda: None)  # FSDP2 takes the first module that is called for the outermost one
        self._root.reshard()

    def stepping(self, parts: int) -> Stepping:
        """What takes updates of the model out of an objective."""
        return _Stepping(self._group, self._root, parts, self._experts)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """As `called_together`; what belongs to no layer is gathered for all of it."""
        with self._group.contact():
            self._root.unshard()
        try:
            with called_together(self._model, self._group, self._device):
                yield
        finally:
            self._root.reshard()
            if hasattr(self._root, "reset_iter_state"):  # from torch 2.13 on: forget these passes
                self._root.reset_iter_state()


class _Stepping(Stepping):
    """Updates under FSDP2: each process comes to its rows of the gradients, summed over all."""

    def __init__(self, group: Group, root: Any, parts: int, experts: Experts | None):
        self._group, self._root, self._parts, self._part, self._experts = group, root, parts, 0, experts

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

    def finish(self) -> None:
        if self._experts is not None:
            with self._group.contact():
                self._experts.add_up()


__all__ = ["Sharded"]
