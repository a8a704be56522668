"""Our own tiny sizes, written by `to_hf`, in transformers: what a config leaves out means the same there."""

from __future__ import annotations

import re

import pytest
import torch
from published import LOGITS
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import zoo
from zoo.models.families import families

MORE_WEIGHTS = ("longcat_flash",)  # transformers wants weights for zero experts, which published checkpoints lack
SHORT = {
    "deepseek_v32-tiny": 16,
    "glm_dsa-tiny": 16,
}  # beyond its top_k, an indexer's equal scores are told apart in another way
COMPUTED = (
    r"(slope_rate|query_decay|key_decay|diagonal_decay)$"  # transformers saves these, and makes them where missing
)
EAGER = ("gemma2",)  # transformers caps scores in its eager attention alone
TINY = [
    f"{family.name}-tiny"
    for family in families.all()
    if "tiny" in family.sizes
    and family.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    and family.name not in MORE_WEIGHTS
]


@pytest.mark.parametrize("name", TINY)
def test_tiny_sizes_are_read_by_transformers(name, tmp_path):
    torch.manual_seed(0)
    ours = zoo.create_model(name).eval()
    for p in ours.parameters():
        p.data += 0.1 * torch.randn_like(p)
    theirs, told = AutoModelForCausalLM.from_pretrained(
        zoo.to_hf(ours, tmp_path / "model"),
        output_loading_info=True,
        experts_implementation="eager",
        attn_implementation="eager" if name.startswith(EAGER) else None,
    )
    assert not [name for name in told["missing_keys"] if not re.search(COMPUTED, name)]
    assert not told["unexpected_keys"]
    tokens = torch.randint(ours.config.vocab_size, (2, SHORT.get(name, 37)))
    with torch.no_grad():
        difference = (ours(tokens)[0] - theirs(tokens, use_cache=False).logits).abs().max()
    assert difference < LOGITS
