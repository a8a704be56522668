"""Seconds, first calls and memory on a device: what was launched has ended before a clock is read."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from zoo.training import machine

Step = Callable[[], object]


def wall(step: Step, device: str) -> float:
    """Seconds of one call by the clock on the wall, until the device has done it."""
    at = torch.device(device)
    machine.synchronize(at)
    started = time.perf_counter()
    step()
    machine.synchronize(at)
    return time.perf_counter() - started


def seconds(step: Step, device: str) -> float:
    """Seconds of one call: between two events on a GPU, else by the clock."""
    if device != "cuda":
        return wall(step, device)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def turns(steps: Mapping[str, Step], device: str, repeats: int, budget: float) -> dict[str, list[float]]:
    """Seconds of each step, the steps taking turns: as many turns as the budget allows, one at least.

    One more turn before is not counted: it warms up.
    """
    found: dict[str, list[float]] = {name: [] for name in steps}
    end = time.perf_counter() + budget
    for turn in range(repeats + 1):
        began = time.perf_counter()
        for name, step in steps.items():
            taken = seconds(step, device)
            if turn:
                found[name].append(taken)
        if turn and time.perf_counter() + (time.perf_counter() - began) > end:
            break
    return found


def peak_bytes(step: Step, device: str) -> int | None:
    """Bytes that one call adds to what the allocator of a GPU has given out; None on a CPU."""
    if device != "cuda":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def spread(values: list[float]) -> list[float]:
    """Median, first and third quartile."""
    if len(values) == 1:
        return values * 3
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return [middle, low, high]


def ratio(times: list[float], others: list[float]) -> list[float]:
    """The spread of the ratios of neighbours in a turn."""
    return spread([a / b for a, b in zip(times, others, strict=True)])


def matmul_rate(device: str, dtype: torch.dtype, size: int, budget: float = 1.0) -> float:
    """Floating-point operations a second of products (size, size) @ (size, size): the median of the turns."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    found = turns({"product": lambda: torch.mm(a, b, out=out)}, device, 50, budget)
    return 2 * size**3 / statistics.median(found["product"])


def told_memory(device: str) -> dict[str, Any]:
    """Free and whole memory of a GPU in bytes."""
    if device != "cuda":
        return {}
    free, whole = torch.cuda.mem_get_info()
    return {"free_bytes": free, "memory_bytes": whole}
