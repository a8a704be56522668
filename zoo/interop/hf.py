"""Published models in the format of Hugging Face's transformers, read and written without running code of theirs."""

from __future__ import annotations

import json
import math
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from zoo.core import readers
from zoo.core.errors import UsageError, UsageWarning
from zoo.core.readers import regular, shown, unreadable
from zoo.interop._weights import FLOATS, MOST_WEIGHTS, check_complete, fill, hollow, sizes, some, unpickle, written
from zoo.interop.quantised import Dequantised
from zoo.models.config import ModelConfig
from zoo.models.ends import Ends
from zoo.models.families import Family, families
from zoo.models.published.maps import Map, renamed
from zoo.models.uninitialised import require_numbers

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
PICKLED = "pytorch_model.bin"
PICKLED_INDEX = "pytorch_model.bin.index.json"
SHARD = re.compile(r"[\w.-]+\.safetensors", re.ASCII)
PICKLED_SHARD = re.compile(r"[\w.-]+\.bin", re.ASCII)
OTHER_FORMS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".onnx", ".h5", ".msgpack", ".npz")
TOOLS = {"hf_quant_config.json": "ModelOpt", "quantize_config.json": "GPTQ", "quant_config.json": "AWQ"}
"""Files of tools that quantise, which some leave beside a config that says nothing of it."""
MOST_JSON = 256 * 2**20  # bytes; the index of a model of 10^12 parameters takes a tenth
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def from_hf(
    source: nn.Module | str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> Ends:
    """Load a published model with its weights.

    Args:
        source: a model of transformers, which is copied, or the path of a checkpoint folder: `config.json` beside
            `model.safetensors` or `pytorch_model.bin` (read with `weights_only=True`), or shards of either and their
            index. The stack without its head (`Qwen3Model`) is enough if the config ties the head to the embedding.
            Weights in MXFP4 (GPT-OSS) or in FP8 by blocks (DeepSeek-V3) are dequantised, which a warning says.
        dtype: dtype of all weights; by default each keeps its own, and those that were quantised are in bfloat16.
        device: device of the weights. "meta" reads no weight of safetensors: names, shapes and dtypes are checked, and
            the model holds no numbers, however large it is.

    Raises:
        UsageError: an architecture, an option or a quantisation that is not supported, weights that are missing, not
            expected or of another shape (all of them are listed), a folder that cannot be read, a device that is not
            there, or more weights than its memory holds.
    """
    if dtype is not None and dtype not in FLOATS:
        raise UsageError(f"dtype={dtype} is not allowed: it should be one of {', '.join(map(str, FLOATS))}.")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:  # each for some kind of device
        reason = str(error).split("\n")[0].split(". ")[0].rstrip(".")
        raise UsageError(f"device={str(device)!r} is not available here: {reason}.") from None
    weights: Mapping[str, Tensor]
    if isinstance(source, nn.Module):
        config, weights = _config_of(source), _weights_of(source)
    elif not isinstance(source, str | Path):
        raise UsageError(f"from_hf takes a model of transformers or a folder, not a {type(source).__name__}.")
    else:
        folder = Path(source)
        config, weights = read_json(folder / CONFIG, folder), {}
    family = families.of_config(config)
    model = hollow(ModelConfig(**family.model_options(config)))  # which tells whether it is supported, weights or not
    if isinstance(source, str | Path):
        _refuse_quantised(folder)
        kind = f"{shown(folder)} is supported (family {family.name}, {model.n_parameters():,} parameters)"
        weights = _Folder(folder, kind)
        if how := family.quantisation(config):
            weights = Dequantised(weights, weights.shapes, how, dtype or torch.bfloat16)
    maps = weight_maps(model.config)
    top = next(m.theirs[0] for m in maps if "embedding.weight" in m.ours).split(".")[0] + "."
    if not any(name.startswith(top) for name in weights):  # of the stack without its head
        maps = [renamed(m, lambda name: name.removeprefix(top)) for m in maps]
    left_aside = family.beyond(config, list(weights))
    _refuse_headless(maps, weights, family)
    shapes = weights.shapes if isinstance(weights, _Folder | Dequantised) else None
    fill(model, maps, weights, family.architecture, shapes=shapes, left_aside=left_aside, dtype=dtype, device=device)
    if isinstance(weights, Dequantised) and weights.parts:
        warnings.warn(f"{shown(folder)} is quantised: {weights.told}.", UsageWarning, stacklevel=2)
    return model.eval()


def to_hf(model: Ends, folder: str | Path, *, shard_bytes: int = 5_000_000_000) -> Path:
    """Write `config.json` and the weights of a family's model as transformers reads them.

    Args:
        model: a model from `from_hf` or from a `family-size`, with unchanged options.
        folder: a folder that does not exist or is empty.
        shard_bytes: largest size of one file; larger models have several files and an index.

    Returns:
        The folder.

    Raises:
        UsageError: a model that is not, or no longer, of a family; a folder that contains files or cannot be written.
    """
    if not isinstance(model, Ends):
        raise UsageError(f"to_hf takes a model of the zoo, not a {type(model).__name__}.")
    folder, maps = Path(folder), weight_maps(model.config)
    check_complete(model, maps, families.of_config(model.config.published or {}).architecture)
    require_numbers(model, "to_hf")
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UsageError(f"{folder} is not empty: nothing was written.")
        _write(model, folder, maps, shard_bytes)
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{folder} cannot be written: {getattr(error, 'strerror', None) or error}.") from None
    return folder


def _write(model: Ends, folder: Path, maps: list[Map], shard_bytes: int) -> None:
    """The files of a checkpoint folder, as `to_hf`."""
    shards: list[list[str]] = [[]]
    room, bytes_of = shard_bytes, sizes(model, maps)
    for name, size in bytes_of.items():
        if size > room and shards[-1]:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= size
    folder.mkdir(parents=True, exist_ok=True)
    n = len(shards)
    files = [WEIGHTS] if n == 1 else [f"model-{i:05d}-of-{n:05d}.safetensors" for i in range(1, n + 1)]
    weights = written(model, maps)  # one shard at a time is held beside the model
    for file, shard in zip(files, shards, strict=True):
        save_file(dict(islice(weights, len(shard))), folder / file, metadata={"format": "pt"})
    if n > 1:
        places = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": sum(bytes_of.values())}, "weight_map": places}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    (folder / CONFIG).write_text(json.dumps(_marked(model.config.published), indent=2, allow_nan=False) + "\n")


def published_weights(model: Ends) -> dict[str, Tensor]:
    """The weights of a family's model under their published names, on the CPU; no two share memory.

    Raises:
        UsageError: a model that is not of a family, or no more.
    """
    return dict(written(model, weight_maps(model.config)))


def weight_maps(config: ModelConfig) -> list[Map]:
    """How the weights of a family's model lie in published checkpoints.

    Raises:
        UsageError: the options are not, or no longer, those of a published config.
    """
    if config.published is None:
        raise UsageError("Only a model of a family (see `zoo list models`) has a published form; this is a pattern.")
    family = families.of_config(config.published)
    expected = ModelConfig(**family.model_options(config.published))
    changed = [k for k in ModelConfig.model_fields if getattr(config, k) != getattr(expected, k)]
    if changed:
        given = ", ".join(f"{k}={getattr(config, k)!r}" for k in changed)
        raise UsageError(f"This model is no {family.architecture} any more: {given[:300]} is not what that has.")
    return family.maps(config.published)


# ---- reading


def _refuse_quantised(folder: Path) -> None:
    """Raise where a folder holds a file of a tool that quantises weights, whatever its config says."""
    for file, tool in TOOLS.items():
        if not os.path.lexists(folder / file):
            continue
        found = read_json(folder / file, folder)
        told = found["quantization"] if isinstance(found.get("quantization"), dict) else found
        how = [f"{k}={told[k]!r}" for k in ("quant_algo", "bits", "w_bit", "quant_method") if told.get(k)]
        if how:  # the file may say that nothing is
            way = "take the weights in bfloat16, float16 or float32"
            raise UsageError(f"{shown(folder)} is quantised by {tool} ({file}: {', '.join(how)[:100]}): {way}.")


def _refuse_headless(maps: list[Map], weights: Mapping[str, Tensor], family: Family) -> None:
    """Raise where the head is all that a checkpoint lacks, and the config does not tie it to the embedding."""
    lost = {n for m in maps for n in m.found_in(weights).theirs if n not in weights}
    if lost and lost == {n for m in maps if m.ours == ("head.weight",) for n in m.theirs}:
        told = f"it lacks {lost.pop()}, which the config does not tie to the embedding (tie_word_embeddings)"
        raise UsageError(f"This is the stack of {family.architecture} without its head: {told}.")


def _config_of(model: nn.Module) -> dict[str, Any]:
    """The config of a model of transformers, which names the class that it was made of."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "to_dict"):
        raise UsageError(f"from_hf takes a model of transformers or a folder, not a {type(model).__name__}.")
    return {**config.to_dict(), "architectures": [type(model).__name__]}


def _weights_of(model: nn.Module) -> dict[str, Tensor]:
    """The weights of a model of transformers under the names that its checkpoints have."""
    weights = model.state_dict()
    if bare := [name for name, tensor in weights.items() if tensor.is_meta]:
        raise UsageError(f"from_hf takes a model with weights; {len(bare)} have none: {some(bare)}.")
    try:  # since its version 5, a model in memory may hold them joined
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:
        return weights
    weights = revert_weight_conversion(model, weights)
    if any(tensor.dtype == torch.float8_e4m3fn for tensor in weights.values()):  # again, by the same library: inexact
        raise UsageError("This model was read from quantised weights: give from_hf its checkpoint folder.")
    return weights


class _Folder(Mapping[str, Tensor]):
    """The weights of a checkpoint folder by name, each read on access.

    Files may be links, as in the hub's cache, but those that an index names have to lie in the folder.

    Attributes:
        shapes: tensors on the meta device, of the shapes and dtypes of the weights.
    """

    def __init__(self, folder: Path, kind: str):
        """`kind` is what to say of the folder where it holds no weights."""
        self.folder = folder
        self._pickled: dict[str, Tensor] = {}
        self._files: dict[str, Any] = {}  # the open file of each weight
        forms: dict[str, Callable[[], None]] = {
            WEIGHTS: lambda: self._files.update(self._names(WEIGHTS)),
            INDEX: lambda: self._files.update(self._read_index(INDEX, SHARD, self._names)),
            PICKLED: lambda: self._pickled.update(unpickle(folder / PICKLED)),
            PICKLED_INDEX: lambda: self._pickled.update(
                self._read_index(PICKLED_INDEX, PICKLED_SHARD, lambda file: unpickle(folder / file))
            ),
        }
        form = next((file for file in forms if os.path.lexists(folder / file)), None)
        if form is None:
            others = sorted(f.name for f in folder.iterdir() if f.suffix in OTHER_FORMS)
            there = f" It does hold {some(others, 3)}." if others else ""
            raise UsageError(f"{kind}, but holds no weights: none of {', '.join(forms)}.{there}")
        forms[form]()
        self.shapes = {name: t.to("meta") for name, t in self._pickled.items()}
        for name, file in self._files.items():
            header = file.get_slice(name)
            self.shapes[name] = torch.empty(header.get_shape(), dtype=_dtype(name, header.get_dtype()), device="meta")

    def _read_index(
        self, index: str, named: re.Pattern[str], read: Callable[[str], Mapping[str, Any]]
    ) -> dict[str, Any]:
        """What `read` says of the weights of an index by name, in files beside it that are `named` so."""
        places = read_json(self.folder / index, self.folder).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(f, str) and named.fullmatch(f) for f in places.values()):
            raise UsageError(f"{shown(self.folder / index)} is not an index of weights in files beside it.")
        shards = {file: read(file) for file in sorted(set(places.values()))}
        if lost := [name for name, file in places.items() if name not in shards[file]]:
            raise UsageError(f"{self.folder}: the shards lack {len(lost)} weights of the index: {some(lost)}.")
        if extra := [name for names in shards.values() for name in names if name not in places]:
            raise UsageError(f"{self.folder}: the index lacks {len(extra)} weights of the shards: {some(extra)}.")
        return {name: shards[file][name] for name, file in places.items()}

    def _names(self, file: str) -> dict[str, Any]:
        """The names of a file's weights, each with the open file."""
        try:
            opened = safe_open(regular(self.folder / file, most=MOST_WEIGHTS), framework="pt")
        except (OSError, SafetensorError) as error:
            raise unreadable(self.folder / file, error) from None
        return dict.fromkeys(opened.keys(), opened)

    def __getitem__(self, name: str) -> Tensor:
        return self._pickled[name] if self._pickled else self._files[name].get_tensor(name)

    def __contains__(self, name: object) -> bool:
        return name in self.shapes  # without reading it

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def _dtype(name: str, given: str) -> torch.dtype:
    """The dtype of a weight, by its name in safetensors."""
    if given not in DTYPES:
        raise UsageError(f"{shown(name)} is of dtype {given}: quantised weights are not supported.")
    return DTYPES[given]


def read_json(path: Path, folder: Path) -> dict[str, Any]:
    """The mapping in a file of a checkpoint folder.

    Raises:
        UsageError: no such folder or file, one that is no regular file, too large or damaged, or no mapping.
    """
    if not os.path.isdir(folder):
        raise UsageError(f"There is no folder {shown(folder)}.")
    if not os.path.lexists(path):
        raise UsageError(f"{shown(folder)} holds no {path.name}: it is not a checkpoint folder.")
    found = readers.read_json(path, most=MOST_JSON, object_hook=_unmarked, parse_constant=_constant)
    if not isinstance(found, dict):
        raise UsageError(f"{shown(path)} is not a mapping.")
    return found


def _constant(name: str) -> float:
    """The infinities, which JSON lacks and Python writes; a number that is none stands for a mistake."""
    if name == "NaN":
        raise ValueError("NaN is no number")
    return float(name)


def _marked(value: Any) -> Any:
    """Plain data with infinities, which JSON lacks, in the form that transformers gives them."""
    if isinstance(value, Mapping):
        return {k: _marked(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_marked(v) for v in value]
    if isinstance(value, float) and math.isinf(value):
        return {"__float__": "Infinity" if value > 0 else "-Infinity"}
    return value


def _unmarked(value: dict[str, Any]) -> Any:
    marked = value.get("__float__") if len(value) == 1 else None
    return float(marked) if marked in ("Infinity", "-Infinity") else value
