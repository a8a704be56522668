"""How many steps ops take at a time, by size: these choices stand here, as `zoo doctor` shows them.

They come from measurements on one machine, and nothing is measured when an op runs. A choice depends on the op and its
sizes alone, never on the machine, the load or the number of rows: it decides in what order numbers are added, and so
the last bits of a result.
"""

from __future__ import annotations

from typing import NamedTuple


class Chunk(NamedTuple):
    """Steps a chunk of one form of an op.

    Attributes:
        op: name of the op.
        form: "chunked", or "compiled" for the steps between the states kept for a backward pass.
        widest: largest width of a key for which the row is; None for all that are wider than those of the rows before.
        steps: of a chunk.
    """

    op: str
    form: str
    widest: int | None
    steps: int


CHUNKS = (
    Chunk("linear_attention", "chunked", 32, 32),  # the work between chunks grows with the width, that inside with them
    Chunk("linear_attention", "chunked", None, 64),
    Chunk("delta_rule", "chunked", 64, 32),
    Chunk("delta_rule", "chunked", None, 64),
    Chunk("delta_rule", "compiled", 64, 32),  # and dplr, by the same kernel
    Chunk("delta_rule", "compiled", None, 64),
    Chunk("dplr", "chunked", None, 32),
    Chunk("mlstm", "chunked", 64, 32),
    Chunk("mlstm", "chunked", None, 64),
    Chunk("slot_scores", "chunked", None, 32),
    Chunk("selective_scan", "chunked", None, 32),
    Chunk("scan", "chunked", None, 16),
    Chunk("oscillate", "chunked", None, 16),
)


def chunk(op: str, form: str, width: int = 0) -> int:
    """Steps a chunk of a form of an op, for keys of a width."""
    rows = (row for row in CHUNKS if (row.op, row.form) == (op, form))
    return next(row.steps for row in rows if row.widest is None or width <= row.widest)


class Pass(NamedTuple):
    """Sizes at which the compiled form without gradients takes a few of an op's steps at a time (`heads_pass`).

    Attributes:
        op: name of the op.
        decays: "any", or "channel" where only those with one decay a channel do.
        largest: K V, numbers of the state of a head.
        measured: median time over that of the form of training, at K = V = 32 and 64, on one thread.
    """

    op: str
    decays: str
    largest: int
    measured: tuple[float, float]


PASSES = (
    Pass("linear_attention", "channel", 64 * 64, (0.80, 0.82)),
    Pass("delta_rule", "any", 64 * 64, (0.67, 0.76)),
    Pass("dplr", "any", 128 * 128, (0.57, 0.64)),
)
FEWEST, MOST = 64, 2048
"""Steps of such a pass. Shorter ones keep the form of training, and its bits: a call costs as much. In longer ones, of
steps that are all alike, roundings would add up to more than an op may be off."""


def in_one_pass(op: str, n_steps: int, K: int, V: int, per_channel: bool) -> bool:
    """Whether a compiled op without gradients takes a few of its steps at a time."""
    row = next(row for row in PASSES if row.op == op)
    return FEWEST <= n_steps <= MOST and row.largest >= K * V and (per_channel or row.decays == "any")
