from __future__ import annotations

import numpy as np
import pytest

import tasks
from tasks.protocol import IGNORE, SPLITS

CASES = [
    {},
    {"vocab_size": 8192, "seq_len": 512, "n_pairs": 64},
    {"vocab_size": 257, "seq_len": 64, "n_pairs": 16},  # no slot but its own is free
    {"vocab_size": 40, "seq_len": 32, "n_pairs": 3, "n_passes": 3, "random_non_queries": False},
    {"vocab_size": 64, "seq_len": 40, "n_pairs": (1, 2, 8), "power_a": 1.0},
    {"vocab_size": 70, "seq_len": 64, "n_pairs": 16, "n_passes": 1},
]


@pytest.mark.parametrize("options", CASES)
@pytest.mark.parametrize("split", SPLITS)
def test_definition(options, split):
    task = tasks.create_task("mqar", **options)
    c = task.config
    batch = task.sample(40, split=split, seed=0)
    assert task.vocab_size == c.vocab_size
    for inputs, targets, n in zip(
        batch.inputs.tolist(), batch.targets.tolist(), batch.slices["n_pairs"].tolist(), strict=True
    ):
        assert n in np.atleast_1d(c.n_pairs)
        block, context = inputs[: 2 * n], 2 * n * c.n_passes
        assert inputs[:context] == block * c.n_passes
        keys, values = block[::2], block[1::2]
        assert len(set(keys)) == len(set(values)) == n
        assert all(1 <= k < c.vocab_size // 2 for k in keys)
        assert all(c.vocab_size // 2 <= v < c.vocab_size for v in values)

        asked = [i for i, t in enumerate(targets) if t != IGNORE]
        assert all(i >= context and (i - context) % 2 == 0 for i in asked)
        assert sorted(inputs[i] for i in asked) == sorted(keys), "each key is asked for once"
        value_of = dict(zip(keys, values, strict=True))
        assert all(targets[i] == value_of[inputs[i]] for i in asked)
        others = [t for i, t in enumerate(inputs) if i >= context and i not in asked]
        if not c.random_non_queries:
            assert set(others) <= {0}


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


def test_no_set_of_pairs_is_in_two_splits():
    task = tasks.create_task("mqar", vocab_size=20, seq_len=8, n_pairs=2)
    seen = {}
    for split in SPLITS:
        block = task.sample(2000, split=split, seed=1).inputs[:, :4].numpy()
        seen[split] = {frozenset([(a, b), (c, d)]) for a, b, c, d in block.tolist()}
        assert len(seen[split]) > 100
    assert not seen["train"] & (seen["validation"] | seen["test"])
    assert not seen["validation"] & seen["test"]


def test_render_shows_pairs_and_answers():
    task = tasks.create_task("mqar", vocab_size=64, seq_len=16, n_pairs=2)
    batch = task.sample(1, split="train", seed=0)
    key, value = batch.inputs[0, :2].tolist()
    assert f"[{key}>{value}]" in task.render(batch)
    wrong = batch.targets.clone()
    wrong[batch.targets == value] = 1
    assert f"[{key}>{value}] not 1" in task.render(batch, 0, wrong)


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
        ({"vocab_size": 6, "seq_len": 4, "n_pairs": 1}, "only 6 different"),
    ],
)
def test_wrong_sizes(options, message):
    with pytest.raises(tasks.UsageError, match=message) as error:
        tasks.create_task("mqar", **options)
    assert "\n" not in str(error.value)


def test_lists_are_taken_for_tuples():
    assert tasks.create_task("mqar", n_pairs=[2, 4]).config.n_pairs == (2, 4)
