"""A row's loss, answer and score are its own: no batch size, no batch-mate and no order of the rows changes them."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

import zoo
from zoo.laws import batch_mates
from zoo.objectives import create_objective, list_objectives
from zoo.objectives.draws import RowDraws, row_names
from zoo.tasks import create_task
from zoo.tasks.protocol import split_rows, take
from zoo.training.evaluation import answered, evaluate, evaluate_run, held_out
from zoo.training.generating import answer_example
from zoo.training.solving import solve_run

SUDOKU = {"name": "sudoku", "size": 4, "max_givens": 8}  # 8 to 12 blanks a row
MQAR = {"name": "mqar", "seq_len": 24, "n_pairs": (2, 3, 4), "vocab_size": 25}  # 2 to 4 answers a row
TEXT = {"name": "text", "seq_len": 24}
SERIES = {"name": "oscillators", "n_steps": 20, "min_steps": 14, "gap_steps": (2, 4)}  # 4 to 8 answers a row
DIGITS = {"name": "digits", "order": "rows"}
WORDS = {"name": "formal_language", "min_length": 3, "max_length": 12}  # answers of many lengths
BOTH_WAYS = ("masked_diffusion", "uniform_diffusion", "deep_supervision")
CASES = [
    ("regression", SERIES, {}),
    ("regression", SERIES | {"timespans": False}, {"huber": 0.5}),
    ("classification", DIGITS, {"label_smoothing": 0.1}),
    ("next_token", SUDOKU, {}),
    ("next_token", MQAR, {}),
    ("next_token", TEXT, {}),
    ("next_token", WORDS, {}),
    ("next_token", {"name": "copy", "seq_len": 12}, {"free_running": True}),
    *[
        ("masked_diffusion", task, {"order": order, **how})
        for order in ("random", "confidence", "margin", "low_confidence")
        for task, how in [
            (SUDOKU, {"steps": 8, "block_length": 4, "temperature": 0.7}),
            (SUDOKU, {}),
            (SUDOKU, {"steps": 5, "weighting": "mdlm"}),
            (SUDOKU, {"steps": 40, "block_length": 3}),
            (MQAR, {"block_length": 1, "antithetic": False}),
        ]
    ],
    ("masked_diffusion", SUDOKU, {"self_conditioning": True, "order": "random", "steps": 7, "temperature": 0.7}),
    ("masked_diffusion", SUDOKU, {"self_conditioning": True, "order": "random", "remasking": "cap", "steps": 4}),
    ("masked_diffusion", TEXT, {"self_conditioning": True}),
    ("uniform_diffusion", SUDOKU, {"self_conditioning": True, "steps": 3}),
    ("uniform_diffusion", TEXT, {"self_conditioning": True}),
    ("masked_diffusion", SUDOKU, {"order": "learned", "steps": 5}),
    ("masked_diffusion", MQAR, {"order": "learned", "block_length": 2, "temperature": 0.7}),
    ("masked_diffusion", SUDOKU, {"temperature": 1.0, "guidance": 0.5, "prompt_dropout": 0.1}),
    ("masked_diffusion", SUDOKU, {"entropy_bound": 0.5, "order": "entropy", "block_length": 4}),
    ("masked_diffusion", SUDOKU, {"order": "random", "remasking": "cap", "remasking_rate": 0.3, "temperature": 1.0}),
    ("masked_diffusion", MQAR, {"order": "random", "remasking": "confidence", "steps": 5}),
    ("masked_diffusion", MQAR, {"order": "random", "remasking": "loop", "remasking_rate": 0.1, "steps": 5}),
    ("masked_diffusion", TEXT, {}),
    ("masked_diffusion", WORDS, {}),
    ("block_diffusion", SUDOKU, {}),
    ("block_diffusion", SUDOKU, {"block_length": 5, "order": "random", "steps": 7, "temperature": 0.7, "readings": 1}),
    ("block_diffusion", MQAR, {"block_length": 3, "entropy_bound": 0.5, "order": "entropy"}),
    ("block_diffusion", TEXT, {"block_length": 7, "mask_range": (0.3, 0.8), "antithetic": False}),
    ("block_diffusion", WORDS, {}),
    ("uniform_diffusion", SUDOKU, {}),
    ("uniform_diffusion", SUDOKU, {"steps": 3, "tail": "ancestral", "temperature": 0.7, "time_bins": 0}),
    ("uniform_diffusion", MQAR, {"antithetic": False}),
    ("uniform_diffusion", TEXT, {}),
    ("uniform_diffusion", WORDS, {}),
    *[
        ("deep_supervision", task, options)
        for task in (SUDOKU, MQAR)
        for options in ({}, {"random_start": True}, {"starts": 3}, {"starts": 2, "vote": "settled", "eval_steps": 4})
    ],
    ("deep_supervision", SUDOKU, {"starts": 2, "noise": 0.2, "vote": "first"}),
    ("deep_supervision", SUDOKU, {"votes": 3, "vote": "majority", "noise": 0.1}),
    ("deep_supervision", MQAR, {"starts": 2, "candidates": 3, "vote": "first"}),
]


def parts(name, spec, options):
    """An objective with an untrained model in float64."""
    task = create_task(spec)
    chosen = create_objective(name, task, causal=name not in BOTH_WAYS, **options)
    torch.manual_seed(0)
    answers = task.n_outputs or task.n_classes
    ends = {"inputs": task.n_inputs, "outputs": answers} if chosen.series else {"vocab_size": chosen.vocab_size}
    recursion = {"recursion": {"cycles": 1, "updates": 2, "max_steps": 2}} if name == "deep_supervision" else {}
    more = recursion | ({"unmasking_policy": {}} if options.get("order") == "learned" else {})
    model = zoo.create_model("mha(n_heads=2) swiglu", d_model=16, causal=chosen.causal, **ends, **more).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model, chosen


def test_every_objective_is_tried():
    assert {name for name, _, _ in CASES} == set(list_objectives())


def is_crossed(name, spec, options):
    """Whether a case has neither the first order of unmasking, or task, nor the first of its other options."""
    if name == "masked_diffusion":
        return options.get("order", "random") != "random" and "temperature" not in options
    return name == "deep_supervision" and spec is MQAR and bool(options)


# each case once in `make test`, with names and without in turn; the other way, and orders and tasks with all other
# options, in `make check-all`
ALONE = [
    pytest.param(
        *case,
        named,
        id=f"{case[0]}-{i}-{named}",
        marks=[] if (i + named) % 2 and not is_crossed(*case) else [pytest.mark.slow],
    )
    for i, case in enumerate(CASES)
    for named in (True, False)
]


@pytest.mark.parametrize(("name", "spec", "options", "named"), ALONE)
def test_rows_are_answered_alone(name, spec, options, named):
    model, chosen = parts(name, spec, options)
    rows = held_out(chosen.task, "test", 7) if named else chosen.task.sample(7, split="test", seed=0)
    batch_mates(model, chosen, rows, take(chosen.task.sample(9, split="train", seed=5), slice(3, 9)))


@pytest.mark.parametrize(("name", "spec", "options"), CASES[::3], ids=lambda v: v if isinstance(v, str) else None)
def test_the_first_rows_are_the_same_of_any_number(name, spec, options):
    model, chosen = parts(name, spec, options)
    few, many = (answered(model, chosen, held_out(chosen.task, "test", n), batch_size=4) for n in (5, 9))
    agree = torch.equal if name != "regression" else torch.allclose
    assert agree(many.predictions[:5], few.predictions)
    later = answered(model, chosen, held_out(chosen.task, "test", 2, start=3), batch_size=2)
    assert agree(later.predictions, few.predictions[3:])


def test_the_bound_is_right_at_every_batch_size():
    """Of a model that says the same everywhere the bound is log(vocabulary): within 4 errors over 4,000 rows."""

    class Flat(torch.nn.Module):
        config = SimpleNamespace(shifted_logits=False)

        def __init__(self, vocab_size):
            super().__init__()
            self.unused, self.vocab_size = torch.nn.Parameter(torch.zeros(1)), vocab_size

        def features(self, tokens, state, context):
            return torch.zeros(*tokens.shape, self.vocab_size), ()

        def logits(self, hidden):
            return hidden

    for weighting in ("llada", "mdlm"):
        task = create_task("text", seq_len=16)
        chosen = create_objective("masked_diffusion", task, causal=False, weighting=weighting)
        rows = held_out(task, "validation", 4000)
        found = [answered(Flat(chosen.vocab_size), chosen, rows, batch_size=size).loss for size in (4000, 50)]
        assert found[0] == pytest.approx(found[1], rel=1e-6)
        nats = torch.tensor(float(task.vocab_size)).log().item()
        noisy = chosen._noise(chosen.encode(rows), RowDraws.of(chosen.encode(rows)))
        of_rows = torch.bincount(noisy.rows, noisy.weight.double(), 4000) * 4000
        assert abs(found[0] / nats - 1) < 4 * of_rows.std().item() / 4000**0.5 < 0.1


@pytest.mark.parametrize("name", ["masked_diffusion", "uniform_diffusion", "block_diffusion"])
def test_the_bound_has_an_interval_over_draws(name):
    """Eight draws give eight losses, of which the first is that of a single draw; no batch size changes them."""
    model, once = parts(name, TEXT, {})
    _, several = parts(name, TEXT, {"loss_draws": 8})
    rows = held_out(once.task, "test", 6)
    score = evaluate(model, several, rows, batch_size=4)
    found = [answered(model, several, rows, batch_size=size).estimates for size in (2, 6)]
    assert found[0] == pytest.approx(found[1], rel=1e-9)
    single = evaluate(model, once, rows, batch_size=6)
    assert found[0][0] == pytest.approx(single["loss"], rel=1e-9)
    assert "loss_low" not in single
    mean, error = torch.tensor(found[0]).mean(), torch.tensor(found[0]).std() / 8**0.5
    reach = 2.364624 * error  # of Student's t with 7 degrees of freedom
    assert (score["loss_low"], score["loss"]) == pytest.approx((float(mean - reach), float(mean)), rel=1e-4)
    bits = [score[f"bits_per_byte{end}"] for end in ("_low", "", "_high")]
    assert bits == sorted(bits)
    assert bits[1] == pytest.approx(score["loss"] / 0.6931472)


def test_copies_of_a_row_draw_for_themselves():
    """A row that comes 2,000 times has 2,000 times and masks, with names and without."""
    chosen = create_objective("masked_diffusion", create_task(SUDOKU), causal=False)
    rows = take(chosen.task.sample(1, split="test", seed=0), torch.zeros(2000, dtype=torch.int64))
    noisy = chosen._noise(chosen.encode(rows), RowDraws.of(chosen.encode(rows)))
    assert abs(noisy.weight.sum().item() - 1) < 0.1
    assert len(row_names(chosen.encode(rows)).unique()) == 2000


def test_draws_are_what_they_should_be():
    """Uniform and normal, and of two rows, purposes, moments or places unlike each other."""
    draws = RowDraws(torch.arange(400))
    u = draws.uniform(3, 50)
    assert 0 < u.min() < u.max() < 1
    assert abs(u.mean() - 0.5) < 0.01
    assert abs(u.var() - 1 / 12) < 0.003
    z = draws.normal(4, 5, 10)
    assert z.shape == (400, 5, 10)
    assert abs(z.mean()) < 0.03
    assert abs(z.std() - 1) < 0.03
    others = [draws, draws.at(None, 0), draws.at(None, 1 + torch.arange(400) % 7), RowDraws(torch.arange(400) + 1)]
    kinds = torch.stack([each.uniform(purpose, 50).flatten() for each in others for purpose in (3, 4)])
    assert (torch.corrcoef(kinds) - torch.eye(8)).abs().max() < 0.03
    some = torch.tensor([7, 3])
    assert torch.equal(draws.at(some, torch.tensor([2, 5])).uniform(1, 4)[1], draws.at(None, 5).uniform(1, 4)[3])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose answers are drawn at random, in bfloat16."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    made = {
        "task": SUDOKU,
        "model": {"pattern": "mha(n_heads=2) swiglu", "d_model": 32, "causal": False, "positions": "learned"},
        "objective": {"name": "masked_diffusion", "order": "random", "temperature": 0.5},
        "train": {"steps": 30, "batch_size": 16, "eval_rows": 12, "test_rows": 12, "precision": "bfloat16"},
        "out": str(folder),
    }
    return zoo.train(made, {"train.threads": 1}, quiet=True).path


def test_a_run_is_scored_the_same_at_every_batch_size(run):
    scores = [evaluate_run(run, {"train.eval_batch_size": size, "train.precision": "float32"}) for size in (1, 5, 12)]
    assert len({json.dumps({k: v for k, v in score.items() if k != "loss"}) for score in scores}) == 1
    assert scores[1]["loss"] == pytest.approx(scores[0]["loss"], rel=1e-5)
    assert scores[2]["loss"] == pytest.approx(scores[0]["loss"], rel=1e-5)


def test_an_example_is_answered_as_it_is_scored(run):
    """By zoo generate and by zoo show, at the run's precision and with the row's own draws."""
    from zoo.training.loading import open_run

    opened = open_run(run)
    rows = held_out(opened.parts.task, "validation", 12)
    whole = answered(opened.model, opened.parts.objective, rows, batch_size=1, precision="bfloat16")
    for row in (0, 5, 11):
        _, data = answer_example(run, row)
        assert data["predictions"] == whole.predictions[row].tolist()
        last = solve_run(run, row=row).steps[-1].sketch
        cells = [int(cell.text) + 1 for cell in last.cells]
        assert cells == data["predictions"]


def test_an_example_has_the_run_s_precision(run, monkeypatch):
    """Seen from within the model: autocast is on where the run's precision says so."""
    from zoo.models.stack import Stack

    seen, original = set(), Stack.features

    def spy(self, *args, **rest):
        seen.add(torch.is_autocast_enabled("cpu"))
        return original(self, *args, **rest)

    monkeypatch.setattr(Stack, "features", spy)
    answer_example(run, 0)
    assert seen == {True}


def test_evaluations_of_a_part_and_of_all_agree():
    """The loss is the mean over scored positions, whatever the rows' lengths: pieces weigh by theirs."""
    for name in ("next_token", "masked_diffusion"):
        model, chosen = parts(name, WORDS, {})
        rows = held_out(chosen.task, "test", 9)
        pieces = [(evaluate(model, chosen, p, batch_size=9)["loss"], p) for p in split_rows(rows, 4)]
        weights = [(p.targets != -100).sum().item() for _, p in pieces]
        mean = sum(loss * w for (loss, _), w in zip(pieces, weights, strict=True)) / sum(weights)
        assert mean == pytest.approx(evaluate(model, chosen, rows, batch_size=9)["loss"], rel=1e-9)
