"""The rows of a weight that each process has, where processes hold a model together: cut along the first axis.

As torch cuts them: ceil(n / size) rows each, the last processes fewer or none. Where there are more processes than
pieces, process i has the same as process i - size.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def own_rows(n: int, rank: int, size: int) -> slice:
    """Which of n rows a process has, of a weight in `size` pieces."""
    rank, each = rank % size, -(-n // size)
    return slice(min(rank * each, n), min((rank + 1) * each, n))


def is_shard(tensor: Tensor) -> bool:
    """Whether a tensor stands for one whose rows lie in several processes (a `DTensor`)."""
    return hasattr(tensor, "to_local")


def n_pieces(tensor: Any) -> int:
    """In how many pieces a tensor lies; 1 where each process has it whole."""
    return tensor.device_mesh.size() if is_shard(tensor) else 1


def here(tensor: Any) -> Tensor:
    """The part of a tensor that this process has, with the same memory; a whole tensor itself."""
    return tensor.detach().to_local() if is_shard(tensor) else tensor


def trained_here(parameter: nn.Parameter) -> nn.Parameter:
    """A parameter for an optimizer: itself, or this process's rows of it, with the same memory."""
    return nn.Parameter(here(parameter)) if is_shard(parameter) else parameter


__all__ = ["here", "is_shard", "n_pieces", "own_rows", "trained_here"]
