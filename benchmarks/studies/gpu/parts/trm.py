"""A training step of recursive models, eager, compiled and as a CUDA graph, and its share of the matmul rate."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from zoo.benchmarks.studies import trm_step
from zoo.benchmarks.studies.gpu import timing
from zoo.benchmarks.studies.gpu.part import Items, Part, Row, Settings
from zoo.benchmarks.studies.harness import table
from zoo.core.errors import UsageError
from zoo.training.compiling import compile_layers

ROWS, RECIPE_ROWS, SIDE = 768, 384, 8192
RECIPE = "sudoku-9x9-fast"
TARGET = 0.5
"""Of the matmul rate, for the compiled step."""
TOY = {
    "task": {"name": "sudoku", "size": 4, "n_puzzles": 8},
    "model.pattern": 'token_mlp(length=17, d_hidden=16, norm_axis="time", inner_norm=True) swiglu(d_hidden=16)',
    "model.d_model": 16,
    "model.recursion": {"cycles": 2, "updates": 1, "max_steps": 2, "prefix": 1},
}


def step_of(name: str, settings: Settings) -> trm_step.Ours:
    """With weights and puzzles from fixed seeds."""
    torch.manual_seed(0)
    rows = (2 if settings.toy else ROWS if name == "TRM" else RECIPE_ROWS,)
    if name == "TRM":
        sizes = {"size": 4, "width": 32} if settings.toy else {}
        return trm_step.published_step(*rows, settings.device, **sizes)
    return trm_step.recipe_step(name, *rows, settings.device, TOY if settings.toy else None)


def measured(name: str, compiled: bool, settings: Settings) -> Row:
    """One supervision step, forward and backward, without the optimizer."""
    step = step_of(name, settings)
    row: Row = {"rows": step.rows, "compile_s": None}
    if compiled:
        if settings.toy:
            raise UsageError("torch.compile takes long on a CPU: toy sizes leave it out.")
        row["compile_s"] = compile_layers(step.model, step.loss)
    row["first_s"] = timing.wall(lambda: row.update(loss=step()), settings.device)
    row["peak_bytes"] = timing.peak_bytes(step, settings.device)
    return row | timed(step, trm_step.flops_of(step), settings)


def timed(step: Callable[[], object], flops: int, settings: Settings) -> Row:
    """The step and a large product in turns."""
    side, budget = (64, 0.1) if settings.toy else (SIDE, 8.0)
    a, b = (torch.randn(side, side, device=settings.device).bfloat16() for _ in range(2))
    found = timing.turns({"step": step, "product": lambda: a @ b}, settings.device, 15, budget)
    seconds, product = timing.spread(found["step"]), timing.spread(found["product"])[0]
    rate = 2 * side**3 / product
    return {
        "seconds": seconds,
        "n": len(found["step"]),
        "flops": flops,
        "matmul_rate": rate,
        "share": flops / seconds[0] / rate,
    }


def graphed(name: str, settings: Settings) -> Row:
    """The recursion alone, forward and backward, as one CUDA graph: embedding, head and loss stay outside of it."""
    step = step_of(name, settings)
    model, tokens = step.model, step.data.tokens
    state = model.init_state(*tokens.shape)

    def body() -> Tensor:
        with step.precision():
            thought = model.think(tokens, state)
        thought.hidden.sum().backward()
        return thought.hidden

    if settings.device != "cuda":
        body()
        raise UsageError("CUDA graphs need a GPU.")
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            model.zero_grad(set_to_none=True)
            body()
    torch.cuda.current_stream().wait_stream(aside)
    torch.cuda.synchronize()
    model.zero_grad(set_to_none=True)
    expected = body().detach().float().clone()
    model.zero_grad(set_to_none=True)
    graph, began = torch.cuda.CUDAGraph(), time.perf_counter()
    with torch.cuda.graph(graph):
        hidden = body()
    torch.cuda.synchronize()
    capture = time.perf_counter() - began
    graph.replay()
    torch.cuda.synchronize()
    off = (hidden.float() - expected).abs().max() / expected.abs().max()
    row = {"rows": step.rows, "first_s": capture, "off": off.item(), "compile_s": None}
    return row | timed(graph.replay, trm_step.flops_of(step), settings)


def items(settings: Settings) -> Items:
    return {
        "TRM, eager": functools.partial(measured, "TRM", False, settings),
        "TRM, compiled": functools.partial(measured, "TRM", True, settings),
        "TRM, recursion as a CUDA graph": functools.partial(graphed, "TRM", settings),
        f"{RECIPE}, compiled": functools.partial(measured, RECIPE, True, settings),
        f"{RECIPE}, eager": functools.partial(measured, RECIPE, False, settings),
        f"{RECIPE}, recursion as a CUDA graph": functools.partial(graphed, RECIPE, settings),
    }


def lines(rows: Mapping[str, Row]) -> list[str]:
    head = ["step", "puzzles", "ms, quartiles", "TFLOP/s", "share of a large product's rate", "loss", "first call, s"]
    shown = []
    for name, row in rows.items():
        if "seconds" in row:
            middle, low, high = (1e3 * s for s in row["seconds"])
            first = f"{row['first_s']:.1f}" + (
                f" after {row['compile_s']:.0f} of compiling" if row["compile_s"] else ""
            )
            loss = f"{row['loss']:.4f}" if "loss" in row else f"off by {row['off']:.0e}"
            peak = f"{row['peak_bytes'] / 2**30:.1f}" if row.get("peak_bytes") else ""
            rate = row["flops"] / row["seconds"][0] / 1e12
            spread = f"{middle:.1f} [{low:.1f}, {high:.1f}]"
            shown.append([name, str(row["rows"]), spread, f"{rate:.3g}", f"{row['share']:.0%}", loss, first, peak])
    if not shown:
        return []
    rate = max(row["matmul_rate"] for row in rows.values() if "matmul_rate" in row)
    told = f"A product of bfloat16 runs at {rate / 1e12:,.3g} TFLOP/s in the same process, in turns with the steps."
    return [f"{told} The target of the compiled step is {TARGET:.0%} of it.", "", *table([*head, "peak, GiB"], shown)]


PART = Part(
    name="trm",
    title="A step of recursive models",
    about=(
        "One supervision step, forward and backward without the optimizer, of TRM in the authors' Sudoku configuration "
        f"({ROWS} puzzles) and of `{RECIPE}` ({RECIPE_ROWS} puzzles), in bfloat16: eager, compiled, and the recursion "
        "alone as a CUDA graph, beside large products in the same process."
    ),
    share=85,
    item_seconds=100,
    items=items,
    lines=lines,
)
