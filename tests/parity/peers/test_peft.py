"""LoRA by Hugging Face's peft: an adapter on any linear layer or embedding takes effect, learns and can be merged."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

import zoo
from zoo.laws import noise, off_inits, spelled
from zoo.protocol import Context

WORDS = [w for w in zoo.list_mixers() if any(isinstance(m, nn.Linear) for m in zoo.create_mixer(w, 32).modules())]


def adapted(model: nn.Module) -> list[tuple[str, LoraLayer]]:
    """Puts LoRA in the place of all linear layers and embeddings, and starts it off zero."""
    names = [name for name, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Embedding))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tied weights
        inject_adapter_in_model(LoraConfig(r=4, target_modules=names, init_lora_weights=False), model)
    found = [(name, m) for name, m in model.named_modules() if isinstance(m, LoraLayer)]
    assert [name for name, _ in found] == names
    return found


def check(model: nn.Module, run) -> None:
    """`run` gives outputs and a loss."""
    before = run()[0].detach()
    for _, layer in (layers := adapted(model)):
        layer.train()
    y, loss = run()
    assert (y - before).abs().max() > 1e-3 * before.abs().max()
    loss.backward()
    for name, layer in layers:
        up = layer.lora_B if layer.lora_B else layer.lora_embedding_B
        grads = [p.grad for p in up.parameters()]
        assert grads, name
        if name == "halting":  # of recursive models, which learns from a loss of its own
            continue
        assert all(g is not None and g.any() for g in grads), f"the adapter of {name} learns nothing"
    with torch.no_grad():
        for _, layer in layers:
            layer.merge()
        assert (run()[0] - y).abs().max() <= 1e-6 * y.abs().max()


@pytest.mark.parametrize("word", WORDS)
def test_mixers(word):
    torch.manual_seed(0)
    mixer = spelled(off_inits(zoo.create_mixer(word, 32)).double())

    def run() -> tuple[Tensor, Tensor]:
        context = Context()
        y, _ = mixer(noise(2, 40, 32), None, context)
        return y, (y * noise(*y.shape, seed=1)).sum() + sum(context.losses)

    check(mixer, run)


@pytest.mark.parametrize("name", zoo.list_models("*-tiny"))
def test_families(name):
    torch.manual_seed(0)
    model = off_inits(zoo.create_model(name)).double()
    tokens = torch.randint(0, 20, (2, 40), generator=torch.Generator().manual_seed(1))

    def run() -> tuple[Tensor, Tensor]:
        context = Context()
        logits, _ = model(tokens, None, context)
        return logits, (logits * noise(*logits.shape, seed=1)).mean() + sum(context.losses)

    check(model, run)
