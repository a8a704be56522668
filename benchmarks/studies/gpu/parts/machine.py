"""What machine this is, and its rates of large products and of copies."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib import metadata
from typing import Any

import torch

from zoo.benchmarks.studies.gpu import timing, wheels
from zoo.benchmarks.studies.gpu.part import Items, Part, Row, Settings
from zoo.training import machine

FULL, TOY = 8192, 128
PACKAGES = ("triton", "flash-linear-attention", "flash-qla", "mamba-ssm", "causal-conv1d")


def facts(settings: Settings) -> Row:
    """Device, memory, and versions of what computes on it."""
    at, versions = torch.device(settings.device), machine.versions()
    for package in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    found: dict[str, Any] = machine.describe_machine(at) | {"versions": versions, "left_out": wheels.left_out()}
    if settings.device == "cuda":
        properties = torch.cuda.get_device_properties(at)
        found["capability"] = f"{properties.major}.{properties.minor}"
        found["multiprocessors"] = properties.multi_processor_count
        versions |= {"cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}
    return found | timing.told_memory(settings.device)


def rate(dtype: torch.dtype, tf32: bool, settings: Settings) -> Row:
    """Of large square products."""
    torch.backends.cuda.matmul.allow_tf32 = tf32
    try:
        size = TOY if settings.toy else FULL
        return {"size": size, "rate": timing.matmul_rate(settings.device, dtype, size, 0.1 if settings.toy else 1.0)}
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False


def copies(settings: Settings) -> Row:
    """Bytes a second that are read and written by a copy."""
    n = 2**20 if settings.toy else 2**32
    a = torch.empty(n, dtype=torch.uint8, device=settings.device)
    b = torch.empty_like(a)
    found = timing.turns({"copy": lambda: b.copy_(a)}, settings.device, 20, 0.5)
    return {"bytes_per_second": 2 * n / statistics.median(found["copy"])}


def items(settings: Settings) -> Items:
    found: dict[str, Callable[[], Row]] = {
        "facts": lambda: facts(settings),
        "bfloat16": lambda: rate(torch.bfloat16, False, settings),
        "float32": lambda: rate(torch.float32, False, settings),
        "TF32": lambda: rate(torch.float32, True, settings),
        "copies": lambda: copies(settings),
    }
    return found


def lines(rows: Mapping[str, Row]) -> list[str]:
    rates = [f"{name} {row['rate'] / 1e12:,.3g} TFLOP/s" for name, row in rows.items() if "rate" in row]
    size = next((row["size"] for row in rows.values() if "size" in row), FULL)
    told = [f"Products of {size} x {size} matrices: {', '.join(rates)}."] if rates else []
    if "bytes_per_second" in rows.get("copies", {}):
        told.append(f"Copies read and write {rows['copies']['bytes_per_second'] / 1e12:.3g} TB/s together.")
    return told


PART = Part(
    name="machine",
    title="The machine",
    about="The GPU, its memory, the versions of what computes on it, and its rates of large products and of copies.",
    share=20,
    item_seconds=30,
    items=items,
    lines=lines,
    always=True,
)
