"""Generation against transformers': the same tokens, and the same distributions to sample from."""

from __future__ import annotations

import pytest
import torch
from published import perturbed
from transformers import AutoModelForCausalLM
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import zoo
from zoo.models.sampling import Choice

NEW = 40


def both(name: str, tmp_path):
    """A tiny family's model as transformers has it, in float64, and ours of the same weights."""
    torch.manual_seed(0)
    zoo.to_hf(zoo.create_model(name), tmp_path / name)
    theirs = perturbed(AutoModelForCausalLM.from_pretrained(tmp_path / name).double())
    theirs.generation_config.pad_token_id = 0
    theirs.generation_config.eos_token_id = None
    return theirs, zoo.from_hf(theirs)


@pytest.mark.parametrize("name", ["llama3-tiny", "mamba2-tiny"])
def test_greedy_tokens_are_theirs(name, tmp_path):
    theirs, ours = both(name, tmp_path)
    prompts = [torch.randint(256, (n,), generator=torch.Generator().manual_seed(n)) for n in (1, 19, 6)]
    expected = [theirs.generate(p[None], max_new_tokens=NEW, do_sample=False)[0] for p in prompts]
    for chunk in (4, None):
        got = ours.generate(prompts, NEW, prefill_chunk=chunk)
        assert [row.tolist() for row in got] == [row.tolist() for row in expected]
    new = [row[len(p) :].tolist() for row, p in zip(expected, prompts, strict=True)]
    assert len({tuple(row) for row in new}) == 3
    assert min(len(set(row)) for row in new) > 5, "a few tokens over and over would say little"
    stop = new[1][7]
    ended = [theirs.generate(p[None], max_new_tokens=NEW, do_sample=False, eos_token_id=stop)[0] for p in prompts]
    assert [row.tolist() for row in ours.generate(prompts, NEW, stop=stop)] == [row.tolist() for row in ended]
    assert len(ended[1]) <= 19 + 8


@pytest.mark.parametrize("temperature", [0.6, 1.7])
@pytest.mark.parametrize(
    "options",
    [{}, {"top_k": 7}, {"top_p": 0.8}, {"min_p": 0.05}, {"top_k": 12, "top_p": 0.6}, {"top_p": 0.9, "min_p": 0.2}],
    ids=str,
)
def test_distributions_are_theirs(temperature, options):
    logits = 3 * torch.randn(5, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    warpers = {"top_k": TopKLogitsWarper, "top_p": TopPLogitsWarper, "min_p": MinPLogitsWarper}
    chain = LogitsProcessorList([TemperatureLogitsWarper(temperature), *(warpers[k](v) for k, v in options.items())])
    expected = chain(torch.zeros(5, 1, dtype=torch.int64), logits).softmax(-1)
    choice = Choice(**{"top_k": None, "top_p": None, "min_p": None, "temperature": temperature, **options})
    weights, ids = choice.distribution(logits)
    ids = torch.arange(50).expand(5, 50) if ids is None else ids
    got = torch.zeros_like(logits).scatter(1, ids, weights / weights.sum(-1, keepdim=True))
    assert torch.equal(got > 0, expected > 0)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)
    assert (expected > 0).all() == (not options)
