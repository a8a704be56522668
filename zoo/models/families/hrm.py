"""HRM, the hierarchical reasoning model (Wang et al. 2025, arXiv 2506.21734): a network for each of answer and latent.

The config keys are the authors', of `config/arch/hrm_v1.yaml`, with those of the data as in `trm`. Checkpoints are
torch files beside a YAML file, which `zoo.interop.trm.from_authors` loads. Sizes: of the published checkpoints, which
differ in what they read. Taught by the objective `deep_supervision` with `halting=q`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from zoo.models.families.trm import (
    ARC,
    MAZE,
    SUDOKU,
    is_learned,
    layers,
    places,
    recursive_maps,
    recursive_options,
    steps,
)
from zoo.models.published.config import Published
from zoo.models.published.family import Family, families
from zoo.models.published.maps import Map


def _options(p: Published) -> dict[str, Any]:
    p.only("mlp_t", False)
    prefix = places(p)
    outer = layers(p, "H_layers", prefix)
    return recursive_options(p, layers(p, "L_layers", prefix), prefix, outer=outer, gradient="step")


def _weights(p: Published) -> Iterator[Map]:
    networks = steps(p, "L_layers"), steps(p, "H_layers")
    return recursive_maps(*networks, puzzles=bool(places(p)), positions=is_learned(p))


_V1 = {
    "H_cycles": 2,
    "L_cycles": 2,
    "H_layers": 4,
    "L_layers": 4,
    "hidden_size": 512,
    "num_heads": 8,
    "expansion": 4,
    "puzzle_emb_ndim": 512,
    "pos_encodings": "rope",
    "halt_max_steps": 16,
}
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        **_V1,
        "H_layers": 1,
        "L_layers": 1,
        "hidden_size": 64,
        "num_heads": 4,
        "puzzle_emb_ndim": 0,
        "halt_max_steps": 4,
        "vocab_size": 256,
        "seq_len": 64,
    },
    "sudoku": {**_V1, **SUDOKU},
    "maze": {**_V1, **MAZE},
    "arc": {**_V1, **ARC},
}

families.add(Family("hrm", "HierarchicalReasoningModel_ACTV1", "hrm", SIZES, _options, _weights))
