from __future__ import annotations

import numpy as np
import pytest
import torch

from zoo import tasks
from zoo.tasks.addition import END, EQUALS, PLUS, ZERO
from zoo.tasks.protocol import IGNORE, SPLITS


def addition(**options):
    return tasks.create_task("addition", **options)


def read(task, inputs, targets):
    """Both numbers and their sum as the row writes them."""
    plus, equals = inputs.index(PLUS), inputs.index(EQUALS)
    answer = [t for t in targets if t != IGNORE]
    assert targets[equals : equals + len(answer)] == answer
    assert answer[-1] == END
    assert inputs[equals + 1 : equals + len(answer)] == answer[:-1]
    assert not any(inputs[equals + len(answer) :])
    words = ["".join(str(t - ZERO) for t in part) for part in (inputs[:plus], inputs[plus + 1 : equals], answer[:-1])]
    order = task.config.order
    a, b, total = (
        word[::-1] if order != "plain" and (i == 2 or order == "reverse_all") else word for i, word in enumerate(words)
    )
    return a, b, total


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"order": "reverse_answer", "min_digits": 4, "max_digits": 30, "test_digits": (31, 60)},
        {"order": "reverse_all", "same_length": False, "validation_digits": (12, 12)},
    ],
)
@pytest.mark.parametrize("split", SPLITS)
def test_rows(options, split):
    task = addition(**options)
    c = task.config
    batch = task.sample(100, split=split, seed=0)
    low, high = {"validation": c.validation_digits, "test": c.test_digits}.get(split) or (c.min_digits, c.max_digits)
    seen, shorter = set(), [0, 0]
    rows = zip(batch.inputs.tolist(), batch.targets.tolist(), *(v.tolist() for v in batch.slices.values()), strict=True)
    for inputs, targets, digits, carries in rows:
        a, b, total = read(task, inputs, targets)
        assert int(a) + int(b) == int(total)
        assert str(int(total)) == total
        assert str(int(a)) == a
        assert str(int(b)) == b
        assert max(len(a), len(b)) == digits
        assert low <= min(len(a), len(b))
        assert digits <= high
        assert len(a) == len(b) or not c.same_length
        shorter = [shorter[0] + (len(a) < len(b)), shorter[1] + (len(b) < len(a))]
        seen.add(digits)
        chain, best, carry = 0, 0, 0
        for i in range(1, digits + 1):
            carry = (int(a[-i] if i <= len(a) else 0) + int(b[-i] if i <= len(b) else 0) + carry) // 10
            chain = chain + 1 if carry else 0
            best = max(best, chain)
        assert best <= carries <= 1.5 * best
    assert len(seen) > 0.6 * min(high - low + 1, 30)
    assert c.same_length or low == high or min(shorter) > 15, "either may be the shorter one"


def test_a_pair_of_numbers_is_in_one_split_in_either_order():
    task = addition(max_digits=2, min_digits=2)
    pairs = []
    for split in SPLITS:
        batch = task.sample(2000, split=split, seed=0)
        rows = zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True)
        pairs.append({frozenset(read(task, *row)[:2]) for row in rows})
        assert len(task.problems(batch).unique()) == len(pairs[-1])
    assert not pairs[0] & pairs[1]
    assert not pairs[0] & pairs[2]
    assert not pairs[1] & pairs[2]
    assert sum(map(len, pairs)) > 2300, "of 4005 pairs"


def test_a_pair_has_one_name_at_any_length_of_the_splits():
    short, long = addition(max_digits=3), addition(max_digits=3, test_digits=(40, 40), order="reverse_all")
    a, b = (task.sample(300, split="train", seed=0) for task in (short, long))
    assert torch.equal(short.problems(a), long.problems(b))


def test_chance():
    task = addition(min_digits=8, max_digits=8)
    batch = task.sample(2000, split="test", seed=0)
    said = torch.randint(ZERO, ZERO + 10, batch.targets.shape, generator=torch.Generator().manual_seed(0))
    digits = (batch.targets != IGNORE) & (batch.targets != END)
    assert (said == batch.targets)[digits].double().mean() == pytest.approx(0.1, abs=0.01)
    assert task.score(batch, said)["exact"] == 0


def test_lengths_are_uniform():
    digits = addition().sample(3000, split="train", seed=0).slices["digits"].numpy()
    counts = np.bincount(digits)[2:]
    assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() < 40


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_digits": 4, "max_digits": 3}, r"min_digits and max_digits=\(4, 3\) should be the fewest"),
        ({"test_digits": [5, 4]}, r"test_digits=\(5, 4\) should be the fewest"),
        ({"validation_digits": [1, 1]}, "gives only 40 different rows"),
        ({"order": "reverse"}, "order"),
        ({"digits": 9}, "digits"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(tasks.UsageError, match=message) as error:
        addition(**options)
    assert "\n" not in str(error.value)
