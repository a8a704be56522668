"""Every family's stack without its head, as transformers saves it: its class, its names, its numbers."""

from __future__ import annotations

import pytest
import torch
import transformers

import zoo
from zoo.models.families import families

NAMES = [name for name in zoo.list_models("*-tiny") if hasattr(transformers, families.of(name)[0].architecture)]


@pytest.mark.parametrize("name", [name for name in NAMES if name != "kimi_k2-tiny"])  # of DeepSeek-V3's class
def test_a_stack_alone(name, tmp_path):
    torch.manual_seed(0)
    published = zoo.create_model(name).config.published
    given = {key: value for key, value in published.items() if key != "architectures"}
    stack = getattr(transformers, families.of(name)[0].bare_name)(transformers.AutoConfig.for_model(**given)).eval()
    stack.save_pretrained(tmp_path)
    if not stack.config.tie_word_embeddings:
        with pytest.raises(zoo.UsageError, match=r"without its head: it lacks lm_head\.weight"):
            zoo.from_hf(tmp_path)
        return
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        expected = stack(tokens)[0] @ stack.get_input_embeddings().weight.T
        ours = zoo.from_hf(tmp_path)(tokens)[0]
    both = torch.stack([expected.flatten(), ours.flatten()])  # but for factors on the logits and their cap
    assert torch.corrcoef(both)[0, 1] > 0.99999
