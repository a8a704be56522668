"""The machine at hand: device, precision, memory, and what a result must say about them."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import zoo
from zoo.core.errors import UsageError
from zoo.core.memory import total_memory

STATUS = Path("/proc/self/status")  # on Linux
PACKAGES = ("torch", "numpy", "triton", "flash-linear-attention", "mamba-ssm", "causal-conv1d", "numba")


def available_devices() -> list[str]:
    found = ["cuda"] if torch.cuda.is_available() else []
    return [*found, *(["mps"] if torch.backends.mps.is_available() else []), "cpu"]


def choose_device(name: str) -> torch.device:
    """`auto` takes the first of cuda, mps and cpu that is there.

    Raises:
        UsageError: a device that this machine or this build of torch lacks.
    """
    found = available_devices()
    if name != "auto" and name not in found:
        raise UsageError(f"device={name!r} is not available here. Available: auto, {', '.join(found)}.")
    return torch.device(found[0] if name == "auto" else name)


def fast_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 matrix products have hardware of their own."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and torch.cpu._is_amx_tile_supported()


def choose_precision(name: str, device: torch.device) -> str:
    """`auto` takes bfloat16 where the hardware gains from it."""
    if name == "auto":
        return "bfloat16" if fast_bfloat16(device) else "float32"
    return name


def autocast(precision: str, device: torch.device) -> Any:
    """The context in which a model computes at `precision`."""
    if precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


def synchronize(device: torch.device) -> None:
    """Wait until a device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def no_peak_memory(device: torch.device) -> str | None:
    """Why `peak_memory` gives no figure for a device here; None where it does."""
    if device.type == "mps":
        return "not measured: MPS keeps no largest figure"
    if device.type == "cpu" and not STATUS.exists() and importlib.util.find_spec("resource") is None:
        return f"not measured: {platform.system()} does not tell a process its own"
    return None


def peak_memory(device: torch.device) -> int | None:
    """Largest memory so far in bytes: of the allocator on a GPU, else of the process; None if not known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if no_peak_memory(device) is not None:
        return None
    with contextlib.suppress(OSError):  # getrusage would also count the parent that started this process
        for line in STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource  # where there is one

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak_memory(device: torch.device) -> bool:
    """Make `peak_memory` start again from what is in use now; whether the system allows that."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        (STATUS.parent / "clear_refs").write_text("5")
    except OSError:
        return False
    return True


def cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def describe_machine(device: torch.device) -> dict[str, Any]:
    """What a result says about the machine."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {
        "cpu": cpu_name(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": name,
        "memory_bytes": total_memory(),
        "amx": torch.cpu._is_amx_tile_supported(),
        "system": platform.platform(terse=True),
    }


def versions() -> dict[str, str]:
    """Versions of Python, of this package and of those that compute."""
    found = {"python": platform.python_version(), "sequence-zoo": zoo.__version__}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def commit() -> str | None:
    """The commit of the checkout this package runs from, `+` where it has changes; None outside one."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=5).stdout

    try:
        return git("rev-parse", "HEAD").strip() + ("+" if git("status", "--porcelain", "-uno").strip() else "") or None
    except (OSError, subprocess.SubprocessError):
        return None
