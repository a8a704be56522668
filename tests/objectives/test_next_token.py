"""The objective against plain definitions: full logits, teacher forcing, a model that knows the answer."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import zoo
from zoo import tasks
from zoo.objectives import create_objective
from zoo.tasks.protocol import IGNORE, Batch


class Known(nn.Module):
    """A causal model that has read the solution: after a prompt and t tokens of its answer it says token t."""

    causal = True

    def __init__(self, tokens: torch.Tensor, vocab_size: int):
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(()))
        self.tokens, self.vocab_size = tokens, vocab_size

    def init_state(self, n, capacity):
        return 0

    def features(self, tokens, state=None, context=None):
        start = state or 0
        end = start + tokens.shape[1]
        assert torch.equal(tokens, self.tokens[:, start:end])  # what it said was read back to it
        return self.tokens[:, start + 1 : end + 1].float().unsqueeze(-1), end

    def logits(self, hidden):
        return F.one_hot(hidden.squeeze(-1).long(), self.vocab_size).float()

    def step(self, token, state):
        hidden, state = self.features(token[:, None], state)
        return self.logits(hidden[:, 0]), state


@pytest.fixture
def puzzles():
    """Cells 0 are asked for, and every third of them is not scored."""
    generator = torch.Generator().manual_seed(0)
    answers = torch.randint(1, 7, (5, 8), generator=generator)
    asked = torch.rand(5, 8, generator=generator) < 0.6
    inputs = torch.where(asked, 0, answers)
    return Batch(inputs, torch.where(asked, answers, IGNORE)), answers


class Puzzle(tasks.Task):
    layout = "fill_in"
    name = "puzzle"
    vocab_size, seq_len = 7, 8

    def __init__(self, layout="fill_in"):
        self.layout = layout

    def sample(self, n, *, split, seed, start=0):
        raise NotImplementedError

    def render(self, batch, row=0, predictions=None):
        raise NotImplementedError


def test_generation_of_a_perfect_model_is_the_answer(puzzles):
    batch, answers = puzzles
    objective = create_objective("next_token", Puzzle())
    assert (objective.vocab_size, objective.length) == (8, 16)
    separator = torch.full((5, 1), 7)
    end = torch.zeros(5, 1, dtype=torch.int64)
    model = Known(torch.cat([batch.inputs, separator, answers, end], 1), 8)
    predictions, loss = objective.evaluate(model, batch)
    assert torch.equal(predictions, answers)
    assert torch.equal(objective.predict(model, batch), answers)
    logits = F.one_hot(answers[batch.targets != IGNORE], 8).float()
    torch.testing.assert_close(loss, F.cross_entropy(logits, batch.targets[batch.targets != IGNORE]))
    assert objective.task.score(batch, predictions)["exact"] == 1


@pytest.mark.parametrize("pattern", ["mha swiglu", "lstm", "mamba2 short_conv"])
def test_generation_reads_back_its_own_tokens(puzzles, pattern):
    """Step by step with a state, as with the whole sequence read anew for every token."""
    batch, _ = puzzles
    objective = create_objective("next_token", Puzzle())
    torch.manual_seed(0)
    model = zoo.create_model(pattern, d_model=16, vocab_size=8).eval()
    with torch.no_grad():
        model.head.weight.mul_(20)  # decided predictions
        tokens = torch.cat([batch.inputs, torch.full((5, 1), 7)], 1)
        answer = torch.empty(5, 0, dtype=torch.int64)
        for t in range(8):
            said = model(torch.cat([tokens, answer], 1))[0][:, -1, :7].argmax(-1)  # the separator is no answer
            given = batch.targets[:, t] == IGNORE
            answer = torch.cat([answer, torch.where(given, batch.inputs[:, t], said)[:, None]], 1)
    assert torch.equal(objective.predict(model, batch), answer)


@pytest.mark.parametrize("pattern", ["mha swiglu", "mamba2 short_conv"])
def test_free_running_reads_back_its_own_tokens(pattern):
    """Row by row, the text up to the question is read anew for every token; what comes after the answer is given."""
    task = tasks.create_task("code_trace", seq_len=160, max_statements=1)
    batch = task.sample(3, split="test", seed=0)
    objective = create_objective("next_token", task, free_running=True)
    torch.manual_seed(0)
    model = zoo.create_model(pattern, d_model=16, vocab_size=task.vocab_size).eval()
    expected = batch.inputs.clone()
    with torch.no_grad():
        model.head.weight.mul_(20)
        for row in range(3):
            where = (batch.targets[row] != IGNORE).nonzero()[:, 0].tolist()
            text = batch.inputs[row, : where[0] + 1].tolist()
            for t in where:
                text.append(int(model(torch.tensor([text]))[0][0, -1].argmax()))
                expected[row, t] = text[-1]
    predictions, loss = objective.evaluate(model, batch)
    assert torch.equal(predictions, expected)
    assert torch.equal(objective.predict(model, batch), expected)
    given, same = create_objective("next_token", task).evaluate(model, batch)
    assert loss == same
    assert not torch.equal(given, expected)


def test_free_running_of_a_perfect_model_is_the_answer():
    task = tasks.create_task("code_trace", seq_len=160, max_statements=1)
    batch = task.sample(4, split="test", seed=0)
    model = Known(torch.cat([batch.inputs, torch.zeros(4, 1, dtype=torch.int64)], 1), task.vocab_size)
    score = task.score(batch, create_objective("next_token", task, free_running=True).predict(model, batch))
    assert score["exact"] == score["final"] == 1


def test_loss_is_cross_entropy_of_the_full_logits():
    task = tasks.create_task("mqar", vocab_size=64, seq_len=16, n_pairs=2)
    batch = task.sample(6, split="train", seed=0)
    objective = create_objective("next_token", task)
    model = zoo.create_model("mha swiglu", d_model=16, vocab_size=64)
    (update,) = objective.updates(model, objective.encode(batch), {}, torch.Generator())
    logits, _ = model(batch.inputs)
    expected = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORE)
    torch.testing.assert_close(update.loss, expected)
    update.loss.backward()
    predictions = logits.argmax(-1)
    got, loss = objective.evaluate(model, batch)
    torch.testing.assert_close(loss, expected)
    scored = batch.targets != IGNORE
    assert torch.equal(got[scored], predictions[scored])
    assert torch.equal(got[~scored], batch.inputs[~scored])
    score = task.score(batch, predictions)
    assert update.figures() == {k: pytest.approx(score[k]) for k in ("accuracy", "exact")}


def test_cells_in_place(puzzles):
    batch, _ = puzzles
    objective = create_objective("next_token", Puzzle(), causal=False)
    assert (objective.vocab_size, objective.length) == (7, 8)
    model = zoo.create_model("mha swiglu", d_model=16, vocab_size=7, causal=False)
    logits, _ = model(batch.inputs)
    predictions, loss = objective.evaluate(model, batch)
    torch.testing.assert_close(loss, F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten()))
    scored = batch.targets != IGNORE
    assert torch.equal(predictions[scored], logits.argmax(-1)[scored])
    assert torch.equal(predictions[~scored], batch.inputs[~scored])


def test_auxiliary_losses_and_metrics_are_taken_along(puzzles, monkeypatch):
    batch, _ = puzzles
    objective = create_objective("next_token", Puzzle())
    model = zoo.create_model("lstm", d_model=16, vocab_size=8)
    data = objective.encode(batch)
    (plain,) = objective.updates(model, data, {}, torch.Generator())
    original = type(model.backbone).forward

    def forward(self, x, state=None, context=None):
        context.losses.append(torch.tensor(2.0))
        context.metrics["load"] = torch.tensor(0.5)
        return original(self, x, state, context)

    monkeypatch.setattr(type(model.backbone), "forward", forward)
    (update,) = objective.updates(model, data, {}, torch.Generator())
    torch.testing.assert_close(update.loss, plain.loss + 2)
    assert update.figures()["load"] == 0.5


def test_timespans_reach_the_model(monkeypatch):
    batch = Batch(torch.zeros(1, 8, dtype=torch.int64), torch.ones(1, 8, dtype=torch.int64), {}, torch.rand(1, 8))
    assert torch.equal(create_objective("next_token", Puzzle(), causal=False).encode(batch).timespans, batch.timespans)
    spread = create_objective("next_token", Puzzle()).encode(batch)
    assert spread.timespans.shape == spread.tokens.shape


def test_label_smoothing(puzzles):
    batch, _ = puzzles
    model = zoo.create_model("lstm", d_model=16, vocab_size=8)
    losses = []
    for smoothing in (0.0, 0.5):
        objective = create_objective("next_token", Puzzle(), label_smoothing=smoothing)
        losses += [u.loss.item() for u in objective.updates(model, objective.encode(batch), {}, torch.Generator())]
    assert losses[0] != losses[1]


def test_a_model_that_sees_the_next_token_is_refused():
    with pytest.raises(zoo.UsageError, match=r"set model\.causal=true"):
        create_objective("next_token", Puzzle("next_token"), causal=False)


def test_free_running_wants_a_text():
    with pytest.raises(zoo.UsageError, match="free_running=True is for answers that are a text, which mqar's are not"):
        create_objective("next_token", tasks.create_task("mqar"), free_running=True)


def test_names():
    assert "next_token" in zoo.list_objectives()
    with pytest.raises(zoo.UsageError, match=r"Unknown objective 'next'.*Available: "):
        create_objective("next", Puzzle())
    with pytest.raises(zoo.UsageError, match="label_smoothing=2 is not allowed"):
        create_objective({"name": "next_token", "label_smoothing": 2}, Puzzle())
