"""Llama 2 (Touvron et al. 2023, arXiv 2307.09288): sizes of Llama's architecture; 70b has grouped queries.

Its configs name the class of Llama 3, and are read as of that family.
"""

from __future__ import annotations

from typing import Any

from zoo.models.families.llama3 import options, weights
from zoo.models.published.family import Family, families


def _size(width: int, hidden: int, n_layers: int, n_heads: int, n_kv_heads: int, **others: Any) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "intermediate_size": hidden,
        "num_hidden_layers": n_layers,
        "num_attention_heads": n_heads,
        "num_key_value_heads": n_kv_heads,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        **others,
    }


SIZES: dict[str, dict[str, Any]] = {
    "tiny": _size(64, 192, 2, 4, 4, vocab_size=256),
    "7b": _size(4096, 11008, 32, 32, 32),
    "13b": _size(5120, 13824, 40, 40, 40),
    "70b": _size(8192, 28672, 80, 64, 8),
}

families.add(Family("llama2", "LlamaForCausalLM", "llama", SIZES, options, weights, sizes_of="llama3"))
