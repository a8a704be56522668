from __future__ import annotations

import re
from itertools import pairwise

import numpy as np
import pytest
import torch

from zoo import tasks
from zoo.tasks import strings
from zoo.tasks.protocol import IGNORE, SPLITS

SYMBOLS = {1: "+", 2: "-", 3: "*", 4: "="}


def language(name, **options):
    return tasks.create_task("formal_language", language=name, **options)


def rows(batch):
    """Each row's tokens without padding, and its targets."""
    for inputs, targets in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
        n = sum(token > 0 for token in inputs)
        assert not any(inputs[n:]), "padding is on the right"
        assert set(targets[n:]) <= {IGNORE}
        yield inputs[:n], targets[:n]


def expected(name, tokens, options):
    """The answer after a string, from its definition."""
    if name == "parity":
        return 1 + tokens.count(2) % 2
    if name == "even_pairs":
        changes = sum(a != b for a, b in pairwise(tokens))
        return 1 + changes % 2
    if name == "cycle_nav":
        most = options.get("max_step", 1)
        steps = [t - 1 if t <= 1 + most else 1 + most - t for t in tokens]
        return 2 + 2 * most + sum(steps) % options.get("cycle_size", 5)
    modulus = options.get("modulus", 5)
    brackets = {5 + modulus: "(", 6 + modulus: ")"}
    text = "".join({**SYMBOLS, **brackets}.get(t, str(t - 5)) for t in tokens)
    return 5 + eval(re.sub("=$", "", text)) % modulus


CASES = [
    ("parity", {}),
    ("even_pairs", {}),
    ("cycle_nav", {}),
    ("cycle_nav", {"max_step": 3, "cycle_size": 7}),
    ("modular_arithmetic", {}),
    ("modular_arithmetic", {"modulus": 11}),
    ("modular_arithmetic", {"brackets": True}),
    ("modular_arithmetic", {"brackets": True, "modulus": 7}),
]


@pytest.mark.parametrize(("name", "options"), CASES)
@pytest.mark.parametrize("split", SPLITS)
def test_definition(name, options, split):
    task = language(name, **options)
    for tokens, targets in rows(task.sample(100, split=split, seed=0)):
        assert 3 <= len(tokens) <= 40
        assert targets[:-1] == [IGNORE] * (len(tokens) - 1)
        assert targets[-1] == expected(name, tokens, options)


@pytest.mark.parametrize(("name", "options"), [c for c in CASES if "brackets" not in c[1]])
def test_every_prefix_has_an_answer(name, options):
    task = language(name, answers="all", **options)
    for tokens, targets in rows(task.sample(60, split="train", seed=0)):
        for end, target in enumerate(targets, 1):
            if target == IGNORE:
                assert name == "modular_arithmetic"
                assert end % 2 == 0, "a sign"
            else:
                assert target == expected(name, tokens[:end], options)
        assert targets[-1] != IGNORE


def test_the_answer_asked_for_changes_no_string():
    last, all_ = language("parity"), language("parity", answers="all")
    a, b = (task.sample(20, split="train", seed=0) for task in (last, all_))
    assert torch.equal(a.inputs, b.inputs)


def test_expressions_alternate():
    for tokens, _ in rows(language("modular_arithmetic").sample(50, split="train", seed=1)):
        assert all(5 <= t < 10 for t in tokens[::2])
        assert all(t in (1, 2, 3) for t in tokens[1:-1:2])
        assert tokens[-1] == 4


def test_bracketed_expressions_have_every_length_and_form():
    lengths, forms = set(), set()
    for tokens, _ in rows(language("modular_arithmetic", brackets=True).sample(3000, split="train", seed=0)):
        lengths.add(len(tokens))
        if len(tokens) < 6:
            forms.add("".join({10: "(", 11: ")", 2: "-", 4: "="}.get(t, "d") for t in tokens))
        depth = np.cumsum([(t == 10) - (t == 11) for t in tokens])
        assert depth.min() >= 0
        assert depth[-1] == 0
    assert lengths == set(range(3, 41))
    assert forms == {"-d=", "(d)=", "(-d)="}


def test_lengths_are_uniform_and_by_split():
    task = language("parity", validation_lengths=(30, 60), test_lengths=[40, 256])
    assert task.seq_len == 256
    for split, (low, high) in {"train": (3, 40), "validation": (30, 60), "test": (40, 256)}.items():
        batch = task.sample(4000, split=split, seed=0)
        assert batch.inputs.shape == (4000, high), "training is not padded to the longest test row"
        lengths = (batch.inputs > 0).sum(1).numpy()
        assert (lengths.min(), lengths.max()) == (low, high)
        counts = np.bincount(lengths)[low + 8 :]  # short strings are not all in every split
        each = 4000 / (high - low + 1)
        assert ((counts - each) ** 2 / each).sum() < len(counts) + 6 * np.sqrt(2 * len(counts))


def test_strings_are_uniform():
    batch = language("cycle_nav").sample(3000, split="train", seed=0)
    counts = np.bincount(batch.inputs[batch.inputs > 0].numpy())[1:]
    assert len(counts) == 3
    assert (abs(counts / counts.sum() - 1 / 3) < 0.01).all()
    answers = np.bincount(batch.targets[batch.targets >= 0].numpy())[4:]
    assert (abs(answers / 3000 - 0.2) < 0.03).all()


def test_a_string_is_in_one_split_whatever_the_lengths():
    short, long = language("parity", max_length=12), language("parity", max_length=12, test_lengths=(3, 30))
    seen = {}
    for task in (short, long):
        for split in SPLITS:
            found = {tuple(t) for t, _ in rows(task.sample(3000, split=split, seed=1)) if len(t) <= 12}
            seen.setdefault(split, set()).update(found)
    assert not seen["train"] & (seen["validation"] | seen["test"])
    assert not seen["validation"] & seen["test"]


def test_fingerprint_ignores_padding_and_nothing_else():
    strings_ = np.random.default_rng(0).integers(1, 3, (500, 9))
    padded = np.pad(strings_, ((0, 0), (0, 5)))
    assert (strings.fingerprint(strings_) == strings.fingerprint(padded)).all()
    assert len(np.unique(strings.fingerprint(strings_))) == len(np.unique(strings_, axis=0))


def test_buckets():
    got = strings.length_bucket(np.array([1, 2, 3, 4, 5, 6, 7, 9, 40, 48, 49, 64, 65, 256]))
    assert got.tolist() == [1, 2, 3, 4, 6, 6, 8, 12, 48, 48, 64, 64, 96, 256]
    batch = language("parity", max_length=20).sample(300, split="train", seed=0)
    assert set(batch.slices["length"].tolist()) == {3, 4, 6, 8, 12, 16, 24}


def test_scaled_accuracy():
    for name, chance in (("parity", 0.5), ("even_pairs", 0.5), ("cycle_nav", 0.2), ("modular_arithmetic", 0.2)):
        task = language(name)
        batch = task.sample(2000, split="test", seed=0)
        score = task.score(batch, batch.targets)
        assert score["scaled"] == pytest.approx(1)
        assert score["slices"]["length"]["24"]["scaled"] == pytest.approx(1)
        constant = torch.full_like(batch.targets, int(batch.targets.max()))
        score = task.score(batch, constant)
        assert score["scaled"] == pytest.approx((score["accuracy"] - chance) / (1 - chance))
        assert abs(score["scaled"]) < 0.1


def test_render():
    task = language("modular_arithmetic", min_length=6, max_length=6)
    batch = task.sample(1, split="train", seed=0)
    head, answer = task.render(batch).splitlines()
    assert eval(head.removeprefix("modular arithmetic").rstrip("=")) % 5 == int(answer.split()[1])
    wrong = torch.where(batch.targets == 5, 6, 5)
    assert task.render(batch, 0, wrong).endswith("!")
    assert "!" not in task.render(batch, 0, batch.targets)
    text = language("even_pairs").render(language("even_pairs").sample(1, split="train", seed=0))
    assert text.split()[-1] in ("even", "odd")
    long = language("parity", min_length=90, max_length=90)
    lines = long.render(long.sample(1, split="train", seed=0)).splitlines()
    assert len(lines) > 2
    assert max(map(len, lines)) <= 100


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"language": "parety"}, "Did you mean 'parity'"),
        ({"min_length": 9, "max_length": 8}, r"\(9, 8\) should be the shortest, then the longest"),
        ({"test_lengths": (9, 8)}, r"test_lengths=\(9, 8\) should be"),
        ({"test_lengths": (3, 5)}, r"test_lengths=\(3, 5\) gives only 56 different rows, too few"),
        ({"modulus": 7}, "modulus is an option of language='modular_arithmetic', not 'parity'"),
        ({"cycle_size": 7}, "cycle_size is an option of language='cycle_nav'"),
        ({"brackets": True}, "brackets is an option of"),
        ({"language": "modular_arithmetic", "brackets": True, "answers": "all"}, "no value"),
        ({"language": "modular_arithmetic", "min_length": 7, "max_length": 7}, "only 0 different"),
        ({"test_lengths": (3,)}, "test_lengths"),
        ({"max_length": 0}, "max_length"),
        ({"answers": "none"}, "answers"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(tasks.UsageError, match=message) as error:
        tasks.create_task("formal_language", **options)
    assert "\n" not in str(error.value)
