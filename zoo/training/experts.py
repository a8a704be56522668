"""Models whose experts are shared out over the processes of a training, beside DDP or FSDP2 for all other weights.

Processes r N to r N + N - 1 hold all experts together, each a part of every layer's, and as many others hold the same.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from zoo.protocol import Mixer
from zoo.training.data_parallel import DataParallel
from zoo.training.group import Group, Stepping
from zoo.training.shards import here, own_rows
from zoo.training.together import called_together


class Experts:
    """The experts of a model on the device "meta", of which this process has a part from now on.

    Args:
        model: whose weights of experts become `DTensor`s.
        sharers: the processes in torch that hold all experts together.
        replicas: those that hold the same experts as this one.
        device: of this process.
    """

    def __init__(self, model: nn.Module, sharers: Any, replicas: Any, device: torch.device):
        self._replicas = replicas
        self.weights: dict[str, nn.Parameter] = {}
        mesh = DeviceMesh.from_group(sharers, device.type)
        rank, size = mesh.get_local_rank(), mesh.size()
        for path, module in model.named_modules():
            for name in module.expert_weights if isinstance(module, Mixer) else ():
                whole = module.get_parameter(name)
                part = whole.detach()[own_rows(len(whole), rank, size)]
                weight = nn.Parameter(DTensor.from_local(part, mesh, [Shard(0)], run_check=False), whole.requires_grad)
                setattr(module, name, weight)
                self.weights[f"{path}.{name}"] = weight

    def add_up(self) -> None:
        """Add up the gradients over the processes that hold the same experts."""
        gradients = [here(weight.grad) for weight in self.weights.values() if weight.grad is not None]
        if torch.distributed.get_world_size(self._replicas) == 1 or not gradients:
            return
        wire = torch.cat([gradient.flatten() for gradient in gradients])
        torch.distributed.all_reduce(wire, group=self._replicas)
        for gradient, total in zip(gradients, wire.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(total.view_as(gradient))


class SharedExperts:
    """A model of which each process holds all weights but those of experts, of which it has a part.

    Args:
        group: the processes.
        processes: their group in torch.
        model: on the device "meta", its `experts` shared out; afterwards on `device`, with weights of no value.
        experts: of the model.
        device: of this process.
    """

    def __init__(self, group: Group, processes: Any, model: nn.Module, experts: Experts, device: torch.device):
        self._group, self._processes, self._experts, self._device = group, processes, experts, device
        self._model = model.to_empty(device=device)

    def stepping(self, parts: int) -> Stepping:
        """What takes updates of the model out of an objective."""
        return DataParallel(self._group, self._processes, self._model, parts, self._experts)

    def together(self) -> contextlib.AbstractContextManager[None]:
        """As `called_together`."""
        return called_together(self._model, self._group, self._device)


__all__ = ["Experts", "SharedExperts"]
