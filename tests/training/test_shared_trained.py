"""A model with a shared block, by the command: trained, interrupted, resumed, evaluated, exported."""

from __future__ import annotations

import pytest

import zoo
from zoo.cli import main

BLOCK = 'mha(adapter_rank=2) geglu(adapter_rank=2, residual_scale=0.0), inject="wide", enters="next", out_proj=True'
PATTERN = f'2*(short_conv shared("a", {BLOCK}) gru) shared("b", moe(n_experts=3, top_k=2)) shared("b")'
MODEL = [f"model.pattern={PATTERN}"]


def command(*words: str) -> int:
    """The exit status of the command."""
    try:
        main(list(words))
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_a_run_with_a_shared_block_is_resumed_to_the_same_bits(recipe, outcome_of, capsys):
    assert command("train", recipe, *MODEL, "out=whole", "--quiet") == 0
    assert command("train", recipe, *MODEL, "out=cut", "train.steps=20", "--quiet") == 0
    assert command("train", recipe, *MODEL, "out=cut", "train.steps=40", "--quiet") == 0
    assert outcome_of("cut") == outcome_of("whole")
    assert command("eval", "whole") == 0
    assert zoo.load("whole").config.pattern == PATTERN
    capsys.readouterr()
    assert command("generate", "whole", "--tokens", "1 2 3", "-n", "4") == 0
    continued = [int(token) for token in capsys.readouterr().out.split()]
    assert continued == zoo.load("whole").generate([[1, 2, 3]], max_new_tokens=4)[0][3:].tolist()


@pytest.mark.parametrize(
    "pattern", ['shared("a")', "shared(gqa)", 'shared("a", gqa, enter="next")', 'shared("a", gru, enters="next")']
)
def test_a_shared_block_that_is_wrong_is_refused_in_one_line(pattern, recipe, capsys):
    assert command("train", recipe, f"model.pattern={pattern}", "out=x") == 2
    assert capsys.readouterr().err.count("\n") == 1
