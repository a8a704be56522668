"""Token shards: files of token ids, `.npy` or raw `.bin`, mapped into memory and read where a row needs them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zoo.core.errors import UsageError
from zoo.core.readers import regular, shown, unreadable
from zoo.tasks import random
from zoo.tasks.random import SPLITS, Split

ENDINGS = (".bin", ".npy")
DTYPES = ("uint16", "uint32")
MOST_BYTES = 2**62
_HEAD = 1024  # bytes before the tokens in the shards of llm.c and modded-nanogpt
_MAGIC = {20240520: "uint16", 20240801: "uint32"}  # how that head begins
_BLOCK = 4096  # tokens of a block
_MOST_CUT = 40  # shorter shards are cut into shorter blocks, about this number of them


class Shards:
    """The tokens of all shards, cut into blocks, each of which belongs to one split.

    Which split a block belongs to follows from its number alone, and a row is a window within a block at a random
    place. So neither memory nor the time to start grows with the size of the files.

    Args:
        paths: of the shards, in order.
        length: tokens of a row, with the one behind it.
        vocab_size: every token is below it.
        dtype: of raw shards; by default what their head says, else uint16.

    Raises:
        UsageError: a file that is empty, of another type, or damaged, or too few tokens; says which.
    """

    def __init__(self, paths: Sequence[Path], length: int, vocab_size: int, dtype: str | None):
        self._paths, self._length, self._vocab_size = paths, length, vocab_size
        self._shards = [_open(path, dtype) for path in paths]
        sizes = np.array([len(shard) for shard in self._shards], dtype=np.int64)
        self._block = min(max(_BLOCK, 4 * length), max(length, int(sizes.sum()) // _MOST_CUT))
        counts = np.maximum(-(-(sizes - length + 1) // self._block), 0)
        self._ends = np.cumsum(counts)
        if self._ends[-1] < random.FEWEST_PLACES:
            told = f"{sizes.sum():,} tokens are too few for rows of seq_len={length - 1} in each of three splits"
            raise UsageError(f"text: the {told}: at least {random.FEWEST_PLACES * length:,} are needed in one file.")

    def rows(self, keys: random.Keys, split: Split) -> NDArray[np.int64]:
        """(n, length) tokens, a row for each key (n,)."""
        blocks = self._blocks(keys, split)
        words = random.bits(keys, 1)[:, 0]
        which = np.searchsorted(self._ends, blocks, side="right")
        rows = np.empty((len(keys), self._length), dtype=np.int64)
        for i, (shard, block) in enumerate(zip(which.tolist(), blocks.tolist(), strict=True)):
            tokens = self._shards[shard]
            start = (block - (int(self._ends[shard - 1]) if shard else 0)) * self._block
            room = min(self._block, len(tokens) - start) - self._length + 1
            first = start + int(random.below(words[i : i + 1], room)[0])
            rows[i] = tokens[first : first + self._length]
            if rows[i].max() >= self._vocab_size:
                at = int(rows[i].argmax())
                told = f"the token {first + at:,} (from 0) is {rows[i, at]}"
                fix = f"which is not below vocab_size={self._vocab_size}: vocab_size or dtype may be wrong"
                raise UsageError(f"{shown(self._paths[shard])}: {told}, {fix}.")
        return rows

    def _blocks(self, keys: random.Keys, split: Split) -> NDArray[np.int64]:
        """(n,) a block of this split for each key: drawn among all until it is one."""
        found, left, attempt = np.zeros(len(keys), dtype=np.int64), np.arange(len(keys)), 0
        while len(left):
            attempt += 1
            drawn = random.below(random.bits(random.fold(keys[left], attempt), 1)[:, 0], int(self._ends[-1]))
            right = random.split_of(random.mix(drawn)) == SPLITS.index(split)
            found[left[right]] = drawn[right]
            left = left[~right]
        return found


def _open(path: Path, dtype: str | None) -> Any:
    """A shard as an array (tokens,) that is read from the file."""
    size = regular(path, most=MOST_BYTES).stat().st_size
    if not size:
        raise unreadable(path, "it is empty")
    if path.suffix == ".npy":
        return _open_npy(path, dtype)
    with open(path, "rb") as file:
        head = file.read(_HEAD)
    magic = int.from_bytes(head[:4], "little") if len(head) == _HEAD else 0
    begins = _HEAD if magic in _MAGIC else 0
    said = _MAGIC.get(magic)
    if said is not None and dtype not in (None, said):
        raise unreadable(path, f"its head says {said}, and dtype={dtype} was given")
    kind = np.dtype(dtype or said or "uint16").newbyteorder("<")
    if (size - begins) % kind.itemsize or size == begins:
        raise unreadable(path, f"its {size - begins:,} bytes of tokens are no whole number of {kind.name} (see dtype)")
    return np.memmap(path, dtype=kind, mode="r", offset=begins)


def _open_npy(path: Path, dtype: str | None) -> Any:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError, SyntaxError) as error:
        raise unreadable(path, error) from None
    if not isinstance(array, np.ndarray) or array.ndim != 1 or array.dtype.name not in DTYPES:
        found = f"{array.dtype} of shape {array.shape}" if isinstance(array, np.ndarray) else "no array"
        raise unreadable(path, f"it holds {found}, not one row of {' or '.join(DTYPES)}")
    if not len(array):
        raise unreadable(path, "it holds no token")
    if dtype not in (None, array.dtype.name):
        raise unreadable(path, f"it holds {array.dtype.name}, and dtype={dtype} was given")
    return array


__all__ = ["DTYPES", "ENDINGS", "Shards"]
