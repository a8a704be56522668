"""The task `text`."""

from __future__ import annotations

import os
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, PositiveInt
from torch import Tensor

from zoo.core.errors import UsageError
from zoo.core.options import Options
from zoo.core.readers import form_of, read_bytes, shown, unreadable
from zoo.tasks import json_lines, random, shards
from zoo.tasks.json_lines import JsonLines
from zoo.tasks.protocol import SPLITS, Batch, Split, Task, check_request, register
from zoo.tasks.question_files import Bytes, Subwords, Writing
from zoo.tasks.shards import Shards
from zoo.tasks.strings import named, picture

START = 256
"""The token before the first byte of a row."""
BLOCK = 4096
MOST_CUT = 40  # shorter texts are cut into shorter blocks, of which they then have so many
FEWEST = random.FEWEST_PLACES
"""Blocks, with which every split has one."""


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

    Tokens of subwords come from token shards (`.bin`, `.npy`, with `vocab_size`), or from JSON lines (`.jsonl`, with
    `tokenizer`). Both may be larger than memory. Their rows start with no start token.
    """

    class Config(Options):
        """Options of `text`."""

        seq_len: PositiveInt = 256
        """Bytes of a row."""
        path: str | None = None
        """A file or a folder, of at least three times `seq_len` bytes; links and hidden files are left out."""
        tokenizer: str | None = None
        """A tokenizer's JSON file (of the library `tokenizers`), for JSON lines, and to show the tokens of shards."""
        field: str | None = None
        """The field of JSON lines that holds the text, by default `text`; without a tokenizer tokens are its bytes."""
        end_token: str | None = None
        """The token behind a document of JSON lines; by default one beyond those of the tokenizer."""
        vocab_size: PositiveInt | None = Field(default=None, le=2**32)
        """Number of token ids of token shards; by default those of the tokenizer."""
        dtype: Literal["uint16", "uint32"] | None = None
        """The type of `.bin` shards; by default what their head says, else uint16."""

    layout = "next_token"
    is_language = True
    overlap: ClassVar[str | None] = "A text repeats itself: splits are disjoint places of it, not different strings."
    vocab_size = 257
    config: Config

    def __init__(self, config: Config):
        super().__init__(config)
        self.seq_len = config.seq_len
        self._source = None if config.path is None else self._open(Path(config.path))
        if self._source is not None:
            return
        steering = [name for name in config.changed() if name not in ("seq_len", "path")]
        if steering:
            told = f"{steering[0]} goes with a path of JSON lines ({', '.join(json_lines.ENDINGS)})"
            raise UsageError(f"text: {told} or of token shards ({', '.join(shards.ENDINGS)}).")
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
        if self._source is not None:
            rows = torch.from_numpy(self._source.rows(random.row_keys(split, seed, start, n), split))
            return Batch(rows[:, :-1], rows[:, 1:])
        places, size = self._places[split], self.config.seq_len
        words = random.bits(random.row_keys(split, seed, start, n), 2)
        block = places[random.below(words[:, 0], len(places))]
        room = np.minimum(self._block, len(self._bytes) - block) - size + 1
        first = block + random.below(words[:, 1], room)
        targets = torch.from_numpy(self._bytes[first[:, None] + np.arange(size)].astype(np.int64))
        inputs = torch.cat([torch.full((n, 1), START), targets[:, :-1]], 1)
        return Batch(inputs, targets)

    def render(self, batch: Batch, row: int = 0, predictions: Tensor | None = None) -> str:
        if self._source is not None:
            return self._render_tokens(batch, row, predictions)
        lines = {"text": _shown(batch.targets[row])}
        if predictions is not None:
            right = predictions[row] == batch.targets[row]
            lines["predicted"] = _shown(predictions[row])
            lines["right"] = "".join("^" if r else " " for r in right.tolist())
        return "\n".join(f"{name:<10}{line}".rstrip() for name, line in lines.items())

    def _render_tokens(self, batch: Batch, row: int, predictions: Tensor | None) -> str:
        target = batch.targets[row]
        if self._writing is None:
            return picture(*named(batch, row, predictions, str), ("inputs", "targets"))
        lines = {"text": self._said(target)}
        if predictions is not None:
            right = int((predictions[row] == target).sum())
            lines |= {"predicted": self._said(predictions[row]), "right": f"{right} of {len(target)} tokens"}
        return "\n".join(f"{name:<10}{line}".rstrip() for name, line in lines.items())

    def _said(self, tokens: Tensor) -> str:
        assert self._writing is not None
        return " ".join(self._writing.text(tokens.tolist()).split())

    def spell(self, token: int) -> str:
        return _shown(torch.tensor([token])) if self.token_is_byte else str(token)

    # ---- tokens from files

    def _open(self, path: Path) -> Shards | JsonLines | None:
        """The source of a path's tokens; None where the bytes of its files are read."""
        c = self.config
        of_shards, of_lines = c.vocab_size is not None or c.dtype is not None, c.tokenizer or c.field
        if not of_shards and not of_lines:
            if path.suffix in shards.ENDINGS:
                told = "its tokens need vocab_size, the number of token ids, or tokenizer"
                raise UsageError(f"text: {shown(path)} is a file of token ids by its name: {told}.")
            return None
        files = _files(path)
        lines = [] if of_shards else [file for file in files if file.suffix in json_lines.ENDINGS]
        tokens = [file for file in files if file.suffix in shards.ENDINGS]
        if c.end_token is not None and c.tokenizer is None:
            raise UsageError(f"text: end_token={c.end_token!r} goes with tokenizer.")
        if lines:
            writing = Bytes() if c.tokenizer is None else Subwords(self.name, c.tokenizer, c.end_token)
            self._writing, self.vocab_size = writing, writing.vocab_size
            self.token_is_byte = c.tokenizer is None
            return JsonLines(lines, c.seq_len + 1, c.field or "text", writing)
        if not tokens:
            return None
        if c.field is not None or (c.tokenizer is None and c.vocab_size is None):
            wrong = "field is for JSON lines" if c.field is not None else "vocab_size, or a tokenizer, has to be given"
            raise UsageError(f"text: {shown(path)} holds token shards: {wrong}.")
        self._writing = None if c.tokenizer is None else Subwords(self.name, c.tokenizer, c.end_token)
        known = 0 if self._writing is None else self._writing.vocab_size
        self.vocab_size, self.token_is_byte = c.vocab_size or known, False
        return Shards(tokens, c.seq_len + 1, self.vocab_size, c.dtype)

    _writing: Writing | None = None


def _shown(tokens: Tensor) -> str:
    """Bytes as one line of printable characters, one for each."""
    return "".join(chr(t) if 32 <= t < 127 else "·" for t in tokens.tolist())


def _documentation() -> bytes:
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics)).encode()


def _read(path: Path) -> bytes:
    if not os.path.isdir(path):
        return _checked(path, read_bytes(path))
    return b"\n".join(_checked(file, read_bytes(file)) for file in _files(path))


def _files(path: Path) -> list[Path]:
    """A file, or all of a folder, in order of name."""
    if not os.path.isdir(path):
        return [path]
    files: list[Path] = []
    for folder, folders, names in os.walk(path):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        found = (Path(folder, name) for name in sorted(names) if not name.startswith("."))
        files += [f for f in found if f.is_file() and not f.is_symlink()]
    if not files:
        raise UsageError(f"text: {shown(path)} holds no file; hidden ones and links are left out.")
    return files


def _checked(path: Path, data: bytes) -> bytes:
    """The bytes of a file, which is to be no text in another form that would be taught byte by byte unseen."""
    if form := form_of(data):
        raise unreadable(path, f"it is {form}")
    return data
