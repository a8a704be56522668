"""Self-conditioning: a model reads its own predictions of the pass before, as weights of tokens at its end."""

from __future__ import annotations

import pytest
import torch

import zoo
from zoo.objectives import create_objective
from zoo.tasks import create_task
from zoo.tasks.protocol import take
from zoo.training.evaluation import held_out

SUDOKU = create_task("sudoku", size=4, max_givens=8)
OBJECTIVES = ("masked_diffusion", "uniform_diffusion")


def made(name, pattern="mha swiglu", **options):
    chosen = create_objective(name, SUDOKU, causal=False, self_conditioning=True, **options)
    torch.manual_seed(0)
    model = zoo.create_model(pattern, d_model=16, vocab_size=chosen.vocab_size, causal=False)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return chosen, model


def watched(model, monkeypatch):
    """What the model read, and what it said, pass by pass."""
    read, said = [], []
    features = model.features

    def features_of(inputs, state, context):
        read.append(inputs.detach())
        assert torch.equal(context.tokens, inputs.argmax(-1))  # no prediction is quite 1 here
        hidden, state = features(inputs, state, context)
        said.append(model.logits(hidden.detach()))
        return hidden, state

    monkeypatch.setattr(model, "features", features_of)
    return read, said


@pytest.mark.parametrize("pattern", ["mha swiglu", "bidirectional(mamba2)", "engram(n_slots=64) mlp"])
def test_weights_of_one_token_are_that_token(pattern):
    torch.manual_seed(0)
    how = {"d_model": 16, "vocab_size": 7, "causal": False, "positions": "learned", "max_len": 9}
    model = zoo.create_model(pattern, **how).double()
    tokens = torch.randint(7, (2, 9))
    weights = torch.nn.functional.one_hot(tokens, 7).double().requires_grad_()
    logits, _ = model(weights)
    assert torch.allclose(logits, model(tokens)[0], rtol=1e-12)
    logits.sum().backward()
    assert weights.grad.abs().sum(-1).all()


def test_weights_mix_embeddings_and_words_look_up_the_tokens_that_are_given():
    torch.manual_seed(0)
    model = zoo.create_model("engram(n_slots=64) mlp", d_model=16, vocab_size=7)
    weights = torch.rand(2, 5, 7)
    embedded = model.embed(weights, torch.arange(5).expand(2, 5))
    assert torch.allclose(embedded, weights @ model.embedding.weight)
    most, other = weights.argmax(-1), (weights.argmax(-1) + 1) % 7
    by_default, _ = model(weights)
    assert torch.equal(model(weights, None, zoo.Context(tokens=most))[0], by_default)
    assert not torch.equal(model(weights, None, zoo.Context(tokens=other))[0], by_default)


def test_an_adapter_round_the_embedding_takes_effect():
    class Doubled(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, tokens):
            return 2 * self.inner(tokens)

    model = zoo.create_model("mlp", d_model=16, vocab_size=7)
    tokens = torch.randint(7, (2, 5))
    model.embedding = Doubled(model.embedding)
    assert torch.allclose(model(torch.nn.functional.one_hot(tokens, 7).float())[0], model(tokens)[0], atol=1e-5)


@pytest.mark.parametrize("wrong", [torch.rand(2, 5, 6), torch.rand(2, 5, 8), torch.rand(2, 0, 7)])
def test_other_weights_are_refused(wrong):
    model = zoo.create_model("mlp", d_model=16, vocab_size=7)
    with pytest.raises(zoo.UsageError, match=r"expected \(B, T, 7\)") as refusal:
        model(wrong)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_half_of_the_rows_of_a_batch_learn_with_predictions(name, monkeypatch):
    chosen, model = made(name)
    read, said = watched(model, monkeypatch)
    data = chosen.encode(SUDOKU.sample(64, split="train", seed=0))
    [update] = chosen.updates(model, data, {}, torch.Generator().manual_seed(0))
    first, second = read
    informed = (second != first).flatten(1).any(1)
    assert 20 < informed.sum() < 44
    assert (first.sum(-1) == 1).all()
    assert torch.equal(first[~informed], second[~informed])
    K = SUDOKU.vocab_size
    added = (second - first)[informed]
    at = added.sum(-1) > 0.5
    said = said[0][informed][..., :K].softmax(-1)
    assert at.any()
    assert torch.allclose(added[at][:, :K], said[at], atol=1e-5)
    assert not added[~at].any()
    update.loss.backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("name", OBJECTIVES)
def test_no_gradient_passes_through_the_first_pass(name, monkeypatch):
    chosen, model = made(name)
    grads = []
    features = model.features
    monkeypatch.setattr(model, "features", lambda *a: grads.append(torch.is_grad_enabled()) or features(*a))
    data = chosen.encode(SUDOKU.sample(4, split="train", seed=0))
    list(chosen.updates(model, data, {}, torch.Generator()))
    assert grads == [False, True]


def test_a_pass_of_the_sampler_reads_what_the_one_before_said_of_cells_still_masked(monkeypatch):
    chosen, model = made("masked_diffusion")
    read, said = watched(model, monkeypatch)
    list(chosen.solve(model, SUDOKU.sample(1, split="test", seed=0)))
    K, mask = SUDOKU.vocab_size, chosen.mask_token
    for before, now, logits in zip(read, read[1:], said, strict=False):
        masked = now[..., mask] == 1
        assert torch.allclose(now[masked][:, :K], logits[masked][:, :K].softmax(-1), atol=1e-5)
        assert (now[~masked].sum(-1) == 1).all()
        assert masked.sum() == (before[..., mask] == 1).sum() - 1
    assert (read[0].sum(-1) == 1).all()


def test_training_by_the_command_with_every_end(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train = {"steps": 2, "batch_size": 4, "eval_every": 2, "eval_rows": 4, "test_rows": 4, "accumulate": 2}
    task, model = {"name": "sudoku", "size": 4}, {"pattern": "mha engram(n_slots=64)", "d_model": 16, "causal": False}
    for name in OBJECTIVES:
        objective = {"name": name, "self_conditioning": True}
        made = {"task": task, "model": model, "objective": objective, "train": train, "out": name}
        assert zoo.train(made, quiet=True).status == "finished"


def test_an_order_is_learned_without_it():
    with pytest.raises(zoo.UsageError, match="a model without self_conditioning: leave one of them out"):
        made("masked_diffusion", unmasking_order={})


def test_a_row_keeps_its_predictions_while_only_others_change():
    """In a random order of few cells, most passes leave some rows as they are."""
    chosen, model = made("masked_diffusion", order="random", steps=12)
    with torch.no_grad():
        model.double().embedding.weight.mul_(4)
    rows = held_out(SUDOKU, "test", 12)
    together = chosen.predict(model, rows)
    for i in range(12):
        assert torch.equal(chosen.predict(model, take(rows, slice(i, i + 1))), together[i : i + 1])
