"""Tokens a second of reading a context and of single steps.

setting   width, context, batch_size, part ("prefill" | "step" | "drift"); of drift, `context` is the number of steps
figures   prefill: tokens_per_second (all tokens over all seconds, with the quartiles of its pieces);
          step: tokens_per_second, seconds; drift: error, state_error, rounding, grown_bytes
"""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import zoo
from zoo.benchmarks.cells import NO_MEMORY, NOT_OFFERED, OVER, Measured, NoFigure, Request, cell, free_bytes
from zoo.benchmarks.options import MOST_TOKENS, BenchmarkOptions, Count, Lengths, Runs, Seconds, Widths, option
from zoo.benchmarks.states import PIECE, at_context, grows, tells_state
from zoo.benchmarks.subjects import Subject
from zoo.benchmarks.tables import distinct, pivot, short
from zoo.report.benchmark import CONTEXT, RATE, Benchmark, Curve, Head, Plot, Table, benchmarks
from zoo.report.records import Record, figure
from zoo.report.units import MISSING, count, size

WARM, SLOWEST = 8, 2.0
KEPT = 1000
RESIDENT = Path("/proc/self/statm")  # on Linux
DRIFT = ("error", "state_error", "rounding")


class Reader:
    """A layer that reads on and on."""

    def __init__(self, request: Request, layer: Any, width: int, batch_size: int):
        self.request, self.layer = request, layer
        self.width, self.batch_size = width, batch_size
        self.rng = torch.Generator(request.device).manual_seed(0)
        self.read, self.spent = 0, 0.0
        self.rates: list[float] = []
        self.state = layer.init_state(batch_size)
        self._forward(min(PIECE, 64), layer.init_state(batch_size))  # warms up

    def _forward(self, n: int, state: Any) -> Any:
        x = torch.randn(self.batch_size, n, self.width, device=self.request.device, generator=self.rng)
        with self.request.autocast():
            _, state = self.layer(x, state)
        self.request.wait()
        return state

    def go_to(self, context: int) -> None:
        """Read on.

        Raises:
            NoFigure: the budget does not reach so far.
        """
        budget = self.request.budget
        while self.read < context:
            n = min(PIECE, context - self.read)
            left = (context - self.read) / self.rates[-1] * self.batch_size if self.rates else 0.0
            if self.spent + left > budget or self.spent > budget:
                expected = f"expected to take {self.spent + left:.3g} s"
                raise NoFigure(OVER, f"{expected}, of {budget:g} s; {self.read:,} were read")
            started = time.perf_counter()
            self.state = self._forward(n, self.state)
            taken = time.perf_counter() - started
            self.read, self.spent = self.read + n, self.spent + taken
            self.rates.append(n * self.batch_size / taken)


class Decoding:
    """One subject at contexts that grow."""

    def __init__(self, request: Request, subject: Subject, width: int, batch_size: int):
        self.request, self.subject, self.width, self.batch_size = request, subject, width, batch_size
        self.reader: Reader | None = None

    def _layer(self, context: int) -> tuple[Reader, dict[str, Any]]:
        layer, laws = self.request.built(self.subject, self.width, context)
        tells_state(layer, 1, 1)
        if self.reader is None:
            self.reader = Reader(self.request, layer.eval(), self.width, self.batch_size)
        return self.reader, {"laws": laws, "n_parameters": sum(p.numel() for p in layer.parameters())}

    @torch.no_grad()
    def prefill(self, context: int) -> Measured:
        reader, fields = self._layer(context)
        reader.go_to(context)
        rate = reader.read * self.batch_size / reader.spent
        return {"tokens_per_second": {**figure(reader.rates), "value": rate}}, fields

    @torch.no_grad()
    def step(self, context: int) -> Measured:
        reader, fields = self._layer(context)
        layer, room = reader.layer, self.request.repeats + WARM
        if grows(layer):
            if (needed := tells_state(layer, self.batch_size, context + room)) > free_bytes(self.request.device) / 2:
                raise NoFigure(NO_MEMORY, f"its state takes {size(needed)}")
            state, how = at_context(layer, context, room=room, batch_size=self.batch_size)
        else:
            reader.go_to(context)
            state, how = zoo.fork(reader.state), "measured"
        x = torch.randn(self.batch_size, self.width, device=self.request.device)
        seconds: list[float] = []
        for turn in range(room):
            started = time.perf_counter()
            with self.request.autocast():
                _, state = layer.step(x, state)
            self.request.wait()
            if turn >= WARM:
                seconds.append(time.perf_counter() - started)
            if sum(seconds) > SLOWEST:
                break
        rates = [self.batch_size / s for s in seconds]
        return {"tokens_per_second": figure(rates, how), "seconds": figure(seconds, how)}, fields

    @torch.no_grad()
    def drift(self, n_steps: int) -> Measured:
        """Single steps in float32 against one pass in float64."""
        reader, fields = self._layer(n_steps)
        layer = reader.layer
        if grows(layer):
            raise NoFigure(NOT_OFFERED, "its state grows with the context")
        if self.request.device == "mps":
            raise NoFigure(NOT_OFFERED, "MPS has no float64 to compare with")
        if self.request.device == "cpu" and not RESIDENT.exists():
            raise NoFigure(NOT_OFFERED, "only Linux tells a process how much memory it uses")
        x = torch.randn(1, n_steps, self.width, generator=torch.Generator().manual_seed(0))
        x = x.to(self.request.device)
        state, kept, resident = layer.init_state(1), [], 0
        started = time.perf_counter()
        for t in range(n_steps):
            if t == 100 and (expected := (time.perf_counter() - started) * n_steps / t) > self.request.budget:
                raise NoFigure(OVER, f"expected to take {expected:.3g} s, of {self.request.budget:g} s")
            if t == n_steps // 10:
                resident = used_bytes(self.request.device)
            y, state = layer.step(x[:, t], state)
            if t >= n_steps - KEPT:
                kept.append(y)
        grown = used_bytes(self.request.device) - resident
        exact = copy.deepcopy(layer).double()
        last, past = self._whole(exact, x.double())
        nudge = 1 + torch.finfo(x.dtype).eps / 2 * torch.randn_like(x.double()).sign()
        moved, _ = self._whole(exact, x.double() * nudge)
        states = zip(tree_leaves(state), tree_leaves(past), strict=True)
        figures = {
            "error": figure(error([torch.stack(kept, 1)], [last])),
            "state_error": figure(max((error([a.double()], [e.double()]) for a, e in states), default=0.0)),
            "rounding": figure(error([moved], [last])),
            "grown_bytes": figure(grown),
        }
        return figures, fields

    def _whole(self, exact: Any, x: Tensor) -> tuple[Tensor, Any]:
        """The last outputs of a layer that reads x (1, T, D) in pieces, and its final state."""
        past, last = exact.init_state(1), x[:, :0]
        for start in range(0, x.shape[1], PIECE):
            y, past = exact(x[:, start : start + PIECE], past)
            last = torch.cat([last, y], 1)[:, -KEPT:]
        return last, past


def error(got: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The largest difference over the largest entry, in the worst of the tensors."""
    return max(
        ((a.double() - b).abs().max() / b.abs().max().clamp(min=1e-30)).item() for a, b in zip(got, exact, strict=True)
    )


def used_bytes(device: str) -> int:
    """Memory in use now: of the allocator on a GPU, else resident in this process."""
    if device == "cuda":
        return torch.cuda.memory_allocated()
    return int(RESIDENT.read_text().split()[1]) * 4096


PREFILL = Curve("tokens_per_second", RATE, "context", CONTEXT, {"part": "prefill"}, "prefill")
STEP = Curve("tokens_per_second", RATE, "context", CONTEXT, {"part": "step"}, "one token after another")


@benchmarks.register("decode")
class Decode(Benchmark):
    """Tokens a second of reading a context and of going on token by token, by context.

    One layer. Prefill: `forward` reads random tokens in pieces, on and on; at each context, all tokens so far over all
    seconds so far, with the quartiles of the pieces' rates. A subject's budget spans the reading of its longest
    context; what is not reached is marked. Step: the median of single steps of `step` from a state at that context:
    where the state has a fixed size, the one that was read; where it grows, one made by hand (see `states.py`), so that
    attention is measured at contexts that it could not read in time. Drift, of states of fixed size, with `--drift`:
    single steps in float32, their last outputs and final state against `forward` in float64 over the whole, and the
    memory that the steps added. Beside the error stands how far the float64 outputs move when every input is rounded to
    float32 otherwise: where a recurrence makes small differences large, no step in float32 can be nearer.
    """

    class Config(BenchmarkOptions):
        width: Widths = option("128", "Widths, separated by commas.")
        context: Lengths = option("1K,4K,16K,64K,256K,1M", "Lengths of the context, separated by commas.")
        batch_size: Count = option(1, "Number of rows.")
        drift: int | None = option(
            None, "Compare this number of single steps in float32 with float64.", least=100, most=MOST_TOKENS
        )
        budget: Seconds = option(60.0, "Seconds for reading the longest context.")
        repeats: Runs = option(200, "Largest number of single steps for a figure.")

    title = "Prefill and decoding"
    order = 3
    plots: ClassVar[Sequence[Plot]] = (
        Plot(
            "bench-decode",
            "Reading and writing against context",
            "Tokens a second at a context. Hollow points: from a cache of random keys and values instead of a prefill.",
            (PREFILL, STEP),
        ),
    )
    heads: ClassVar[Sequence[Head]] = (Head("prefill\ntok/s", PREFILL, "max"), Head("decode\ntok/s", STEP, "max"))

    def cells(self, request: Request) -> Iterator[Record]:
        config = self.config
        request.check(config.width, max(config.context))
        asked = {"repeats": request.repeats}
        for width in config.width:
            for subject in request.at(width):
                decoding = Decoding(request, subject, width, config.batch_size)
                for context in config.context:
                    for part, run in (("prefill", decoding.prefill), ("step", decoding.step)):
                        setting = {"width": width, "context": context, "batch_size": config.batch_size, "part": part}
                        measure = functools.partial(run, context)
                        yield cell(request, self.label(), subject, setting, measure, conditions=asked)
                if config.drift:
                    setting = {"width": width, "context": config.drift, "batch_size": 1, "part": "drift"}
                    measure = functools.partial(decoding.drift, config.drift)
                    yield cell(request, self.label(), subject, setting, measure, conditions=asked)

    @classmethod
    def tables(cls, found: Sequence[Record]) -> list[Table]:
        """Rates by context, and the drift."""
        made = []
        for width in distinct(found, "width"):
            for part, title in (("prefill", "Prefill, tokens a second"), ("step", "Decoding, tokens a second")):
                rows = [r for r in found if {"width": width, "part": part}.items() <= r.setting.items()]
                title = f"{title}, width {width}, by context"
                made.append(pivot(title, rows, lambda r: r.setting["context"], _rate, short))
            for steps in distinct([r for r in found if r.setting["part"] == "drift"], "context"):
                wanted = {"width": width, "part": "drift", "context": steps}
                rows = [r for r in found if wanted.items() <= r.setting.items() and r.figures]
                title = f"After {steps:,} single steps, width {width}: float32 beside float64"
                head = ["", "error of the outputs", "error of the state", "outputs from rounded inputs", "memory added"]
                made.append(Table(title, head, [[r.label, *_drift(r)] for r in rows]))
        return [table for table in made if table.rows]


def _rate(r: Record) -> str:
    return count(r.value("tokens_per_second") or 0)


def _drift(r: Record) -> list[str]:
    grown = r.value("grown_bytes")
    errors = [f"{v:.0e}" if (v := r.value(key)) is not None else MISSING for key in DRIFT]
    return [*errors, MISSING if grown is None else f"{grown / 2**20:+.1f} MiB"]
