"""Tensors of a checkpoint in pieces: each process's rows in a file of its own, read by any number of processes.

step_300/weights-00001-of-00004.safetensors      the first process's rows of each weight, and what is not cut
         average-00001-of-00004.safetensors      of the running average
         optimizer-00001-of-00004.safetensors    of the optimizer's moments, named PART.PARAMETER.NAME

A tensor is its pieces one below the other, in the order of their files.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from zoo.training.shards import own_rows

OPTIMIZER = "optimizer.safetensors"
_PIECE = re.compile(r"(weights|average|optimizer)-([0-9]{5})-of-([0-9]{5})\.safetensors")


def piece(name: str, rank: int, size: int) -> str:
    """The file of a process's rows of the tensors of `name`."""
    return f"{name.removesuffix('.safetensors')}-{rank + 1:05}-of-{size:05}.safetensors"


def is_piece(name: str) -> bool:
    """Whether a file is named as a piece is."""
    return _PIECE.fullmatch(name) is not None


def files_of(name: str, files: Iterable[str]) -> list[str]:
    """The files that hold the tensors of `name`, in order; none where any is missing."""
    known = set(files)
    if name in known:
        return [name]
    sizes = {int(m[3]) for m in map(_PIECE.fullmatch, known) if m and f"{m[1]}.safetensors" == name}
    wanted = [piece(name, rank, size) for size in sizes for rank in range(size)]
    return wanted if len(sizes) == 1 and set(wanted) <= known else []


def joined(parts: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors whose pieces are given file by file."""
    found: dict[str, list[Tensor]] = {}
    for part in parts:
        for name, tensor in part.items():
            found.setdefault(name, []).append(tensor)
    return {name: tensors[0] if len(tensors) == 1 else torch.cat(tensors) for name, tensors in found.items()}


def shapes(paths: Sequence[Path]) -> dict[str, tuple[int, ...]]:
    """The shapes of the whole tensors in files of pieces, whose contents are not read."""
    found: dict[str, tuple[int, ...]] = {}
    for path in paths:
        with safetensors.safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (it is no mapping)
                shape = tuple(file.get_slice(name).get_shape())
                before = found.get(name)
                found[name] = shape if before is None else (before[0] + shape[0], *shape[1:])
    return found


def read_rows(
    paths: Sequence[Path],
    whole: Mapping[str, tuple[int, ...]],
    rank: int,
    n_pieces: Callable[[str], int],
) -> dict[str, Tensor]:
    """The rows of each tensor that a process has; tensors that are not cut are read whole.

    Args:
        paths: files of pieces, in order, or the one file of whole tensors.
        whole: the `shapes` of the tensors in them.
        rank: number of the process.
        n_pieces: in how many pieces the processes have a tensor, by its name, which may be others than in the files.
    """
    starts = dict.fromkeys(whole, 0)
    found: dict[str, list[Tensor]] = {name: [] for name in whole}
    for path in paths:
        with safetensors.safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                if (size := n_pieces(name)) == 1 or not whole[name]:
                    found[name].append(file.get_tensor(name))
                    continue
                wanted, at = own_rows(whole[name][0], rank, size), starts[name]
                part = file.get_slice(name)
                n = part.get_shape()[0]
                first = min(max(wanted.start - at, 0), n)
                found[name].append(part[first : max(first, min(wanted.stop - at, n))])
                starts[name] = at + n
    return {name: parts[0] if len(parts) == 1 else torch.cat(parts) for name, parts in found.items()}


def moments(states: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """States of optimizers without their moments, which are tensors with axes, and these by `PART.PARAMETER.NAME`."""
    rest: list[dict[str, Any]] = []
    tensors: dict[str, Tensor] = {}
    for part, state in enumerate(states):
        kept: dict[int, dict[str, Any]] = {}
        for index, values in state["state"].items():
            cut = {k: v for k, v in values.items() if isinstance(v, Tensor) and v.ndim}
            kept[index] = {k: v for k, v in values.items() if k not in cut}
            tensors |= {f"{part}.{index}.{k}": v for k, v in cut.items()}
        rest.append({**state, "state": kept})
    return rest, tensors


def parameter_of(moment: str) -> str:
    """The parameter that a moment belongs to, `PART.PARAMETER`."""
    return moment.rsplit(".", 1)[0]


def with_moments(rest: Sequence[Mapping[str, Any]], tensors: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """The states that `moments` took apart.

    Raises:
        ValueError: a moment of nothing.
        KeyError: likewise.
    """
    states = [{**state, "state": {i: dict(v) for i, v in state["state"].items()}} for state in rest]
    for name, tensor in tensors.items():
        part, index, key = name.split(".", 2)
        states[int(part)]["state"][int(index)][key] = tensor
    return states


__all__ = [
    "OPTIMIZER",
    "files_of",
    "is_piece",
    "joined",
    "moments",
    "parameter_of",
    "piece",
    "read_rows",
    "shapes",
    "with_moments",
]
