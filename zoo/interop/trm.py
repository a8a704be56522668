"""Recursive models in the format of their authors: TRM (arXiv 2510.04871) and HRM (arXiv 2506.21734)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from zoo.core.errors import UsageError
from zoo.interop._weights import fill, hollow, written
from zoo.interop.hf import weight_maps
from zoo.models.config import ModelConfig
from zoo.models.families import families
from zoo.models.families.trm import recursive_maps
from zoo.models.recursive import RecursiveModel

PREFIXES = ("_orig_mod.", "model.", "inner.")  # of a compiled module, of the loss around it, of the halting around it


def from_authors(state_dict: Mapping[str, Tensor], config: Mapping[str, Any]) -> RecursiveModel:
    """The model of a checkpoint of TinyRecursiveModels or HRM, in float32.

    Args:
        state_dict: their weights under their names, whatever wrapped the model.
        config: their model options: those of `config/arch/*.yaml`, with `vocab_size`, `seq_len` and
            `num_puzzle_identifiers`.

    Raises:
        UsageError: no mappings; an option that is not supported; weights that are missing, not expected or of another
            shape.
    """
    if not isinstance(config, Mapping):
        raise UsageError(f"from_authors takes a mapping of model options, not a {type(config).__name__}.")
    if not (isinstance(state_dict, Mapping) and all(isinstance(tensor, Tensor) for tensor in state_dict.values())):
        raise UsageError("from_authors takes a mapping of names to tensors.")
    weights = {f"inner.{_bare(name)}": tensor for name, tensor in state_dict.items()}
    family, _ = families.of("hrm-tiny" if any("H_level" in name for name in weights) else "trm-tiny")
    marked = {"architectures": [family.architecture], "model_type": family.model_type, **config}
    model = hollow(ModelConfig(**family.model_options(marked)))
    assert isinstance(model, RecursiveModel)
    fill(model, weight_maps(model.config), weights, family.architecture, dtype=torch.float32)
    return model.eval()


def to_authors(model: RecursiveModel) -> dict[str, Tensor]:
    """The inverse: weights under the authors' names, as their model without a loss around it has them.

    Args:
        model: of any layers that the authors have: `mha` or `token_mlp`, each followed by `swiglu`.
    """
    inner, outer = (
        [] if network is None else [mixer.name for mixer in network.mixers()]
        for network in (model.backbone, model.outer)
    )
    learned = {"puzzles": model.puzzles is not None, "positions": model.positions is not None}
    return dict(written(model, recursive_maps(inner, outer, **learned)))


def _bare(name: str) -> str:
    while (prefix := next((p for p in PREFIXES if name.startswith(p)), None)) is not None:
        name = name[len(prefix) :]
    return name
