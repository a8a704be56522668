from __future__ import annotations

import numpy as np
import pytest

from zoo.tasks import random
from zoo.tasks.kernels import random as compiled


def test_compiled_stream_is_the_same():
    keys = random.row_keys("test", 5, 10, 3)
    for key, expected in zip(keys, random.bits(keys, 4), strict=True):
        state = np.array([key], dtype=np.uint64)
        assert [compiled.word(state) for _ in range(4)] == expected.tolist()


def test_published_splitmix64_values():
    # The reference implementation's first outputs for the seed 1234567.
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert random.bits(np.array([1234567], dtype=np.uint64), 3)[0].tolist() == expected


@pytest.mark.parametrize(("count", "bound"), [(1, 1), (3, 3), (7, 7), (64, 127), (4, 4095)])
def test_distinct_is_uniform_sampling_without_replacement(count, bound):
    n = 3000
    drawn = random.distinct(random.row_keys("train", 1, 0, n), count, bound)
    assert drawn.shape == (n, count)
    assert all(len(set(row)) == count for row in drawn.tolist())
    for column in (0, count - 1):
        frequency = np.bincount(drawn[:, column], minlength=bound)
        assert len(frequency) == bound
        chi2 = ((frequency - n / bound) ** 2 / (n / bound)).sum()
        assert chi2 <= bound + 6 * np.sqrt(2 * bound)
    assert (random.distinct(random.row_keys("train", 1, 5, 2), count, bound) == drawn[5:7]).all()


def test_compiled_split_is_the_same():
    prints = random.row_keys("train", 2, 0, 200)
    assert [compiled.split_of(f, random.SPLIT_SALT) for f in prints] == random.split_of(prints).tolist()


def test_split_shares():
    share = np.bincount(random.split_of(random.row_keys("train", 0, 0, 80_000))) / 80_000
    assert np.allclose(share, [0.75, 0.125, 0.125], atol=0.01)


def test_uniform_stays_inside():
    words = np.array([0, 2**64 - 1], dtype=np.uint64)
    low, high = random.uniform(words)
    assert 0 < low < 1e-15
    assert 1 - 1e-15 < high < 1


def test_permutation():
    assert sorted(random.permutation(random.row_keys("train", 0, 0, 1), 50)) == list(range(50))


def test_the_split_of_one_place_is_that_of_arrays():
    places = [*range(200), 2**40 + 3, 2**63]
    of_arrays = random.split_of(random.mix(np.array(places, dtype=np.uint64))).tolist()
    assert [random.split_of_place(place) for place in places] == of_arrays
