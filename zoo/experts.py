"""Experts that several processes share out: rows are sent to the process that holds their expert, and come back.

A weight whose first axis is experts is then a `DTensor`, cut along this axis; the processes of its mesh hold equal
numbers of experts, in order.

Shape legend: M rows, D their width, E experts of all processes, P processes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zoo.pieces import first_derivative


def sharers(weight: Any) -> Any:
    """The process group of torch that shares out the experts of a weight; None where this process holds them all."""
    return weight.device_mesh.get_group() if hasattr(weight, "device_mesh") else None


def held_here(weight: Any) -> Any:
    """The experts of a weight that this process holds; gradients reach the weight."""
    return weight.to_local() if hasattr(weight, "device_mesh") else weight


def through_experts(
    rows: Tensor, sizes: Tensor, processes: Any, dtype: torch.dtype, experts: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """What experts of several processes give for rows of this one; every process calls it at the same place.

    Args:
        rows: (M, D), sorted by expert.
        sizes: (E,) int64, rows of each expert; the rows that are left over give zeros.
        processes: their group in torch.
        dtype: in which rows travel.
        experts: (rows of this process's experts, sorted by expert; rows of each) to as many rows, of any width. It has
            to give a gradient to all that it reads, also where there are no rows.
    """
    n = torch.distributed.get_world_size(processes)
    wanted = sizes.view(n, -1)  # of this process's rows, by process and expert
    given = torch.empty_like(wanted)  # of all processes' rows, for the experts here
    torch.distributed.all_to_all_single(given, wanted, group=processes)
    sent, received = wanted.sum(1).tolist(), given.sum(1).tolist()
    arrived = exchanged(rows[: sum(sent)].to(dtype), sent, received, processes)
    # They arrive by process, then by expert. Sorted by expert alone, they are in the order of one process's rows.
    each = torch.arange(wanted.shape[1], device=rows.device).repeat(n).repeat_interleave(given.flatten())
    order = each.argsort(stable=True)
    y = experts(arrived.index_select(0, order), given.sum(0)).index_select(0, order.argsort())
    back = exchanged(y, received, sent, processes)
    left_over = len(rows) - len(back)
    return torch.cat([back, back.new_zeros(left_over, back.shape[1])]) if left_over else back


def exchanged(rows: Tensor, sent: list[int], received: list[int], processes: Any) -> Tensor:
    """The rows that all processes have for this one, in their order; gradients travel back.

    Args:
        rows: (M, D), those for each process in turn.
        sent: number of rows for each process.
        received: number of rows from each process.
        processes: their group in torch.
    """
    # Every process's exchange is part of its graph, so that all of them send gradients.
    anchor = torch.zeros((), device=rows.device, requires_grad=torch.is_grad_enabled())
    return _Exchange.apply(anchor, rows, sent, received, processes)


class _Exchange(torch.autograd.Function):
    """The anchor is stored so that a forward pass that is computed again is so before gradients are waited for."""

    @staticmethod
    def forward(ctx, anchor: Tensor, rows: Tensor, sent: list[int], received: list[int], processes: Any) -> Tensor:
        ctx.way = received, sent, processes
        ctx.save_for_backward(anchor)
        return _all_to_all(rows, sent, received, processes)

    @staticmethod
    @first_derivative
    def backward(ctx, d_rows: Tensor):
        _ = ctx.saved_tensors
        return None, _all_to_all(d_rows, *ctx.way), None, None, None


def _all_to_all(rows: Tensor, sent: list[int], received: list[int], processes: Any) -> Tensor:
    found = rows.new_empty(sum(received), rows.shape[1])
    torch.distributed.all_to_all_single(found, rows.contiguous(), received, sent, group=processes)
    return found


__all__ = ["exchanged", "held_here", "sharers", "through_experts"]
