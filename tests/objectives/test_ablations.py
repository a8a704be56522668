"""Every row of TRM's ablation tables, as the page about objectives has it, is a config that learns."""

from __future__ import annotations

import pathlib
import re
import shlex

import pytest
import torch

import zoo
from zoo.training.optimizer import Average, Optimizer
from zoo.training.recipes import parse_overrides, read_experiment

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "objectives.md"
ROWS = re.findall(r"^\| (.+) \| +(\d+\.\d) % \| (?:`(.+)` )?\|$", PAGE.read_text(), re.M)
PUBLISHED = {87.4, 86.1, 82.4, 79.9, 79.5, 74.7, 73.7, 56.5, 55.0, 77.6, 71.9}
"""Accuracies of tables 1 and 2 of arXiv 2510.04871."""
WIDTH, VOCABULARY, PLACES = 512, 11, 97
"""Of the authors' Sudoku: 81 cells behind 16 places of the puzzle."""
SWIGLU = 3 * WIDTH * 1536
MLP = 3 * PLACES * 512
ATTENTION = 4 * WIDTH * WIDTH
ENDS = 2 * VOCABULARY * WIDTH + WIDTH + 2 * (WIDTH + 1)
"""Embedding, head, the embedding of the one puzzle, and the halting head with its two outputs."""
SIZES = {82.4: (4, MLP, 10), 79.5: (4, MLP, 10), 74.7: (2, ATTENTION, 7), 55.0: (8, ATTENTION, 27)}
"""By accuracy, where it is not that of TRM: layers in all networks, what mixes cells, millions in the paper."""
SMALL = {"task.size": 4, "task.n_puzzles": 50, "model.d_model": 16, "train.batch_size": 3}


def experiment(overrides, **more):
    return read_experiment("sudoku-9x9-trm", {**parse_overrides(shlex.split(overrides)), **more})


def test_every_row_is_there_and_a_config_of_its_own():
    assert {float(accuracy) for _, accuracy, _ in ROWS} == PUBLISHED
    configs = [experiment(overrides).model_dump_json() for _, _, overrides in ROWS]
    assert len(set(configs)) == len(ROWS)


QUICK = "model.recursion.cycles=2 model.recursion.updates=2"
"""The row with the fewest passes: it guards the code; that the others learn too is evidence for the page."""
LEARNING = [
    pytest.param(overrides, id=name.replace(" ", "-"), marks=[] if overrides == QUICK else [pytest.mark.slow])
    for name, _, overrides in ROWS
]


@pytest.mark.parametrize("overrides", LEARNING)
def test_a_row_learns(overrides):
    """A step of training moves what should learn, the running average with it; then a puzzle is answered."""
    made = experiment(overrides, **SMALL)
    parts, config = made.build(), made.train
    torch.manual_seed(0)
    model = zoo.create_model(parts.model).train()
    optimizer = Optimizer(model, config)
    average = Average(model, config.ema) if config.ema else None
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    rows = parts.task.sample(config.batch_size, split="train", seed=0)
    for update in parts.objective.updates(model, parts.objective.encode(rows), {}, torch.Generator().manual_seed(0)):
        update.loss.backward()
        optimizer.step(config.warmup_steps)
    assert not [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    if average is not None:
        average.update(1)
    evaluated = model if average is None else average.module
    predictions, loss = parts.objective.evaluate(evaluated, parts.task.sample(2, split="test", seed=0))
    assert loss.isfinite()
    assert predictions.shape == (2, 16)


@pytest.mark.parametrize(("accuracy", "overrides"), [(row[1], row[2]) for row in ROWS], ids=[row[0] for row in ROWS])
def test_a_row_has_the_published_size(accuracy, overrides):
    """To the last parameter those of the authors' layers, and rounded those of the paper's tables."""
    with torch.device("meta"):
        model = zoo.create_model(experiment(overrides).build().model)
    layers, mixing, millions = SIZES.get(float(accuracy), (2, MLP, 5))
    expected = layers * (mixing + SWIGLU) + ENDS
    assert sum(p.numel() for p in model.parameters()) == expected
    assert round(expected / 1e6) == millions
