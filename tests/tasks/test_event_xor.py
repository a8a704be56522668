from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from zoo import tasks
from zoo.tasks.protocol import IGNORE, SPLITS


def event_xor(**options):
    return tasks.create_task("event_xor", **options)


def bits_of(batch, unit=1.0):
    """The strings of bits that the events tell of."""
    assert batch.timespans.dtype == torch.float32
    for inputs, spans in zip(batch.inputs.tolist(), (batch.timespans / unit).tolist(), strict=True):
        n = sum(token > 0 for token in inputs)
        assert not any(inputs[n:])
        assert spans[n:] == [1 / unit] * (len(spans) - n)
        assert all(a != b for a, b in pairwise(inputs[:n])), "an event is a change"
        yield "".join(str(token - 1) * int(span) for token, span in zip(inputs[:n], spans[:n], strict=True))


@pytest.mark.parametrize("options", [{}, {"min_length": 12, "max_length": 12}, {"max_length": 100, "time_unit": 0.25}])
@pytest.mark.parametrize("split", SPLITS)
def test_definition(options, split):
    task = event_xor(**options)
    c = task.config
    batch = task.sample(100, split=split, seed=0)
    assert batch.inputs.shape == batch.timespans.shape == (100, c.max_length)
    for bits, targets in zip(bits_of(batch, c.time_unit), batch.targets.tolist(), strict=True):
        assert c.min_length <= len(bits) <= c.max_length
        events = 1 + sum(a != b for a, b in pairwise(bits))
        assert targets[events - 1] == 1 + bits.count("1") % 2
        assert [t for t in targets if t != IGNORE] == [targets[events - 1]]


def test_every_event_has_an_answer():
    batch = event_xor(answers="all").sample(50, split="train", seed=0)
    for inputs, spans, targets in zip(
        batch.inputs.tolist(), batch.timespans.tolist(), batch.targets.tolist(), strict=True
    ):
        ones = np.cumsum([span * (token == 2) for token, span in zip(inputs, spans, strict=True)])
        for token, n, target in zip(inputs, ones, targets, strict=True):
            assert target == (1 + n % 2 if token else IGNORE)


def test_rows_depend_only_on_their_number():
    task = event_xor()
    whole, part = task.sample(30, split="test", seed=2), task.sample(5, split="test", seed=2, start=20)
    assert torch.equal(whole.timespans[20:25], part.timespans)
    assert torch.equal(whole.targets[20:25], part.targets)


def test_no_string_is_in_two_splits():
    task = event_xor(max_length=12)
    seen = [set(bits_of(task.sample(3000, split=split, seed=0))) for split in SPLITS]
    assert [len(s) > 300 for s in seen] == [True] * 3
    assert not seen[0] & seen[1]
    assert not seen[0] & seen[2]
    assert not seen[1] & seen[2]


def test_bits_and_lengths_are_uniform():
    strings = list(bits_of(event_xor().sample(3000, split="train", seed=0)))
    assert abs("".join(strings).count("1") / sum(map(len, strings)) - 0.5) < 0.01
    counts = np.bincount([len(s) for s in strings])[8:]
    each = 3000 / 31
    assert ((counts - each) ** 2 / each).sum() < len(counts) + 6 * np.sqrt(2 * len(counts))


def test_what_counts_is_in_the_timespans():
    """Tokens alone say next to nothing: rows of the same tokens have either answer."""
    batch = event_xor().sample(2000, split="train", seed=0)
    answers: dict[bytes, list[int]] = {}
    for inputs, targets in zip(batch.inputs.numpy(), batch.targets.numpy(), strict=True):
        if 2 in inputs:  # zeros alone are even
            answers.setdefault(inputs.tobytes(), []).append(int(targets.max()))
    many = [found for found in answers.values() if len(found) > 30]
    assert many
    assert all(0.2 < np.mean(np.array(found) == 1) < 0.8 for found in many)


def test_scaled_accuracy():
    task = event_xor()
    batch = task.sample(100, split="test", seed=0)
    score = task.score(batch, torch.ones_like(batch.targets))
    assert score["scaled"] == pytest.approx(2 * score["accuracy"] - 1)
    assert task.score(batch, batch.targets)["scaled"] == 1


def test_pictures():
    task = event_xor()
    batch = task.sample(1, split="train", seed=0)
    (bits,) = bits_of(batch)
    assert task.render(batch).splitlines()[0].split() == ["bits", bits]
    assert "odd!" in task.render(batch, 0, 3 - batch.targets) or "even!" in task.render(batch, 0, 3 - batch.targets)
    assert "!" not in task.render(batch, 0, batch.targets)
    for predictions in (None, batch.targets, 3 - batch.targets):
        assert isinstance(task.draw(batch, 0, predictions), Figure)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_length": 9, "max_length": 8}, "min_length=9 is more than max_length=8"),
        ({"max_length": 5}, "min_length=2, max_length=5 gives only 60 different rows"),
        ({"time_unit": 0.0}, "time_unit"),
        ({"max_lenght": 9}, "Did you mean 'max_length'"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(tasks.UsageError, match=message) as error:
        event_xor(**options)
    assert "\n" not in str(error.value)
