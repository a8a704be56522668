"""Every mixer under every objective: it learns and answers, or is refused with the fix named."""

from __future__ import annotations

import pytest
import torch

import zoo
from zoo.cli import main
from zoo.objectives import create_objective, list_objectives
from zoo.protocol import Place
from zoo.report import leaderboard
from zoo.report.runs import load_runs
from zoo.tasks import create_task
from zoo.training.optimizer import Optimizer
from zoo.training.options import Experiment
from zoo.training.train import train

WORDS = zoo.list_mixers(kind="sequence")
RECURSION = {"cycles": 1, "updates": 1, "max_steps": 2, "prefix": 1}


BOTH_WAYS = ("masked_diffusion", "uniform_diffusion", "deep_supervision")  # these need a model that looks ahead
SUDOKU = {"name": "sudoku", "size": 4, "max_givens": 12}
TASKS = {
    "regression": {"name": "oscillators", "n_steps": 12, "min_steps": 10, "gap_steps": (2, 3), "held_out": 0.3},
    "classification": {"name": "digits", "order": "rows"},
}


def experiment(objective, pattern, **model):
    """4x4 Sudoku, or a series, with a small model that suits the objective."""
    suits = {"causal": objective not in BOTH_WAYS}
    if objective == "deep_supervision":
        suits |= {"recursion": RECURSION, "placement": "post"}
    return Experiment(
        task=TASKS.get(objective, SUDOKU),
        model={"pattern": pattern, "d_model": 16, **suits, **model},
        objective={"name": objective},
        train={"batch_size": 4, "lr": 1e-2, "warmup_steps": 0},
    )


def learns_and_answers(made):
    """Two steps of training move every weight that has a gradient; then there is an answer to every cell."""
    parts, config = made.build(), made.train
    torch.manual_seed(0)
    model = zoo.create_model(parts.model)
    optimizer, carry, generator = Optimizer(model, config), {}, torch.Generator().manual_seed(0)
    before = [p.detach().clone() for p in model.parameters()]
    for step in range(2):
        rows = parts.task.sample(4, split="train", seed=0, start=4 * step)
        for update in parts.objective.updates(model.train(), parts.objective.encode(rows), carry, generator):
            assert update.loss.isfinite()
            update.loss.backward()
            optimizer.step(step)
    moved = [not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True)]
    assert sum(moved) > 0.8 * len(moved)
    rows = parts.task.sample(3, split="test", seed=0)
    said, loss = parts.objective.evaluate(model, rows)
    assert loss.isfinite()
    assert said.shape == rows.targets.shape
    if parts.task.n_outputs:
        assert said.isfinite().all()
    else:
        assert 0 <= said.min() <= said.max() < (parts.task.n_classes or parts.task.vocab_size)
    return model


OBJECTIVES = list_objectives()
# each word under one of them in `make test`, under all in `make check-all`
PAIRS = [
    pytest.param(word, objective, marks=[] if (i + j) % len(OBJECTIVES) == 0 else pytest.mark.slow)
    for i, word in enumerate(WORDS)
    for j, objective in enumerate(OBJECTIVES)
]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_loop_under_every_objective(objective):
    learns_and_answers(experiment(objective, 'loop(2, mha swiglu, inject="concat", gate=True, exit=0.6)'))


@pytest.mark.parametrize(("word", "objective"), PAIRS)
def test_every_mixer_under_every_objective(word, objective):
    made = experiment(objective, f"{word} swiglu")
    looks_ahead = not zoo.create_mixer(word, 16, place=Place(causal=objective not in BOTH_WAYS)).causal
    if looks_ahead == (objective in BOTH_WAYS):
        learns_and_answers(made)
    elif looks_ahead and objective == "block_diffusion":
        with pytest.raises(zoo.UsageError, match="keeps the state after finished blocks"):
            experiment(objective, f"{word} swiglu", causal=False).build()
    elif looks_ahead:
        with pytest.raises(zoo.UsageError, match=f"{word} looks ahead here, but the model is causal: set causal=False"):
            made.build()
        learns_and_answers(experiment(objective, f"{word} swiglu", causal=False))
    else:
        fix = f"bidirectional({word})"
        with pytest.raises(zoo.UsageError) as refusal:
            made.build()
        assert str(refusal.value).endswith(f"but the model has causal=False: write {fix}.")
        learns_and_answers(experiment(objective, f"{fix} swiglu"))


@pytest.mark.parametrize(
    ("objective", "model", "message"),
    [
        (
            "masked_diffusion",
            {"causal": True},
            r"set model.causal=false, and write recurrent words as bidirectional",
        ),
        ("deep_supervision", {"causal": True, "recursion": None}, r"all cells at once: set model.causal=false\."),
        ("deep_supervision", {"causal": True}, r"all cells at once: set model.causal=false\."),
        ("deep_supervision", {"recursion": None}, r"or set model.recursion=\{\}\."),
        ("masked_diffusion", {"recursion": RECURSION}, r"not teach recursive models: set objective=deep_supervision\."),
        ("next_token", {"causal": False, "recursion": {}}, r"recursive models: set objective=deep_supervision\."),
        ("next_token", {"recursion": {}}, r"recursive models: set objective=deep_supervision\."),
    ],
)
def test_mismatches_name_their_fix(objective, model, message):
    with pytest.raises(zoo.UsageError, match=message) as refusal:
        experiment(objective, "gqa swiglu", **model).build()
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", BOTH_WAYS)
@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("compression", "layout.* reconstruct"),
        ("noisy_recall", "each answer right behind its question.* objective=next_token can"),
    ],
)
def test_tasks_that_do_not_suit_are_refused(name, task, message):
    made = experiment(name, "gqa swiglu").model_copy(update={"task": {"name": task}})
    with pytest.raises(zoo.UsageError, match=message):
        made.build()


@pytest.mark.parametrize(
    ("name", "task", "message"),
    [
        ("next_token", "oscillators", r"is a series of real vectors: set objective=regression\."),
        ("masked_diffusion", "digits", r"is a series of real vectors: set objective=classification\."),
        ("deep_supervision", "oscillators", r"is a series of real vectors: set objective=regression\."),
        ("regression", "sudoku", r"the rows of sudoku are tokens: set objective=next_token\."),
        ("classification", "mqar", r"the rows of mqar are tokens: set objective=next_token\."),
        ("regression", "digits", r"digits asks for classes: set objective=classification\."),
        ("classification", "oscillators", r"oscillators asks for real vectors: set objective=regression\."),
    ],
)
def test_series_and_tokens_are_not_mixed_up(name, task, message):
    causal = name not in BOTH_WAYS
    with pytest.raises(zoo.UsageError, match=message) as refusal:
        create_objective(name, create_task(task), causal=causal)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("next_token", {}),
        ("masked_diffusion", {}),
        ("masked_diffusion", {"steps": 3}),
        ("masked_diffusion", {"steps": 40}),
        ("masked_diffusion", {"steps": 6, "block_length": 4, "order": "confidence"}),
        ("masked_diffusion", {"steps": 9, "order": "random", "remasking": "rescale"}),
        ("masked_diffusion", {"self_conditioning": True, "steps": 3}),
        ("uniform_diffusion", {}),
        ("uniform_diffusion", {"self_conditioning": True, "steps": 2}),
        ("uniform_diffusion", {"steps": 3, "tail": "ancestral"}),
        ("block_diffusion", {}),
        ("block_diffusion", {"block_length": 5, "steps": 2, "readings": 1}),
        ("deep_supervision", {}),
        ("deep_supervision", {"eval_steps": 3, "starts": 2}),
    ],
)
def test_passes_are_those_taken(name, options, monkeypatch):
    parts = experiment(name, "gqa swiglu").build()
    objective = create_objective(name, parts.task, causal=name not in BOTH_WAYS, **options)
    model, rows = zoo.create_model(parts.model), parts.task.sample(5, split="test", seed=0)
    taken = []
    if name == "deep_supervision":
        think = model.think
        monkeypatch.setattr(model, "think", lambda *args, **rest: taken.append(1) or think(*args, **rest))
    else:
        model.backbone.register_forward_hook(lambda *_: taken.append(1))
    objective.predict(model, rows)
    assert len(taken) == objective.passes(model, rows)


def test_they_stand_side_by_side(tmp_path, capsys):
    """One table of all three, on one task; and of a text's bits a byte, with the bound marked as one."""
    short = {"train.steps": 2, "train.eval_rows": 4, "train.test_rows": 4, "train.threads": 1}
    for name in ("next_token", *BOTH_WAYS):
        made = experiment(name, "gqa swiglu").model_dump(exclude_unset=True)
        train({**made, "out": str(tmp_path / "sudoku" / name)}, short, quiet=True)
    for name in ("next_token", "masked_diffusion"):
        text = {"task": {"name": "text", "seq_len": 32}, "model": {"pattern": "gqa", "d_model": 16}, "objective": name}
        text["model"]["causal"] = name == "next_token"
        train({**text, "out": str(tmp_path / "text" / name)}, short, quiet=True)

    rows = {row["objective"]: row for row in leaderboard.rows(load_runs([tmp_path / "sudoku"]))}
    assert {name: row["passes"] for name, row in rows.items()}["deep_supervision"] == RECURSION["max_steps"]
    assert rows["next_token"]["passes"] == 16
    assert 4 <= rows["masked_diffusion"]["passes"] <= 12
    assert {row["bits_per_byte"] for row in rows.values()} == {None}
    texts = load_runs([tmp_path / "text"])
    columns, lines = leaderboard.lines(texts)
    at = [column.key for column in columns].index("bits_per_byte")
    marks = {line.run.section("objective")["name"]: line.cells[at].text.startswith("≤ ") for line in lines}
    assert marks == {"next_token": False, "masked_diffusion": True}
    with pytest.raises(SystemExit) as ended:
        main(["compare", str(tmp_path / "sudoku"), str(tmp_path / "text")])
    assert ended.value.code in (0, None)
    out = capsys.readouterr().out
    assert all(word in out for word in ("passes", "bits per", "≤"))
