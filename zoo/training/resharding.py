"""What one process reads of a checkpoint where the model is in pieces: its rows, however the checkpoint was cut."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import safetensors
import torch
from torch import Tensor, nn

from zoo.core.errors import quoted
from zoo.training import checkpoint, pieces
from zoo.training.group import Group
from zoo.training.shards import here, n_pieces, own_rows

Model = TypeVar("Model", bound=nn.Module)


def check_fits(model: nn.Module, path: Path, *, average: bool = True) -> None:
    """Check the names and shapes of a checkpoint's weights against those of a model, in pieces or not.

    Raises:
        Damaged: they belong to another model.
    """
    _fitting(model, path, average)


def _fitting(model: nn.Module, path: Path, average: bool) -> tuple[list[Path], dict[str, tuple[int, ...]]]:
    """The files of a checkpoint's weights, and the shapes in them, which are those of the model."""
    files = [path / name for name in checkpoint.files_of(checkpoint.read_manifest(path), average=average)]
    there = _shapes(files, path)
    checkpoint.check_same({k: tuple(v.shape) for k, v in model.state_dict().items()}, there, path)
    return files, there


@torch.no_grad()
def load_rows(model: Model, path: Path, group: Group, *, average: bool = True) -> Model:
    """Put this process's rows of a checkpoint's weights into a model in pieces.

    Args:
        model: in pieces; its buffers are whole.
        path: the checkpoint.
        group: the processes.
        average: whether the weights are those that evaluation reads, or those being trained.

    Returns:
        The model.

    Raises:
        Damaged: the files cannot be read here, or belong to another model.
    """
    files, shapes = _fitting(model, path, average)
    own = model.state_dict()
    for name, rows in _rows(files, shapes, path, group, lambda name: n_pieces(own[name])).items():
        here(own[name]).copy_(rows)
    return model


def own_moments(path: Path, group: Group, cut: Mapping[str, int]) -> dict[str, Tensor]:
    """This process's rows of the moments of the optimizer, by `PART.PARAMETER.NAME`.

    Args:
        path: the checkpoint.
        group: the processes.
        cut: in how many pieces they hold a parameter, by `PART.PARAMETER`.

    Raises:
        Damaged: the files cannot be read here.
    """

    def size(name: str) -> int:
        return cut[pieces.parameter_of(name)]

    manifest = checkpoint.read_manifest(path)
    if names := pieces.files_of(pieces.OPTIMIZER, manifest.files):
        files = [path / name for name in names]
        return _rows(files, _shapes(files, path), path, group, size)
    whole = pieces.moments(checkpoint.read_training(path)["optimizer"])[1]
    return {name: tensor[own_rows(len(tensor), group.rank, size(name))].clone() for name, tensor in whole.items()}


def _rows(
    files: list[Path],
    shapes: Mapping[str, tuple[int, ...]],
    path: Path,
    group: Group,
    n_pieces: Callable[[str], int],
) -> dict[str, Tensor]:
    try:
        return pieces.read_rows(files, shapes, group.rank, n_pieces)
    except (OSError, safetensors.SafetensorError, RuntimeError) as error:
        raise _unread(path, error) from None


def _shapes(files: list[Path], path: Path) -> dict[str, tuple[int, ...]]:
    try:
        return pieces.shapes(files)
    except (OSError, safetensors.SafetensorError, IndexError) as error:
        raise _unread(path, error) from None


def _unread(path: Path, error: Exception) -> checkpoint.Damaged:
    told = quoted(" ".join(str(error).split()), 120)
    return checkpoint.Damaged(f"The checkpoint {path} cannot be read by every process ({told}).")


__all__ = ["check_fits", "load_rows", "own_moments"]
