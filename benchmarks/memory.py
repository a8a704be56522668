"""Training memory of the recurrent ops against length: it must grow with T, not faster.

    python -m benchmarks.memory [--ops delta_rule] [--out docs/results]

Forward and backward in float32 at B 1, H 4, K = V = 64 (scans: as many channels), every length in a process of its own:
its peak resident memory, less that of the same process at T = 64. `per token` is that over T; inputs, outputs and
gradients alone take `floor` of it. Writes memory.json and memory.md.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.ops import causal_conv1d, delta_rule, dplr, linear_attention, mlstm, scan, selective_scan
from zoo.training import machine

H, K, N = 4, 64, 16
LENGTHS = (2048, 4096, 8192, 16384, 32768)
OPS: dict[str, tuple[Callable[..., tuple[Tensor, Any]], str]] = {
    "linear_attention, per head": (linear_attention, "q k v g"),
    "linear_attention, per channel": (linear_attention, "q k v gk"),
    "delta_rule, per head": (delta_rule, "q k v beta g"),
    "delta_rule, per channel": (delta_rule, "q k v beta gk"),
    "dplr": (dplr, "q k v a b gk"),
    "mlstm": (mlstm, "q k v i f"),
    "scan": (scan, "decay x"),
    "selective_scan": (selective_scan, "x x A B C"),
    "causal_conv1d": (causal_conv1d, "x weight"),
}


def draw(kind: str, T: int) -> Tensor:
    x = torch.randn(1, T, H, K)
    match kind:
        case "k":
            return F.normalize(x, dim=-1)
        case "a":
            return -F.normalize(x, dim=-1)
        case "b":
            return 0.5 * F.normalize(x, dim=-1)
        case "gk":
            return F.logsigmoid(x + 3)
        case "g" | "f":
            return F.logsigmoid(x[..., 0] + 3)
        case "beta":
            return x[..., 0].sigmoid()
        case "i":
            return x[..., 0]
        case "x":
            return x.flatten(2)
        case "decay":
            return x.flatten(2).sigmoid()
        case "A":
            return -torch.rand(H * K, N) - 0.1
        case "B" | "C":
            return torch.randn(1, T, N)
        case "weight":
            return torch.randn(H * K, 4)
    return x


def train_once(name: str, T: int, backend: str) -> None:
    """One forward and backward; prints the process's peak resident bytes and the bytes of all that must exist."""
    op, kinds = OPS[name]
    torch.manual_seed(0)
    leaves = [draw(kind, T).requires_grad_() for kind in kinds.split()]
    o, _ = op(*leaves, backend=backend)
    gradients = torch.autograd.grad(o, leaves, torch.ones_like(o))
    floor = sum(x.numel() * x.element_size() for x in (*leaves, *gradients, o, o))
    print(json.dumps({"peak": machine.peak_memory(torch.device("cpu")), "floor": floor}))


def measured(name: str, T: int, backend: str) -> dict[str, int]:
    command = [sys.executable, "-m", "benchmarks.memory", "--once", name, str(T), backend]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    return dict(json.loads(done.stdout.splitlines()[-1]))


def markdown(report: dict[str, Any]) -> str:
    lines = [
        "# Training memory against length",
        "",
        "Peak resident memory of a process that runs one forward and backward pass (float32, B 1, H 4, K = V = 64),",
        "less that at T = 64. Inputs, output and their gradients alone take the floor. Growth: bytes per token at the",
        f"longest over those at the shortest length; 1 is linear. {report['machine']['cpu']}, torch",
        f"{report['machine']['torch']}.",
        "",
        "| op | form | " + " | ".join(f"T {T:,}" for T in LENGTHS) + " | floor | growth |",
        "|---|---|" + "---:|" * (len(LENGTHS) + 2),
    ]
    for row in report["ops"]:
        cells = " | ".join(f"{row['bytes'][str(T)] / 2**20:.0f} MiB" for T in LENGTHS)
        lines.append(
            f"| {row['op']} | {row['form']} | {cells} | {row['floor'] / 2**20:.0f} MiB | {row['growth']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--once", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--ops", nargs="*", default=[""], help="only ops whose name contains one of these")
    parser.add_argument("--out", type=pathlib.Path, help="write memory.json and memory.md into this folder")
    args = parser.parse_args()
    if args.once:
        train_once(args.once[0], int(args.once[1]), args.once[2])
        return
    facts = machine.describe_machine(torch.device("cpu")) | {"torch": torch.__version__}
    report: dict[str, Any] = {"machine": facts, "ops": []}
    for name in OPS:
        if not any(part in name for part in args.ops):
            continue
        for form in ("auto", "chunked"):
            base = measured(name, 64, form)["peak"]
            runs = {T: measured(name, T, form) for T in LENGTHS}
            used = {T: max(run["peak"] - base, 1) for T, run in runs.items()}
            growth = (used[LENGTHS[-1]] / LENGTHS[-1]) / (used[LENGTHS[0]] / LENGTHS[0])
            row = {
                "op": name,
                "form": form,
                "bytes": {str(T): b for T, b in used.items()},
                "floor": runs[LENGTHS[-1]]["floor"],
                "growth": growth,
            }
            report["ops"].append(row)
            print(name, form, {T: f"{b / 2**20:.0f} MiB" for T, b in used.items()}, f"growth {growth:.2f}", flush=True)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "memory.json").write_text(json.dumps(report, indent=1) + "\n")
        (args.out / "memory.md").write_text(markdown(report))
    print(json.dumps(report))


if __name__ == "__main__":
    main()
