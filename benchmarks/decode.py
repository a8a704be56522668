"""Recurrent mixers after a long past: the cost of a step, and what 100,000 steps do to memory and error.

    python -m benchmarks.decode [--mixers "*"] [--prefill 1000000] [--steps 100000] [--out docs/results]

Cost: one row of width 256 is read in pieces of 4,096 tokens, by `forward`, up to 1,000 and up to a million; the median
time of a `step` from either state, the two taking turns (ratio). Drift: width 64, 100,000 single steps in float32,
their last 1,000 outputs and final state against `forward` in float64 over the whole sequence; the resident memory that
the steps added, and the processor time of the last tenth of the steps over that of the second tenth. Mixers whose state
grows with the context (attention without a window) are left out. Writes decode.json and decode.md.
"""

from __future__ import annotations

import argparse
import copy
import json
import pathlib
import statistics
import time
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import zoo
from benchmarks.measure import error
from zoo.protocol import Mixer
from zoo.registry import list_mixers
from zoo.training import machine

PIECE = 4096
SHORT = 1000


def has_fixed_state(mixer: Mixer) -> bool:
    """The state has a size, and not one that grows with the context."""
    few, many = (mixer.state_bytes(1, n, torch.float32) for n in (1_000, 1_000_000))
    return mixer.causal and 0 < few == many


def prefill(mixer: Mixer, n_tokens: int, rng: torch.Generator) -> Any:
    """The state after random tokens."""
    state, left = mixer.init_state(1), n_tokens
    while left:
        n = min(left, PIECE)
        _, state = mixer(torch.randn(1, n, mixer.d_model, generator=rng), state)
        left -= n
    return state


@torch.no_grad()
def step_cost(mixer: Mixer, n_prefill: int, repeats: int = 2000) -> dict[str, float]:
    """Microseconds of a step after SHORT tokens and after `n_prefill`, and what the long prefill took."""
    rng = torch.Generator().manual_seed(0)
    early = prefill(mixer, SHORT, rng)
    started = time.perf_counter()
    late = prefill(mixer, n_prefill, rng)
    prefill_seconds = time.perf_counter() - started
    x = torch.randn(1, mixer.d_model, generator=rng)
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(repeats):
        for which, state in enumerate((early, late)):
            started = time.perf_counter()
            _, state = mixer.step(x, state)
            if turn >= repeats // 10:
                times[which].append(time.perf_counter() - started)
            if which == 0:
                early = state
            else:
                late = state
    first, last = (1e6 * statistics.median(t) for t in times)
    return {
        "step_us": first,
        "late_step_us": last,
        "ratio": last / first,
        "prefill_tokens_per_second": n_prefill / prefill_seconds,
    }


def resident_bytes() -> int:
    """Resident memory of this process now."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


@torch.no_grad()
def drift(mixer: Mixer, n_steps: int) -> dict[str, float]:
    """Single steps against one pass in float64."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(1, n_steps, mixer.d_model, generator=rng)
    state, kept = mixer.init_state(1), []
    marks, resident = [], 0
    tenth = n_steps // 10
    for t in range(n_steps):
        if t % tenth == 0:
            marks.append(time.process_time())
            resident = resident_bytes() if t == tenth else resident
        y, state = mixer.step(x[:, t], state)
        if t >= n_steps - SHORT:
            kept.append(y)
    marks.append(time.process_time())
    grown = resident_bytes() - resident
    exact = copy.deepcopy(mixer).double()
    expected_state, last = exact.init_state(1), None
    for start in range(0, n_steps, PIECE):
        piece, expected_state = exact(x[:, start : start + PIECE].double(), expected_state)
        last = (piece if last is None else torch.cat([last, piece], 1))[:, -SHORT:]
    assert last is not None
    states = zip(map(_float, tree_leaves(state)), map(_float, tree_leaves(expected_state)), strict=True)
    return {
        "error": error([torch.stack(kept, 1)], [last]),
        "state_error": max(error([a], [e]) for a, e in states),
        "grown_bytes": grown,
        "late_over_early": (marks[-1] - marks[-2]) / (marks[2] - marks[1]),
    }


def _float(x: Tensor) -> Tensor:
    return x.double()


def markdown(report: dict[str, Any]) -> str:
    facts = report["machine"]
    lines = [
        "# A step after a long past",
        "",
        f"{facts['cpu']}, {facts['threads']} thread, torch {facts['versions']['torch']}. A step at width 256, one",
        f"row, after {SHORT:,} tokens and after a prefill of {report['prefill']:,} by `forward`; then",
        f"{report['steps']:,} single steps at width 64 in float32 against float64: error of the last outputs and the",
        "final state, memory that the steps added, processor time of the last tenth of them over that of the second.",
        "",
        "| mixer | step us | after the prefill | ratio | prefill tokens/s | error | state error | memory | time |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, m in report["mixers"].items():
        lines.append(
            f"| {name} | {m['step_us']:.0f} | {m['late_step_us']:.0f} | {m['ratio']:.2f} "
            f"| {m['prefill_tokens_per_second']:,.0f} | {m['error']:.0e} | {m['state_error']:.0e} "
            f"| {m['grown_bytes'] / 2**20:+.1f} MiB | {m['late_over_early']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixers", default="*", help="a shell pattern")
    parser.add_argument("--missing", action="store_true", help="only mixers that have no row yet")
    parser.add_argument("--prefill", type=int, default=1_000_000)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=pathlib.Path, help="write decode.json and decode.md into this folder")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    facts = machine.describe_machine(torch.device("cpu")) | {"versions": machine.versions()}
    report: dict[str, Any] = {"machine": facts, "prefill": args.prefill, "steps": args.steps, "mixers": {}}
    kept = args.out / "decode.json" if args.out else None
    if kept and kept.exists():
        report["mixers"] = json.loads(kept.read_text())["mixers"]
    for name in list_mixers(args.mixers):
        if args.missing and name in report["mixers"]:
            continue
        torch.manual_seed(0)
        mixer = zoo.create_mixer(name, 256)
        if not has_fixed_state(mixer):
            continue
        m = step_cost(mixer, args.prefill)
        torch.manual_seed(0)
        m |= drift(zoo.create_mixer(name, 64), args.steps)
        report["mixers"][name] = m
        print(name, {k: float(f"{v:.3g}") for k, v in m.items()}, flush=True)
        if kept:
            args.out.mkdir(parents=True, exist_ok=True)
            report["mixers"] = dict(sorted(report["mixers"].items()))
            kept.write_text(json.dumps(report, indent=1) + "\n")
            (args.out / "decode.md").write_text(markdown(report))
    print(json.dumps(report))


if __name__ == "__main__":
    main()
