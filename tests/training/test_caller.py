"""What the caller finds as it was: every module's mode, and the process's random states."""

from __future__ import annotations

import itertools
import random
from typing import Any

import numpy as np
import pytest
import torch

import zoo
from zoo import tasks
from zoo.objectives import create_objective, list_objectives
from zoo.tasks.protocol import take
from zoo.training.evaluation import decode_rate, evaluate, evaluate_run, held_out
from zoo.training.generating import answer_example
from zoo.training.solving import solve, solve_run

MADE = {
    "task": {"name": "sudoku", "size": 4},
    "model": {"pattern": "gqa swiglu", "d_model": 16, "causal": False, "dropout": 0.1},
    "objective": "masked_diffusion",
    "train": {"steps": 3, "batch_size": 4, "eval_rows": 4, "test_rows": 4, "threads": 1, "seed": 7},
}


def modes(model):
    return [module.training for module in model.modules()]


@pytest.mark.parametrize("name", list_objectives())
def test_every_module_has_its_own_mode_back(name):
    """Of generate, of a stream, of the objectives and of evaluation, though a part was in evaluation mode already."""
    task = tasks.create_task({"regression": "oscillators", "classification": "digits"}.get(name, "sudoku"))
    chosen = create_objective(name, task, causal=name in ("next_token", "block_diffusion"))
    more: dict[str, Any] = {"recursion": {"cycles": 1, "updates": 1, "max_steps": 2}} if chosen.recursive else {}
    if chosen.series:
        needs = task.needs()
        more |= {"inputs": needs.inputs.value, "outputs": needs.outputs.value}
    else:
        more["vocab_size"] = chosen.vocab_size
    model = zoo.create_model("gqa swiglu", d_model=16, causal=chosen.causal, **more)
    model.train().backbone.eval()
    before, rows = modes(model), held_out(task, "test", 2)
    uses = [
        lambda: chosen.predict(model, rows),
        lambda: chosen.evaluate(model, rows),
        lambda: next(chosen.solve(model, rows)),  # left half way
        lambda: evaluate(model, chosen, rows, batch_size=1),
        lambda: solve(chosen, model, take(rows, slice(0, 1))),
    ]
    if chosen.causal:
        uses += [
            lambda: model.generate([[1]], 3),
            lambda: list(model.stream([[1]], 3)),
            lambda: decode_rate(model, 4),
        ]
    for use in uses:
        use()
        assert modes(model) == before


def test_streams_of_one_model_side_by_side():
    """One that ends leaves the others in evaluation mode; the last gives every module its mode back."""
    torch.manual_seed(0)
    model = zoo.create_model("2*(gqa swiglu)", d_model=16, vocab_size=12, dropout=0.5).train()
    model.backbone.eval()
    before, prompts = modes(model), [torch.tensor([1, 2, 3]), torch.tensor([4, 5, 6, 7])]
    expected = model.generate(prompts, 8)
    for ends in itertools.permutations(range(3)):
        streams = [model.stream(prompts, n) for n in (3, 8, 8)]
        got = [[next(stream).tokens] for stream in streams]
        assert not any(modes(model))
        for i in ends:
            got[i] += [step.tokens for step in streams[i]]
            assert any(modes(model)) == (i == ends[-1])
        assert modes(model) == before
        for tokens in got:
            new = torch.stack(tokens, 1)
            assert torch.equal(
                new, torch.stack([e[len(p) :][: new.shape[1]] for e, p in zip(expected, prompts, strict=True)])
            )
    stream = model.stream(prompts, 8)
    next(stream)
    model.generate(prompts, 2)
    assert not any(modes(model)), "within a stream"
    del stream
    assert modes(model) == before


# ---- random states


def states():
    """What each generator says next, without asking it to."""
    kept = random.getstate(), np.random.get_state(), torch.get_rng_state()
    drawn = random.random(), np.random.random(), torch.rand(3).tolist(), torch.initial_seed()
    random.setstate(kept[0])
    np.random.set_state(kept[1])
    torch.set_rng_state(kept[2])
    return drawn


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return zoo.train({**MADE, "out": str(tmp_path_factory.mktemp("runs") / "run")}, quiet=True).path


def test_the_caller_s_random_states_are_kept(run, tmp_path):
    random.seed(11)
    np.random.seed(12)
    torch.manual_seed(13)
    before = states()
    uses = [
        lambda: zoo.train({**MADE, "out": str(tmp_path / "new")}, quiet=True),
        lambda: zoo.train({**MADE, "out": str(tmp_path / "new")}, quiet=True),  # finished: nothing to do
        lambda: zoo.train(MADE, {"out": str(tmp_path / "muon"), "train.optimizer": "muon"}, quiet=True).load(),
        lambda: zoo.load(run),
        lambda: zoo.load(run, which="last"),
        lambda: evaluate_run(run),
        lambda: answer_example(run, 0),
        lambda: solve_run(run),
    ]
    for use in uses:
        use()
        assert states() == before
    with pytest.raises(zoo.UsageError):
        zoo.train(MADE, {"out": str(tmp_path / "no"), "train.metric": "nothing"}, quiet=True)
    with pytest.raises(zoo.UsageError):
        zoo.load(tmp_path / "nothing")
    assert states() == before


def test_a_training_does_not_depend_on_the_caller_s(run, tmp_path):
    torch.manual_seed(99)
    other = zoo.train({**MADE, "out": str(tmp_path / "other")}, quiet=True).load()
    for a, b in zip(zoo.load(run).parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
