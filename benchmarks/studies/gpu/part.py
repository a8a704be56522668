"""What a part is: items to measure, in the order of their importance, and how their rows are shown."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]
"""What is known of an item, for JSON; `status` is one of those below, `why` explains all but OK in one line. A row with
`more` is continued by the next session."""
OK, NOT_OFFERED, NO_MEMORY = "ok", "not offered", "no memory"
FAILED, OVER, CRASHED = "failed", "stopped by its limit", "crashed"
SETTLED = (OK, NOT_OFFERED, NO_MEMORY)
"""Statuses of rows that the next session does not measure again."""


@dataclass(frozen=True)
class Settings:
    """How a part runs.

    Attributes:
        device: "cuda" or "cpu".
        toy: sizes for a CPU, at which figures mean nothing.
        work: folder for runs and caches.
        seconds: of this part, its start included.
        session: number of the session.
    """

    device: str
    toy: bool
    work: str
    seconds: float
    session: int = 0

    @property
    def folder(self) -> Path:
        return Path(self.work)

    def data(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


Items = Mapping[str, Callable[[], Row]]


@dataclass(frozen=True)
class Part:
    """One part of the study.

    Attributes:
        name: for `--parts`.
        title: of its section.
        about: what is measured, in a sentence or two of the page.
        share: seconds of its own where all parts together have 500; what is left over goes to the parts after it.
        item_seconds: the most that one item may take.
        items: by name, in the order in which they are measured.
        lines: its section, from the rows by item.
        always: whether every session measures it anew.
    """

    name: str
    title: str
    about: str
    share: float
    item_seconds: float
    items: Callable[[Settings], Items]
    lines: Callable[[Mapping[str, Row]], list[str]]
    always: bool = False


def settled(row: Row) -> bool:
    """Whether the next session leaves this row as it is."""
    return row.get("status") in SETTLED and not row.get("more")


def cold_cache() -> bool:
    """Whether Triton's cache, which the runner names, is empty now."""
    named = os.environ.get("TRITON_CACHE_DIR")
    return named is None or not any(Path(named).glob("*"))


def exact_float32() -> None:
    """Products, convolutions and recurrent layers of float32 without TF32, whatever torch's defaults are."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
