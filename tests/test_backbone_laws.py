"""Whole backbones under the law book: loops, shared blocks, shortcuts and parallel words, nested, in training and in
evaluation."""

from __future__ import annotations

import functools

import pytest
import torch

import zoo.backbone
from zoo.laws import LAWS, Check, plan
from zoo.laws.cases import backbone_cases
from zoo.loops import LoopStep
from zoo.pattern import LoopOptions, SharedOptions, parse
from zoo.shared import SharedStep


@functools.cache
def cases(device: str = "cpu"):
    return backbone_cases(device)


def judge(checks: list[Check]) -> None:
    findings = [check.find() for check in checks]
    broken = [str(finding) for finding in findings if finding.broken]
    assert not broken, "\n".join(broken)
    refused = [f.subject for f in findings if f.law.number == 13 and f.note and "refused" in f.note]
    assert all("gradient=" in subject for subject in refused)


@pytest.mark.parametrize("law", LAWS)
def test_law(law):
    judge(plan(LAWS[law], cases()[:3]))


@pytest.mark.slow
@pytest.mark.parametrize("law", LAWS)
def test_law_in_every_case(law):
    done = plan(LAWS[law], cases()[:3])
    judge([check for check in plan(LAWS[law], cases(), thorough=True) if check not in done])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("law", LAWS)
def test_law_on_a_gpu(law):
    judge(plan(LAWS[law], cases("cuda")))


def test_the_cases_have_every_node_and_every_option():
    loops = [m for case in cases() for m in case.build().modules() if isinstance(m, LoopStep)]
    changed = {name for loop in loops for name in loop.options.changed()}
    assert changed == set(LoopOptions.model_fields)
    uses = [m for case in cases() for m in case.build().modules() if isinstance(m, SharedStep)]
    assert {name for use in uses for name in use.options.changed()} == set(SharedOptions.model_fields)
    text = " ".join(case.options["pattern"] for case in cases())
    assert all(part in text for part in ("loop(", "shared(", "shortcut(", " | ", "bidirectional("))
    for case in cases():
        assert str(parse(case.options["pattern"])) == case.options["pattern"]


def test_tokens_leave_the_loops_at_several_passes():
    """Without that, the laws would say nothing of leaving early."""
    case = next(case for case in cases() if case.options.get("evaluate"))
    mixer, context = case.build(), zoo.Context()
    mixer(torch.randn(2, 40, mixer.d_model, generator=torch.Generator().manual_seed(0)).double(), None, context)
    for name, depth in context.metrics.items():
        assert 1 < depth < 2, name


def test_a_skipped_pass_that_writes_no_state_breaks_the_laws(monkeypatch):
    case = next(case for case in cases() if case.options.get("evaluate"))
    monkeypatch.setattr(zoo.backbone, "stateless", lambda step: True)
    check = Check(LAWS["chunk consistency"], case, torch.float64, {"n": 21})
    assert check.find().broken
    monkeypatch.undo()
    assert not check.find().broken


@pytest.mark.parametrize(
    ("word", "shown", "n"),
    [
        ("gru loop(4, gqa swiglu) gru", "gru loop(4, gqa swiglu) gru: every law holds", 1),
        ("loop( 2, gru,exit=0.5)", "loop( 2, gru,exit=0.5): every law holds", 2),
        ("bidirectional(gru) 2*swiglu", ": every law holds", 1),
        ('gqa(placement="post")', ": every law holds", 1),
    ],
)
def test_the_command_judges_a_pattern(word, shown, n, capsys):
    from zoo.cli import app

    with pytest.raises(SystemExit) as end:
        app(["laws", word, "--law", "contract", "--law", "causality"])
    assert end.value.code == 0
    assert shown in capsys.readouterr().out
    assert len(zoo.laws.cases.cases_of_word(word)) == n


@pytest.mark.parametrize("word", ["loop(2, swiglus)", "loop(2)", "gru bidirectional(gru)"])
def test_a_pattern_that_cannot_be_judged_is_refused_in_one_line(word):
    with pytest.raises(zoo.UsageError) as refusal:
        zoo.laws.cases.cases_of_word(word)
    assert "\n" not in str(refusal.value)
