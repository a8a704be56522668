"""Checkpoints: folders that appear whole, are verified when read, and have all that a run needs to continue.

checkpoints/step_300/weights.safetensors    the model
                     average.safetensors    the running average, where `train.ema` is set
                     training.pt            optimizer, random states, position; read with weights_only=True
                     manifest.json          step, best step so far, the run's config, size and digest of each file

Where processes hold the model in pieces, each writes files of its own instead (`zoo.training.pieces`). Nothing of
torch's distributed checkpoints is read, as their index is a pickle.

Whatever is read is checked against the manifest on its way, by `read_weights` and `read_training` alike.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import secrets
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import safetensors
import safetensors.torch
import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, NonNegativeInt, ValidationError
from torch import Tensor, nn

from zoo.core.errors import UsageError, quoted
from zoo.core.files import sync_folder, write_bytes, writing
from zoo.core.readers import read_bytes
from zoo.core.run_files import as_written_now
from zoo.training import pieces

WEIGHTS, AVERAGE, TRAINING, MANIFEST = "weights.safetensors", "average.safetensors", "training.pt", "manifest.json"
FORMAT = 1
MOST_BYTES_OF_MANIFEST = 2**26
_NAME = re.compile(r"step_(0|[1-9][0-9]{0,17})")


class Damaged(UsageError):
    """A checkpoint that is missing, truncated, altered or not one of ours."""


def _file_name(name: str) -> str:
    if name not in (WEIGHTS, AVERAGE, TRAINING) and not pieces.is_piece(name):
        raise ValueError("no file of a checkpoint")
    return name


class File(BaseModel):
    """What a manifest says of a file."""

    bytes: NonNegativeInt
    digest: str


class Manifest(BaseModel):
    """What a checkpoint says about itself.

    Attributes:
        step: batches trained.
        best: the step of the best weights so far.
        files: its files.
        config: the config of the run, as in its `config.yaml`; older checkpoints have none.
    """

    model_config = ConfigDict(strict=True)

    step: NonNegativeInt
    best: NonNegativeInt | None
    files: dict[Annotated[str, AfterValidator(_file_name)], File]
    config: Annotated[dict[str, Any], AfterValidator(as_written_now)] | None = None


def save(
    folder: Path,
    step: int,
    *,
    weights: Mapping[str, Tensor],
    average: Mapping[str, Tensor] | None,
    training: Mapping[str, Any],
    best: int | None,
    config: Mapping[str, Any] | None = None,
) -> Path:
    """Write `folder/step_N` under a temporary name, flush it, then give it its name.

    Raises:
        RunError: the file system refuses; earlier checkpoints are as they were.
    """
    tensors = {WEIGHTS: weights} if average is None else {WEIGHTS: weights, AVERAGE: average}
    temporary = begin(folder, step)
    try:
        return complete(temporary, step, write(temporary, tensors, training), best=best, config=config)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def begin(folder: Path, step: int) -> Path:
    """A temporary folder for the files of `folder/step_N`.

    Raises:
        RunError: the file system refuses.
    """
    final = folder / name_of(step)
    temporary = folder / f".{final.name}.{secrets.token_hex(4)}.tmp"
    with writing(final):
        folder.mkdir(exist_ok=True)  # in the run's folder, which has to be there
        temporary.mkdir()
    return temporary


def write(
    temporary: Path, tensors: Mapping[str, Mapping[str, Tensor]], training: Mapping[str, Any] | None
) -> dict[str, dict[str, Any]]:
    """Write files of tensors and the training state, and flush them.

    Returns:
        What the manifest says of each.

    Raises:
        RunError: the file system refuses.
    """
    told: dict[str, dict[str, Any]] = {}

    def put(name: str, data: bytes) -> None:
        write_bytes(temporary / name, data)
        told[name] = {"bytes": len(data), "digest": _digest(data)}

    with writing(temporary.with_name(temporary.name.split(".")[1])):
        for name, each in tensors.items():
            put(name, _tensors(each))
        if training is not None:
            buffer = io.BytesIO()
            torch.save(dict(training), buffer)
            put(TRAINING, buffer.getvalue())
    return told


def complete(
    temporary: Path,
    step: int,
    files: Mapping[str, Mapping[str, Any]],
    *,
    best: int | None,
    config: Mapping[str, Any] | None,
) -> Path:
    """Write the manifest of the files that are there, and give the checkpoint its name.

    Raises:
        RunError: the file system refuses.
    """
    final = temporary.with_name(name_of(step))
    manifest = {
        "format": FORMAT,
        "step": step,
        "best": best,
        "config": None if config is None else dict(config),
        "files": dict(files),
    }
    with writing(final):
        told = json.dumps({**manifest, "digest": _digest_of(manifest)}, indent=1)
        write_bytes(temporary / MANIFEST, told.encode())
        sync_folder(temporary)
        if final.exists():
            shutil.rmtree(final)
        temporary.rename(final)
        sync_folder(final.parent)
    return final


def _tensors(tensors: Mapping[str, Tensor]) -> bytes:
    return safetensors.torch.save({k: v.detach().cpu().contiguous() for k, v in tensors.items()})


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _digest_of(manifest: Mapping[str, Any]) -> str:
    return _digest(json.dumps(manifest, sort_keys=True).encode())


def name_of(step: int) -> str:
    """The name of the checkpoint of a step."""
    return f"step_{step}"


def step_of(path: Path) -> int | None:
    """The step of a checkpoint by its name; None of a path that has no checkpoint's name."""
    match = _NAME.fullmatch(path.name)
    return None if match is None else int(match[1])


def is_checkpoint(path: Path) -> bool:
    """Whether a path has a checkpoint's name."""
    return step_of(path) is not None


def read_manifest(path: Path) -> Manifest:
    """What a checkpoint says about itself.

    Raises:
        Damaged: there is none, or it is not as it was written.
    """
    if not path.is_dir():
        raise Damaged(f"There is no checkpoint {path}.")
    if not (path / MANIFEST).exists():
        raise Damaged(f"{path} is no checkpoint of this package: it has no {MANIFEST}.")
    try:
        data = json.loads(read_bytes(path / MANIFEST, most=MOST_BYTES_OF_MANIFEST))
        version = data["format"]
        intact = _digest_of({k: v for k, v in data.items() if k != "digest"}) == data["digest"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise Damaged(f"The checkpoint {path} is damaged: {MANIFEST} cannot be read.") from None
    if version != FORMAT:
        raise Damaged(f"The checkpoint {path} has format {quoted(version, 20)}; this version reads format {FORMAT}.")
    if not intact:
        raise Damaged(f"The checkpoint {path} is damaged: {MANIFEST} has changed since it was written.")
    try:
        manifest = Manifest.model_validate(data)
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))
        raise Damaged(f"{path} is no checkpoint of this package: {where} of {MANIFEST} is something else.") from None
    for name in (WEIGHTS, TRAINING):
        if not pieces.files_of(name, manifest.files):
            raise Damaged(f"{path} is no checkpoint of this package: {MANIFEST} names no {name}.")
    return manifest


def files_of(manifest: Manifest, *, average: bool) -> list[str]:
    """The files of the weights that evaluation reads, or of those being trained: one, or one for each piece."""
    found = pieces.files_of(AVERAGE, manifest.files) if average else []
    return found or pieces.files_of(WEIGHTS, manifest.files)


def _read(path: Path, manifest: Manifest, name: str) -> bytes:
    """A file of a checkpoint, as it was written.

    Raises:
        Damaged: it is not.
    """
    expected = manifest.files[name]
    try:
        longer = (path / name).stat().st_size > expected.bytes
        content = b"" if longer else read_bytes(path / name, most=expected.bytes)
    except OSError as error:
        raise Damaged(f"The checkpoint {path} is damaged: {name} cannot be read ({error.strerror}).") from None
    except UsageError as error:
        raise Damaged(f"The checkpoint {path} is damaged: {str(error).rstrip('.')}.") from None
    if len(content) < expected.bytes and not longer:
        sizes = f"{len(content):,} of {expected.bytes:,} bytes"
        raise Damaged(f"The checkpoint {path} is damaged: {name} is truncated, {sizes} are there.")
    if longer or _digest(content) != expected.digest:
        raise Damaged(f"The checkpoint {path} is damaged: the content of {name} has changed since it was written.")
    return content


def verify(path: Path) -> Manifest:
    """Read a checkpoint's manifest and check every file against it.

    Raises:
        Damaged: what is wrong, in one line.
    """
    manifest = read_manifest(path)
    for name in manifest.files:
        _read(path, manifest, name)
    return manifest


def read_weights(path: Path, *, average: bool = True) -> dict[str, Tensor]:
    """The weights that evaluation reads, or with `average=False` those being trained, once they are verified.

    Raises:
        Damaged: they are not as they were written, or no weights.
    """
    manifest = read_manifest(path)
    return _read_tensors(path, manifest, files_of(manifest, average=average))


def _read_tensors(path: Path, manifest: Manifest, names: list[str]) -> dict[str, Tensor]:
    parts = []
    for name in names:
        try:
            parts.append(safetensors.torch.load(_read(path, manifest, name)))
        except (safetensors.SafetensorError, KeyError) as error:  # KeyError: of a type that torch has not
            raise Damaged(f"The checkpoint {path} is damaged: {name} cannot be read ({_first_line(error)}).") from None
    try:
        return pieces.joined(parts)
    except RuntimeError as error:
        raise Damaged(f"The checkpoint {path} is damaged: its pieces do not fit ({_first_line(error)}).") from None


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    """Put weights into a model, which takes their precision.

    Raises:
        Damaged: they belong to another model.
    """
    own = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    check_same(own, {k: tuple(v.shape) for k, v in weights.items()}, path)
    trained = [name for name, _ in model.named_parameters() if weights[name].is_floating_point()]
    if trained:
        model.to(weights[trained[0]].dtype)
    model.load_state_dict(dict(weights))


def check_same(own: Mapping[str, tuple[int, ...]], given: Mapping[str, tuple[int, ...]], path: Path) -> None:
    """Check the shapes of a model's weights against those of a checkpoint.

    Raises:
        Damaged: they belong to another model.
    """
    for name in [*own, *given]:
        if own.get(name) != given.get(name):
            told = f"{name} is {_shape(given.get(name))} there and {_shape(own.get(name))} in the model"
            raise Damaged(f"The checkpoint {path} belongs to another model: {told}.")


def _shape(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else str(shape)


def read_training(path: Path, *, values: bool = True) -> dict[str, Any]:
    """The training state, once it is verified.

    Args:
        path: the checkpoint.
        values: false leaves the moments of an optimizer that lie in pieces without memory, on the device "meta".

    Raises:
        Damaged: it is not as it was written, or none.
    """
    manifest = read_manifest(path)
    data = _read_state(path, manifest)
    names = pieces.files_of(pieces.OPTIMIZER, manifest.files)
    if not names:
        return data
    try:
        if values:
            tensors = _read_tensors(path, manifest, names)
        else:
            shapes = pieces.shapes([path / name for name in names])
            tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        return {**data, "optimizer": pieces.with_moments(data["optimizer"], tensors)}
    except Damaged:
        raise
    except (OSError, safetensors.SafetensorError, KeyError, ValueError, TypeError, AttributeError, IndexError) as error:
        told = _first_line(error)
        raise Damaged(f"The checkpoint {path} is damaged: its optimizer's pieces cannot be read ({told}).") from None


def _read_state(path: Path, manifest: Manifest) -> dict[str, Any]:
    content = _read(path, manifest, TRAINING)
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
        if unpacked > len(content):  # torch packs nothing
            raise Damaged(f"The checkpoint {path} is not to be trusted: {TRAINING} unpacks to {unpacked:,} bytes.")
        data = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        if not isinstance(data, dict):
            raise TypeError(f"it holds a {type(data).__name__}")
        return data
    except Damaged:
        raise
    except Exception as error:  # a strange pickle may raise anything
        raise Damaged(f"The checkpoint {path} is damaged: {TRAINING} cannot be read ({_first_line(error)}).") from None


def _first_line(error: BaseException) -> str:
    return quoted((str(error).splitlines() or [type(error).__name__])[0], 200)
