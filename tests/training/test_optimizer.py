"""Groups, schedules, steps and the running average."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

import zoo
from zoo.parameters import rules_of, set_rule
from zoo.training.optimizer import AdamATan2, Average, Optimizer, lr_scale, parameter_groups
from zoo.training.recipes import read_experiment
from zoo.training.train_options import TrainConfig


def names(model: nn.Module, group: list[nn.Parameter]) -> set[str]:
    ids = {id(p) for p in group}
    return {n for n, p in model.named_parameters() if id(p) in ids}


@pytest.mark.parametrize("muon", [False, True])
@pytest.mark.parametrize("mixer", zoo.list_mixers())
def test_every_parameter_is_in_one_group(mixer, muon):
    causal = zoo.create_mixer(mixer, d_model=32).causal
    options = {"d_model": 32, "vocab_size": 16, "positions": "learned", "max_len": 8, "causal": causal}
    model = zoo.create_model(f"{mixer} swiglu", **options)
    groups = parameter_groups(model, muon=muon)
    found = [id(p) for group in groups.values() for p in group]
    assert sorted(found) == sorted(id(p) for p in model.parameters())
    exempt = names(model, groups["no_decay"])
    assert {"embedding.weight", "positions.weight", "norm.weight"} <= exempt
    assert {n for n, p in model.named_parameters() if p.ndim < 2} <= exempt
    matrices = names(model, groups["matrices"])
    assert bool(matrices) == muon
    assert not matrices & {"embedding.weight", "head.weight", "positions.weight"}
    assert all(p.ndim == 2 and min(p.shape) > 8 for p in groups["matrices"])


def test_decays_and_tied_weights_are_exempt():
    model = zoo.create_model("mamba2 lstm(bias=True)", d_model=32, vocab_size=16, tie_embeddings=True)
    exempt = names(model, parameter_groups(model)["no_decay"])
    assert any(n.endswith("A_log") for n in exempt)
    assert any(n.endswith("dt_bias") for n in exempt)
    assert "embedding.weight" in exempt
    marked = nn.Linear(16, 16, bias=False)
    set_rule(marked, "weight", weight_decay=False)
    assert parameter_groups(marked)["no_decay"] == [marked.weight]


@pytest.mark.parametrize("pattern", ["rwkv7 rwkv_channel_mix", "mamba moe(bias=True)", "slstm swiglu"])
def test_rules_last_where_parameters_are_replaced(pattern):
    """By a copy, by `to_empty`, by pruning, by a parametrization."""

    def found(model):
        rules = rules_of(model)
        return sorted(rule for rule in rules.values()), {id(p) for p in model.parameters()} >= set(rules)

    model = zoo.create_model(pattern, d_model=32, vocab_size=16)
    with torch.device("meta"):
        empty = zoo.create_model(pattern, d_model=32, vocab_size=16)
    assert found(model) == found(copy.deepcopy(model)) == found(empty.to_empty(device="cpu"))
    assert found(model)[1]
    assert len(found(model)[0]) > 0
    for module in list(model.modules()):
        for i, name in enumerate(list(module.__dict__.get("_parameter_rules", {}))):
            if getattr(module, name, None) is not None:
                if i % 2:
                    prune.random_unstructured(module, name, 0.5)
                else:
                    parametrize.register_parametrization(module, name, nn.Identity())
    assert found(model) == found(empty)


def test_frozen_parameters_are_left_out():
    model = nn.Linear(16, 16)
    model.weight.requires_grad_(False)
    assert parameter_groups(model) == {"rows": [], "matrices": [], "decay": [], "no_decay": [model.bias]}


def config(**options) -> TrainConfig:
    return TrainConfig(**options)


def test_schedules():
    cosine = config(steps=101, warmup_steps=10, final_lr=0.1)
    assert [lr_scale(cosine, s) for s in (0, 8, 9)] == pytest.approx([0.1, 0.9, 1.0])
    assert lr_scale(cosine, 55) == pytest.approx(0.55)  # half way from step 9, the peak, to 101, one past the last
    assert lr_scale(cosine, 100) == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi * 91 / 92)))
    falling = [lr_scale(cosine, s) for s in range(9, 101)]
    assert all(a > b > 0.1 for a, b in itertools.pairwise(falling))
    wsd = config(steps=101, warmup_steps=0, schedule="wsd", decay_steps=19)
    assert [lr_scale(wsd, s) for s in (0, 81, 82, 91, 100)] == pytest.approx([1, 1, 0.95, 0.5, 0.05])
    default = config(steps=100, warmup_steps=0, schedule="wsd")
    assert [lr_scale(default, s) for s in (79, 80, 99)] == pytest.approx([1, 20 / 21, 1 / 21])
    assert lr_scale(config(steps=9, warmup_steps=0, schedule="wsd", decay_steps=0), 8) == 1
    constant = config(steps=10, warmup_steps=4, schedule="constant")
    assert [lr_scale(constant, s) for s in (0, 3, 9)] == [0.25, 1, 1]
    assert all(0 <= lr_scale(config(steps=1, warmup_steps=w), 0) <= 1 for w in (0, 1, 5))


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
@pytest.mark.parametrize("warmup", [0, 1, 2, 7, 50])
@pytest.mark.parametrize("steps", [1, 2, 3, 8, 60])
@pytest.mark.parametrize("decay", [None, 0, 5, 60])
def test_every_step_teaches(schedule, warmup, steps, decay):
    """No learning rate is 0, first and last steps included; the peak is reached, and left at once by a cosine."""
    c = config(schedule=schedule, warmup_steps=warmup, steps=steps, decay_steps=decay)
    scales = [lr_scale(c, step) for step in range(steps)]
    assert all(0 < scale <= 1 for scale in scales)
    if steps >= max(warmup, 1) and not (schedule == "wsd" and (decay or 0) >= steps - warmup):
        assert max(scales) == 1
    if schedule == "cosine":
        assert scales.count(1.0) <= 1


def test_adamw_step_is_torch_s_with_clipping():
    torch.manual_seed(0)
    mine, theirs = (nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16)) for _ in range(2))
    theirs.load_state_dict(mine.state_dict())
    c = config(lr=0.1, warmup_steps=0, schedule="constant", clip=0.5, weight_decay=0.3)
    optimizer = Optimizer(mine, c)
    decay, rest = [theirs[0].weight], [theirs[0].bias, theirs[1].weight, theirs[1].bias]
    reference = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.3}, {"params": rest, "weight_decay": 0.0}], lr=0.1, betas=(0.9, 0.98)
    )
    for step in range(5):
        x = torch.randn(8, 16)
        norms = []
        for model in (mine, theirs):
            (model(x) ** 3).sum().backward()
        norms.append(nn.utils.clip_grad_norm_(theirs.parameters(), 0.5))
        reference.step()
        reference.zero_grad()
        torch.testing.assert_close(optimizer.step(step), norms[0])
        assert all(p.grad is None for p in mine.parameters())
    for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_muon_takes_the_matrices():
    torch.manual_seed(0)
    model = zoo.create_model("mha swiglu", d_model=32, vocab_size=16)
    optimizer = Optimizer(model, config(optimizer="muon", lr=1e-2, muon_lr=2e-2, warmup_steps=0, weight_decay=0.0))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    logits, _ = model(torch.randint(16, (2, 8)))
    logits.square().mean().backward()
    optimizer.step(0)
    for name, p in model.named_parameters():
        change = (p.detach() - before[name]).square().mean().sqrt().item()
        assert change > 0, name
        if name in names(model, parameter_groups(model, muon=True)["matrices"]):
            assert 0.4 < change / (0.2 * 2e-2) < 1.2, name  # about the size of AdamW's updates
    assert {group["lr"] for part in optimizer.parts for group in part.param_groups} == {1e-2, 2e-2}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_parameter_s_own_learning_rate_and_decay(optimizer):
    """RWKV-7's published rules: w0 learns twice as fast, and only the large matrices are decayed."""
    model = zoo.create_model("2*(rwkv7 rwkv_channel_mix)", d_model=32, vocab_size=16)
    c = config(optimizer=optimizer, lr=1e-3, muon_lr=3e-3, weight_decay=0.3, warmup_steps=0, schedule="constant")
    trained = Optimizer(model, c)
    rules = {}
    for _ in range(2):  # before and after a checkpoint
        model(torch.randint(16, (2, 8)))[0].square().mean().backward()
        trained.step(0)
        for part in trained.parts:
            for group in part.param_groups:
                for name in names(model, group["params"]):
                    rules[name] = (type(part).__name__, group["lr"], group["weight_decay"])
        assert set(rules) == {name for name, _ in model.named_parameters()}
        for name, (part, lr, decay) in rules.items():
            if name.endswith(("receptance.weight", "key.weight", "value.weight", "output.weight")):
                assert (part, lr, decay) == (("Muon", 3e-3, 0.3) if optimizer == "muon" else ("AdamW", 1e-3, 0.3)), name
            elif not name.startswith("head"):
                assert (part, lr, decay) == ("AdamW", 2e-3 if name.endswith("w0") else 1e-3, 0.0), name
        saved = trained.state_dict()
        trained = Optimizer(model, c)
        trained.load_state_dict(saved)


def puzzle_model():
    torch.manual_seed(0)
    recursion = {"cycles": 1, "updates": 1, "prefix": 1, "n_puzzles": 6}
    return zoo.create_model("mha(n_heads=2) swiglu", d_model=16, vocab_size=8, causal=False, recursion=recursion)


@pytest.mark.parametrize("optimizer", ["adamw", "adam_atan2", "muon"])
def test_puzzles_move_by_sign_in_the_steps_that_use_them(optimizer):
    model = puzzle_model()
    table = model.puzzles.weight
    nn.init.normal_(table)
    c = config(optimizer=optimizer, lr=1e-3, puzzle_lr=0.1, weight_decay=0.3, clip=None, warmup_steps=2)
    trained = Optimizer(model, c)
    for step, lr in ((0, 0.05), (1, 0.1)):
        before, others = table.detach().clone(), model.head.weight.detach().clone()
        thought = model.think(torch.randint(8, (3, 4)), puzzles=torch.tensor([1, 4, 1]))
        (model.logits(thought.hidden) ** 3).sum().backward()
        sign = table.grad.sign()
        assert set(sign.abs().sum(1).nonzero().flatten().tolist()) == {1, 4}
        expected = before.clone()
        expected[[1, 4]] = before[[1, 4]] * (1 - 0.3 * lr) - lr * sign[[1, 4]]
        trained.step(step)
        torch.testing.assert_close(table.detach(), expected)
        assert (model.head.weight != others).any()
    assert [type(part).__name__ for part in trained.parts][-1] == "SignRows"
    trained.load_state_dict(trained.state_dict())
    plain = Optimizer(model, config(optimizer=optimizer))
    assert all(type(part).__name__ != "SignRows" for part in plain.parts)


def test_average_copies_what_changes_too_seldom():
    model = puzzle_model()
    average = Average(model, 0.9)
    start = average.module.head.weight.clone()
    nn.init.normal_(model.puzzles.weight)
    nn.init.normal_(model.head.weight)
    average.update(1000)
    assert torch.equal(average.module.puzzles.weight, model.puzzles.weight)
    torch.testing.assert_close(average.module.head.weight, start.lerp(model.head.weight, 0.1))


def test_average_follows():
    model = nn.Linear(4, 4)
    average = Average(model, 0.9)
    torch.testing.assert_close(average.module.weight, model.weight)
    start = model.weight.detach().clone()
    with torch.no_grad():
        model.weight += 1
    average.update(0)  # the first steps are forgotten faster: weight 1 - 1/10
    torch.testing.assert_close(average.module.weight, start + 0.9)
    average.update(10**6)
    torch.testing.assert_close(average.module.weight, start + 0.9 + 0.1 * 0.1)
    assert not any(p.requires_grad for p in average.module.parameters())


def test_a_constant_average_is_trm_s():
    """`EMAHelper` of the authors: (1 - mu) p + mu shadow from the first step on."""
    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    average, shadow = Average(model, 0.9, warmup=False), model.weight.detach().clone()
    for step in range(5):
        nn.init.normal_(model.weight)
        average.update(step)
        shadow = 0.1 * model.weight.detach() + 0.9 * shadow
        torch.testing.assert_close(average.module.weight, shadow)
    for recipe in ("sudoku-9x9-trm", "maze-30x30-trm", "arc-trm"):
        assert not read_experiment(recipe).train.ema_warmup


def test_adam_atan2_by_hand():
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(3, 4, dtype=torch.float64))
    optimizer = AdamATan2([p], lr=0.1, betas=(0.8, 0.9), weight_decay=0.5)
    expected, m, v = p.detach().clone(), torch.zeros(3, 4).double(), torch.zeros(3, 4).double()
    for t in range(1, 5):
        g = torch.randn(3, 4, dtype=torch.float64)
        p.grad = g.clone()
        optimizer.step()
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g**2
        step = 0.1 / (1 - 0.8**t) * torch.atan2(m, (v / (1 - 0.9**t)).sqrt())
        expected = (1 - 0.1 * 0.5) * expected - step
        torch.testing.assert_close(p.detach(), expected)


def test_adam_atan2_goes_on_from_its_state():
    torch.manual_seed(0)
    gradients = torch.randn(6, 5)
    results = []
    for cut in (6, 3):
        p = nn.Parameter(torch.ones(5))
        optimizer = AdamATan2([p], lr=0.1)
        for i, g in enumerate(gradients):
            if i == cut:
                state = optimizer.state_dict()
                optimizer = AdamATan2([p], lr=0.1)
                optimizer.load_state_dict(state)
            p.grad = g.clone()
            optimizer.step()
        results.append(p.detach())
    assert torch.equal(*results)


@pytest.mark.parametrize("decay_all", [False, True])
def test_decay_all(decay_all):
    model = zoo.create_model("mlp", d_model=16, vocab_size=5)
    optimizer = Optimizer(model, TrainConfig(optimizer="adam_atan2", weight_decay=0.3, decay_all=decay_all))
    decays = {id(p): group["weight_decay"] for group in optimizer.parts[0].param_groups for p in group["params"]}
    assert decays[id(model.embedding.weight)] == (0.3 if decay_all else 0.0)
    assert decays[id(model.head.weight)] == 0.3
