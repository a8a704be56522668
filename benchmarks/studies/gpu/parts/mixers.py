"""Throughput, memory and decoding of every mixer at the sizes of a GPU, by the functions of `zoo bench`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from zoo.benchmarks.cells import Measured, Request, cell
from zoo.benchmarks.decode import Decode, Decoding
from zoo.benchmarks.memory import Memory, training_peak
from zoo.benchmarks.studies.gpu.part import OK, Items, Part, Row, Settings
from zoo.benchmarks.studies.harness import table
from zoo.benchmarks.subjects import Subject, choose, peers
from zoo.benchmarks.throughput import DIRECTIONS, Throughput, measure
from zoo.report.records import Record, figure

WIDTH, TOKENS, LENGTHS, CONTEXTS = 1024, 16384, (2048, 8192), (1024, 16384)
TOY = {"width": 32, "tokens": 64, "lengths": (16, 32), "contexts": (16, 32)}
FULL = {"width": WIDTH, "tokens": TOKENS, "lengths": LENGTHS, "contexts": CONTEXTS}
FIRST = ("mha", "gqa", "mamba2", "gated_deltanet", "rwkv7", "mamba", "gla", "mlstm", "kda", "swa", "mla", "rg_lru")
BENCHMARKS = {"throughput": Throughput, "memory": Memory, "decode": Decode}
DROPPED = ("machine", "versions", "commit", "date", "device", "threads", "slices", "chance")
"""Fields of a record that the session has, or that do not concern it."""


def measured(subject: Subject, settings: Settings) -> Row:
    """All cells of one layer."""
    said: list[str] = []
    sizes: Any = TOY if settings.toy else FULL
    how: dict[str, Any] = {"budget": 0.5, "repeats": 2} if settings.toy else {"budget": 2.0, "repeats": 7}
    request = Request([subject], settings.device, "bfloat16", say=said.append, **how)
    records = [dataclasses.asdict(each) for each in _cells(request, subject, **sizes)]
    return {"records": [{key: value for key, value in r.items() if key not in DROPPED} for r in records]}


def _cells(
    request: Request, subject: Subject, width: int, tokens: int, lengths: tuple[int, ...], contexts: tuple[int, ...]
) -> Iterator[Record]:
    for length in lengths:
        rows = max(1, tokens // length)
        for direction in DIRECTIONS:
            setting: dict[str, Any] = {"width": width, "length": length, "batch_size": rows}
            setting |= {"direction": direction, "compiled": False}
            run = functools.partial(measure, request, subject, **setting)
            yield cell(request, "throughput", subject, setting, run)
        if request.device == "cuda":  # elsewhere only a fresh process has a peak of its own
            setting = {"width": width, "length": length, "batch_size": rows, "part": "training"}
            yield cell(
                request, "memory", subject, setting, functools.partial(_peak, request, subject, width, length, rows)
            )
    decoding = Decoding(request, subject, width, 1)
    for context in contexts:
        for part, step in (("prefill", decoding.prefill), ("step", decoding.step)):
            setting = {"width": width, "context": context, "batch_size": 1, "part": part}
            yield cell(request, "decode", subject, setting, functools.partial(step, context))


def _peak(request: Request, subject: Subject, width: int, length: int, rows: int) -> Measured:
    peak = training_peak(request, subject, width, length, rows)
    return {"peak_bytes": figure(peak), "bytes_per_token": figure(peak / (rows * length))}, {}


def subjects(settings: Settings) -> list[Subject]:
    """Every layer once, those of `FIRST` first, then the public ones."""
    if settings.toy:
        chosen = choose(["gated_deltanet"])
    else:
        chosen = [*choose(FIRST), *(s for s in choose(()) if s.name not in FIRST)]
    width = TOY["width"] if settings.toy else WIDTH
    others = [s for s in peers() if not settings.toy or s.name == "torch.nn.LSTM"]
    own = Request([*chosen], settings.device).at(width)  # type: ignore[arg-type]
    return [*own[: len(FIRST)], *others, *own[len(FIRST) :]]


def items(settings: Settings) -> Items:
    found: dict[str, Callable[[], Row]] = {}
    for subject in subjects(settings):
        found[subject.names] = functools.partial(measured, subject, settings)
    return found


def lines(rows: Mapping[str, Row]) -> list[str]:
    kept = [Record(**record) for row in rows.values() if row["status"] == OK for record in row["records"]]
    shown: list[str] = []
    for name, benchmark in BENCHMARKS.items():
        for made in benchmark.tables([r for r in kept if r.benchmark == name]):
            shown += [f"{made.title}:", "", *table(made.head, made.rows), ""]
    shown += [f"- {r.label}, {r.benchmark}: {r.status} ({r.why})" for r in kept if r.status != OK and r.why]
    return shown


PART = Part(
    name="mixers",
    title="Every mixer",
    about=(
        f"One layer of every mixer at width {WIDTH:,} in bfloat16 (autocast), after its quick laws: tokens a second "
        f"and peak memory at {TOKENS:,} tokens in rows of 2,048 and 8,192, and decoding at contexts of 1,024 and "
        "16,384."
    ),
    share=70,
    item_seconds=30,
    items=items,
    lines=lines,
)
