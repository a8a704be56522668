"""TRM and HRM against what their authors' code computes, recorded by `record_trm.py`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import zoo
from zoo.interop.trm import from_authors, to_authors
from zoo.objectives import create_objective
from zoo.tasks import Batch, create_task

RECORD = Path(__file__).parent / "trm_authors.safetensors"
CASES = ("attention", "mlp", "learned", "hrm")
TOLERANCE = 3e-5


@pytest.fixture(params=CASES)
def recorded(request):
    """(name, config, tensors) of a case."""
    with safe_open(RECORD, framework="pt") as file:
        config = json.loads(file.metadata()["configs"])[request.param]
        prefix = f"{request.param}/"
        tensors = {n.removeprefix(prefix): file.get_tensor(n) for n in file.keys() if n.startswith(prefix)}  # noqa: SIM118
    return request.param, config, tensors


def weights_of(tensors):
    return {n.removeprefix("weights."): t for n, t in tensors.items() if n.startswith("weights.")}


def test_every_supervision_step(recorded):
    _, config, tensors = recorded
    model, state = from_authors(weights_of(tensors), config), None
    for i in range(len(tensors["logits"])):
        thought = model.think(tensors["tokens"][0], state, puzzles=tensors["puzzles"])
        state = thought.state
        for ours, theirs in (
            (model.logits(thought.hidden), "logits"),
            (thought.halt, "halt"),
            (thought.go_on, "go_on"),
        ):
            torch.testing.assert_close(ours, tensors[theirs][i], rtol=TOLERANCE, atol=TOLERANCE)


def test_the_loss_of_every_update_and_who_halts(recorded):
    name, config, tensors = recorded
    model = from_authors(weights_of(tensors), config)
    task = create_task("sudoku", size=4)  # any with cells: rows are given below
    options = {"exploration": 0.0, "halting": "q" if name == "hrm" else "halt"}
    objective = create_objective("deep_supervision", task, causal=False, **options)
    carry, generator = {}, torch.Generator()
    for i, (inputs, labels) in enumerate(zip(tensors["tokens"], tensors["labels"], strict=True)):
        (update,) = objective.updates(model, objective.encode(Batch(inputs, labels)), carry, generator)
        torch.testing.assert_close(update.loss, tensors["losses"][i], rtol=TOLERANCE, atol=TOLERANCE)
        assert torch.equal(carry["halted"], tensors["halted"][i])
    assert 0 < tensors["halted"].float().mean() < 1


@pytest.mark.parametrize(
    ("weights", "config", "told"),
    [
        (None, {}, "a mapping of names to tensors"),
        ({"inner.lm_head.weight": [1.0]}, {}, "a mapping of names to tensors"),
        ({}, None, "a mapping of model options, not a NoneType"),
    ],
)
def test_what_is_no_checkpoint(weights, config, told):
    with pytest.raises(zoo.UsageError, match=told):
        from_authors(weights, config)


def test_there_and_back(recorded):
    _, config, tensors = recorded
    weights = weights_of(tensors)
    back = to_authors(from_authors({f"_orig_mod.model.{n}": t for n, t in weights.items()}, config))
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[n], t) for n, t in weights.items())


def test_what_does_not_fit_is_told(recorded):
    _, config, tensors = recorded
    weights = weights_of(tensors)
    head = weights.pop("inner.lm_head.weight")
    for given, options, message in [
        (weights, {}, "1 weights are missing: inner.lm_head.weight"),
        ({**weights, "inner.lm_head.weight": head, "inner.extra": head}, {}, "1 weights are not expected: inner.extra"),
        ({**weights, "inner.lm_head.weight": head[1:]}, {}, r"lm_head.weight \(6, 16\) for head.weight \(7, 16\)"),
        (weights, {"pos_encodings": "alibi"}, "pos_encodings='alibi' is not supported"),
        (weights, {"depth": 3}, "depth=3 is not supported"),
    ]:
        with pytest.raises(zoo.UsageError, match=message) as refusal:
            from_authors(given, {**config, **options})
        assert "\n" not in str(refusal.value)
