from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from zoo import tasks
from zoo.tasks.protocol import IGNORE, SPLITS
from zoo.tasks.state_tracking import StateTracking, find_group


def word_problem(**options):
    return tasks.create_task("state_tracking", **options)


@pytest.mark.parametrize(
    ("name", "order", "abelian"),
    [
        ("Z2", 2, True),
        ("S2", 2, True),
        ("Z60", 60, True),
        ("S3", 6, False),
        ("A4", 12, False),
        ("A5", 60, False),
        ("S5", 120, False),
        ("S6", 720, False),
        ("A4xZ5", 60, False),
        ("S3xZ2xZ2", 24, False),
    ],
)
def test_groups_are_groups(name, order, abelian):
    table = find_group(name).table
    elements = np.arange(order)
    assert table.shape == (order, order)
    assert (table[0] == elements).all()
    assert (table[:, 0] == elements).all(), "0 is the identity"
    assert (np.sort(table, 0) == elements[:, None]).all()
    assert (np.sort(table, 1) == elements).all(), "each element once in every row and column"
    a, b, c = np.random.default_rng(0).integers(0, order, (3, 2000))
    assert (table[table[a, b], c] == table[a, table[b, c]]).all()
    assert bool((table == table.T).all()) == abelian
    assert len(set(find_group(name).names)) == order


def test_permutations_act_from_the_left():
    """(12) then (123): 1 to 2 to 3, 2 to 1 to 2, 3 to 3 to 1."""
    group = find_group("S3")
    assert group.names == ("e", "(23)", "(12)", "(123)", "(132)", "(13)")
    assert group.names[group.table[group.names.index("(12)"), group.names.index("(123)")]] == "(13)"


@pytest.mark.parametrize("n", [3, 4, 5])
def test_names_are_the_cycles(n):
    group = find_group(f"S{n}")
    for name, images in zip(group.names, itertools.permutations(range(n)), strict=True):
        cycles = [] if name == "e" else name.strip("()").split(")(")
        written = dict(zip("".join(cycles), "".join(c[1:] + c[0] for c in cycles), strict=True))
        assert all(int(written.get(str(i + 1), i + 1)) - 1 == image for i, image in enumerate(images))


CASES = [
    {},
    {"group": "Z2", "length": 20},
    {"group": "Z60", "length": 12},
    {"group": "S5", "length": 40, "elements": "swaps"},
    {"group": "S5", "length": 9, "elements": "3-cycles", "tokens_per_transition": 4},
    {"group": "A5", "length": 16, "elements": "3-cycles"},
    {"group": "A4xZ5", "length": 8, "tokens_per_transition": 2},
]


@pytest.mark.parametrize("options", CASES)
@pytest.mark.parametrize("split", SPLITS)
def test_definition(options, split):
    task = word_problem(**options)
    k, table, order = task.config.tokens_per_transition, task.group.table, len(task.group.names)
    assert task.seq_len == task.config.length * k
    assert task.vocab_size == order + (k > 1)
    batch = task.sample(30, split=split, seed=0)
    for inputs, targets in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
        product = 0
        for t in range(task.config.length):
            element, *fill = inputs[t * k : (t + 1) * k]
            *silent, target = targets[t * k : (t + 1) * k]
            product = table[product, element]
            assert fill == [order] * (k - 1)
            assert silent == [IGNORE] * (k - 1)
            assert target == product


def test_parity_is_z2():
    batch = word_problem(group="Z2", length=30).sample(20, split="train", seed=0)
    assert torch.equal(batch.targets, batch.inputs.cumsum(1) % 2)


@pytest.mark.parametrize(
    ("elements", "group", "names"),
    [
        ("all", "S3", {"e", "(12)", "(13)", "(23)", "(123)", "(132)"}),
        ("swaps", "S3", {"(12)", "(13)", "(23)"}),
        ("3-cycles", "A4", {"e", "(123)", "(132)", "(124)", "(142)", "(134)", "(143)", "(234)", "(243)"}),
    ],
)
def test_elements_are_drawn_alike(elements, group, names):
    task = word_problem(group=group, elements=elements)
    inputs = task.sample(1000, split="train", seed=0).inputs
    counts = np.bincount(inputs.flatten().numpy(), minlength=len(task.group.names))
    assert {task.group.names[i] for i in np.flatnonzero(counts)} == names
    assert (abs(counts[counts > 0] / counts.sum() * len(names) - 1) < 0.05).all()


def test_splits_have_their_own_lengths():
    task = word_problem(length=16, validation_length=32, test_length=100)
    assert task.seq_len == 100
    assert [task.sample(3, split=s, seed=0).inputs.shape for s in SPLITS] == [(3, 16), (3, 32), (3, 100)]


def test_no_row_is_in_two_splits():
    task = word_problem(group="Z2", length=12)
    seen = [{tuple(r) for r in task.sample(3000, split=s, seed=0).inputs.tolist()} for s in SPLITS]
    assert [len(s) > 300 for s in seen] == [True] * 3
    assert not any(a & b for a, b in itertools.combinations(seen, 2))


def test_score_tells_how_far_it_is_right():
    task = word_problem(group="Z2", length=40, tokens_per_transition=2)
    batch = task.sample(4, split="test", seed=0)
    score = task.score(batch, batch.targets)
    figures = {"accuracy", "exact", "scaled", "reach", "accuracy_8", "accuracy_16", "accuracy_32", "accuracy_40", "n"}
    assert score.keys() == figures | {"slices"}
    assert (score["scaled"], score["reach"], score["accuracy_40"]) == (1, 40, 1)
    predictions = batch.targets.clone()
    predictions[:, 2 * 10 + 1 :: 2] = 1 - predictions[:, 2 * 10 + 1 :: 2]  # wrong from element 11 on
    score = task.score(batch, predictions)
    assert score["reach"] == 10
    assert score["accuracy"] == 0.25
    assert score["scaled"] == -0.5
    assert [score[f"accuracy_{n}"] for n in (8, 16, 32, 40)] == [1, 0.25, 0, 0]
    assert task.score(batch, torch.zeros_like(batch.targets))["scaled"] == pytest.approx(0, abs=0.2)


def test_render():
    task = word_problem(group="S3", length=5)
    batch = task.sample(1, split="train", seed=0)
    elements, products = task.render(batch).splitlines()
    assert elements.split()[2:] == [task.group.names[i] for i in batch.inputs[0]]
    assert products.split()[1:] == [task.group.names[i] for i in batch.targets[0]]
    assert "!" not in task.render(batch, 0, batch.targets)
    assert task.render(batch, 0, batch.targets + 1).count("!") == 5


@pytest.mark.parametrize("options", [{}, {"group": "Z60"}, {"group": "S5", "tokens_per_transition": 2}])
def test_picture_marks_what_is_wrong(options):
    task = word_problem(length=12, **options)
    batch = task.sample(1, split="train", seed=0)
    predictions = batch.targets.clone()
    predictions[:, -1] = (predictions[:, -1] + 1) % len(task.group.names)
    (axes,) = task.draw(batch, 0, predictions).axes
    assert axes.get_title() == "11 of 12 products right"
    *strands, marks = axes.lines
    assert list(marks.get_xdata()) == [12]
    assert len(strands) == (1 if task.group.images is None else task.group.images.shape[1])
    for strand in strands:
        assert len(strand.get_xdata()) == 13


def test_docstring_is_true():
    lines = [line.split() for line in StateTracking.__doc__.splitlines()]
    shown = {words[0]: words[1:] for words in lines if words and words[0] in ("inputs", "targets", "products")}
    group = find_group("S3")
    products = group.products(np.array([list(map(int, shown["inputs"]))]))[0]
    assert products.tolist() == list(map(int, shown["targets"]))
    assert [group.names[i] for i in products] == shown["products"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group": "Q8"}, "group='Q8' is not known: write S3, A5, Z60, or a product"),
        ({"group": "S3x"}, "group='S3x' is not known"),
        ({"group": "S7"}, "has 5040 elements; from 2 to 1000"),
        ({"group": "S500"}, "over a million elements"),
        ({"group": "Z1"}, "has 1 elements"),
        ({"group": "Z5", "elements": "swaps"}, "elements='swaps' is for groups of permutations"),
        ({"group": "A5", "elements": "swaps"}, "A5 has too few elements that are swaps"),
        ({"group": "Z2", "length": 6}, "length=6 over 2 elements gives only 64 different rows"),
        ({"test_length": 2}, "test rows of length=2 over 6 elements gives only 36"),
        ({"tokens_per_transition": 5}, "tokens_per_transition"),
        ({"elements": "two"}, "elements='two' is not allowed"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(tasks.UsageError, match=message) as error:
        word_problem(**options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("group", "elements"),
    [*itertools.product(["S3", "S5"], ["all", "swaps", "3-cycles"]), ("A5", "all"), ("A5", "3-cycles"), ("Z60", "all")],
)
def test_program_that_moves_the_things_scores_100(group, elements):
    """Things are moved one after the other, by what each element does to them; sums are taken modulo 60."""
    task = word_problem(group=group, elements=elements, length=50)
    batch = task.sample(10, split="test", seed=0)
    said = torch.empty_like(batch.targets)
    for row, elements_of_row in enumerate(batch.inputs.tolist()):
        if group == "Z60":
            said[row] = torch.tensor(elements_of_row).cumsum(0) % 60
            continue
        n = int(group[1:])
        orders = [p for p in itertools.permutations(range(n)) if group[0] == "S" or is_even(p)]
        places = list(range(n))
        for t, element in enumerate(elements_of_row):
            places = [orders[element][place] for place in places]
            said[row, t] = orders.index(tuple(places))
    score = task.score(batch, said)
    assert score["exact"] == score["scaled"] == 1
    assert score["reach"] == 50


def is_even(order):
    return sum(a > b for a, b in itertools.combinations(order, 2)) % 2 == 0


@pytest.mark.parametrize("group", ["S3", "S5", "A5", "Z60"])
def test_guessing_scores_one_in_the_number_of_elements(group):
    task = word_problem(group=group)
    batch = task.sample(500, split="test", seed=0)
    order = len(task.group.names)
    guesses = torch.randint(order, batch.targets.shape, generator=torch.Generator().manual_seed(0))
    score = task.score(batch, guesses)
    spread = np.sqrt(1 / order * (1 - 1 / order) / batch.targets.numel())
    assert abs(score["accuracy"] - 1 / order) < 4 * spread
    assert abs(score["scaled"]) < 4 * spread / (1 - 1 / order)
