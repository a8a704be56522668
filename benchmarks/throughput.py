"""Training and forward passes: tokens a second of one layer, by width and length.

A training step is one forward and one backward pass to the input and every parameter, without an optimizer; a cell's
budget spans its runs after the one that warms up. The share is that of the rate of large matrix products on the same
device, in the same precision, that the layer's matrix products are done at: those of the reference form, each token at
its own context, three times over for training.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zoo.benchmarks.cells import (
    NOT_OFFERED,
    Ladder,
    Measured,
    NoFigure,
    Request,
    Table,
    cell,
    distinct,
    pivot,
    sampled,
    short,
)
from zoo.benchmarks.records import Record, figure
from zoo.benchmarks.subjects import Subject
from zoo.protocol import Mixer
from zoo.report.units import count
from zoo.training import doctor

DIRECTIONS = ("train", "forward")


@functools.cache
def machine_rate(device: str, precision: str) -> float:
    """Floating-point operations a second of large products."""
    return 1e9 * doctor.matmul_rate(torch.device(device), precision, 2048, seconds=1.0)


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


def cells(
    request: Request,
    *,
    widths: Sequence[int],
    lengths: Sequence[int],
    tokens: int,
    directions: Sequence[str] = DIRECTIONS,
    compiled: Sequence[bool] = (False,),
) -> Iterator[Record]:
    """The records of all subjects.

    Args:
        request: what is measured, and how.
        widths: D.
        lengths: T, rising.
        tokens: of a batch, whose size follows; one row where a row is longer.
        directions: "train" or "forward".
        compiled: whether by torch.compile.
    """
    request.check(widths, max(lengths))
    for width in widths:
        for subject in request.at(width):
            for how in compiled:
                for direction in directions:
                    ladder = Ladder(request.budget)
                    for length in lengths:
                        batch_size = max(1, tokens // length)
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
                        yield cell(request, "throughput", subject, setting, run, conditions=asked)


def tables(found: Sequence[Record]) -> list[Table]:
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
