"""Counter-based random numbers: any row of any stream can be drawn alone.

Every number is a hash of a key and a counter (the splitmix64 finaliser of Steele, Lea and Flood, 2014), so nothing
depends on what was drawn before, on the batch, or on the process. All keys are uint64 arrays.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Iterable
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")

Keys = NDArray[np.uint64]

GAMMA = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1
SPLIT_SALT = np.uint64(0x5EED)
_TURNS = 6  # of a Feistel network


def mix(x: ArrayLike) -> Keys:
    """The splitmix64 finaliser: a bijection of uint64 whose every output bit depends on every input bit."""
    z = np.array(x, dtype=np.uint64, ndmin=1)  # at least 1-D: numpy warns of overflow in scalars only
    z ^= z >> np.uint64(30)
    z *= np.uint64(0xBF58476D1CE4E5B9)
    z ^= z >> np.uint64(27)
    z *= np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return z


def row_keys(split: Split, seed: int, start: int, n: int) -> Keys:
    """(n,) the keys of rows start ... start + n - 1 of the stream (split, seed)."""
    stream = fold(mix(operator.index(seed) & _MASK), SPLITS.index(split))
    return fold(stream, np.arange(start, start + n, dtype=np.uint64))


def fold(keys: Keys, tag: ArrayLike) -> Keys:
    """New keys from old ones and tags (broadcast): one for each purpose that must not share its numbers."""
    return mix(keys + mix(np.asarray(tag, dtype=np.uint64) + np.uint64(1)))


def bits(keys: Keys, count: int) -> Keys:
    """(..., count) random words of each key (...): the first `count` outputs of splitmix64 seeded with it."""
    steps = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(GAMMA)
    return mix(keys[..., None] + steps)


def below(words: Keys, bound: ArrayLike) -> NDArray[np.int64]:
    """Integers in [0, bound), bound < 2**31, from random words; the bias is under bound / 2**32."""
    return (((words >> np.uint64(32)) * np.asarray(bound, dtype=np.uint64)) >> np.uint64(32)).astype(np.int64)


def uniform(words: Keys) -> NDArray[np.float64]:
    """Floats in the open interval (0, 1) from random words."""
    return ((words >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52


def distinct(keys: Keys, count: int, bound: int) -> NDArray[np.int64]:
    """(n, count) different integers in [0, bound) for each of n keys, in random order; needs count <= bound.

    The first `count` new values of an endless stream of independent draws, which is sampling without replacement and
    costs nothing for the values not drawn.
    """
    draws = count + count * count // bound + 8
    while True:
        values = below(bits(keys, draws), bound)
        repeated = repeats(values)
        rank = np.cumsum(~repeated, axis=1)
        if (rank[:, -1] >= count).all():
            return values[~repeated & (rank <= count)].reshape(len(keys), count)
        draws *= 2


def repeats(values: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether the same value stands further left in its row, (n, m) of (n, m)."""
    order = np.argsort(values, axis=1, kind="stable")
    ordered = np.take_along_axis(values, order, axis=1)
    repeated = np.zeros(values.shape, dtype=bool)
    np.put_along_axis(repeated, order[:, 1:], ordered[:, 1:] == ordered[:, :-1], axis=1)
    return repeated


def split_of(fingerprints: Keys) -> NDArray[np.int64]:
    """The index in `SPLITS` to which instances belong: 3/4 train, 1/8 validation, 1/8 test, by hash."""
    eighth = (mix(fingerprints ^ SPLIT_SALT) >> np.uint64(61)).astype(np.int64)
    return np.clip(eighth - 5, 0, 2)


def split_of_place(place: int) -> int:
    """`split_of(mix(place))` of one place, in whole numbers of Python: for a single one much faster than arrays."""
    z = place
    for salt in (0, int(SPLIT_SALT)):
        z ^= salt
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & _MASK
        z = (z ^ z >> 27) * 0x94D049BB133111EB & _MASK
        z ^= z >> 31
    return min(max((z >> 61) - 5, 0), 2)


FEWEST_PLACES = max(int(np.argmax(split_of(mix(np.arange(99))) == i)) for i in range(len(SPLITS))) + 1
"""Of places numbered from 0, with which every split has one."""


def contents(rows: Iterable[NDArray]) -> Keys:
    """(n,) a hash of the bytes of each row."""
    digests = b"".join(hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in rows)
    return np.frombuffer(digests, dtype="<u8").astype(np.uint64)


def permutation(key: Keys, n: int) -> NDArray[np.int64]:
    """A random order of 0 ... n - 1 from one key (1,)."""
    return np.argsort(bits(key, n)[0], kind="stable")


def shuffled(keys: Keys, places: NDArray[np.int64], n: int) -> NDArray[np.int64]:
    """(m,) where places (m,) lie in a random order of 0 ... n - 1, an order for each key (m,), without memory for it.

    A Feistel network permutes the next power of four; what falls beyond n is permuted again.
    """
    half = np.uint64(max((int(n - 1).bit_length() + 1) // 2, 1))
    low = (np.uint64(1) << half) - np.uint64(1)
    found, left = places.astype(np.uint64), np.arange(len(places))
    while len(left):
        a, b = found[left] >> half, found[left] & low
        for turn in range(_TURNS):
            a, b = b, a ^ (fold(fold(keys[left], turn), b) & low)
        found[left] = a << half | b
        left = left[found[left] >= np.uint64(n)]
    return found.astype(np.int64)
