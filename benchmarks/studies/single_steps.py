"""What one step through a compiled kernel costs above the kernel itself.

    python -m zoo.benchmarks.studies.single_steps [--repeats 2000]

Every kernel is called at T = 1 without gradients in two ways: through its operator, and as the bare C function with
addresses that were made before. The difference is what the bridge costs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from zoo import ops
from zoo.benchmarks.studies.harness import Data, Study, facts, load, shown_load
from zoo.ops import kernel as kernels
from zoo.ops import native, single_step
from zoo.ops.bridge import OPERATORS, Operator

HEADER = """# Single steps through the compiled kernels

Microseconds for one call at T = 1 and batch 1 without gradients, the median of calls in one process. Kernel: the C
function alone, with addresses that were made before. Call: the same through the operator, with its checks and new
memory for what it returns. Above: the difference. Dispatched: the difference where the call goes through torch's
dispatcher, as it does in compiled code. A decoder's steps of `causal_conv1d`, `delta_rule` and `linear_attention` go
past these operators to a kernel of their own, which is not measured here.
"""


def noise(*shape: int) -> Tensor:
    return 0.3 * torch.randn(*shape)


def calls(n_steps: int = 1) -> dict[str, Callable[[], object]]:
    """By the name of an operator, a function that calls it once, on (1, n_steps, 64) or two heads of 32."""
    x, heads, gates = (1, n_steps, 64), (1, n_steps, 2, 32), (1, n_steps, 2)
    compiled: dict[str, Any] = {"backend": "compiled"}
    q, k, v, g, beta = noise(*heads), noise(*heads), noise(*heads), -noise(*gates).abs(), noise(*gates)
    a, b = noise(*x).sigmoid(), noise(*x)
    weights = noise(128, 64), noise(128, 64), noise(64, 128)
    recurrent, layer = noise(64, 64), (noise(256, 64), noise(256))
    synapses = ops.Synapses(*noise(4, 8, 8).abs())
    return {
        "causal_conv1d": lambda: ops.causal_conv1d(b, noise(64, 4), noise(64), activation="silu", **compiled),
        "cfc": lambda: ops.cfc(b, recurrent, [layer], timespans=noise(1, n_steps).abs(), **compiled),
        "delta": lambda: ops.delta_rule(q, k, v, beta, g, **compiled),
        "gated_mlp": lambda: OPERATORS["gated_mlp"](b, *weights, False),
        "gated_norm": lambda: OPERATORS["gated_norm"](b, a, noise(64), 1, 1e-5, True),
        "linear_attention": lambda: ops.linear_attention(q, k, v, g, **compiled),
        "ltc": lambda: ops.ltc(b[..., :8], synapses, synapses, *noise(3, 8).abs(), **compiled),
        "m2rnn": lambda: ops.m2rnn(q, k, v, noise(2, 32, 32), g, **compiled),
        "mlstm": lambda: ops.mlstm(q, k, v, g, g, **compiled),
        "normed_gated_mlp": lambda: OPERATORS["normed_gated_mlp"](b, *weights, False),
        "normed_product": lambda: OPERATORS["normed_product"](a, b),
        "oscillate": lambda: ops.oscillate(b, a, noise(*x).abs(), noise(*x).abs(), **compiled),
        "plain_norm": lambda: OPERATORS["plain_norm"](b, 2, 1e-5),
        "scan": lambda: ops.scan(a, b, **compiled),
        "selective_scan": lambda: ops.selective_scan(
            b, a, -noise(64, 16).abs(), noise(1, n_steps, 16), noise(1, n_steps, 16), noise(64), b, **compiled
        ),
        "silu_product": lambda: OPERATORS["silu_product"](a, b),
        "slot_scores": lambda: ops.slot_scores(q, k, noise(*heads), -noise(*heads).abs(), **compiled),
        "slstm": lambda: ops.slstm(noise(1, n_steps, 4, 2, 32), noise(2, 4, 32, 32), **compiled),
    }


def inputs_of(call: Callable[[], object]) -> tuple[Operator, tuple[Any, ...]]:
    """The operator that a call reaches, and its inputs."""
    found: list[tuple[Operator, tuple[Any, ...]]] = []
    real = Operator.__call__

    def record(operator: Operator, *inputs: Any) -> Any:
        found.append((operator, inputs))
        return real(operator, *inputs)

    past = mock.patch.object(single_step, "steps_alone", return_value=False)  # some steps go past their operators
    with mock.patch.object(Operator, "__call__", record), past:
        call()
    return found[0]


def bare(call: Callable[[], object]) -> Callable[[], None]:
    """The C functions that a call of an operator reaches, alone."""
    functions, memory = [], []
    real = kernels.Kernel.__call__

    def record(kernel: kernels.Kernel, name: str, reads: Any, writes: Any, *numbers: Any) -> None:
        real(kernel, name, reads, writes, *numbers)
        tensors = [x.tensor if isinstance(x, kernels.Strided) else x for x in (*reads, *writes)]
        addresses = [None if x is None else x.data_ptr() for x in tensors]
        functions.append((native.load(kernel.source).function(name), (*addresses, *numbers)))
        memory.append(tensors)

    with mock.patch.object(kernels.Kernel, "__call__", record):
        call()

    def run() -> None:
        for function, arguments in functions:
            function(*arguments)

    run.memory = memory  # type: ignore[attr-defined]  # which the addresses are of
    return run


def microseconds(call: Callable[[], object], repeats: int) -> float:
    """The median time of a call."""
    seen = []
    for _ in range(repeats + repeats // 10):
        start = time.perf_counter_ns()
        call()
        seen.append(time.perf_counter_ns() - start)
    return statistics.median(seen[repeats // 10 :]) / 1e3


@torch.no_grad()
def overhead(name: str, repeats: int) -> dict[str, float]:
    """Microseconds of the kernel, of the call, and of the call through torch's dispatcher."""
    operator, inputs = inputs_of(calls()[name])
    whole = (*inputs, False) if operator.keeps else inputs
    return {
        "kernel": microseconds(bare(lambda: operator(*inputs)), repeats),
        "call": microseconds(lambda: operator(*inputs), repeats),
        "dispatched": microseconds(lambda: operator.dispatched(*whole), repeats),
    }


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repeats", type=int, default=2000)


def measure(args: argparse.Namespace, old: Data) -> Iterator[Data]:
    torch.set_num_threads(1)
    report: Data = {"machine": facts(), "load": load(), "operators": {}}
    for name in calls():
        report["operators"][name] = row = overhead(name, args.repeats)
        print(f"{name:18} {row['kernel']:6.1f} us, above {row['call'] - row['kernel']:5.1f} us")
        yield report


def markdown(report: Data) -> str:
    """The report as a page."""
    at = report["machine"]
    lines = [
        HEADER,
        f"{at['cpu']}, 1 thread, torch {at['versions']['torch']}{shown_load(report.get('load'))}.",
        "",
        "| operator | kernel | call | above | dispatched |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, row in report["operators"].items():
        above, dispatched = row["call"] - row["kernel"], row["dispatched"] - row["kernel"]
        lines.append(f"| {name} | {row['kernel']:.1f} | {row['call']:.1f} | {above:.1f} | {dispatched:.1f} |")
    return "\n".join(lines) + "\n"


STUDY = Study("single_steps", __doc__, arguments, measure, markdown)

if __name__ == "__main__":
    STUDY.main()
