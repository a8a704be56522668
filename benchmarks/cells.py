"""What all benchmarks of `zoo bench` share: a cell with a budget, its record, and the table at the end."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from zoo.benchmarks import records
from zoo.benchmarks.records import OK, Record
from zoo.benchmarks.subjects import HEADS, Subject, distinct_layers, held
from zoo.core.errors import UsageError
from zoo.laws import LawBroken
from zoo.ops.common import logged_forms
from zoo.pattern import Word, parse, to_text
from zoo.report.units import MISSING
from zoo.training import machine

OVER, NO_MEMORY, NOT_OFFERED, LAW = "over budget", "no memory", "not offered", "breaks a law"
MIXER = "{mixer}"
"""Stands for what is measured in the pattern of a whole model."""
NOT_LEARNED, CLOCK, NO_AVERAGE = "not learned", "stopped by the clock", "no average"
ENDED = {CLOCK: "its budget of seconds", NOT_LEARNED: "its steps"}
MARKS = {"formula": "†", "random cache": "*"}
ABOVE = (
    "‡ above 100 %: counted are the products of the reference form, three times over for training, and compared with "
    "the rate of one product of 2048 x 2048, measured by itself. A layer that does fewer products than that, or does "
    "them in better shapes or at a quieter moment, comes out above."
)


class NoFigure(Exception):
    """A cell that ends without figures: `status` and why."""

    def __init__(self, status: str, why: str):
        super().__init__(why)
        self.status, self.why = status, why


@dataclass(frozen=True)
class Request:
    """What is asked of a benchmark.

    Attributes:
        subjects: what is measured, in order.
        device: "cpu", "cuda" or "mps".
        precision: "float32" or "bfloat16" (autocast).
        budget: seconds that a cell may take; what it spans is said by each benchmark.
        repeats: most runs of a cell.
        imports: files and modules that register further mixers.
        say: receives a line of progress.
    """

    subjects: Sequence[Subject]
    device: str = "cpu"
    precision: str = "float32"
    budget: float = 10.0
    repeats: int = 5
    imports: Sequence[str] = ()
    say: Callable[[str], None] = field(default=lambda line: print(line, file=sys.stderr, flush=True))

    def at(self, width: int) -> list[Subject]:
        """The subjects at a width, those that are one layer there once."""
        return distinct_layers(self.subjects, width)

    def check(self, widths: Sequence[int], length: int) -> None:
        """That every subject can be built at every width, before anything is measured.

        Raises:
            UsageError: options that do not fit a width, or a size that no tensor can have.
        """
        for width in widths:
            for subject in self.subjects:
                if not subject.peer:
                    try:
                        subject.weight_bytes(width, length)
                    except (RuntimeError, OverflowError, MemoryError):
                        raise UsageError(f"{subject.name}: width {width} is beyond what a tensor can hold.") from None

    def autocast(self) -> Any:
        """The context to compute in."""
        return machine.autocast(self.precision, torch.device(self.device))

    def wait(self) -> None:
        """Synchronise the device: return when all its work is done."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def built(self, subject: Subject, width: int, length: int) -> tuple[Any, list[str]]:
        """The module, and the laws that it was held to first.

        Raises:
            NoFigure: it breaks a law, its package cannot be used here, or its weights do not fit.
            UsageError: options that do not fit the width.
        """
        try:
            if not subject.peer and (weights := subject.weight_bytes(width, length)) > free_bytes(self.device) / 8:
                raise NoFigure(NO_MEMORY, f"weights of {weights / 1e9:.1f} GB, several times over, do not fit")
            passed = held(subject, width, length, self.device)
            return subject.build(width, length, self.device), passed
        except LawBroken as error:
            raise NoFigure(LAW, str(error)) from None
        except ImportError as error:
            raise NoFigure(NOT_OFFERED, str(error)) from None


def free_bytes(device: str) -> float:
    """Memory that is free on a device; without end where the system does not tell."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    told = Path("/proc/meminfo")
    for line in told.read_text().splitlines() if told.exists() else []:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return math.inf


Measured = tuple[Mapping[str, Any], Mapping[str, Any]]
"""The figures of a cell, and further fields of its record."""


def cell(
    request: Request,
    benchmark: str,
    subject: Subject,
    setting: Mapping[str, Any],
    measure: Callable[[], Measured],
    *,
    layer: str | None = None,
    conditions: Mapping[str, Any] | None = None,
    chance: float | None = None,
) -> Record:
    """The record of one cell: what `measure` finds, or why it found nothing.

    Args:
        request: what is measured, and how.
        benchmark: its name.
        subject: of the cell.
        setting: of the cell.
        measure: gives the figures, or raises NoFigure.
        layer: what is built, by default the subject's own words.
        conditions: what was asked for beside the setting and the budget.
        chance: the accuracy of a constant answer.
    """
    rest: dict[str, Any] = {
        "peer": subject.peer,
        "precision": request.precision,
        "same": list(subject.same),
        "layer": subject.text(setting["width"]) if layer is None else layer,
        "conditions": {"budget": request.budget, **(conditions or {})},
        "chance": chance,
    }
    with logged_forms() as forms:
        try:
            figures, more = measure()
            rest |= {"figures": dict(figures), **more}
        except NoFigure as none:
            rest |= {"status": none.status, "why": none.why}
        except (MemoryError, torch.OutOfMemoryError) as error:
            rest |= {"status": NO_MEMORY, "why": _first_line(error)}
        except RuntimeError as error:
            if "memory" not in str(error):
                raise
            rest |= {"status": NO_MEMORY, "why": _first_line(error)}
    rest.setdefault("backends", {op: sorted(names) for op, names in sorted(forms.items())})
    made = records.record(benchmark, subject.name, setting, device=request.device, **rest)
    request.say(progress(made))
    return made


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def progress(r: Record) -> str:
    """A record as one line for a person."""
    where = ", ".join(f"{k} {v}" for k, v in r.setting.items())
    what = ", ".join(f"{k} {v['value']:,.4g}" for k, v in r.figures.items()) if r.status == OK else r.status
    return f"{r.name}: {where}: {what}" + (f" ({r.why})" if r.why else "")


def sampled(request: Request, step: Callable[[], object]) -> list[float]:
    """Seconds of up to `repeats` runs within the budget, after one that warms up.

    Raises:
        NoFigure: the run that warms up took longer than the budget.
    """

    def once() -> float:
        started = time.perf_counter()
        step()
        request.wait()
        return time.perf_counter() - started

    warm = once()
    if warm > request.budget:
        raise NoFigure(OVER, f"one run took {warm:.3g} s, of {request.budget:g} s")
    end = time.perf_counter() + request.budget
    seconds = [once()]
    while len(seconds) < request.repeats and time.perf_counter() + seconds[-1] < end:
        seconds.append(once())
    return seconds


class Ladder:
    """Cells of one subject that grow: what was too much at one size is not tried at larger ones."""

    def __init__(self, budget: float):
        self.budget = budget
        self.stopped: NoFigure | None = None
        self.size, self.seconds = 0, 0.0

    def climb(self, size: int, measure: Callable[[], Measured]) -> Measured:
        """What `measure` finds, at a size that work is at least proportional to.

        Raises:
            NoFigure: by `measure`; or a smaller size was too much already, or foretells that this one is.
        """
        if self.stopped is not None:
            raise NoFigure(self.stopped.status, f"as before: {self.stopped.why}")
        if self.size and (expected := self.seconds * size / self.size) > self.budget:
            raise NoFigure(OVER, f"expected to take {expected:.3g} s, of {self.budget:g} s")
        try:
            figures, rest = measure()
        except NoFigure as none:
            self.stopped = none
            raise
        if "seconds" in figures:
            self.size, self.seconds = size, figures["seconds"]["value"]
        return figures, rest


# ---- tables


class Table(NamedTuple):
    """Texts in rows, and a title."""

    title: str
    head: list[str]
    rows: list[list[str]]


def pivot(
    title: str,
    found: Iterable[Record],
    column: Callable[[Record], Any],
    text: Callable[[Record], str],
    label: Callable[[Any], str] = str,
) -> Table:
    """A row for each subject and a column for each value of `column`, in order of appearance."""
    cells: dict[str, dict[Any, str]] = {}
    columns: dict[Any, None] = {}
    for r in found:
        columns[column(r)] = None
        cells.setdefault(r.label, {})[column(r)] = shown(r, text)
    head = ["", *map(label, columns)]
    return Table(title, head, [[name, *(row.get(c, MISSING) for c in columns)] for name, row in cells.items()])


def shown(r: Record, text: Callable[[Record], str]) -> str:
    """A cell: its text with the mark of how it came about, or why there is none."""
    if r.status != OK:
        return r.status
    marks = {MARKS.get(f["how"], "") for f in r.figures.values()}
    return text(r) + "".join(sorted(marks))


def spread(r: Record, key: str, text: Callable[[float], str]) -> str:
    """A figure as text, of several values with its quartiles."""
    figure = r.figures[key]
    if figure["n"] == 1:
        return text(figure["value"])
    return f"{text(figure['value'])} ({text(figure['low'])} to {text(figure['high'])})"


def chance_in(found: Iterable[Record]) -> str:
    """What chance gives, for the head of a column of accuracies; empty where it is unknown or not one figure."""
    known = {r.chance for r in found if r.chance is not None}
    return f"chance {known.pop():.0%}" if len(known) == 1 else ""


def notes(found: Sequence[Record]) -> list[str]:
    """Lines below the tables: what the marks mean, which words had their heads settled, why cells are empty."""
    hows = {f["how"] for r in found for f in r.figures.values()}
    lines = {
        "formula": "† said by the layer, not measured.",
        "random cache": "* measured on a cache of keys and values filled with random numbers, not by a prefill.",
    }
    told = [line for how, line in lines.items() if how in hows]
    if any((r.value("matmul_share") or 0) > 1 for r in found):
        told.append(ABOVE)
    untaught = [status for status in (CLOCK, NOT_LEARNED) if any(r.status == status for r in found)]
    if untaught:
        ends = " or ".join(ENDED[status] for status in untaught)
        told.append(f"{' and '.join(untaught)}: below 85 % when {ends} ended; the records say how far each had come.")
    empty: dict[str, None] = {}
    for r in found:
        if r.status not in (OK, OVER, CLOCK, NOT_LEARNED, NO_AVERAGE):
            empty[f"{r.label}: {r.status}: {r.why.rstrip('.')}."] = None
    return told + settled(found) + list(empty)


def settled(found: Iterable[Record]) -> list[str]:
    """Lines that say which layers have several names, and which options were filled in."""
    several = dict.fromkeys(f"{r.label} (width {r.setting['width']})" for r in found if r.same)
    lines = [f"One layer under several names, measured once: {', '.join(several)}."] if several else []
    built: dict[int, dict[str, Word]] = {}
    for r in found:
        built.setdefault(r.setting["width"], {}).update(_filled_in(r))
    for width, words in built.items():
        if words:
            told = f"At width {width}, where no number of heads is given: {', '.join(words)}."
            few = any(getattr(word.config, "n_heads", HEADS) < HEADS for word in words.values())
            lines.append(told + (f" zoo bench now gives attention {HEADS} at least." if few else ""))
    return lines


def _filled_in(r: Record) -> dict[str, Word]:
    """The words of a record's layer in which something was filled in, by their texts."""
    asked = str(r.setting.get("layers") or MIXER).replace(MIXER, r.name)
    try:
        pairs = zip(parse(asked).words(), parse(r.layer).words(), strict=True)
        return {to_text(word): word for before, word in pairs if before != word}
    except (UsageError, ValueError):  # a peer, or a mixer that is not registered here
        return {}


def short(n: int) -> str:
    """1024 as 1K, 2**20 as 1M."""
    for unit, size in (("M", 2**20), ("K", 1024)):
        if n >= size and n % size == 0:
            return f"{n // size}{unit}"
    return f"{n:,}"


def distinct(found: Iterable[Record], key: str) -> list[Any]:
    """The values of a setting, in order of appearance."""
    return list(dict.fromkeys(r.setting[key] for r in found if key in r.setting))


def check_lengths(name: str, lengths: Sequence[int]) -> list[int]:
    """Whole numbers from 1, rising, each once.

    Raises:
        UsageError: none, or one below 1.
    """
    if not lengths or min(lengths) < 1:
        raise UsageError(f"--{name} {','.join(map(str, lengths))!r} is not allowed: give whole numbers from 1.")
    return sorted(set(lengths))
