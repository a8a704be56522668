"""Peak memory of a training step, and bytes of a state.

setting   width, length, batch_size, part ("training" | "state"); of a state, `length` is the context
figures   training: peak_bytes (over the same process before the step), bytes_per_token; state: state_bytes
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, ClassVar

import torch

from zoo.benchmarks.cells import (
    NO_MEMORY,
    NOT_OFFERED,
    OVER,
    Ladder,
    Measured,
    NoFigure,
    Request,
    cell,
    free_bytes,
)
from zoo.benchmarks.options import BenchmarkOptions, Count, Lengths, Runs, Seconds, Widths, option
from zoo.benchmarks.states import PIECE, at_context, tells_state
from zoo.benchmarks.subjects import Subject, choose, peers
from zoo.benchmarks.tables import distinct, pivot, short
from zoo.benchmarks.throughput import step_of
from zoo.core.errors import UsageError
from zoo.core.imports import import_source
from zoo.report.benchmark import CONTEXT, LENGTH, Benchmark, Curve, Head, Plot, Table, benchmarks
from zoo.report.charts import Axis
from zoo.report.records import Record, figure
from zoo.report.units import size
from zoo.states import tree_bytes
from zoo.training import machine

WARM = 64
KILLED = -9


def training_peak(request: Request, subject: Subject, width: int, length: int, batch_size: int) -> int:
    """Bytes that a training step of this process adds to its peak so far, after one over WARM tokens."""
    device = torch.device(request.device)
    layer = subject.build(width, length, request.device)

    def step(n_tokens: int) -> None:
        x = torch.randn(batch_size, n_tokens, width, device=device)
        step_of(request, layer, x, "train")()
        request.wait()

    step(min(WARM, length))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        with contextlib.suppress(OSError):  # else a smaller peak before counts for nothing now
            Path("/proc/self/clear_refs").write_text("5")  # the peak is what is resident now
    before = machine.peak_memory(device)
    step(length)
    after = machine.peak_memory(device)
    assert before is not None
    assert after is not None
    return after - before


def _child(pipe: Connection, threads: int, name: str, imports: Sequence[str], rest: dict[str, Any]) -> None:
    """In a fresh process: send the peak, or the name and text of an error."""
    torch.set_num_threads(threads)
    for source in imports:
        import_source(source, "--import")
    subject = {peer.name: peer for peer in peers()}.get(name) or choose([name])[0]
    request = Request([subject], rest.pop("device"), rest.pop("precision"))
    try:
        pipe.send(training_peak(request, subject, **rest))
    except (UsageError, ImportError) as error:
        pipe.send(NoFigure(NOT_OFFERED, str(error)))
    except (RuntimeError, MemoryError) as error:
        pipe.send(NoFigure(NO_MEMORY if "memory" in str(error) else NOT_OFFERED, str(error).splitlines()[0]))


@functools.cache
def _processes() -> Any:
    """Processes that come with torch and the zoo loaded, and nothing computed."""
    if "forkserver" not in multiprocessing.get_all_start_methods():  # on Windows
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["zoo.benchmarks.memory"])
    return context


def peak_in_child(request: Request, subject: Subject, width: int, length: int, batch_size: int) -> int:
    """`training_peak` of a fresh process.

    Raises:
        NoFigure: it took too long, or more memory than there is.
    """
    here, there = _processes().Pipe(duplex=False)
    rest: dict[str, Any] = {"device": request.device, "precision": request.precision}
    rest |= {"width": width, "length": length, "batch_size": batch_size}
    arguments = (there, torch.get_num_threads(), subject.name, list(request.imports), rest)
    child = _processes().Process(target=_child, args=arguments, daemon=True)
    child.start()
    there.close()
    try:
        if not here.poll(request.budget):
            raise NoFigure(OVER, f"a process took more than {request.budget:g} s")
        answer = here.recv()
    except EOFError:
        child.join()
        if child.exitcode == KILLED:
            raise NoFigure(
                NO_MEMORY, "the process was killed, as one is that takes more memory than there is"
            ) from None
        raise RuntimeError(f"{subject.name}: a child process ended with status {child.exitcode}.") from None
    finally:
        child.kill()
        child.join()
    if isinstance(answer, NoFigure):
        raise answer
    return int(answer)


def training(request: Request, subject: Subject, *, width: int, length: int, batch_size: int, part: str) -> Measured:
    """The figures of a training step."""
    layer, laws = request.built(subject, width, length)
    peaks = [peak_in_child(request, subject, width, length, batch_size) for _ in range(request.repeats)]
    tokens = length * batch_size
    figures = {"peak_bytes": figure(peaks), "bytes_per_token": figure([peak / tokens for peak in peaks])}
    return figures, {"laws": laws, "n_parameters": sum(p.numel() for p in layer.parameters())}


@torch.no_grad()
def state(request: Request, subject: Subject, *, width: int, length: int, batch_size: int, part: str) -> Measured:
    """The bytes of a state at a context."""
    layer, laws = request.built(subject, width, length)
    told = tells_state(layer, batch_size, length)
    fields = {"laws": laws, "n_parameters": sum(p.numel() for p in layer.parameters())}
    if told > free_bytes(request.device) / 2:
        return {"state_bytes": figure(told, "formula")}, fields
    piece = min(PIECE, length)
    past, how = at_context(layer, length - piece, room=piece, batch_size=batch_size)
    x = torch.randn(batch_size, piece, width, device=request.device)
    with request.autocast():
        _, after = layer(x, past)
    return {"state_bytes": figure(tree_bytes(after), how)}, fields


PEAK = Curve(
    "peak_bytes", Axis("peak memory", "size", log=True), "length", LENGTH, {"part": "training"}, "training step"
)
STATE = Curve(
    "state_bytes", Axis("state of one sequence", "size", log=True), "length", CONTEXT, {"part": "state"}, "state"
)


@benchmarks.register("memory")
class Memory(Benchmark):
    """Peak memory of a training step by length, and bytes of the state by context.

    Training: the peak of one forward and backward pass of one layer over that of the same process after a pass over 64
    tokens: of the allocator on a GPU, else of the process's resident memory. Every run is in a process of its own,
    which ends with its budget. State: bytes of the tensors of a state that has just read a piece at that context. What
    lies before the piece does not change them: caches of keys and values are filled with random numbers, other states
    are at rest. Where the state would not fit into half of the free memory, the layer's own `state_bytes` stand there.
    """

    class Config(BenchmarkOptions):
        width: Widths = option("128", "Widths, separated by commas.")
        length: Lengths = option("1K,4K,16K", "Lengths of training rows, separated by commas.")
        context: Lengths = option("1K,4K,16K,64K,256K,1M", "Lengths of the context, separated by commas.")
        batch_size: Count = option(1, "Rows of a training step.")
        budget: Seconds = option(20.0, "Seconds for each process that measures a training step.")
        repeats: Runs = option(3, "Number of processes that measure each training step.")

    title = "Memory"
    order = 2
    plots: ClassVar[Sequence[Plot]] = (
        Plot(
            "bench-memory",
            "Memory against length",
            "Peak memory of a training step, and what one sequence carries. "
            "Hollow points: counted on a cache of random keys and values, or said by the layer's own formula.",
            (PEAK, STATE),
        ),
    )
    heads: ClassVar[Sequence[Head]] = (Head("training\nmemory", PEAK, "min"), Head("state", STATE, "min"))

    def cells(self, request: Request) -> Iterator[Record]:
        config = self.config
        if (why := machine.no_peak_memory(torch.device(request.device))) is not None:
            raise UsageError(f"bench memory: {why}.")
        request.check(config.width, max(*config.length, *config.context))
        asked = {"repeats": request.repeats}
        for width in config.width:
            for subject in request.at(width):
                ladder = Ladder(request.budget)
                for length in config.length:
                    setting: dict[str, Any] = {
                        "width": width,
                        "length": length,
                        "batch_size": config.batch_size,
                        "part": "training",
                    }
                    run = functools.partial(training, request, subject, **setting)
                    run = functools.partial(ladder.climb, length, run)
                    yield cell(request, self.label(), subject, setting, run, conditions=asked)
                for context in config.context:
                    setting = {"width": width, "length": context, "batch_size": 1, "part": "state"}
                    run = functools.partial(state, request, subject, **setting)
                    yield cell(request, self.label(), subject, setting, run, conditions=asked)

    @classmethod
    def tables(cls, found: Sequence[Record]) -> list[Table]:
        """Peaks by length and states by context."""
        made = []
        for width in distinct(found, "width"):
            for part, key, title in (
                ("training", "peak_bytes", "Peak memory of a training step"),
                ("state", "state_bytes", "State of one row"),
            ):
                rows = [r for r in found if {"width": width, "part": part}.items() <= r.setting.items()]
                by = "length" if part == "training" else "context"
                text = functools.partial(_size, key)
                title = f"{title}, width {width}, by {by}"
                made.append(pivot(title, rows, lambda r: r.setting["length"], text, short))
        return [table for table in made if table.rows]


def _size(key: str, r: Record) -> str:
    return size(r.value(key) or 0)
