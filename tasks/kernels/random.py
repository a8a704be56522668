"""Random numbers inside compiled loops: the splitmix64 stream of `zoo.tasks.random`, its state in one uint64."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numba import njit

GAMMA = np.uint64(0x9E3779B97F4A7C15)
_M1, _M2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_S27, _S30, _S31, _S32 = np.uint64(27), np.uint64(30), np.uint64(31), np.uint64(32)


def compiled(function: Callable) -> Callable:
    """Compile on first call, without holding the GIL, and keep the machine code on disk.

    A cached kernel is renewed when its own file changes, not when a function it calls in another file does: after
    a change here, touch the other kernel files.
    """
    try:
        return njit(cache=True, nogil=True)(function)
    except RuntimeError:  # no writable folder for the cache: compile anew in each process
        return njit(nogil=True)(function)


@compiled
def mix(z):
    """The splitmix64 finaliser of one uint64."""
    z = (z ^ (z >> _S30)) * _M1
    z = (z ^ (z >> _S27)) * _M2
    return z ^ (z >> _S31)


@compiled
def split_of(fingerprint, salt):
    """`zoo.tasks.random.split_of` for one fingerprint: 0 train, 1 validation, 2 test."""
    return max(np.int64(mix(fingerprint ^ salt) >> np.uint64(61)) - 5, 0)


@compiled
def word(state):
    """The next random uint64."""
    state[0] += GAMMA
    return mix(state[0])


@compiled
def below(state, bound):
    """A random integer in [0, bound), bound < 2**31."""
    return np.int64(((word(state) >> _S32) * np.uint64(bound)) >> _S32)


@compiled
def shuffle(state, items):
    """Put the items in random order, in place."""
    for i in range(len(items) - 1, 0, -1):
        j = below(state, i + 1)
        items[i], items[j] = items[j], items[i]
