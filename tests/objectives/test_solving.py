"""Answers step by step: every objective's last step is what evaluation scores, and steps before it hide the rest."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

import zoo
from zoo.objectives import create_objective, list_objectives
from zoo.objectives.base import objectives
from zoo.tasks import create_task
from zoo.tasks.protocol import IGNORE

SUDOKU = create_task("sudoku", size=4, max_givens=6)
MQAR = create_task("mqar", seq_len=16, n_pairs=2, vocab_size=20)
TRACE = create_task("code_trace", seq_len=256, max_statements=2)
TEXT = create_task("text", seq_len=16)
THOUGHT = {"recursion": {"cycles": 1, "updates": 2, "max_steps": 3}}
CASES = {
    "left to right": (SUDOKU, {"name": "next_token"}, {}),
    "at once": (SUDOKU, {"name": "next_token"}, {"causal": False}),
    "given tokens": (MQAR, {"name": "next_token"}, {}),
    "own tokens": (TRACE, {"name": "next_token", "free_running": True}, {}),
    "unmasking": (SUDOKU, {"name": "masked_diffusion"}, {"causal": False}),
    "random order": (SUDOKU, {"name": "masked_diffusion", "order": "random", "steps": 4}, {"causal": False}),
    "masking anew": (SUDOKU, {"name": "masked_diffusion", "order": "low_confidence"}, {"causal": False}),
    "a copy": (MQAR, {"name": "masked_diffusion"}, {"causal": False}),
    "halves": (TEXT, {"name": "masked_diffusion"}, {"causal": False}),
    "blocks": (SUDOKU, {"name": "block_diffusion"}, {}),
    "blocks behind": (MQAR, {"name": "block_diffusion", "block_length": 3}, {}),
    "halves of blocks": (TEXT, {"name": "block_diffusion", "block_length": 5}, {}),
    "correcting": (SUDOKU, {"name": "uniform_diffusion", "steps": 5}, {"causal": False}),
    "corrected halves": (TEXT, {"name": "uniform_diffusion"}, {"causal": False}),
    "thinking": (SUDOKU, {"name": "deep_supervision"}, {"causal": False, **THOUGHT}),
    "several starts": (SUDOKU, {"name": "deep_supervision", "starts": 3}, {"causal": False, **THOUGHT}),
    "blanks behind": (MQAR, {"name": "deep_supervision", "eval_steps": 5}, {"causal": False, **THOUGHT}),
}


def parts(case):
    task, options, model = CASES[case]
    chosen = create_objective(options, task, causal=model.get("causal", True))
    torch.manual_seed(0)
    pattern = "gqa swiglu" if chosen.causal else "gqa(rope=False) swiglu"
    made = zoo.create_model(pattern, d_model=32, vocab_size=chosen.vocab_size, **model)
    torch.nn.init.normal_(made.embedding.weight)  # answers that differ from cell to cell
    return task.sample(5, split="validation", seed=0), chosen, made


def test_every_objective_is_here():
    of_tokens = {name for name in list_objectives() if not objectives[name].series}  # series are drawn as plots
    assert {options["name"] for _, options, _ in CASES.values()} == of_tokens


@pytest.mark.parametrize("case", CASES)
def test_the_last_step_is_what_is_scored(case):
    rows, chosen, model = parts(case)
    frames = list(chosen.solve(model, rows))
    predictions, _ = chosen.evaluate(model, rows)
    cells = rows.targets != IGNORE
    assert torch.equal(frames[-1].tokens[cells], predictions[cells])
    assert torch.equal(chosen.predict(model, rows)[cells], predictions[cells])
    assert not frames[-1].hidden.any()
    for frame in frames:
        assert frame.tokens.shape == frame.hidden.shape == rows.inputs.shape
        assert not (frame.hidden & ~cells).any()
        assert torch.equal(frame.tokens[frame.hidden], rows.inputs[frame.hidden])
        assert frame.tokens.max() < chosen.vocab_size
        assert (frame.halting is not None) == chosen.recursive


def hidden(frames):
    return [frame.hidden[0].sum().item() for frame in frames]


def test_steps():
    """As many as cells or supervision steps; what is hidden shrinks, or may grow where masks come anew."""
    rows, chosen, model = parts("left to right")
    assert hidden(chosen.solve(model, rows)) == list(range(15, -1, -1))
    rows, chosen, model = parts("unmasking")
    blank = (rows.inputs == SUDOKU.blank).sum(1)
    frames = list(chosen.solve(model, rows))
    assert len(frames) == blank.max()
    for before, after in pairwise(frames):
        assert not (after.hidden & ~before.hidden).any()
        assert torch.equal(after.tokens[~before.hidden], before.tokens[~before.hidden])
    assert not (frames[0].hidden & (rows.inputs != SUDOKU.blank)).any()
    rows, chosen, model = parts("blanks behind")
    assert hidden(chosen.solve(model, rows)) == [0] * 5
    rows, chosen, model = parts("at once")
    assert hidden(chosen.solve(model, rows)) == [0]
    rows, chosen, model = parts("halves")
    first, last = chosen.solve(model, rows)
    assert 0 < first.hidden.sum() < first.hidden.numel()
    assert torch.equal(first.tokens[~first.hidden], last.tokens[~first.hidden])


def test_every_step_of_the_favourite_start():
    rows, chosen, model = parts("several starts")
    torch.nn.init.normal_(model.halting.weight)
    frames = list(chosen.solve(model, rows))
    data = chosen.encode(rows)
    starts = [[thought for _, thought in chosen.walk(model, data, attempt)] for attempt in chosen.attempts()]
    favourite = torch.stack([thoughts[-1].halt for thoughts in starts]).argmax(0)
    assert len(favourite.unique()) > 1
    for row, start in enumerate(favourite.tolist()):
        for frame, thought in zip(frames, starts[start], strict=True):
            assert frame.halting[row] == thought.halt[row].sigmoid()
            assert torch.equal(frame.tokens[row], model.logits(thought.hidden)[row, :, : SUDOKU.vocab_size].argmax(-1))


@pytest.mark.parametrize(
    ("case", "name"), [("left to right", "token"), ("at once", "step"), ("unmasking", "pass"), ("thinking", "step")]
)
def test_steps_have_names(case, name):
    assert parts(case)[1].step_name == name
