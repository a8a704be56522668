"""Law 11 of models: what does not fit is refused in one line. (Of mixers: `test_laws.py`.)"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map

import zoo
from zoo.laws import assert_close, refusal_of_a_model
from zoo.laws.refusal import refused
from zoo.protocol import Context

B, T = 3, 9
MODELS = {
    "hybrid": {"pattern": "gated_deltanet swiglu gqa moe lstm swa(window=5) mlp"},
    "shortcut": {"pattern": "shortcut(moe, swiglu mla swiglu)"},
    "parallel": {"pattern": "(mamba2 | gqa) swiglu"},
    "hyper-connections": {"pattern": "cfc swiglu", "residual": "hyper_connections"},
    "bidirectional": {"pattern": "bidirectional(mamba2) swiglu", "causal": False},
    "attention that looks ahead": {"pattern": "gqa swiglu", "causal": False},
    "recursive": {"pattern": "gqa swiglu", "causal": False, "recursion": {}},
}
EVERY_MODEL = pytest.mark.parametrize("options", MODELS.values(), ids=list(MODELS))


def model_of(options: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    return zoo.create_model({"d_model": 32, "vocab_size": 20, **options}).eval()


@EVERY_MODEL
def test_a_model_refuses_what_does_not_fit(options):
    refusal_of_a_model(model_of(options), 20)


@EVERY_MODEL
def test_a_model_refuses_states(options):
    model, tokens = model_of(options), torch.randint(0, 20, (B, T))
    other = zoo.create_model("gru", d_model=32, vocab_size=20).init_state(B)
    wrong = ["state", torch.zeros(B, 32), (torch.zeros(B, 32),), other, zoo.create_mixer("lstm", 32).init_state(B)]
    if options.get("recursion") is not None:
        _, own = model(tokens)
        few = zoo.select(own, [0])
        wrong += [(), few, own._replace(latents=few.latents), tree_map(lambda t: t[..., 1:], own)]
        wrong += [own._replace(answer=own.answer[:, 1:]), tuple(own)]
    elif model.causal:
        _, own = model(tokens)
        wrong += [(), tuple(own), model.init_state(B - 1), own._replace(layers=own.layers[:-1])]
        wrong += [own._replace(layers=model.init_state(1).layers), own._replace(position=own.position.int())]
        before = zoo.fork(own)
        for i, layer in enumerate(own.layers):
            if tree_leaves(layer):
                layers = [*own.layers]
                layers[i] = tree_map(lambda t: t[..., None], layer)
                wrong.append(own._replace(layers=tuple(layers)))
    for state in wrong:
        with torch.no_grad():
            refused("it", lambda state=state: model(tokens, state))
    if model.causal:
        assert_close(own, before, 0.0, "the state after refusals")
        refused("it", lambda: model.step(tokens, own), "(B,)")


def test_puzzles_are_looked_at():
    model = zoo.create_model(
        "gqa swiglu", d_model=32, vocab_size=20, causal=False, recursion={"prefix": 2, "n_puzzles": 4}
    )
    tokens = torch.randint(0, 20, (B, T))
    expected = model.think(tokens, puzzles=torch.tensor([0, 3, 1]))
    assert_close(model.think(tokens, puzzles=torch.tensor([0, 3, 1]).int()), expected, 0.0, "int32")
    for puzzles in ([0, 4, 1], [0, -1, 1], [0, 1], [0.0, 1.0, 2.0], [[0, 1, 2]]):
        refused("it", lambda puzzles=puzzles: model.think(tokens, puzzles=torch.tensor(puzzles)), "puzzles")


def test_greedy_decoding_refuses_logits_that_are_no_numbers():
    model = model_of({"pattern": "gqa swiglu"})
    with torch.no_grad():
        model.embedding.weight[3] = torch.nan
    refused("it", lambda: model.generate([[1, 3]], max_new_tokens=2), "finite")


def test_a_graph_clamps_what_it_cannot_refuse():
    model = zoo.create_model("cfc swiglu gqa", d_model=16, vocab_size=20).eval()
    tokens = torch.randint(0, 20, (2, 6))
    compiled = torch.compile(lambda t, n: model(t, None, Context(lengths=n))[0], fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        expected = model(tokens, None, Context(lengths=torch.tensor([0, 6])))[0]
        got = compiled(tokens.int(), torch.tensor([-5, 600], dtype=torch.int32))
    assert_close(got, expected, 2e-5, "clamped lengths")


def test_exchanged_mixers_are_looked_at_anew():
    model = zoo.create_model("lstm gru", d_model=16, vocab_size=20)
    tokens = torch.randint(0, 20, (2, 5))
    _, state = model(tokens)
    model(tokens, state)
    model.backbone.steps[0].mixers[0] = zoo.create_mixer("gru", 16)
    _, fresh = model(tokens)
    model(tokens, fresh)
