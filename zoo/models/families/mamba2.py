"""Mamba-2 (Dao and Gu 2024, arXiv 2405.21060): a stack of the one mixer, no feed-forward layers, tied embeddings."""

from zoo.models.families import families


def _options(n_layers: int, d_model: int, vocab_size: int) -> dict:
    return {
        "pattern": f"{n_layers}*(mamba2)",
        "d_model": d_model,
        "vocab_size": vocab_size,
        "tie_embeddings": True,
    }


families.add(
    "mamba2",
    {
        "tiny": _options(4, 128, 256),
        "130m": _options(24, 768, 50288),
        "370m": _options(48, 1024, 50288),
        "780m": _options(48, 1536, 50288),
        "1.3b": _options(48, 2048, 50288),
        "2.7b": _options(64, 2560, 50288),
    },
)
