"""CWM, the code world model (FAIR CodeGen Team 2025, arXiv 2510.02387): Llama with three windowed layers to one global.

Where a config has no `layer_types`, every fourth layer sees all, from the first on, as in transformers; the authors'
own code may let the last one see all, too, which published configs then say.
"""

from __future__ import annotations

from typing import Any

from zoo.models.families.llama3 import weights
from zoo.models.published.config import Published, attention_word, stack, word
from zoo.models.published.family import Family, families

DEFAULTS: dict[str, Any] = {
    "vocab_size": 128256,
    "hidden_size": 6144,
    "intermediate_size": 21504,
    "num_hidden_layers": 64,
    "num_attention_heads": 48,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "sliding_window": 8192,
}
SCALED: dict[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 1e6,
    "factor": 16.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def _rope(p: Published) -> dict[str, Any]:
    """The options of rotary positions; where a config does not scale them, the published model's, base included."""
    if p("rope_parameters", None) or p("rope_scaling", None):
        return p.rope(base=SCALED["rope_theta"])
    p.ignore("rope_theta")
    return Published({"rope_parameters": SCALED}, p.architecture).rope(context=DEFAULTS["max_position_embeddings"])


def _options(p: Published) -> dict[str, Any]:
    p.only("hidden_act", "silu")
    p.only("attention_bias", False)
    p.only("mlp_bias", False)
    feed_forward = word("swiglu", d_hidden=p("intermediate_size"))

    windows = p.windows(p("sliding_window", None), lambda i: bool(i % 4))
    return {
        "pattern": stack(
            [step for window in windows for step in (attention_word(p, window, **_rope(p)), feed_forward)]
        ),
        "d_model": p("hidden_size"),
        "vocab_size": p("vocab_size"),
        "norm_eps": p.number("rms_norm_eps"),
        "tie_embeddings": p("tie_word_embeddings", False),
    }


SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 256,
        "sliding_window": 16,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "32b": {},
}

families.add(Family("cwm", "CwmForCausalLM", "cwm", SIZES, _options, weights, DEFAULTS))
