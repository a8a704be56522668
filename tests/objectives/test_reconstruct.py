"""The layout `reconstruct`: every token of a row told from the features of its last."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import zoo
from zoo import tasks
from zoo.objectives import create_objective, list_objectives
from zoo.objectives.base import objectives
from zoo.tasks.protocol import IGNORE, Batch
from zoo.training.recipes import read_experiment

PATTERNS = ["mha swiglu", "mamba2", "lstm", "short_conv mlp"]


@pytest.fixture
def task():
    return tasks.create_task("compression", vocab_size=8, seq_len=10)


def model_for(task, pattern="mha swiglu", **options):
    torch.manual_seed(0)
    return zoo.create_model(pattern, d_model=16, vocab_size=task.vocab_size, decoder=True, **options)


@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm", "none"])
def test_decoder_is_its_definition(norm):
    task = tasks.create_task("compression")
    decoder = model_for(task, norm=norm).decoder.double()
    last = torch.randn(3, 16, dtype=torch.float64)
    for weight in decoder.norms.parameters():
        nn.init.normal_(weight)

    def norm_of(i, x):
        if norm == "none":
            return x
        weight = decoder.norms[i].weight
        if norm == "layernorm":
            return F.layer_norm(x, (16,), weight, decoder.norms[i].bias, 1e-5)
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight

    rates = 10000 ** -(torch.arange(0, 16, 2, dtype=torch.float64) / 16)
    for t, given in enumerate(decoder(last, 7).unbind(1)):
        place = torch.stack([(t * rates).sin(), (t * rates).cos()], 1).flatten()
        x = norm_of(0, last + place)
        for i, layer in enumerate(decoder.layers):
            x = norm_of(i + 1, F.gelu(x @ layer.weight.T + layer.bias))
        torch.testing.assert_close(given, x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("pattern", "causal"), [*((p, True) for p in PATTERNS), ("mha swiglu", False), ("bidirectional(lstm)", False)]
)
def test_loss_is_that_of_every_token_from_the_last_features(task, pattern, causal):
    model = model_for(task, pattern, causal=causal)
    objective = create_objective("next_token", task, causal=causal)
    assert (objective.vocab_size, objective.length) == (task.vocab_size, task.seq_len)
    batch = task.sample(5, split="train", seed=0)
    (update,) = objective.updates(model, objective.encode(batch), {}, torch.Generator())
    hidden, _ = model.features(batch.inputs)
    logits = model.logits(model.decoder(hidden[:, -1], 10))
    torch.testing.assert_close(update.loss, F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten()))
    update.loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.decoder.parameters())
    predictions, loss = objective.evaluate(model, batch)
    assert torch.equal(predictions, logits.argmax(-1))
    torch.testing.assert_close(loss, update.loss.detach())
    assert torch.equal(objective.predict(model, batch), predictions)


def test_what_is_not_asked_is_not_scored(task):
    model = model_for(task)
    batch = task.sample(4, split="train", seed=0)
    fewer = Batch(batch.inputs, batch.targets.clone())
    fewer.targets[:, ::3] = IGNORE
    objective = create_objective("next_token", task)
    predictions, _ = objective.evaluate(model, fewer)
    everywhere, _ = objective.evaluate(model, batch)
    assert torch.equal(predictions[:, ::3], batch.inputs[:, ::3])
    assert torch.equal(predictions[:, 1::3], everywhere[:, 1::3])


def test_decoder_counts(task):
    with_it, without = model_for(task), zoo.create_model("mha swiglu", d_model=16, vocab_size=8)
    assert with_it.n_parameters() - without.n_parameters() == 2 * (16 * 16 + 16) + 3 * 16
    assert with_it.flops_per_token(10) - without.flops_per_token(10) == 2 * 2 * 16 * 16
    tokens = torch.randint(8, (2, 10))
    weights = {k: v for k, v in with_it.state_dict().items() if not k.startswith("decoder.")}
    without.load_state_dict(weights)
    assert torch.equal(with_it(tokens)[0], without(tokens)[0]), "what the model says of the next token is as it was"


EXPERIMENT = {
    "task": {"name": "compression", "vocab_size": 4, "seq_len": 8},
    "model": {"pattern": "lstm", "d_model": 32},
    "train": {"steps": 60, "batch_size": 32, "lr": 1e-2, "warmup_steps": 5, "eval_every": 30, "eval_rows": 64},
}


def test_training_learns_and_goes_on_to_the_same_bits(tmp_path):
    train = {**EXPERIMENT["train"], "test_rows": 64, "checkpoint_every": 30, "precision": "float32"}
    whole = zoo.train({**EXPERIMENT, "train": train, "out": str(tmp_path / "whole")}, quiet=True)
    test = whole.metrics["test"]
    assert test["accuracy"] > 0.6, "a third of the tokens are guessed, and an eighth is the same always"
    other = {**EXPERIMENT, "train": train, "out": str(tmp_path / "parts")}
    for step in (30, 60):  # the checkpoint of step 30 is gone on from as a stopped run would be
        zoo.train(other, quiet=True)
        for folder in (tmp_path / "parts" / "checkpoints").glob("step_*"):
            if step == 30 and folder.name != "step_30":
                for file in folder.iterdir():
                    file.unlink()
                folder.rmdir()
        if step == 30:
            (tmp_path / "parts" / "result.json").unlink()
    again = zoo.load(tmp_path / "parts")
    for name, weight in zoo.load(tmp_path / "whole").state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), name
    assert zoo.load(tmp_path / "whole").decoder is not None


def test_experiment_fills_in_the_decoder(task):
    assert read_experiment(EXPERIMENT).build().model.decoder
    without = {**EXPERIMENT, "model": {"pattern": "lstm", "decoder": False}}
    with pytest.raises(zoo.UsageError, match=r"model\.decoder=False is not allowed: compression needs a decoder"):
        read_experiment(without).build()
    useless = {"task": "mqar", "model": {"pattern": "lstm", "decoder": True}}
    with pytest.raises(zoo.UsageError, match="mqar has no use for a decoder, with its layout next_token"):
        read_experiment(useless).build()
    budget = {**EXPERIMENT, "model": {"pattern": "lstm", "n_parameters": 20_000}}
    model = zoo.create_model(read_experiment(budget).build().model)
    assert 15_000 < model.n_parameters() <= 20_000


def test_what_does_not_fit_is_refused(task):
    objective = create_objective("next_token", task)
    bare = zoo.create_model("lstm", d_model=16, vocab_size=8)
    with pytest.raises(zoo.UsageError, match="the model needs decoder=True"):
        objective.evaluate(bare, task.sample(2, split="test", seed=0))
    with pytest.raises(zoo.UsageError, match="A recursive model takes no decoder"):
        zoo.create_model("mha", d_model=16, vocab_size=8, causal=False, decoder=True, recursion={})
    for name in list_objectives():
        if name != "next_token":
            told = "teaches series of real vectors" if objectives[name].series else "reconstruct"
            with pytest.raises(zoo.UsageError, match=told):
                create_objective(name, task, causal=name == "block_diffusion")
