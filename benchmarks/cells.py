"""What all benchmarks of `zoo bench` share: a request, and a cell with a budget and its record."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from zoo.benchmarks.subjects import Subject, distinct_layers, passed_laws
from zoo.core.errors import UsageError, quoted, unknown
from zoo.laws import LawBroken
from zoo.ops.common import logged_forms
from zoo.report.records import OK, Record
from zoo.training import machine

OVER, NO_MEMORY, NOT_OFFERED, LAW = "over budget", "no memory", "not offered", "breaks a law"
FAILED = "failed"
NOT_LEARNED, CLOCK, NO_AVERAGE = "not learned", "stopped by the clock", "no average"


STATUSES = (OVER, NO_MEMORY, NOT_OFFERED, LAW, FAILED, NOT_LEARNED, CLOCK, NO_AVERAGE)


class NoFigure(Exception):
    """A cell that ends without figures.

    Args:
        status: one of `STATUSES`, the words that records have.
        why: one line.

    Raises:
        UsageError: another status.
    """

    def __init__(self, status: str, why: str):
        if status not in STATUSES:
            raise unknown("status of a cell without figures", status, STATUSES)
        super().__init__(status, why)
        self.status, self.why = status, why

    def __str__(self) -> str:
        return self.why


@dataclass(frozen=True)
class Request:
    """What a benchmark measures, and how.

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
        """The module, and the names of the laws that it passed first.

        Raises:
            NoFigure: it breaks a law, its package cannot be used here, or its weights do not fit.
            UsageError: options that do not fit the width.
        """
        try:
            if not subject.peer and (weights := subject.weight_bytes(width, length)) > free_bytes(self.device) / 8:
                raise NoFigure(NO_MEMORY, f"weights of {weights / 1e9:.1f} GB, several times over, do not fit")
            passed = passed_laws(subject, width, length, self.device)
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


OF_ITSELF = frozenset(
    ("benchmark", "name", "setting", "figures", "status", "why", "threads", "device", "machine", "versions", "commit")
)
FIELDS = [each.name for each in dataclasses.fields(Record) if each.name not in OF_ITSELF | {"date"}]
"""Fields of a record that `measure` may give beside the figures."""
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
        conditions: what was requested beside the setting and the budget.
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
            figures, more = _measured(measure(), benchmark)
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
    made = record(benchmark, subject.name, setting, device=request.device, **rest)
    request.say(progress(made))
    return made


def _measured(found: Any, benchmark: str) -> Measured:
    """What `measure` of a benchmark returned, checked."""
    who = f"The benchmark {benchmark!r}: what measures a cell"
    if not (isinstance(found, tuple) and len(found) == 2 and all(isinstance(part, Mapping) for part in found)):
        raise UsageError(f"{who} returns {quoted(found, 60)}, expected (figures, further fields of the record).")
    for name, value in found[0].items():
        if not (isinstance(value, Mapping) and isinstance(value.get("value"), int | float)):
            raise UsageError(f"{who} returns {name}={quoted(value, 60)}: make it with zoo.benchmarks.figure.")
    if wrong := next((name for name in found[1] if name not in FIELDS), None):
        raise unknown(f"field of a record of the benchmark {benchmark!r}", wrong, FIELDS)
    return found


@functools.cache
def _facts(device: str, threads: int) -> dict[str, Any]:
    described = machine.describe_machine(torch.device(device))
    return {
        "threads": threads,
        "device": described["device"],
        "machine": described,
        "versions": machine.versions(),
        "commit": machine.commit(),
    }


def record(benchmark: str, name: str, setting: Mapping[str, Any], *, device: str, **rest: Any) -> Record:
    """A record of this process, now, on a device ("cpu", "cuda", "mps")."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return Record(benchmark, name, dict(setting), date=now, **_facts(device, torch.get_num_threads()), **rest)


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
