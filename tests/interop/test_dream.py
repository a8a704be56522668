"""Dream against what its authors' model and sampler compute, recorded by `record_dream.py`, and its checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import zoo
from zoo.interop.hf import CONFIG, WEIGHTS, weight_maps
from zoo.objectives import create_objective
from zoo.objectives.masked_diffusion import Unmasking
from zoo.tasks import create_task

RECORD = Path(__file__).parent / "dream_authors.safetensors"
TOLERANCE = 1e-5
MASK, PROMPT = 17, 5
PUBLISHED = {  # the config of the 7B models, smaller
    "architectures": ["DreamModel"],
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_dream.DreamConfig", "AutoModel": "modeling_dream.DreamModel"},
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "hidden_size": 24,
    "initializer_range": 0.02,
    "intermediate_size": 20,
    "mask_token_id": 151666,
    "max_position_embeddings": 131072,
    "max_window_layers": 28,
    "model_type": "Dream",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 151643,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.46.2",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 19,
}


@pytest.fixture(params=["plain", "other"])
def recorded(request, tmp_path):
    """(checkpoint folder, tensors) of a case."""
    with safe_open(RECORD, framework="pt") as file:
        config = json.loads(file.metadata()["configs"])[request.param]
        prefix = f"{request.param}/"
        tensors = {n.removeprefix(prefix): file.get_tensor(n) for n in file.keys() if n.startswith(prefix)}  # noqa: SIM118
    (tmp_path / CONFIG).write_text(json.dumps(config))
    save_file(of(tensors, "weights."), tmp_path / WEIGHTS)
    return tmp_path, tensors


def of(tensors, prefix):
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def test_logits_and_gradients(recorded):
    folder, tensors = recorded
    model, tokens = zoo.from_hf(folder), tensors["tokens"]
    logits, _ = model(tokens)
    assert tensors["logits"].std() > 0.1  # else the bounds say little
    torch.testing.assert_close(logits, tensors["logits"], rtol=TOLERANCE, atol=TOLERANCE)
    F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    own, given = dict(model.named_parameters()), of(tensors, "gradients.")
    for m in weight_maps(model.config):
        for name, theirs in zip(m.ours, m.read(*(given[n] for n in m.theirs)), strict=True):
            torch.testing.assert_close(own[name].grad, theirs, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("order", ["confidence", "margin"])
def test_masked_diffusion_unmasks_as_the_authors_sampler(recorded, order):
    """Every step of theirs, which reads the logits one place on."""
    folder, tensors = recorded
    model, steps = zoo.from_hf(folder).eval(), tensors[f"sampled.{order}"]
    task = create_task("mqar", seq_len=8, n_pairs=2, vocab_size=MASK)
    objective = create_objective("masked_diffusion", task, causal=False)
    tokens = F.pad(tensors["tokens"][:, :PROMPT], (0, steps.shape[-1] - PROMPT), value=MASK)
    found = list(objective.unmask(model, tokens, tokens == MASK, how=Unmasking(steps=len(steps), order=order)))
    assert torch.equal(torch.stack(found), steps)
    assert (steps[-1] != MASK).all()


def test_there_and_back(recorded, tmp_path):
    folder, tensors = recorded
    back = load_file(zoo.to_hf(zoo.from_hf(folder), tmp_path / "back") / WEIGHTS)
    weights = of(tensors, "weights.")
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[n], t) for n, t in weights.items())


def test_the_published_config():
    family = zoo.models.families.families.of_config(PUBLISHED)
    model = zoo.create_model(family.model_options(PUBLISHED))
    assert (family.name, model.causal, model.config.shifted_logits) == ("dream", False, True)
    for key, value, told in [
        ("use_sliding_window", True, "use_sliding_window=True is not supported, only False"),
        ("hidden_act", "gelu", "hidden_act='gelu' is not supported, only 'silu'"),
        ("head_dim", 8, "head_dim=8 is not supported, only 6"),
        ("depth", 3, "depth=3 is not supported"),
    ]:
        with pytest.raises(zoo.UsageError) as error:
            family.model_options({**PUBLISHED, key: value})
        assert told in str(error.value)
