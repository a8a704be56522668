"""Checkpoints: folders that appear whole, are verified when read, and carry all that a run needs to go on.

checkpoints/step_300/weights.safetensors    the model
                     average.safetensors    the running average, where `train.ema` is set
                     training.pt            optimizer, random states, position; read with weights_only=True
                     manifest.json          step, best step so far, size and digest of each file
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import json
import pickle
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from tasks.registry import UsageError
from zoo.training.files import sync_folder, write_bytes, writing

WEIGHTS, AVERAGE, TRAINING, MANIFEST = "weights.safetensors", "average.safetensors", "training.pt", "manifest.json"
FORMAT = 1
_NAME = re.compile(r"step_(\d+)")


class Damaged(UsageError):
    """A checkpoint that is missing, truncated, altered or not one of ours."""


class Manifest(NamedTuple):
    """What a checkpoint says about itself."""

    step: int
    best: int | None
    files: dict[str, dict[str, Any]]


def save(
    folder: Path,
    step: int,
    *,
    weights: Mapping[str, Tensor],
    average: Mapping[str, Tensor] | None,
    training: Mapping[str, Any],
    best: int | None,
) -> Path:
    """Write `folder/step_N` under a temporary name, flush it, then give it its name.

    Raises:
        RunError: the file system refuses; earlier checkpoints are as they were.
    """
    files = {WEIGHTS: _tensors(weights)}
    if average is not None:
        files[AVERAGE] = _tensors(average)
    buffer = io.BytesIO()
    torch.save(dict(training), buffer)
    files[TRAINING] = buffer.getvalue()
    manifest = {
        "format": FORMAT,
        "step": step,
        "best": best,
        "files": {name: {"bytes": len(data), "digest": _digest(data)} for name, data in files.items()},
    }
    files[MANIFEST] = json.dumps({**manifest, "digest": _digest_of(manifest)}, indent=1).encode()
    final = folder / f"step_{step}"
    temporary = folder / f".{final.name}.{secrets.token_hex(4)}.tmp"
    with writing(final):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            temporary.mkdir()
            for name, data in files.items():
                write_bytes(temporary / name, data)
            sync_folder(temporary)
            if final.exists():
                shutil.rmtree(final)
            temporary.rename(final)
            sync_folder(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return final


def _tensors(tensors: Mapping[str, Tensor]) -> bytes:
    return safetensors.torch.save({k: v.detach().cpu().contiguous() for k, v in tensors.items()})


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _digest_of(manifest: Mapping[str, Any]) -> str:
    return _digest(json.dumps(manifest, sort_keys=True).encode())


def is_checkpoint(path: Path) -> bool:
    """Whether a path has a checkpoint's name."""
    return _NAME.fullmatch(path.name) is not None


def steps(folder: Path) -> list[int]:
    """Steps of the checkpoints in a folder, rising; whether they can be read is another matter."""
    if not folder.is_dir():
        return []
    found = (_NAME.fullmatch(p.name) for p in folder.iterdir() if p.is_dir())
    return sorted(int(m.group(1)) for m in found if m)


def verify(path: Path) -> Manifest:
    """Read the manifest and check every file against it.

    Raises:
        Damaged: what is wrong, in one line.
    """
    if not path.is_dir():
        raise Damaged(f"There is no checkpoint {path}.")
    try:
        data = json.loads((path / MANIFEST).read_bytes())
        version = data["format"]
        intact = _digest_of({k: v for k, v in data.items() if k != "digest"}) == data["digest"]
    except FileNotFoundError:
        raise Damaged(f"{path} is no checkpoint of this package: it has no {MANIFEST}.") from None
    except (OSError, ValueError, KeyError, TypeError):
        raise Damaged(f"The checkpoint {path} is damaged: {MANIFEST} cannot be read.") from None
    if version != FORMAT:
        raise Damaged(f"The checkpoint {path} has format {version!r:.20}; this version reads format {FORMAT}.")
    if not intact:
        raise Damaged(f"The checkpoint {path} is damaged: {MANIFEST} has changed since it was written.")
    manifest = Manifest(data["step"], data["best"], data["files"])
    for name, expected in manifest.files.items():
        try:
            content = (path / name).read_bytes()
        except OSError as error:
            raise Damaged(f"The checkpoint {path} is damaged: {name} cannot be read ({error.strerror}).") from None
        if len(content) != expected["bytes"]:
            sizes = f"{len(content):,} of {expected['bytes']:,} bytes"
            raise Damaged(f"The checkpoint {path} is damaged: {name} is truncated, {sizes} are there.")
        if _digest(content) != expected["digest"]:
            raise Damaged(f"The checkpoint {path} is damaged: the content of {name} has changed since it was written.")
    return manifest


def read_weights(path: Path, *, average: bool = True) -> dict[str, Tensor]:
    """The weights of a verified checkpoint: those evaluation reads, or with `average=False` those being trained.

    Raises:
        Damaged: they cannot be read.
    """
    name = AVERAGE if average and (path / AVERAGE).exists() else WEIGHTS
    try:
        return safetensors.torch.load((path / name).read_bytes())
    except (OSError, safetensors.SafetensorError, ValueError) as error:
        raise Damaged(f"The checkpoint {path} is damaged: {name} cannot be read ({_first_line(error)}).") from None


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    """Put weights into a model.

    Raises:
        Damaged: they belong to another model.
    """
    own = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    given = {k: tuple(v.shape) for k, v in weights.items()}
    for name in [*own, *given]:
        if own.get(name) != given.get(name):
            told = f"{name} is {_shape(given.get(name))} there and {_shape(own.get(name))} in the model"
            raise Damaged(f"The checkpoint {path} belongs to another model: {told}.")
    model.load_state_dict(dict(weights))


def _shape(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else str(shape)


def read_training(path: Path) -> dict[str, Any]:
    """The training state of a verified checkpoint.

    Raises:
        Damaged: it cannot be read.
    """
    try:
        return torch.load(path / TRAINING, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError) as error:
        raise Damaged(f"The checkpoint {path} is damaged: {TRAINING} cannot be read ({_first_line(error)}).") from None


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def newest(folder: Path) -> Iterator[tuple[Path, Manifest | Damaged]]:
    """Checkpoints from the newest back, each with its manifest or with what is wrong with it."""
    for step in reversed(steps(folder)):
        path = folder / f"step_{step}"
        try:
            yield path, verify(path)
        except Damaged as error:
            yield path, error


def prune(folder: Path, keep: int) -> None:
    """Delete all but the latest `keep` checkpoints and those they name as the best."""
    found = steps(folder)
    kept = set(found[-keep:])
    for step in found[-keep:]:
        with contextlib.suppress(OSError, ValueError, KeyError):  # a damaged one names none
            kept.add(json.loads((folder / f"step_{step}" / MANIFEST).read_bytes())["best"])
    for step in found:
        if step not in kept:
            shutil.rmtree(folder / f"step_{step}", ignore_errors=True)


def aside(path: Path) -> Path:
    """A free name under which a damaged checkpoint is kept and never looked at again."""
    names = (path.with_name(f"{path.name}.damaged{n or ''}") for n in itertools.count())
    return next(name for name in names if not name.exists())


def clear_leftovers(folder: Path) -> None:
    """Delete what a killed process was still writing."""
    for path in folder.glob(".step_*.tmp"):
        shutil.rmtree(path, ignore_errors=True)
