"""Models in a folder of their own, without a run: `zoo.save`, and what `zoo.load` reads of such a folder.

model.json             the config, the words that come from files outside the package, the digest of the weights
weights.safetensors    all weights, each in its dtype
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import safetensors
import safetensors.torch
from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError
from torch import Tensor, nn

from zoo import __version__
from zoo.backbone import Backbone
from zoo.core.errors import UsageError, quoted
from zoo.core.files import sync_folder, write_bytes
from zoo.core.readers import check_path, read_bytes, shown
from zoo.models.config import ModelConfig
from zoo.models.create import create_backbone, create_model
from zoo.models.ends import Ends
from zoo.models.transfer import check_plain, outline, outline_of_layers
from zoo.models.uninitialised import Uninitialised, require_numbers
from zoo.training import imports

MODEL, WEIGHTS = "model.json", "weights.safetensors"
FORMAT = 1
MOST_BYTES_OF_MODEL = 2**26
TEXT_FILES = ("tokenizer.json", "generation_config.json")
"""Of a published checkpoint, read by `zoo generate` beside any model."""


class _File(BaseModel):
    """What is said of the file of weights."""

    model_config = ConfigDict(strict=True, extra="forbid")

    bytes: NonNegativeInt
    digest: str


class _Model(BaseModel):
    """What `model.json` holds."""

    model_config = ConfigDict(strict=True)

    format: int
    kind: Literal["model", "backbone"] = "model"
    model: dict[str, Any]
    weights: _File
    imports: list[dict[str, Any]] = []


def is_saved(folder: Path) -> bool:
    """Whether a folder holds a model of `zoo.save`, by what is in it."""
    return (check_path(folder) / MODEL).is_file()


def save(model: Ends | Backbone, folder: str | Path, *, text_files: Mapping[str, bytes] = {}) -> Path:
    """Save a model with its config: `zoo.load(folder)` gives it back, to the same bits.

    Any model of the zoo can be saved, swapped and resized models of published families and backbones of
    `create_backbone` too. The folder appears whole
    or not at all. It also serves `zoo generate`, `init=` of an experiment, and `zoo export`.

    Args:
        model: a model; it is not changed.
        folder: a folder that does not exist or is empty.
        text_files: contents of a `tokenizer.json` or a `generation_config.json`, which `zoo generate` reads.

    Returns:
        The folder.

    Raises:
        UsageError: not a model of the zoo, or one with adapters; a folder that holds files or cannot be written.
    """
    if not isinstance(model, Ends | Backbone) or model.config is None:
        hint = " (torch.save(module.state_dict(), file) saves the weights of any module)"
        told = f"{type(model).__name__}{hint if isinstance(model, nn.Module) else ''}"
        raise UsageError(f"save takes a model of create_model or create_backbone, not a {told}.")
    path = check_path(folder)
    check_plain(model, "save")
    require_numbers(model, "save")
    if path.is_symlink() or (path.exists() and (not path.is_dir() or any(path.iterdir()))):
        raise UsageError(f"{shown(path)} is not empty: nothing was written. Choose another folder, or delete it first.")
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    path = path.absolute()
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        safetensors.torch.save_file(weights, temporary / WEIGHTS)
        size, digest = _digest(temporary / WEIGHTS)
        data = {
            "format": FORMAT,
            "zoo": __version__,
            "kind": "model" if isinstance(model, Ends) else "backbone",
            "model": model.config.model_dump(mode="json"),
            "imports": imports.needed_by_model(model.config),
            "weights": {"bytes": size, "digest": digest},
        }
        for name, content in text_files.items():
            write_bytes(temporary / name, content)
        write_bytes(temporary / MODEL, json.dumps(data, indent=1).encode() + b"\n")
        sync_folder(temporary)
        if path.exists():
            path.rmdir()
        temporary.rename(path)
        sync_folder(path.parent)
    except (OSError, safetensors.SafetensorError) as error:
        raise UsageError(f"{shown(path)} cannot be written: {getattr(error, 'strerror', None) or error}.") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Path(folder)


def load_saved(folder: Path) -> Ends | Backbone:
    """The model or the backbone of a folder that `save` wrote, on the CPU in evaluation mode.

    Raises:
        UsageError: a file is missing, damaged or not what `save` writes, or a word is not registered here.
    """
    data = _read(folder)
    imports.check_entries(folder, data.imports)
    weights = _read_weights(folder, data.weights)
    config = ModelConfig(**data.model)
    form, create = (outline, create_model) if data.kind == "model" else (outline_of_layers, create_backbone)
    own = form(config).state_dict()  # before any memory is taken for sizes that the file does not have
    for name in [*own, *weights]:
        if name not in own or name not in weights or own[name].shape != weights[name].shape:
            there = tuple(weights[name].shape) if name in weights else "absent"
            here = tuple(own[name].shape) if name in own else "absent"
            raise _damaged(folder, f"{shown(name)} is {there} in {WEIGHTS} and {here} in the model")
    with Uninitialised():  # every weight is read
        model = create(config)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name in weights:
            tensor.data = tensor.data.to(weights[name].dtype)
    model.load_state_dict(weights)
    return model.eval()


def saved_options(folder: Path) -> dict[str, Any]:
    """The options of the model of a folder that `save` wrote.

    Raises:
        UsageError: as `load_saved`, or it holds a backbone.
    """
    data = _read(folder)
    if data.kind == "backbone":
        raise _headless(folder)
    return ModelConfig(**data.model).model_dump(mode="json")


def load_model(folder: Path) -> Ends:
    """As `load_saved`, where a whole model is meant.

    Raises:
        UsageError: the folder holds a backbone.
    """
    model = load_saved(folder)
    if not isinstance(model, Ends):
        raise _headless(folder)
    return model


def _headless(folder: Path) -> UsageError:
    return UsageError(f"{shown(folder)} holds a backbone, which has neither inputs nor a head: only zoo.load reads it.")


def _read(folder: Path) -> _Model:
    path = folder / MODEL
    try:
        data = json.loads(read_bytes(path, most=MOST_BYTES_OF_MODEL))
        if isinstance(data, dict) and isinstance(data.get("format"), int) and data["format"] != FORMAT:
            raise UsageError(f"{shown(path)} has format {data['format']}; this version reads format {FORMAT}.")
        return _Model.model_validate(data)
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"])) or "it"
        raise UsageError(f"{shown(path)} is damaged, or not of zoo.save: {shown(where)} is something else.") from None
    except UsageError:
        raise
    except (ValueError, RecursionError):
        raise UsageError(f"{shown(path)} is damaged, or not of zoo.save: it is no JSON.") from None


def _read_weights(folder: Path, file: _File) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    if not os.path.lexists(path):
        raise _damaged(folder, f"{WEIGHTS} is missing")
    content = read_bytes(path, most=max(file.bytes, 1)) if path.stat().st_size <= file.bytes else b""
    if len(content) != file.bytes:
        raise _damaged(folder, f"{WEIGHTS} has {path.stat().st_size:,} bytes instead of {file.bytes:,}")
    if _digest_of(content) != file.digest:
        raise _damaged(folder, f"the content of {WEIGHTS} has changed since it was written")
    try:
        return safetensors.torch.load(content)
    except (safetensors.SafetensorError, KeyError) as error:  # KeyError: of a type that torch has not
        raise _damaged(folder, f"{WEIGHTS} cannot be read ({quoted(str(error), 120)})") from None


def _damaged(folder: Path, why: str) -> UsageError:
    return UsageError(f"The saved model {shown(folder)} is damaged: {why}.")


def _digest_of(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _digest(path: Path) -> tuple[int, str]:
    """Bytes and digest of a file, which is flushed to the disk."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
        digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16))
        return file.tell(), digest.hexdigest()


__all__ = ["MODEL", "TEXT_FILES", "is_saved", "load_model", "load_saved", "save", "saved_options"]
