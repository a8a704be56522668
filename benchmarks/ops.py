"""Speed and exactness of the ops on this machine, beside the plain PyTorch forms of flash-linear-attention.

    python -m benchmarks.ops [--json PATH] [--threads 2] [--repeats 9] [--cases delta_rule linear_attention]

Forward + backward in float32 at B 2, T 2048, H 4, K = V = 64; median of interleaved runs in one process. An error is
the largest difference to the float64 step form, over the largest entry, in the worst of the output, the last state
and all gradients. `share` is the rate of the matrix products that a form runs, over the rate of one large product here.
The last line printed is JSON. The peer is measured where `pip install --no-deps flash-linear-attention` has been done.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import pathlib
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode, bmm_flop

from zoo.ops import causal_conv1d, delta_rule, linear_attention

B, T, H, K, V = 2, 2048, 4, 64, 64
CHANNELS, WINDOW = 512, 4
SEGMENT = 128  # steps between the states kept by the float64 step form

Op = Callable[..., tuple[Tensor, Tensor]]
Run = Callable[[dict[str, Tensor]], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Case:
    """One op on one set of inputs; `peer` maps fla's naive module to a function of the same inputs."""

    op: Op
    inputs: dict[str, Tensor]
    module: str | None = None
    peer: Callable[[Any], Callable[..., Tensor]] | None = None


def cases() -> dict[str, Case]:
    """All measured cases, from a fixed seed."""
    rng = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng)

    qkv = {"q": normal(B, T, H, K), "k": F.normalize(normal(B, T, H, K), dim=-1), "v": normal(B, T, H, V)}
    beta = {"beta": normal(B, T, H).sigmoid()}
    per_head = {"log_decay": F.logsigmoid(normal(B, T, H) + 3)}
    per_channel = {"log_decay": F.logsigmoid(normal(B, T, H, K) + 3)}
    conv = {"x": normal(B, T, CHANNELS), "weight": normal(CHANNELS, WINDOW), "bias": normal(CHANNELS)}
    return {
        "delta_rule, decay per head": Case(
            delta_rule,
            qkv | beta | per_head,
            "gated_delta_rule",
            lambda fla: lambda q, k, v, beta, g: fla.naive_chunk_gated_delta_rule(q, k, v, g, beta)[0],
        ),
        "delta_rule, no decay": Case(
            delta_rule,
            qkv | beta,
            "delta_rule",
            lambda fla: lambda *x: fla.delta_rule_chunkwise(*(t.transpose(1, 2) for t in x))[0].transpose(1, 2),
        ),
        "delta_rule, decay per channel": Case(
            delta_rule,
            qkv | beta | per_channel,
            "kda",
            lambda fla: lambda q, k, v, beta, g: fla.naive_chunk_kda(q, k, v, g, beta)[0],
        ),
        "linear_attention, decay per head": Case(
            linear_attention,
            qkv | per_head,
            "simple_gla",
            lambda fla: lambda q, k, v, g: fla.naive_chunk_simple_gla(q, k, v, g)[0],
        ),
        "linear_attention, no decay": Case(linear_attention, qkv),
        "linear_attention, decay per channel": Case(linear_attention, qkv | per_channel),
        "causal_conv1d": Case(causal_conv1d, conv, None, lambda _: _torch_conv1d),
    }


def _torch_conv1d(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    padded = F.pad(x.transpose(1, 2), (weight.shape[1] - 1, 0))
    return F.conv1d(padded, weight[:, None], bias, groups=len(weight)).transpose(1, 2)


def load_naive(module: str) -> ModuleType | None:
    """fla's naive forms of one op, from their file alone: importing `fla.ops` would ask for Triton and a GPU."""
    package = importlib.util.find_spec("fla")
    if package is None or not package.submodule_search_locations:
        return None
    path = pathlib.Path(package.submodule_search_locations[0]) / "ops" / module / "naive.py"
    spec = importlib.util.spec_from_file_location(f"fla_naive_{module}", path)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def by_steps(op: Op, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The step form, with only every SEGMENT-th state kept for the backward pass."""
    along_time = {name: x for name, x in inputs.items() if x.ndim > 1 and x.shape[1] == T}
    fixed = {name: x for name, x in inputs.items() if name not in along_time}
    outputs, state = [], None
    for start in range(0, T, SEGMENT):
        part = {name: x[:, start : start + SEGMENT] for name, x in along_time.items()}
        step = functools.partial(op, **part, **fixed, state=state, backend="reference")
        o, state = checkpoint(step, use_reentrant=False)
        outputs.append(o)
    assert state is not None
    return torch.cat(outputs, 1), state


def results(run: Run, inputs: dict[str, Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Output, last state, and the gradients of a fixed random functional of both."""
    leaves = {name: x.to(dtype, copy=True).requires_grad_() for name, x in inputs.items()}
    out = run(leaves)
    rng = torch.Generator().manual_seed(1)
    seeds = [torch.randn(x.shape, generator=rng).to(dtype) for x in out]
    return [*out, *torch.autograd.grad(out, list(leaves.values()), seeds)]


def error(got: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    return max(((a.double() - b).abs().max() / b.abs().max()).item() for a, b in zip(got, exact, strict=True))


def training_step(function: Callable[..., Tensor], inputs: dict[str, Tensor]) -> Callable[[], object]:
    """Forward and backward of sum(w * output) with respect to all inputs."""
    leaves = [x.clone().requires_grad_() for x in inputs.values()]
    weight = torch.randn(function(*leaves).shape)

    return lambda: torch.autograd.grad(function(*leaves), leaves, weight)


def medians(steps: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each, the runs taking turns."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(repeats + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if turn:  # the first turn warms up
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(s) for name, s in seconds.items()}


def matmul_flops(step: Callable[[], object]) -> int:
    def inplace(_: Any, a: Any, b: Any, **rest: Any) -> int:
        return int(bmm_flop(a, b))

    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.baddbmm_: inplace}) as counter:
        step()
    return int(counter.get_total_flops())


def matmul_rate(size: int = 2048) -> float:
    """Floating-point operations a second of one large float32 product."""
    a = torch.randn(size, size)
    return 2 * size**3 / medians({"mm": lambda: torch.mm(a, a)}, 5)["mm"]


def measure(case: Case, rate: float, repeats: int) -> dict[str, Any]:
    inputs = case.inputs
    exact = results(lambda x: by_steps(case.op, x), inputs, torch.float64)
    step = training_step(lambda *x: case.op(**dict(zip(inputs, x, strict=True)))[0], inputs)
    steps = {"chunked": step}
    peer_module = load_naive(case.module) if case.module else None
    if case.peer and (peer_module or not case.module):
        steps["peer"] = training_step(case.peer(peer_module), inputs)
    seconds = medians(steps, repeats)
    by_step = training_step(lambda *x: by_steps(case.op, dict(zip(inputs, x, strict=True)))[0], inputs)
    peer = seconds.get("peer")
    return {
        "seconds": seconds["chunked"],
        "error": error(results(lambda x: case.op(**x, backend="chunked"), inputs, torch.float32), exact),
        "share": matmul_flops(step) / seconds["chunked"] / rate,
        "reference_seconds": medians({"reference": by_step}, 1)["reference"],
        "reference_error": error(results(lambda x: by_steps(case.op, x), inputs, torch.float32), exact),
        "peer_seconds": peer,
        "ratio": peer / seconds["chunked"] if peer else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=pathlib.Path, help="also write the results to this file")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--cases", nargs="*", default=[""], help="only cases whose name contains one of these")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rate = matmul_rate()
    print(f"torch {torch.__version__}, {args.threads} threads, float32 matmul {rate / 1e9:.0f} GFLOP/s")
    if importlib.util.find_spec("fla") is None:
        print("fla is not importable: its forms are not measured (pip install --no-deps flash-linear-attention)")
    titles = f"{'ms':>8}{'error':>9}{'share':>7}{'peer ms':>9}{'ratio':>7}{'by step ms':>12}{'error':>9}"
    print(f"{'forward + backward':36}{titles}")
    measured = {}
    for name, case in cases().items():
        if any(part in name for part in args.cases):
            measured[name] = m = measure(case, rate, args.repeats)
            peer = f"{m['peer_seconds'] * 1e3:9.1f}{m['ratio']:7.2f}" if m["peer_seconds"] else f"{'-':>9}{'-':>7}"
            ours = f"{m['seconds'] * 1e3:8.1f}{m['error']:9.1e}{m['share']:7.0%}"
            print(f"{name:36}{ours}{peer}{m['reference_seconds'] * 1e3:12.0f}{m['reference_error']:9.1e}", flush=True)
    machine = {
        "torch": torch.__version__,
        "threads": args.threads,
        "matmul_flops": rate,
        "cpu": platform.processor() or platform.machine(),
    }
    report = json.dumps({"machine": machine, "shape": {"B": B, "T": T, "H": H, "K": K, "V": V}, "ops": measured})
    if args.json:
        args.json.write_text(report + "\n")
    print(report)


if __name__ == "__main__":
    main()
