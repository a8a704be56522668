"""The adapter of reasoning-gym; skipped where the package is missing."""

from __future__ import annotations

import importlib.util
import random

import pytest
import torch

from zoo import tasks
from zoo.tasks.protocol import IGNORE, SPLITS
from zoo.tasks.reasoning_gym import _is_harmless

needs_package = pytest.mark.skipif(
    importlib.util.find_spec("reasoning_gym") is None, reason='needs pip install "sequence-zoo[reasoning]"'
)


def gym(**options):
    return tasks.create_task("reasoning_gym", **options)


def said(batch, row, text):
    """Predictions of one row that are this text."""
    predictions = batch.targets.clone()
    at = batch.scored[row].nonzero()[:, 0]
    tokens = [*text.encode(), 256, *[0] * len(at)][: len(at)]
    predictions[row, at] = torch.tensor(tokens)
    return predictions


@needs_package
@pytest.mark.parametrize("split", SPLITS)
def test_rows_are_questions_with_their_answers(split):
    task = gym(dataset="chain_sum", settings={"min_terms": 2, "max_terms": 3}, seq_len=128)
    before = random.getstate()
    batch = task.sample(30, split=split, seed=0)
    assert random.getstate() == before
    for inputs, targets in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
        begin = inputs.index(256)
        question = bytes(inputs[:begin]).decode()
        answer = [t for t in targets if t != IGNORE]
        assert targets[begin : begin + len(answer)] == answer
        assert inputs[begin + 1 : begin + len(answer)] == answer[:-1]
        assert answer[-1] == 256
        sum_of = question.rpartition(":")[2].strip(" =")
        assert set(sum_of) <= set("0123456789+- ")
        assert eval(sum_of) == int(bytes(answer[:-1]))


@needs_package
def test_no_question_is_in_two_splits_and_rows_depend_on_their_number():
    task = gym(dataset="coin_flip", seq_len=512)
    seen = [{tuple(row) for row in task.sample(100, split=split, seed=0).inputs.tolist()} for split in SPLITS]
    assert sum(map(len, seen)) == len(set.union(*seen))
    assert torch.equal(
        task.sample(5, split="test", seed=0, start=40).inputs,
        gym(dataset="coin_flip", seq_len=512).sample(45, split="test", seed=0).inputs[40:],
    )


@needs_package
def test_the_librarys_scorer_decides():
    """Countdown: any expression with the right value of the right numbers."""
    task = gym(dataset="countdown", seq_len=512, settings={"min_numbers": 3, "max_numbers": 3})
    batch = task.sample(8, split="test", seed=0)
    assert task.is_right(batch, batch.targets).all()
    answer = bytes(batch.targets[0][batch.scored[0]].tolist()[:-1]).decode()
    turned = f"({answer})"
    wide = batch._replace(
        targets=torch.cat([batch.targets, torch.full((8, 2), IGNORE)], 1),
        inputs=torch.nn.functional.pad(batch.inputs, (0, 2)),
    )
    end = int(wide.scored[0].nonzero()[-1])
    wide.targets[0, end + 1 : end + 3] = 256  # room for two more bytes
    right = task.is_right(wide, said(wide, 0, turned))
    assert right[0]
    assert task.right_cells(wide, said(wide, 0, turned))[0].all()
    assert not task.is_right(wide, said(wide, 0, "1"))[0]
    score = task.score(batch, torch.full_like(batch.targets, 65))
    assert score["exact"] == 0
    assert score["reward"] < 0.1


@needs_package
def test_answers_that_are_evaluated_do_no_harm(tmp_path):
    task = gym(dataset="countdown", seq_len=512)
    batch = task.sample(1, split="test", seed=0)
    file = tmp_path / "made"
    text = f"open('{file}','w')"
    inputs = torch.nn.functional.pad(batch.inputs, (0, 512))
    targets = torch.nn.functional.pad(batch.targets, (0, 512), value=IGNORE)
    targets[0, int(batch.scored[0].nonzero()[-1]) + 1 :][:400] = 256
    wide = batch._replace(inputs=inputs, targets=targets)
    assert not task.is_right(wide, said(wide, 0, text))[0]
    assert not file.exists()


@pytest.mark.parametrize(
    ("answer", "harmless"),
    [
        ("3*(4 - 12)/5", True),
        ("-x**2/2 + sin(3*x) + C", True),
        ("[['_', 'Q'], ['Q', '_']]", True),
        ("1, 2, 3", True),
        ("open('a')", False),
        ("__import__('os')", False),
        ("().__class__", False),
        ("x.y", False),
        ("9**9**9", False),
        ("9**(9**9)", False),
        ("2**1000000", False),
        ("[open][0]('a')", False),
        ("exec", True),
        ("lambda: 0", False),
        ("x if y else z;", False),
        ("sin\n(3)", True),
        ("exit\n()", False),
    ],
)
def test_what_may_be_evaluated(answer, harmless):
    assert _is_harmless(answer) == harmless


@needs_package
def test_pictures():
    task = gym()
    batch = task.sample(1, split="train", seed=0)
    assert "answer " in task.render(batch)
    assert "predicted " in task.render(batch, 0, batch.targets.clamp(min=0))


@needs_package
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": "chain_sums"}, "Did you mean 'chain_sum'"),
        ({"dataset": "composite"}, "composite"),
        ({"settings": {"size": 3}}, "settings may not have 'size'"),
        ({"settings": {"min_term": 3}}, "chain_sum refuses settings="),
        ({"settings": {"min_terms": -3}}, "chain_sum refuses settings="),
        ({"dataset": "boxnet"}, "no problem of 'boxnet' was found for the split 'train'"),
        ({"seq_len": 20}, "the shortest took"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(tasks.UsageError, match=message) as error:
        gym(**options).sample(1, split="train", seed=0)
    assert "\n" not in str(error.value)


def test_without_the_package(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(tasks.UsageError, match=r'which is missing: pip install "sequence-zoo\[reasoning\]"'):
        gym()
