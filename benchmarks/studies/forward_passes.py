"""Forward passes of the ops beside ggml and onnxruntime, which compute nothing else.

    python -m zoo.benchmarks.studies.forward_passes [--repeats 15] [--threads 1 2] [--cases wkv7]

Ours and the peers run in turns in one process, without gradients. A peer's values are compared with ours before it is
timed. Times are of the processor on one thread, and of the clock on more. `make bench-ops` installs the peers.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.benchmarks.decode import error
from zoo.benchmarks.studies import peer_ggml, peer_onnxruntime
from zoo.benchmarks.studies.harness import Data, Study, facts, load, quartiles, shown_load, table
from zoo.benchmarks.studies.measure import timings
from zoo.ops import causal_conv1d, delta_rule, dplr, linear_attention, selective_scan

GRID = ((1, 2048, 8, 32), (1, 2048, 8, 64), (1, 2048, 8, 128), (8, 512, 4, 32), (8, 512, 4, 64))
WIDTHS = ((1, 2048, 512), (8, 512, 256))  # of convolutions and state-space scans
N, WINDOW = 16, 4
LARGE = 30 << 20  # bytes: once as much was freed, glibc hands memory out again without asking the system for new pages
AGREE = 2e-4  # of the largest entry
HEADER = """# Forward passes beside ggml and onnxruntime

Milliseconds of one forward pass in float32 without gradients, the median of runs in turns in one process. Ratio: our
time over the peer's, median and quartiles of the turns; below 1 ours is faster. One thread: processor time. Two: wall
clock. The peers keep no states for a backward pass, and neither do ours here. onnxruntime is called as its users do,
with memory for its outputs from its own pool; ours come from torch's allocator, after a larger tensor was freed, as in
any process that has trained; ggml writes to the same memory every time. Sizes are B, T, H, K (K = V), or B, T, D.
Where more processes are at work than there are cores, threads wait for each other: on two threads the quartiles are
then wide, and the medians say little.
"""

Run = Callable[[], Tensor]
Peer = Callable[[int], Run]


def cases() -> dict[str, tuple[Run, dict[str, Peer]]]:
    """By name: our function, and each peer's, made for a number of threads."""
    found: dict[str, tuple[Run, dict[str, Peer]]] = {}
    for size in GRID:
        for name, case in _heads(*size).items():
            found[f"{name} | {' '.join(map(str, size))}"] = case
    for wide in WIDTHS:
        for name, case in _channels(*wide).items():
            found[f"{name} | {' '.join(map(str, wide))}"] = case
    return found


def _heads(B: int, T: int, H: int, K: int) -> dict[str, tuple[Run, dict[str, Peer]]]:
    rng = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng)

    x: dict[str, Any] = {"q": normal(B, T, H, K), "k": F.normalize(normal(B, T, H, K), dim=-1), "v": normal(B, T, H, K)}
    beta: dict[str, Any] = {"beta": normal(B, T, H).sigmoid()}
    head: dict[str, Any] = {"log_decay": F.logsigmoid(normal(B, T, H) + 3)}
    channel: dict[str, Any] = {"log_decay": F.logsigmoid(normal(B, T, H, K) + 3)}
    onnx = peer_onnxruntime.linear_attention
    found: dict[str, tuple[Run, dict[str, Peer]]] = {}
    none: dict[str, Any] = {}
    for decay, g in (("no decay", none), ("decay per head", head), ("decay per channel", channel)):
        peers: dict[str, Peer] = {"onnxruntime": functools.partial(onnx, **x, **g)}
        if decay == "decay per channel":
            peers["ggml gated_linear_attn"] = functools.partial(peer_ggml.gated_linear_attention, **x, **g)
        found[f"linear_attention, {decay}"] = _first(linear_attention, **x, **g), peers
        peers = {"onnxruntime": functools.partial(onnx, **x, **beta, **g)}
        if g:
            peers["ggml gated_delta_net"] = functools.partial(peer_ggml.gated_delta_net, **x, **beta, **g)
        found[f"delta_rule, {decay}"] = _first(delta_rule, **x, **beta, **g), peers
    if K == 64:  # ggml's form is written for it
        a: dict[str, Any] = {"a": -x["k"], "b": x["k"] * normal(B, T, H, K).sigmoid()}
        strong: dict[str, Any] = {"log_decay": -0.6065 * normal(B, T, H, K).sigmoid()}
        wkv7 = functools.partial(peer_ggml.wkv7, **x, **a, **strong)
        found["dplr, as in rwkv7"] = _first(dplr, **x, **a, **strong, scale=1.0), {"ggml rwkv_wkv7": wkv7}
    return found


def _channels(B: int, T: int, D: int) -> dict[str, tuple[Run, dict[str, Peer]]]:
    rng = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng)

    x, weight, bias = normal(B, T, D), normal(D, WINDOW), normal(D)
    selective: dict[str, Any] = {"u": x, "delta": normal(B, T, D) - 4, "A": -torch.arange(1.0, N + 1).repeat(D, 1)}
    selective |= {"B": normal(B, T, N), "C": normal(B, T, N)}
    return {
        "causal_conv1d, silu": (
            _first(causal_conv1d, x, weight, bias, activation="silu"),
            {"onnxruntime": lambda threads: peer_onnxruntime.causal_conv1d(threads, x, weight, bias)},
        ),
        "causal_conv1d": (
            _first(causal_conv1d, x, weight),
            {"ggml ssm_conv": lambda threads: peer_ggml.ssm_conv(threads, x, weight)},
        ),
        f"selective_scan, state {N}": (
            _first(selective_scan, delta_softplus=True, **selective),
            {"ggml ssm_scan": functools.partial(peer_ggml.ssm_scan, **selective)},
        ),
    }


def _first(op: Callable[..., Any], *inputs: Tensor, **named: Any) -> Run:
    return lambda: op(*inputs, **named)[0]


def ratios(ours: Run, peers: dict[str, Run], clock: Callable[[], float], repeats: int) -> dict[str, Any]:
    """Median seconds of all, and the quartiles of our time over each peer's, turn by turn."""
    seen = timings({"ours": ours, **peers}, repeats, clock)
    return {
        "seconds": statistics.median(seen["ours"]),
        "peers": {
            name: {
                "seconds": statistics.median(seen[name]),
                "ratio": quartiles(seen["ours"], seen[name]),
            }
            for name in peers
        },
    }


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--cases", nargs="*", default=[""], help="only cases whose name contains one of these")


@torch.no_grad()
def measure(args: argparse.Namespace, old: Data) -> Iterator[Data]:
    report: Data = {"machine": facts(), "rows": dict(old.get("rows", {}))}
    report["load"] = load()
    for threads in args.threads:
        torch.set_num_threads(threads)
        clock = time.process_time if threads == 1 else time.perf_counter
        for name, (ours, peers) in cases().items():
            if not any(part in name for part in args.cases):
                continue
            ready = {}
            for peer, make in peers.items():
                try:
                    run = make(threads)
                except ImportError as missing:
                    print(f"  {peer} is not installed: {missing}")
                    continue
                if (off := error([run()], [ours()])) > AGREE:
                    raise RuntimeError(f"{name}: {peer} gives other values (by {off:.0e} of the largest)")
                ready[peer] = run
            torch.empty(LARGE, dtype=torch.uint8)
            report["rows"][f"{name} | {threads}"] = row = ratios(ours, ready, clock, args.repeats)
            row["missing"] = sorted({*peers} - {*ready})
            shown = ", ".join(f"{p} {' '.join(f'{q:.2f}' for q in f['ratio'])}" for p, f in row["peers"].items())
            print(f"{name} | {threads}: {row['seconds'] * 1e3:.2f} ms; {shown}", flush=True)
            yield report


def markdown(report: Data) -> str:
    """The report as a page."""
    rows = []
    for name, row in report["rows"].items():
        cells = [*name.split(" | "), f"{row['seconds'] * 1e3:.2f}"]
        for peer, f in row["peers"].items():
            low, middle, high = f["ratio"]
            rows.append([*cells, peer, f"{f['seconds'] * 1e3:.2f}", f"{middle:.2f}", f"{low:.2f} to {high:.2f}"])
        rows += [[*cells, peer, "not installed", "", ""] for peer in row["missing"]]
    at = report["machine"]
    head = ["op", "size", "threads", "ms", "peer", "peer ms", "ratio", "quartiles"]
    about = f"{at['cpu']}, {at['cpus']} cores, torch {at['versions']['torch']}{shown_load(report['load'])}."
    return "\n".join([HEADER, about, "", *table(head, rows)]) + "\n"


STUDY = Study("forward_passes", __doc__, arguments, measure, markdown)

if __name__ == "__main__":
    STUDY.main()
