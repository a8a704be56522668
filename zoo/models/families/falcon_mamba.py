"""Falcon Mamba (Zuo et al. 2024, arXiv 2410.05355): Mamba with norms of step sizes, B and C that have no weights."""

from __future__ import annotations

from typing import Any

from zoo.models.families import mamba
from zoo.models.published.config import Published
from zoo.models.published.family import Family, families


def _options(p: Published) -> dict[str, Any]:
    p.ignore("use_falcon_mambapy")  # a way to compute
    eps = p.number("mixer_rms_eps", 1e-6)
    return mamba.options(p, inner_norm=True, norm_weights=False, norm_eps=eps)


SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 96, "num_hidden_layers": 2, "vocab_size": 256},
    "7b": {
        "hidden_size": 4096,
        "num_hidden_layers": 64,
        "expand": 2,
        "vocab_size": 65024,
        "time_step_rank": 256,
        "tie_word_embeddings": False,
    },
}

families.add(
    Family("falcon_mamba", "FalconMambaForCausalLM", "falcon_mamba", SIZES, _options, mamba.weights, mamba.DEFAULTS)
)
