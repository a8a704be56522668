"""The task `text`."""

from __future__ import annotations

import os
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import PositiveInt
from torch import Tensor

from zoo.core.errors import UsageError
from zoo.core.options import Options
from zoo.core.readers import form_of, read_bytes, shown, unreadable
from zoo.tasks import random
from zoo.tasks.protocol import SPLITS, Batch, Split, Task, check_request, register

START = 256
"""The token before the first byte of a row."""
BLOCK = 4096
MOST_CUT = 40  # shorter texts are cut into shorter blocks, of which they then have so many
FEWEST = max(int(np.argmax(random.split_of(random.mix(np.arange(99))) == i)) for i in range(len(SPLITS))) + 1
"""Of blocks, with which every split has one."""


@register("text")
class Text(Task):
    """Continue a text, byte by byte.

    seq_len=16, a row as a person sees it and as tokens (256 starts the row):

        ```
        P2, ... }" match        inputs   256 80 50 44 32 46 ...
                                targets   80 50 44 32 46 46 ...
        ```

    Rows are windows at random places of the text. The text is cut into blocks, each of which belongs to one split, and
    a window stays within its block. By default the text is the English that ships within Python's own documentation
    (`pydoc_data.topics`); `path` names a file, or a folder whose files are all read, in order of name.
    """

    class Config(Options):
        """Options of `text`."""

        seq_len: PositiveInt = 256
        """Bytes of a row."""
        path: str | None = None
        """A file or a folder, of at least three times `seq_len` bytes; links and hidden files are left out."""

    layout = "next_token"
    is_language = True
    overlap: ClassVar[str | None] = "A text repeats itself: splits are disjoint places of it, not different strings."
    vocab_size = 257
    config: Config

    def __init__(self, config: Config):
        super().__init__(config)
        self.seq_len = config.seq_len
        if config.path is not None:  # wrong paths are told at once
            self._places  # noqa: B018

    @cached_property
    def _bytes(self) -> NDArray[np.uint8]:
        path = self.config.path
        content = _documentation() if path is None else _read(Path(path))
        return np.frombuffer(content, dtype=np.uint8)

    @cached_property
    def _block(self) -> int:
        """Bytes of a block."""
        size = self.config.seq_len
        return min(max(BLOCK, 4 * size), max(size, len(self._bytes) // MOST_CUT))

    @cached_property
    def _places(self) -> dict[Split, NDArray[np.int64]]:
        """Where the blocks of each split start; the last one may be short."""
        size = self.config.seq_len
        starts = np.arange(0, max(len(self._bytes) - size + 1, 0), self._block)
        if len(starts) < FEWEST:
            told = f"{len(self._bytes):,} bytes are too few for rows of seq_len={size} in each of three splits"
            where = "" if self.config.path is None else f" of {shown(self.config.path)}"
            raise UsageError(f"text: the {told}{where}: at least {FEWEST * size:,} are needed.")
        split = random.split_of(random.mix(starts // self._block))
        return {name: starts[split == i] for i, name in enumerate(SPLITS)}

    def sample(self, n: int, *, split: Split, seed: int, start: int = 0) -> Batch:
        check_request(n, split, start)
        places, size = self._places[split], self.config.seq_len
        words = random.bits(random.row_keys(split, seed, start, n), 2)
        block = places[random.below(words[:, 0], len(places))]
        room = np.minimum(self._block, len(self._bytes) - block) - size + 1
        first = block + random.below(words[:, 1], room)
        targets = torch.from_numpy(self._bytes[first[:, None] + np.arange(size)].astype(np.int64))
        inputs = torch.cat([torch.full((n, 1), START), targets[:, :-1]], 1)
        return Batch(inputs, targets)

    def render(self, batch: Batch, row: int = 0, predictions: Tensor | None = None) -> str:
        lines = {"text": _shown(batch.targets[row])}
        if predictions is not None:
            right = predictions[row] == batch.targets[row]
            lines["predicted"] = _shown(predictions[row])
            lines["right"] = "".join("^" if r else " " for r in right.tolist())
        return "\n".join(f"{name:<10}{line}".rstrip() for name, line in lines.items())

    def spell(self, token: int) -> str:
        return _shown(torch.tensor([token]))


def _shown(tokens: Tensor) -> str:
    """Bytes as one line of printable characters, one for each."""
    return "".join(chr(t) if 32 <= t < 127 else "·" for t in tokens.tolist())


def _documentation() -> bytes:
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics)).encode()


def _read(path: Path) -> bytes:
    if not os.path.isdir(path):
        return _checked(path, read_bytes(path))
    files: list[Path] = []
    for folder, folders, names in os.walk(path):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        found = (Path(folder, name) for name in sorted(names) if not name.startswith("."))
        files += [f for f in found if f.is_file() and not f.is_symlink()]
    if not files:
        raise UsageError(f"text: {shown(path)} holds no file; hidden ones and links are left out.")
    return b"\n".join(_checked(file, read_bytes(file)) for file in files)


def _checked(path: Path, data: bytes) -> bytes:
    """The bytes of a file, which is to be no text in another form that would be taught byte by byte unseen."""
    if form := form_of(data):
        raise unreadable(path, f"it is {form}")
    return data
