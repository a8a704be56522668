"""The study of a recursive model's step: its floor has the products that the step has."""

from __future__ import annotations

import pytest

import zoo
from zoo import tasks
from zoo.benchmarks.studies.trm_step import Floor, Ours, fastest, ratio
from zoo.objectives import create_objective

WIDTH, CELLS = 32, 16


@pytest.mark.parametrize(("recompute", "share"), [(False, 1 + 2 / 3), (True, 1 + 3 / 3)])
def test_the_floor_has_the_products_of_all_layers(recompute, share):
    task = tasks.create_task("sudoku", size=4)
    objective = create_objective("deep_supervision", task, causal=False, exploration=0.0)
    model = zoo.create_model(
        "token_mlp(length=20, d_hidden=24) swiglu",
        d_model=WIDTH,
        vocab_size=objective.vocab_size,
        causal=False,
        placement="post",
        recursion={"cycles": 3, "updates": 2, "prefix": 4},
    )
    step = Ours(model, objective, task.sample(4, split="train", seed=0), recompute=recompute)
    floor = Floor(step)
    layers = 4 * CELLS * (model.flops_per_token(CELLS) - 2 * WIDTH * objective.vocab_size)
    assert floor.flops == pytest.approx(layers * share)
    assert len(floor.products) == 2 * 6  # two layers, two products forward and four backward
    floor()
    assert step() > 0


def test_a_product_has_its_shape_in_the_fastest_form():
    assert sorted(fastest(6, 40, 10)().shape) == [6, 10]


def test_ratios_are_of_neighbours():
    assert ratio([2.0, 4.0, 9.0], [1.0, 4.0, 3.0]) == [2.0, 1.5, 2.5]
