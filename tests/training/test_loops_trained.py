"""A model with a loop, by the command: trained, interrupted, resumed, evaluated, continued token by token."""

from __future__ import annotations

from pathlib import Path

import pytest

import zoo
from zoo.cli import main
from zoo.core.run_files import read_metrics

PATTERN = 'loop(3, short_conv moe(n_experts=3, top_k=2), inject="add", exit=0.6, depth_loss=0.01)'
MODEL = [f"model.pattern={PATTERN}"]


def command(*words: str) -> int:
    """The exit status of the command."""
    try:
        main(list(words))
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_a_run_with_a_loop(recipe, outcome_of, capsys):
    assert command("train", recipe, *MODEL, "out=whole", "--quiet") == 0
    lines = [line for line in read_metrics(Path("whole")) if "loop_0_depth" in line]
    assert lines
    assert all(1 < line["loop_0_depth"] < 3 for line in lines)
    capsys.readouterr()
    assert command("eval", "whole") == 0
    assert "accuracy" in capsys.readouterr().out
    assert command("generate", "whole", "--tokens", "1 2 3", "-n", "4") == 0
    continued = [int(token) for token in capsys.readouterr().out.split()]
    model = zoo.load("whole")
    assert model.config.pattern == PATTERN
    assert continued == model.generate([[1, 2, 3]], max_new_tokens=4)[0][3:].tolist()
    layers = {"short_conv": "gru"}
    assert zoo.swap(model, layers).config.pattern == PATTERN.replace("short_conv", "gru")


def test_a_run_with_a_loop_is_resumed_to_the_same_bits(recipe, outcome_of):
    assert command("train", recipe, *MODEL, "out=whole", "--quiet") == 0
    assert command("train", recipe, *MODEL, "out=cut", "train.steps=20", "--quiet") == 0
    assert command("train", recipe, *MODEL, "out=cut", "train.steps=40", "--quiet") == 0
    assert outcome_of("cut") == outcome_of("whole")


@pytest.mark.parametrize(
    "pattern", ["loop(2, gqas)", "loop(gqa)", "loop(2, gqa, exits=0.5)", 'loop(2, gqa, norm="rms")']
)
def test_a_loop_that_is_wrong_is_refused_in_one_line(pattern, recipe, capsys):
    assert command("train", recipe, f"model.pattern={pattern}", "out=x") == 2
    assert capsys.readouterr().err.count("\n") == 1
