"""What this machine and installation offer, and why something is missing."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import time
import warnings
from importlib import metadata
from typing import Any

import torch

from zoo.core.errors import UsageWarning
from zoo.core.imports import discover
from zoo.ops import native, sizes
from zoo.tasks.code_trace import sandbox
from zoo.training import machine

PACKAGES = {
    "triton": "kernels on GPUs",
    "fla": "flash-linear-attention: linear attention, delta rule, RWKV-7",
    "flash_qla": "flash-qla: gated delta rule of width 128 in bfloat16, which fla calls by itself",
    "mlstm_kernels": "mlstm without gradients, by name (backend=mlstm_kernels): its gradients are others",
    "mamba_ssm": "Mamba kernels",
    "causal_conv1d": "short convolutions",
    "numba": "puzzle generators",
    "torchdiffeq": "solver=dopri5 and adjoint=True of neural_ode",
    "tokenizers": "text in the tokens of a tokenizer.json",
    "tensorboard": "event files",
    "wandb": "--track wandb",
    "mlflow": "--track mlflow",
}
SIZES = (128, 512, 2048)


def examine() -> dict[str, Any]:
    """Facts for `zoo doctor`, in seconds."""
    device = machine.choose_device("auto")
    return {
        "python": sys.version.split()[0],
        "versions": machine.versions(),
        "machine": machine.describe_machine(device),
        "devices": machine.available_devices(),
        "device": device.type,
        "precision": machine.choose_precision("auto", device),
        "bfloat16": {
            "amx": torch.cpu._is_amx_tile_supported(),
            "avx512_bf16": torch.cpu._is_avx512_bf16_supported(),
            "cuda": torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
        },
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "compiler": native.compiler() or shutil.which("cl"),
        "kernels": kernels(),
        "sizes": chosen_sizes(),
        "traced_files": traced_files(),
        "peak_memory": {"why": machine.no_peak_memory(device)},
        "packages": {name: {"for": what, **package(name)} for name, what in PACKAGES.items()},
        "matmul_gflops": {
            f"{device.type} {dtype}": {str(n): round(matmul_rate(device, dtype, n), 1) for n in SIZES}
            for dtype in ("float32", "bfloat16")
        },
    }


def kernels() -> dict[str, Any]:
    """Whether the compiled CPU kernels are there, where they are kept, the seconds spent on building those that were
    not, and why some or all are missing."""
    with warnings.catch_warnings():  # which say the same
        warnings.simplefilter("ignore", UsageWarning)
        if (why := native.why_not()) is not None:
            return {"available": False, "why": why}
        discover("zoo.ops")  # whose modules declare the sizes of kernels on which they rely
        seconds, refused = native.build_all()
    return {"available": True, "folder": str(native.folder()), "seconds": seconds, "refused": refused}


def chosen_sizes() -> dict[str, Any]:
    """By what sizes ops choose: those of `zoo.ops.sizes`, the same on every machine, and the threads of this one."""
    return {
        "chunks": [row._asdict() for row in sizes.CHUNKS],
        "passes": {"steps": [sizes.FEWEST, sizes.MOST], "ops": [row._asdict() for row in sizes.PASSES]},
        "threads": torch.get_num_threads(),
    }


def traced_files() -> dict[str, Any]:
    """Whether this system can confine a file of functions for `code_trace`, and by what."""
    confined, held = sandbox.barriers()
    return {"confined": confined, "by": held}


def package(name: str) -> dict[str, Any]:
    """Whether a package can be imported, and why not."""
    if importlib.util.find_spec(name) is None:
        return {"available": False, "why": "not installed"}
    try:
        importlib.import_module(name)
    except Exception as error:
        return {"available": False, "why": (str(error).splitlines() or [type(error).__name__])[0]}
    names = metadata.packages_distributions().get(name, [name])
    return {"available": True, "version": metadata.version(names[0])}


def matmul_rate(device: torch.device, dtype: str, n: int, seconds: float = 0.2) -> float:
    """Billions of operations per second of (n, n) @ (n, n): the best of some, as others may be at work here."""
    a = torch.randn(n, n, device=device).to(getattr(torch, dtype))
    best, end = float("inf"), time.perf_counter() + seconds
    while True:  # at least once, however busy the machine
        started = time.perf_counter()
        a @ a
        machine.synchronize(device)
        best = min(best, time.perf_counter() - started)
        if time.perf_counter() >= end:
            break
    return 2 * n**3 / best / 1e9


def lines(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """The same for a person: (what, finding) pairs."""
    m = facts["machine"]
    found = [("python", facts["python"]), ("torch", facts["versions"]["torch"])]
    found += [
        ("cpu", f"{m['cpu']}, {m['cpus']} cores, {m['threads']} threads, {m['memory_bytes'] / 2**30:.0f} GiB"),
        ("device", f"{facts['device']} ({m['device']}); available: {', '.join(facts['devices'])}"),
        ("bfloat16", ", ".join(k for k, v in facts["bfloat16"].items() if v) or "no hardware for it"),
        ("precision", f"{facts['precision']} under train.precision=auto"),
        ("compiler", facts["compiler"] or "none found: train.compile=true needs one (install gcc)"),
        ("kernels", _kernels(facts["kernels"])),
        *_sizes(facts["sizes"], facts["kernels"]["available"]),
        ("traced files", _traced_files(facts["traced_files"])),
        ("peak memory", facts["peak_memory"]["why"] or "measured"),
    ]
    for dtype, rates in facts["matmul_gflops"].items():
        found.append((f"matmul {dtype}", ", ".join(f"{r:,.1f} GFLOP/s at {n}" for n, r in rates.items())))
    for name, p in facts["packages"].items():
        found.append(
            (name, f"{p['version']}: {p['for']}" if p["available"] else f"not available ({p['why']}): {p['for']}")
        )
    return found


def _sizes(found: dict[str, Any], kernels: bool) -> list[tuple[str, str]]:
    by_op: dict[str, list[str]] = {}
    for row in found["chunks"]:
        width = "" if row["widest"] is None else f" to width {row['widest']}"
        by_op.setdefault(f"{row['op']} {row['form']}", []).append(f"{row['steps']}{width}")
    chunks = "; ".join(f"{name} {', then '.join(steps)}" for name, steps in by_op.items())
    low, high = found["passes"]["steps"]
    ops = "; ".join(
        f"{row['op']}{' (a decay a channel)' if row['decays'] == 'channel' else ''} with K V up to {row['largest']}, "
        f"{row['measured'][0]:.2f} to {row['measured'][1]:.2f} of the time"
        for row in found["passes"]["ops"]
    )
    passes = f"without gradients, of {low} to {high} steps on a CPU: {ops}" if kernels else "none without kernels"
    return [
        ("steps a chunk", f"{chunks} (by size alone, the same on every machine)"),
        ("small heads", passes),
        ("threads of ops", f"{found['threads']}, fewer where there are fewer heads or rows, one for little work"),
    ]


def _traced_files(found: dict[str, Any]) -> str:
    if found["confined"]:
        return f"confined by {', '.join(found['by'])}"
    return f"refused, as this system has no filter of system calls; {sandbox.TRUST} names those to run nevertheless"


def _kernels(found: dict[str, Any]) -> str:
    if not found["available"]:
        return f"none, plain PyTorch runs in their place: {found['why']}"
    compiled = f"compiled: {', '.join(found['seconds'])} ({sum(found['seconds'].values()):.1f} s to build or load)"
    refused = "".join(f"; plain PyTorch in place of {name}: {why}" for name, why in found["refused"].items())
    return f"{compiled}, kept in {found['folder']}{refused}"
