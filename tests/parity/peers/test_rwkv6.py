"""RWKV-6 against the authors' own package: a whole model's logits and states, all at once and token by token."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch
from torch import Tensor

import zoo

D, LAYERS, HEAD, HIDDEN, VOCAB = 64, 3, 16, 96, 40
MIX, DECAY = 6, 8
PATTERN = f"{LAYERS}*(rwkv6(head_dim={HEAD}, mix_rank={MIX}, decay_rank={DECAY}) "
PATTERN += f"rwkv_channel_mix(d_hidden={HIDDEN}, gate=True))"


def published() -> dict[str, Tensor]:
    """A random checkpoint under the authors' names, in their shapes."""
    rng = torch.Generator().manual_seed(0)

    def normal(*shape: int, mean: float = 0.0, std: float = 0.3) -> Tensor:
        return mean + std * torch.randn(shape, generator=rng)

    def layer_norm(name: str) -> dict[str, Tensor]:
        return {f"{name}.weight": normal(D, mean=1.0), f"{name}.bias": normal(D)}

    weights = {"emb.weight": normal(VOCAB, D, std=1.0), "head.weight": normal(VOCAB, D), **layer_norm("ln_out")}
    weights |= layer_norm("blocks.0.ln0")
    for i in range(LAYERS):
        block = layer_norm("ln1") | layer_norm("ln2") | layer_norm("att.ln_x")
        block |= {f"att.time_maa_{x}": torch.rand(1, 1, D, generator=rng) for x in "xwkvrg"}
        block |= {"att.time_maa_w1": normal(D, 5 * MIX), "att.time_maa_w2": normal(5, MIX, D)}
        block |= {"att.time_decay_w1": normal(D, DECAY), "att.time_decay_w2": normal(DECAY, D)}
        block |= {"att.time_decay": normal(1, 1, D, mean=-2.0, std=2.0), "att.time_faaaa": normal(D // HEAD, HEAD)}
        names = ("receptance", "key", "value", "gate", "output")
        block |= {f"att.{x}.weight": normal(D, D, std=D**-0.5) for x in names}
        block |= {f"ffn.time_maa_{x}": torch.rand(1, 1, D, generator=rng) for x in "kr"}
        block |= {"ffn.key.weight": normal(HIDDEN, D, std=D**-0.5), "ffn.value.weight": normal(D, HIDDEN, std=0.1)}
        block |= {"ffn.receptance.weight": normal(D, D, std=D**-0.5)}
        weights |= {f"blocks.{i}.{name}": tensor for name, tensor in block.items()}
    return weights


def ours(weights: dict[str, Tensor]):
    """The model with these weights: the mixers have the authors' names."""
    model = zoo.create_model(PATTERN, d_model=D, vocab_size=VOCAB, norm="layernorm", embedding_norm=True).eval()
    renamed = {}
    for name, tensor in weights.items():
        for theirs, mine in (("emb.", "embedding."), ("blocks.0.ln0.", "embedding_norm."), ("ln_out.", "norm.")):
            name = name.replace(theirs, mine)
        if name.startswith("blocks."):
            _, i, rest = name.split(".", 2)
            step = 2 * int(i) + rest.startswith(("ffn.", "ln2."))
            rest = rest.replace("ffn.time_maa_", "ffn.x_")
            part = "norm_in" if rest.startswith("ln") else "mixers.0"
            name = f"backbone.steps.{step}.{part}.{rest.split('.', 1)[1]}"
            tensor = tensor.flatten() if tensor.shape[:2] == (1, 1) else tensor
        renamed[name] = tensor
    model.load_state_dict(renamed)
    return model


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    (folder,) = importlib.util.find_spec("rwkv").submodule_search_locations
    before = os.environ.copy()
    os.environ |= {"RWKV_V7_ON": "0", "RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0"}  # read when the file is imported
    try:  # a copy of its own: another test imports the file for RWKV-7
        spec = importlib.util.spec_from_file_location("rwkv6_model", f"{folder}/model.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        weights, path = published(), tmp_path_factory.mktemp("rwkv") / "tiny"
        torch.save(weights, f"{path}.pth")
        theirs = module.RWKV(str(path), "cpu fp32")
        yield ours(weights), theirs
    finally:
        os.environ.clear()
        os.environ |= before


def close(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    error = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    print(f"{error:.1e}")
    assert error <= 2e-5


@pytest.fixture
def tokens() -> list[int]:
    return torch.randint(VOCAB, (100,), generator=torch.Generator().manual_seed(1)).tolist()


@torch.no_grad()
def test_logits_of_a_sequence(pair, tokens):
    ours, theirs = pair
    expected, state = theirs.forward(tokens, None, full_output=True)
    logits, last = ours(torch.tensor([tokens]))
    close(logits[0], expected)
    for i in range(LAYERS):
        (time,), (channel,) = last.layers[2 * i : 2 * i + 2]
        close(time.shift[0, 0], state[3 * i])
        close(time.memory[0], state[3 * i + 1])
        close(channel.shift[0, 0], state[3 * i + 2])


@torch.no_grad()
def test_logits_token_by_token(pair, tokens):
    ours, theirs = pair
    state, their_state = ours.init_state(1), None
    for token in tokens:
        expected, their_state = theirs.forward([token], their_state)
        logits, state = ours.step(torch.tensor([token]), state)
        close(logits[0], expected)


@torch.no_grad()
def test_prefill_and_then_tokens(pair, tokens):
    ours, theirs = pair
    _, state = ours(torch.tensor([tokens[:70]]))
    _, their_state = theirs.forward(tokens[:70], None)
    for token in tokens[70:]:
        expected, their_state = theirs.forward([token], their_state)
        logits, state = ours.step(torch.tensor([token]), state)
        close(logits[0], expected)
