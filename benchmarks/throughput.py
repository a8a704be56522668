"""Tokens a second of training and of forward passes.

setting   width, length, batch_size, direction ("train" | "forward"), compiled
figures   tokens_per_second, seconds, matmul_share (of the machine's rate of large matrix products)
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from zoo.benchmarks.cells import NOT_OFFERED, Ladder, Measured, NoFigure, Request, cell, sampled
from zoo.benchmarks.options import BenchmarkOptions, Count, Lengths, Runs, Seconds, Widths, option
from zoo.benchmarks.subjects import Subject
from zoo.benchmarks.tables import distinct, pivot, short
from zoo.protocol import Mixer
from zoo.report.benchmark import LENGTH, RATE, Benchmark, Curve, Head, Plot, Table, benchmarks
from zoo.report.records import Record, figure
from zoo.report.units import count
from zoo.training import doctor

DIRECTIONS = ("train", "forward")


@functools.cache
def machine_rate(device: str, precision: str) -> float:
    """Floating-point operations a second of large products; on a GPU of larger ones, which launches do not delay."""
    size = 8192 if device == "cuda" else 2048
    return 1e9 * doctor.matmul_rate(torch.device(device), precision, size, seconds=1.0)


def forward_flops(layer: Any, length: int) -> int | None:
    """Matmul FLOPs to read a row of `length` tokens; None of a layer that does not tell them."""
    each = [layer.flops_per_token(t) for t in range(1, length + 1)]
    return None if None in each else sum(each)


def step_of(request: Request, layer: Any, x: Tensor, direction: str) -> Callable[[], object]:
    """One pass over x (B, T, D), as it is timed."""

    def forward() -> Tensor:
        with request.autocast():
            y, _ = layer(x)
        return y

    if direction == "forward":
        return torch.no_grad()(forward)
    leaves = [x.requires_grad_(), *layer.parameters()]
    weight = torch.randn_like(x)

    def train() -> object:
        return torch.autograd.grad(forward(), leaves, weight.to(x.dtype), allow_unused=True)

    return train


def _not_compilable(layer: nn.Module) -> str | None:
    """Why a layer cannot be compiled, where a mixer in it says so."""
    return next((why for m in layer.modules() if isinstance(m, Mixer) and (why := m.traits.not_compilable)), None)


def measure(
    request: Request, subject: Subject, *, width: int, length: int, batch_size: int, direction: str, compiled: bool
) -> Measured:
    """The figures of one cell."""
    layer, laws = request.built(subject, width, length)
    if compiled and (why := _not_compilable(layer)):
        raise NoFigure(NOT_OFFERED, f"not compiled: {why}")
    run = torch.compile(layer) if compiled else layer
    x = torch.randn(batch_size, length, width, device=request.device)
    step = step_of(request, run, x, direction)
    if compiled:
        step()  # compiles, which no budget spans
    seconds = sampled(request, step)
    tokens = batch_size * length
    figures = {"tokens_per_second": figure([tokens / s for s in seconds]), "seconds": figure(seconds)}
    if flops := forward_flops(layer, length):
        rate = machine_rate(request.device, request.precision)
        work = batch_size * flops * (3 if direction == "train" else 1)
        figures["matmul_share"] = figure([work / s / rate for s in seconds])
    return figures, {"laws": laws, "n_parameters": sum(p.numel() for p in layer.parameters())}


TRAINING = Curve("tokens_per_second", RATE, "length", LENGTH, {"direction": "train"}, "training")
FORWARD = Curve("tokens_per_second", RATE, "length", LENGTH, {"direction": "forward"}, "forward only")


@benchmarks.register("throughput")
class Throughput(Benchmark):
    """Tokens a second of training and of forward passes, by width and length.

    One layer. A training step is one forward and one backward pass to the input and every parameter, without an
    optimizer; a cell's budget spans its runs after the one that warms up. The share is that of the rate of large matrix
    products on the same device, in the same precision, that the layer's matrix products are done at: those of the
    reference form, each token at its own context, three times over for training.
    """

    class Config(BenchmarkOptions):
        width: Widths = option("128", "Widths, separated by commas.")
        length: Lengths = option("256,1K,4K", "Lengths of rows, separated by commas.")
        tokens: Count = option(4096, "Tokens of a batch, from which its number of rows follows.")
        compile: bool = option(False, "Also measure torch.compile.")
        budget: Seconds = option(5.0, "Seconds for each figure, and the longest time of one run.")
        repeats: Runs = option(9, "Largest number of runs for a figure.")

    title = "Throughput"
    order = 1
    plots: ClassVar[Sequence[Plot]] = (
        Plot(
            "bench-throughput",
            "Throughput against length",
            "Tokens a second of one layer. Bars reach from the first quartile to the third.",
            (TRAINING, FORWARD),
        ),
    )
    heads: ClassVar[Sequence[Head]] = (
        Head("train\ntok/s", TRAINING, "max"),
        Head("forward\ntok/s", FORWARD, "max"),
    )

    def cells(self, request: Request) -> Iterator[Record]:
        config = self.config
        request.check(config.width, max(config.length))
        for width in config.width:
            for subject in request.at(width):
                for how in (False, True) if config.compile else (False,):
                    for direction in DIRECTIONS:
                        ladder = Ladder(request.budget)
                        for length in config.length:
                            batch_size = max(1, config.tokens // length)
                            setting: dict[str, Any] = {
                                "width": width,
                                "length": length,
                                "batch_size": batch_size,
                                "direction": direction,
                                "compiled": how,
                            }
                            run = functools.partial(measure, request, subject, **setting)
                            run = functools.partial(ladder.climb, batch_size * length, run)
                            asked = {"repeats": request.repeats}
                            yield cell(request, self.label(), subject, setting, run, conditions=asked)

    @classmethod
    def tables(cls, found: Sequence[Record]) -> list[Table]:
        """Tokens a second and the share, by length."""

        def text(r: Record) -> str:
            share = r.value("matmul_share")
            rate = count(r.value("tokens_per_second") or 0)
            return rate if share is None else f"{rate} ({share:.0%}{'‡' if share > 1 else ''})"

        made = []
        for width in distinct(found, "width"):
            for compiled in distinct(found, "compiled"):
                for direction in distinct(found, "direction"):
                    wanted = {"width": width, "compiled": compiled, "direction": direction}
                    rows = [r for r in found if wanted.items() <= r.setting.items()]
                    how = ", compiled" if compiled else ""
                    what = "training" if direction == "train" else "forward only"
                    title = f"Tokens a second, {what}{how}, width {width}, by length (share of the matmul rate)"
                    made.append(pivot(title, rows, lambda r: r.setting["length"], text, short))
        return [table for table in made if table.rows]
