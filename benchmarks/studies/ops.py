"""Speed and exactness of the recurrent ops and mixers on this machine, beside public forms on a CPU.

    python -m zoo.benchmarks.studies.ops [--threads 2] [--repeats 9] [--cases delta_rule slstm]

Peers are measured where they are installed (`make bench-ops` sees to it). Cases that are not measured this time are
kept as they stood.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
from collections.abc import Iterator

import torch

from zoo.benchmarks.studies import op_cases
from zoo.benchmarks.studies.harness import Data, Study, facts
from zoo.benchmarks.studies.measure import Case, matmul_rate, measured

HEADER = """# Speed and exactness of the ops

Forward and backward pass in float32; median of interleaved runs in one process, without quartiles. Error: the largest
difference to the float64 step form over the largest entry, in the worst of the output, the last state and all
gradients. Share: the rate of the matrix products that the plain form needs, over the rate of one large torch product
here; more than 100 % means that a form needs fewer products than the plain form. Ratio: the peer's time over ours.
`auto` is what a user gets; forms that could not run here are left out.

The peers are the public forms that run on a CPU. Those of flash-linear-attention are its plain PyTorch forms, not its
GPU kernels. `lstm` and `gru` are torch's own, so their ratio is 1. Rows without a peer have none that was measured.
Forward passes alone are on [a page of their own](forward_passes.md), beside ggml and onnxruntime; single steps are not
measured here, see [limits](../limits.md#speed).
"""


def cases() -> dict[str, Case]:
    """All measured cases, from fixed seeds."""
    found: dict[str, Case] = {}
    for module in sorted(info.name for info in pkgutil.iter_modules(op_cases.__path__)):
        found |= importlib.import_module(f"{op_cases.__name__}.{module}").cases()
    return found


def markdown(report: Data) -> str:
    """The report as a page."""
    at = report["machine"]
    lines = [
        HEADER,
        f"{at['cpu']}, {at['threads']} threads, {at['matmul_flops'] / 1e9:.0f} GFLOP/s in a large float32",
        f"product, torch {at['versions']['torch']}.",
        "",
        "| case | form | ms | error | share | peer | peer ms | ratio |",
        "|---|---|---:|---:|---:|---|---:|---:|",
    ]
    for name, m in report["ops"].items():
        for form, f in m["forms"].items():
            peer = f"{m['peer']} | {m['peer_seconds'] * 1e3:.1f} | {f['ratio']:.1f}x" if m["peer_seconds"] else " | | "
            share = f"{f['share']:.0%}" if f["share"] else ""  # products inside torch's own cells are not counted
            ours = f"{name} | {form} | {f['seconds'] * 1e3:.1f} | {f['error']:.1e} | {share}"
            lines.append(f"| {ours} | {peer} |")
    return "\n".join(lines) + "\n"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--cases", nargs="*", default=[""], help="only cases whose name contains one of these")


def measure(args: argparse.Namespace, old: Data) -> Iterator[Data]:
    torch.set_num_threads(args.threads)
    report: Data = {"machine": facts() | {"matmul_flops": matmul_rate()}, "ops": dict(old.get("ops", {}))}
    for name, case in cases().items():
        if not any(part in name for part in args.cases):
            continue
        report["ops"][name] = m = measured(case, report["machine"]["matmul_flops"], args.repeats)
        peer = (
            f"peer {m['peer_seconds'] * 1e3:8.1f} ms, error {m['peer_error']:.0e}" if m["peer_seconds"] else "no peer"
        )
        print(f"{name}: {peer}")
        for form, f in m["forms"].items():
            ratio = f"{f['ratio']:5.1f}x" if f["ratio"] else ""
            print(f"  {form:10} {f['seconds'] * 1e3:8.1f} ms  error {f['error']:.0e}  share {f['share']:4.0%} {ratio}")
        yield report


STUDY = Study("ops", __doc__, arguments, measure, markdown)

if __name__ == "__main__":
    STUDY.main()
