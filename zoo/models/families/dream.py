"""Dream (Ye et al. 2025, arXiv 2508.15487), a language model by masked diffusion: Qwen2.5 that looks both ways.

It keeps the order of the causal model that it was trained from: the logits of a step are those of the token after it,
`shifted_logits`. Of the published vocabulary the token 151666 is the mask.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from zoo.models.families import qwen2
from zoo.models.families.llama3 import weights
from zoo.models.families.qwen3 import stack_options
from zoo.models.published.config import Published, attention_word, word
from zoo.models.published.family import Family, families

DEFAULTS = {k: v for k, v in qwen2.DEFAULTS.items() if k not in ("sliding_window", "max_window_layers")}


def _options(p: Published) -> dict[str, Any]:
    p.only("use_sliding_window", False)
    p.only("mlp_bias", False)
    p.only("head_dim", p("hidden_size") // p("num_attention_heads"))
    attention = attention_word(p, bias=True, out_bias=False, **p.rope())
    layer = [attention, word("swiglu", d_hidden=p("intermediate_size"))]
    options = stack_options(p, layer * p("num_hidden_layers"))
    return {**options, "causal": False, "shifted_logits": True}


SIZES = {
    "tiny": {**qwen2.SIZES["tiny"], "tie_word_embeddings": False},
    "7b": {**qwen2.SIZES["7b"], "max_position_embeddings": 131072, "mask_token_id": 151666},
}

families.add(
    Family("dream", "DreamModel", "Dream", SIZES, _options, partial(weights, bias=True, out_bias=False), DEFAULTS)
)
