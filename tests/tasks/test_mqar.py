from __future__ import annotations

import numpy as np
import pytest
import torch

from zoo import tasks
from zoo.tasks.mqar import MQAR
from zoo.tasks.protocol import IGNORE, SPLITS

CASES = [
    {},
    {"vocab_size": 8192, "seq_len": 512, "n_pairs": 64},
    {"vocab_size": 257, "seq_len": 64, "n_pairs": 16},  # no slot but its own is free
    {"vocab_size": 40, "seq_len": 32, "n_pairs": 3, "n_passes": 3, "random_non_queries": False},
    {"vocab_size": 64, "seq_len": 40, "n_pairs": (1, 2, 8), "power_a": 1.0},
    {"vocab_size": 70, "seq_len": 64, "n_pairs": 16, "n_passes": 1},
    {"n_pairs": 8, "n_updates": 4},
    {"vocab_size": 60, "seq_len": 40, "n_pairs": (3, 5), "n_updates": 3, "n_passes": 2, "random_non_queries": False},
    {"compositional": True, "n_pairs": 9},
    {"compositional": True, "vocab_size": 31, "seq_len": 30, "n_pairs": (1, 4), "random_non_queries": False},
    {"compositional": True, "vocab_size": 80, "seq_len": 78, "n_pairs": 4, "n_passes": 2, "n_updates": 4},
]


def triples(task, row, n):
    """The pairs of a row as (key, value), those of each pass and then the updates, and where the slots begin."""
    c = task.config
    width = 3 if c.compositional else 2
    context = width * (n * c.n_passes + c.n_updates)
    told = [row[i : i + width] for i in range(0, context, width)]
    pairs = [(tuple(key), value) for *key, value in told]
    return pairs, context, width


def program(task, row, n):
    """What was last told of the key that stands at each slot, at the last token of the key."""
    pairs, context, width = triples(task, row, n)
    known = dict(pairs)
    slots = range(context, len(row) - width + 1, width)
    return {at + width - 2: known.get(tuple(row[at : at + width - 1])) for at in slots}


@pytest.mark.parametrize("options", CASES)
@pytest.mark.parametrize("split", SPLITS)
def test_definition(options, split):
    task = tasks.create_task("mqar", **options)
    c = task.config
    batch = task.sample(40, split=split, seed=0)
    assert task.vocab_size == c.vocab_size
    part = c.vocab_size // (3 if c.compositional else 2)
    for inputs, targets, n in zip(
        batch.inputs.tolist(), batch.targets.tolist(), batch.slices["n_pairs"].tolist(), strict=True
    ):
        assert n in np.atleast_1d(c.n_pairs)
        pairs, context, width = triples(task, inputs, n)
        block, updates = pairs[:n], pairs[n * c.n_passes :]
        assert pairs[: n * c.n_passes] == block * c.n_passes
        keys, values = [k for k, _ in block], [v for _, v in block]
        assert len(set(keys)) == len(set(values)) == n
        assert all(1 <= k[0] < part for k in keys)
        assert all(part * (width - 1) <= v < c.vocab_size for v in [v for _, v in pairs])
        if c.compositional:
            firsts, seconds = ({k[i] for k in keys} for i in (0, 1))
            assert len(firsts) == len(seconds) == n**0.5
            assert all(part <= k < 2 * part for k in seconds)
        assert len({k for k, _ in updates}) == len(updates) == c.n_updates
        assert all(v != dict(block)[k] for k, v in updates)

        asked = [i for i, t in enumerate(targets) if t != IGNORE]
        assert all(i >= context and (i - context) % width == width - 2 for i in asked)
        queried = [tuple(inputs[i - width + 2 : i + 1]) for i in asked]
        assert sorted(queried) == sorted(keys), "each key is asked for once"
        said = program(task, inputs, n)
        assert all(targets[i] == said[i] for i in asked)
        if not c.random_non_queries:
            others = [t for i, t in enumerate(inputs) if i >= context and not {i, i + width - 2} & set(asked)]
            assert set(others) <= {0}


def test_guessing_among_the_values_of_the_row_scores_one_in_their_number():
    task = tasks.create_task("mqar", n_pairs=8)
    batch = task.sample(2000, split="test", seed=0)
    values = batch.inputs[:, 1:16:2]
    picked = torch.randint(8, batch.inputs.shape, generator=torch.Generator().manual_seed(0))
    score = task.score(batch, values.gather(1, picked))
    assert abs(score["accuracy"] - 1 / 8) < 4 * np.sqrt(1 / 8 * 7 / 8 / 16_000)
    assert score.keys() == {"accuracy", "exact", "n", "slices"}


@pytest.mark.parametrize("options", [{}, {"compositional": True, "seq_len": 128}])
def test_score_tells_keys_that_changed(options):
    task = tasks.create_task("mqar", n_pairs=(4, 9) if options else (4, 8), n_updates=3, **options)
    batch = task.sample(60, split="test", seed=0)
    score = task.score(batch, batch.targets)
    assert (score["updated"], score["stale"]) == (1, 0)
    first = torch.full_like(batch.targets, -1)
    for row, (inputs, n) in enumerate(zip(batch.inputs.tolist(), batch.slices["n_pairs"].tolist(), strict=True)):
        pairs, _, width = triples(task, inputs, n)
        known = dict(pairs[:n])  # as if nothing had come behind
        for at in (batch.targets[row] != IGNORE).nonzero().flatten().tolist():
            first[row, at] = known[tuple(inputs[at - width + 2 : at + 1])]
    score = task.score(batch, first)
    assert (score["updated"], score["stale"]) == (0, 1)
    n = batch.slices["n_pairs"].double()
    assert score["accuracy"] == pytest.approx(((n - 3) / n).mean().item())


def test_updated_keys_are_drawn_alike():
    task = tasks.create_task("mqar", vocab_size=32, seq_len=20, n_pairs=4, n_updates=1)
    inputs = task.sample(4000, split="train", seed=0).inputs.numpy()
    place = (inputs[:, :8:2] == inputs[:, 8:9]).argmax(1)
    counts = np.bincount(place, minlength=4)
    assert (abs(counts / 1000 - 1) < 0.1).all()
    old = np.take_along_axis(inputs[:, 1:8:2], place[:, None], 1)[:, 0]
    steps = np.bincount((inputs[:, 9] - old) % 16, minlength=16)
    assert steps[0] == 0
    assert (abs(steps[1:] / (4000 / 15) - 1) < 0.25).all()


def test_neither_half_of_a_key_tells_the_value():
    """The best guess from the first half of a key alone is right for one in the side of the square."""
    task = tasks.create_task("mqar", compositional=True, n_pairs=9)
    batch = task.sample(200, split="test", seed=0)
    for inputs in batch.inputs.tolist():
        pairs, _, _ = triples(task, inputs, 9)
        for half in (0, 1):
            values = {}
            for key, value in pairs:
                values.setdefault(key[half], set()).add(value)
            assert [len(v) for v in values.values()] == [3, 3, 3]


@pytest.mark.parametrize("options", [{}, {"n_updates": 2}, {"compositional": True}])
def test_no_set_of_pairs_is_in_two_splits(options):
    task = tasks.create_task(
        "mqar", vocab_size=28, seq_len=26, n_pairs=4 if "compositional" in options else 2, **options
    )
    n, seen = task.config.n_pairs, {}
    for split in SPLITS:
        rows = task.sample(400, split=split, seed=1).inputs.tolist()
        seen[split] = {frozenset(triples(task, row, n)[0][:n]) for row in rows}
        assert len(seen[split]) > 100
    assert not seen["train"] & (seen["validation"] | seen["test"])
    assert not seen["validation"] & seen["test"]


def test_docstring_is_true():
    drawn, shown = [], {}
    for line in MQAR.__doc__.splitlines():
        words = line.split()
        if words and words[0] in ("inputs", "targets"):
            shown[words[0]] = words[1:]
            if words[0] == "targets":
                drawn.append((list(map(int, shown["inputs"])), shown["targets"]))
    options = [
        {"vocab_size": 16, "seq_len": 14, "n_pairs": 2},
        {"vocab_size": 16, "seq_len": 14, "n_pairs": 2, "n_updates": 1},
        {"vocab_size": 32, "seq_len": 26, "n_pairs": 4, "compositional": True},
    ]
    for (row, targets), given in zip(drawn, options, strict=True):
        task = tasks.create_task("mqar", random_non_queries=False, **given)
        assert len(row) == task.seq_len
        said = program(task, row, given["n_pairs"])
        assert ["." if said.get(i) is None else str(said[i]) for i in range(len(row))] == targets


def test_noise_is_uniform_over_the_vocabulary():
    batch = tasks.create_task("mqar", vocab_size=100, seq_len=64, n_pairs=2).sample(2000, split="train", seed=0)
    noise = batch.inputs[:, 4:][batch.targets[:, 4:] == IGNORE]
    counts = np.bincount(noise.numpy(), minlength=100)
    expected = len(noise) / 100
    assert ((counts - expected) ** 2 / expected).sum() < 99 + 6 * np.sqrt(2 * 99)


@pytest.mark.parametrize("power_a", [0.01, 0.5, 1.0])
def test_gaps_follow_the_power_law(power_a):
    """Slots of the first and second key against drawing one after the other without replacement."""
    n, slots = 20_000, 6
    task = tasks.create_task("mqar", vocab_size=64, seq_len=16, n_pairs=2, power_a=power_a)
    batch = task.sample(n, split="train", seed=0)
    counts = np.zeros((slots, slots))
    for inputs, targets in zip(batch.inputs.numpy(), batch.targets.numpy(), strict=True):
        asked = np.flatnonzero(targets != IGNORE)
        slot = {inputs[i]: (i - 4) // 2 for i in asked}
        counts[slot[inputs[0]], slot[inputs[2]]] += 1
    p = np.arange(1, slots + 1) ** (power_a - 1.0)
    p /= p.sum()
    expected = n * np.outer(p / (1 - p), p)
    np.fill_diagonal(expected, 0)
    cells = expected > 0
    assert (counts[~cells] == 0).all()
    chi2 = ((counts - expected)[cells] ** 2 / expected[cells]).sum()
    degrees = cells.sum() - 1
    assert chi2 < degrees + 5 * np.sqrt(2 * degrees)  # one fixed seed: passes or fails for good


def test_render_shows_pairs_and_answers():
    task = tasks.create_task("mqar", vocab_size=64, seq_len=16, n_pairs=2)
    batch = task.sample(1, split="train", seed=0)
    key, value = batch.inputs[0, :2].tolist()
    assert f"[{key}>{value}]" in task.render(batch)
    wrong = batch.targets.clone()
    wrong[batch.targets == value] = 1
    assert f"[{key}>{value}] not 1" in task.render(batch, 0, wrong)


def test_render_shows_what_came_then():
    task = tasks.create_task("mqar", compositional=True, n_pairs=4, n_updates=1)
    batch = task.sample(1, split="train", seed=0)
    first, second, new = batch.inputs[0, 12:15].tolist()
    lines = task.render(batch).splitlines()
    assert lines[0].count("+") == 4
    assert lines[1] == f"then: {first}+{second}>{new}"
    assert f"[{second}>{new}]" in task.render(batch)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_len": 63}, "seq_len=63 is odd.*64"),
        ({"vocab_size": 64}, "vocab_size=64 must be more than seq_len=64.*65"),
        ({"n_pairs": 17}, "n_pairs=17.*needs 68.*at most 16 pairs, or seq_len=68"),
        ({"n_pairs": 8, "n_passes": 4}, "n_passes=4 needs 80.*at most 6"),
        ({"n_pairs": (4, 40)}, "n_pairs=40"),
        ({"n_pairs": 0}, "n_pairs"),
        ({"n_pairs": ()}, "n_pairs"),
        ({"power_a": 0.0}, "power_a"),
        ({"n_pairs": "4"}, "n_pairs"),
        ({"n_pair": 4}, "Did you mean 'n_pairs'"),
        ({"n_updates": 5}, "n_updates=5 is more than the 4 keys of a row"),
        ({"n_updates": -1}, "n_updates=-1 is not allowed"),
        ({"n_pairs": 16, "n_updates": 2}, "n_pairs=16 with n_passes=1, n_updates=2 needs 68 .* at most 15 pairs"),
        ({"compositional": True, "n_pairs": 5}, "n_pairs=5 with compositional=True should be a square, such as 4 or 9"),
        ({"compositional": True, "n_pairs": 16}, "compositional=True needs 96 positions .* take seq_len=96"),
        ({"compositional": True, "n_pairs": 9, "vocab_size": 12, "seq_len": 10}, "needs 54"),
        ({"compositional": True, "n_pairs": 4, "vocab_size": 8, "seq_len": 6}, "needs 24"),
        ({"compositional": 1}, "compositional=1 is not allowed"),
        ({"vocab_size": 6, "seq_len": 4, "n_pairs": 1}, "only 6 different"),
    ],
)
def test_wrong_sizes(options, message):
    with pytest.raises(tasks.UsageError, match=message) as error:
        tasks.create_task("mqar", **options)
    assert "\n" not in str(error.value)


def test_lists_are_taken_for_tuples():
    assert tasks.create_task("mqar", n_pairs=[2, 4]).config.n_pairs == (2, 4)
