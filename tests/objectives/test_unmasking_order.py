"""A learned order of unmasking: it begins as its reference, learns from rewards, and leaves all other weights alone."""

from __future__ import annotations

import json

import pytest
import torch

import zoo
from zoo.cli import main
from zoo.models.config import ModelConfig
from zoo.models.policy import Policy, sureness
from zoo.objectives import create_objective
from zoo.objectives.base import Encoded
from zoo.objectives.order_training import OrderTeacher, OrderTraining, advantages
from zoo.tasks import create_task
from zoo.tasks.protocol import IGNORE, Batch
from zoo.training.options import Experiment

SUDOKU = {"name": "sudoku", "size": 4, "max_givens": 8}
MASK, WRONG, RIGHT = 3, 2, 1
BASE = {
    "task": SUDOKU,
    "model": {"pattern": "mha swiglu", "d_model": 16, "causal": False, "positions": "learned"},
    "objective": "masked_diffusion",
    "train": {"steps": 3, "batch_size": 4, "eval_every": 3, "eval_rows": 4, "test_rows": 4, "threads": 1},
}


@pytest.mark.parametrize("reference", ["confidence", "margin", "entropy"])
def test_a_new_policy_answers_in_the_order_of_its_reference(reference):
    torch.manual_seed(0)
    chosen = create_objective("masked_diffusion", create_task(SUDOKU), causal=False)
    model = zoo.create_model(
        "2*(mha swiglu)",
        d_model=16,
        vocab_size=chosen.vocab_size,
        causal=False,
        unmasking_policy={"reference": reference, "pattern": "bidirectional(mamba2) engram(n_slots=64)"},
    ).double()
    rows = chosen.task.sample(6, split="test", seed=0)
    answers = {}
    for order in ("learned", reference):
        sampler = create_objective("masked_diffusion", chosen.task, causal=False, order=order)
        answers[order] = [frame.hidden for frame in sampler.solve(model, rows)]
    assert len(answers["learned"]) == chosen.passes(model, rows)
    assert all(map(torch.equal, answers["learned"], answers[reference]))
    with torch.no_grad():
        model.unmasking_policy.score.weight.normal_(std=20)
    sampler = create_objective("masked_diffusion", chosen.task, causal=False, order="learned")
    assert not all(map(torch.equal, [frame.hidden for frame in sampler.solve(model, rows)], answers[reference]))


def misleading(tokens, timespans=None):
    """Of two cells the first is surer and wrong, until the second is known."""
    n, known = len(tokens), tokens[:, 1] != MASK
    logits = torch.zeros(n, 4, 3)
    logits[:, 0, WRONG] = torch.where(known, -9.0, 3.0)
    logits[:, 0, RIGHT] = torch.where(known, 9.0, 0.0)
    logits[:, 1, RIGHT] = 1.5
    hidden = torch.zeros(n, 4, 16)
    hidden[:, range(4), range(4)] = 1.0
    return logits, hidden


def teacher(**how):
    torch.manual_seed(0)
    config = ModelConfig(
        pattern="mha", d_model=16, vocab_size=4, causal=False, unmasking_policy={"pattern": "mlp", "temperature": 0.3}
    )
    policy = Policy(config)
    return OrderTeacher(create_task(SUDOKU), policy, policy, misleading, MASK, OrderTraining(**how))


def rows(n):
    tokens = torch.tensor([[RIGHT, RIGHT, 0, 0]]).repeat(n, 1)
    positions = (torch.arange(n)[:, None] * 4 + torch.arange(2)).flatten()
    targets = torch.tensor([[RIGHT, RIGHT, IGNORE, IGNORE]]).repeat(n, 1)
    return Encoded(tokens, positions, torch.full((2 * n,), RIGHT)), Batch(tokens, targets)


def first_cell(taught):
    tokens = torch.tensor([[MASK, MASK, 0, 0]])
    logits, hidden = misleading(tokens)
    return int(taught.policy(taught.policy.see(tokens, hidden, logits, tokens == MASK)).argmax())


def test_rewards_turn_the_order_round():
    taught = teacher(updates=2)
    optimizer = torch.optim.AdamW(taught.policy.parameters(), lr=1e-2)
    generator, exact = torch.Generator().manual_seed(0), []
    assert first_cell(taught) == 0
    for _ in range(20):
        for update in taught.updates(*rows(8), generator, parts=2):
            update.loss.backward()
            if update.last:
                optimizer.step()
                optimizer.zero_grad()
            if update.rows.numel():
                exact.append(update.figures()["exact"])
    assert first_cell(taught) == 1
    assert sum(exact[:4]) / 4 < 0.5 < 0.9 < sum(exact[-4:]) / 4


def test_the_loss_is_the_clipped_surrogate_and_the_exact_divergence():
    taught = teacher(kl=0.7, clip=0.2)
    reference = torch.tensor([[1.0, 2.0, -torch.inf], [0.5, -torch.inf, 0.1], [3.0, 1.0, 2.0]])
    scores = (reference + torch.randn(3, 3)).requires_grad_()
    p, q = scores.detach().softmax(1), reference.softmax(1)
    chosen, ratio, advantage = torch.tensor([0, 2, 1]), torch.tensor([0.5, 1.0, 1.5]), torch.tensor([1.0, -2.0, 0.5])
    log_p = p[range(3), chosen].log() - ratio.log()
    loss, figures = taught.loss(scores, reference, chosen, log_p, advantage)
    kl = torch.xlogy(p, p / q).nan_to_num(0.0).sum(1).mean()
    assert figures["kl"] == pytest.approx(kl.item())
    assert figures["clipped"] == pytest.approx(2 / 3)
    assert loss.item() == pytest.approx(0.7 * kl.item() - (0.5 * 1 - 2 + 1.2 * 0.5) / 3, rel=1e-5)
    taught.how = OrderTraining(kl=0.0, clip=0.2)
    (gradient,) = torch.autograd.grad(taught.loss(scores, reference, chosen, log_p, advantage)[0], scores)
    one = torch.eye(3)[chosen]
    by_hand = -(torch.tensor([0.5, -2.0, 0.0])[:, None] * (one - p)) / 3  # the third is clipped
    assert torch.allclose(gradient, by_hand, atol=1e-6)


def test_advantages_are_of_a_group_and_none_where_all_are_alike():
    found = advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]]))
    assert found[0] == pytest.approx([1.5, -0.5, -0.5, -0.5], rel=1e-3)
    assert not found[1].any()


def test_parts_have_the_losses_of_the_whole():
    """One generator draws the orders of all rows, so that `train.accumulate` changes no gradient."""
    gradients = []
    for parts in (1, 3):
        taught = teacher(updates=1)
        for update in taught.updates(*rows(4), torch.Generator().manual_seed(1), parts=parts):
            update.loss.backward()
        gradients.append(taught.policy.score.weight.grad)
    assert gradients[0].any()
    assert torch.allclose(*gradients, atol=1e-6)


def test_measures_of_how_sure_a_prediction_is():
    p = torch.tensor([0.5, 0.3, 0.2])
    assert sureness(p, "confidence") == 0.5
    assert sureness(p, "margin") == pytest.approx(0.2)
    assert sureness(p, "entropy") == pytest.approx(-1.0296530, rel=1e-5)
    assert sureness(torch.ones(1), "margin") == 1


def status(arguments):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    return ended.value.code


def test_the_command_trains_a_policy_and_nothing_else(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    zoo.train({**BASE, "out": "base"}, quiet=True)
    assert status(["eval", "base", "objective.order=learned"]) == 2
    assert capsys.readouterr().err == (
        'zoo: order="learned" is not allowed: the model has no learned order, which init=RUN '
        "objective.unmasking_order={} trains of a run with masked_diffusion.\n"
    )
    assert status(["train", "base", "out=none", "init=null", "objective.unmasking_order={}"]) == 2
    assert "in a model that is trained: init=RUN names it." in capsys.readouterr().err
    how = ["objective.unmasking_order.group=2", "objective.unmasking_order.updates=3", "train.weight_decay=0.1"]
    assert status(["train", "base", "out=order", "init=base", *how]) == 0
    assert "unmasking_policy.score.weight" in json.loads((tmp_path / "order/init.json").read_text())["fresh"]
    assert status(["eval", "order"]) == 0
    learned = capsys.readouterr().out
    assert status(["eval", "order", "objective.order=confidence"]) == 0
    assert status(["eval", "order", "objective.order=learned", "objective.entropy_bound=0.1"]) == 0
    assert "exact:" in learned
    before, after = zoo.load("base").state_dict(), zoo.load("order").state_dict()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    assert {name.partition(".")[0] for name in after.keys() - before.keys()} == {"unmasking_policy"}
    result = zoo.train({**BASE, "objective": {"name": "masked_diffusion", "unmasking_order": {}}, "out": "again"}
                       | {"model": zoo.load("order")}, quiet=True)  # fmt: skip
    again = zoo.load("again").state_dict()
    assert result.data["status"] == "finished"
    assert not torch.equal(again["unmasking_policy.read.weight"], after["unmasking_policy.read.weight"])


@pytest.mark.parametrize(
    ("objective", "model", "message"),
    [
        ({"name": "masked_diffusion", "unmasking_order": {"groups": 3}}, {}, "Did you mean 'group'"),
        ({"name": "masked_diffusion", "unmasking_order": {"group": 1}}, {}, "group=1 is not allowed"),
        ({"name": "masked_diffusion", "order": "learned"}, {}, 'order="learned" is not allowed'),
        (
            {"name": "block_diffusion", "order": "learned"},
            {"causal": True},
            'order="learned" is of .* masked_diffusion',
        ),
        ("masked_diffusion", {"unmasking_policy": {"pattern": "mhaa"}}, "Did you mean 'mha'"),
        ("next_token", {"causal": True, "unmasking_policy": {}}, "unmasking_policy is for .* causal=False"),
    ],
)
def test_what_does_not_go_is_refused_in_one_line(objective, model, message):
    with pytest.raises(zoo.UsageError, match=message) as refusal:
        Experiment(**{**BASE, "objective": objective, "model": {**BASE["model"], **model}}).build()
    assert "\n" not in str(refusal.value)


def test_a_text_has_no_right_answers_to_learn_from():
    with pytest.raises(zoo.UsageError, match="text is a text without any"):
        create_objective("masked_diffusion", create_task("text"), causal=False, unmasking_order={})
