"""Deep supervision of a token model whose pattern has a loop: steps that go on where the loop ended."""

from __future__ import annotations

import pytest
import torch

import zoo
from zoo.cli import main
from zoo.laws import batch_mates
from zoo.models.looped import LoopedModel, LoopedState
from zoo.objectives import create_objective
from zoo.objectives.base import with_losses
from zoo.protocol import Context
from zoo.tasks import create_task
from zoo.tasks.protocol import take
from zoo.training.evaluation import held_out

MQAR = {"name": "mqar", "seq_len": 24, "n_pairs": (2, 3, 4), "vocab_size": 25}
SUDOKU = {"name": "sudoku", "size": 4, "max_givens": 8}
TWO_LEVELS = 'loop({n}, loop(2, gqa, inject="add", start="carried", norm="rmsnorm", residual=True) swiglu)'
PATTERNS = [
    "gru loop({n}, gqa swiglu) swiglu",
    'gru loop({n}, gqa swiglu, inject="add", norm="rmsnorm") swiglu',
    'gru loop({n}, gqa swiglu, inject="concat", start="zeros") swiglu',
    'shortcut(swiglu, gru loop({n}, loop(2, gru, inject="add", gradient=[1, 2]), inject="gated")) gqa',
    'shared("a", loop(2, gru, inject="add")) loop({n}, gqa shared("a"), inject="add")',
    f'loop({{n}}, mlp shared("a", {TWO_LEVELS.replace("{n}", "2")}), inject="add") gru shared("a")',
    TWO_LEVELS,
]


def model_of(pattern: str, *, n: int = 2, **options):
    torch.manual_seed(0)
    sizes = {"d_model": 16, "vocab_size": 25, "halting": True}
    return zoo.create_model(pattern.replace("{n}", str(n)), **{**sizes, **options}).double()


def perturbed(model):
    torch.manual_seed(1)
    with torch.no_grad():
        for p in [*model.parameters(), *(b for n, b in model.named_buffers() if n.endswith("initial"))]:
            p.add_(0.3 * torch.randn_like(p))
    return model


TOKENS = torch.randint(25, (3, 9), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_steps_are_a_loop_of_more_passes(pattern):
    model = perturbed(model_of(pattern))
    if "gradient" not in pattern:  # whose list is as long as one step
        longer = model_of(pattern, n=6)
        longer.load_state_dict(model.state_dict())
        expected, _ = longer(TOKENS)
    looped, state, context = LoopedModel(model), None, Context()
    for step in range(3):
        thought = looped.think(TOKENS, state, context)  # one context, which no step leaves anything in
        if step == 0:
            torch.testing.assert_close(model.logits(thought.hidden), model(TOKENS)[0], rtol=1e-10, atol=1e-12)
        state = thought.state
    if "gradient" not in pattern:
        torch.testing.assert_close(model.logits(thought.hidden), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_new_rows_beside_those_that_go_on(pattern):
    looped = LoopedModel(perturbed(model_of(pattern)))
    old = looped.think(TOKENS).state
    new = looped.init_state(*TOKENS.shape)
    begun = torch.tensor([True, False, True])
    mixed = LoopedState(
        *(torch.where(begun.view(-1, *[1] * (a.ndim - 1)), a, b) for a, b in zip(old, new, strict=True))
    )
    together = looped.think(TOKENS, mixed)
    for i, state in enumerate((old, new, old)):
        alone = looped.think(TOKENS[i : i + 1], LoopedState(*(leaf[i : i + 1] for leaf in state)))
        torch.testing.assert_close(alone.hidden[0], together.hidden[i], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(alone.halt[0], together.halt[i], rtol=1e-10, atol=1e-12)


def test_gradients_pass_through_one_step():
    model = perturbed(model_of('gru loop({n}, gqa swiglu, inject="add") swiglu'))
    looped = LoopedModel(model)
    state = looped.think(TOKENS).state
    assert not any(leaf.requires_grad for leaf in state)
    weights = list(model.backbone.parameters())
    found = torch.autograd.grad(looped.think(TOKENS, state).hidden.sin().sum(), weights)
    gru, loop, last = model.backbone.steps
    x, _ = gru(model.embedding(TOKENS), None, Context())
    h = state.answer
    for _ in range(2):
        h, _ = loop.body(h + x, None, Context())
    expected = torch.autograd.grad(model.norm(last(h, None, Context())[0]).sin().sum(), weights)
    for a, e in zip(found, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-11)


def learning(task, *, steps=3, **options):
    """An objective and a model in which rows have been thought about for different numbers of steps."""
    made = create_task(task)
    causal = made.layout == "next_token"
    objective = create_objective("deep_supervision", made, causal=causal, steps=steps, **options)
    model = perturbed(model_of('loop({n}, mha swiglu, inject="add")', causal=causal, vocab_size=objective.vocab_size))
    carry, generator = {}, torch.Generator().manual_seed(0)

    def step(i: int, parts: int = 1):
        data = objective.encode(made.sample(6, split="train", seed=0, start=6 * i))
        return list(objective.updates(model, data, carry, generator, parts))

    return objective, model, carry, step


@pytest.mark.parametrize("task", [MQAR, SUDOKU])
def test_a_row_stays_until_it_is_right_or_has_had_all_steps(task):
    objective, model, carry, step = learning(task)
    with torch.no_grad():
        model.halting.bias.fill_(-5.0)
        model.halting.weight.zero_()
        seen = []
        for i in range(4):
            step(i)
            seen.append(carry["steps"].tolist())
    assert seen == [[1] * 6, [2] * 6, [3] * 6, [1] * 6]
    assert carry["begun"].all()
    assert objective.carries(carry, model, 6)
    assert not objective.carries({**carry, "begun": carry["begun"].float()}, model, 6)
    with torch.no_grad():
        model.halting.bias.fill_(5.0)
        step(4)
        step(5)
    assert (carry["steps"] <= 2).all()  # all but explored ones are new


def test_parts_of_a_batch_add_up():
    found = []
    for parts in (1, 3):
        _, model, _, step = learning(MQAR)
        for i in range(2):
            model.zero_grad()
            for update in step(i, parts):
                update.loss.backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("task", "options"),
    [
        (MQAR, {}),
        (MQAR, {"eval_steps": 5, "vote": "first"}),
        (SUDOKU, {"starts": 2, "noise": 0.2}),
        (SUDOKU, {"votes": 3}),
    ],
)
def test_rows_are_answered_alone(task, options):
    objective, model, _, _ = learning(task, **options)
    rows = held_out(objective.task, "test", 7)
    batch_mates(model, objective, rows, take(objective.task.sample(9, split="train", seed=5), slice(3, 9)))


def test_losses_of_mixers_are_added():
    model = perturbed(model_of("loop({n}, gqa moe(n_experts=3, top_k=2))"))
    context = Context()
    LoopedModel(model).think(TOKENS, None, context)
    assert len(context.losses) == 2
    assert with_losses(torch.zeros(()), context) > 0


TRAIN = [
    "train.steps=12",
    "train.time_budget=null",
    "train.eval_every=6",
    "train.eval_rows=32",
    "train.test_rows=32",
    "--quiet",
]
LOOPED = ["mqar-demo", "--variant", "attention", 'model.pattern=loop(2, mha swiglu, inject="add")']


def command(*words: str) -> int:
    try:
        main(list(words))
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_by_the_command(tmp_path, monkeypatch, capsys):
    """Trained, and evaluated with fewer and more steps than it was trained with."""
    monkeypatch.chdir(tmp_path)
    assert command("train", *LOOPED, "objective=deep_supervision", *TRAIN, "out=run") == 0
    assert zoo.load("run/attention").halting is not None
    capsys.readouterr()
    told = []
    for steps in (1, 8):
        assert command("eval", "run/attention", f"objective.steps={steps}") == 0
        told.append(capsys.readouterr().out)
    assert all("accuracy" in text for text in told)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["model.pattern=mha swiglu"],
            "goes on with one loop of the pattern, and there is none: write one loop(n, ...)",
        ),
        (["model.pattern=2*loop(2, mha swiglu)"], "one loop of the pattern, and there are 2: write one loop(n, ...)"),
        (["model.pattern=loop(2, mha swiglu, exit=0.5)"], "leave out exit, or set objective=next_token"),
        (
            ['model.pattern=loop(2, mha shared("a", loop(2, swiglu, exit=0.5)), inject="add")'],
            "leave out exit, or set objective=next_token",
        ),
        (["objective.starts=3"], "starts is for a recursive model, and loop(2, ...) starts from its own input: set"),
        (["objective.random_start=true"], "random_start is for a recursive model"),
        (["objective.candidates=2"], "candidates is for a recursive model"),
        (["objective.damping=0.1"], "damping is for a recursive model"),
        (["objective.noise_at=application"], "noise_at is for a recursive model"),
        (["model.halting=false"], "model.halting=False is not allowed: deep_supervision of a loop learns when"),
        (
            ["model.residual=hyper_connections"],
            'Deep supervision of a loop has one residual stream: set model.residual="plain"',
        ),
        (["model.recursion={}"], "A recursive model reads whole puzzles: set model.causal=false"),
        (["task={name: sudoku, size: 4}"], "answers all cells at once: set model.causal=false"),
    ],
)
def test_refused_in_one_line(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert command("train", *LOOPED, "objective=deep_supervision", *words, *TRAIN, "out=run") == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert message in told
    assert not (tmp_path / "run").exists()
