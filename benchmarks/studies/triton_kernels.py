"""What every Triton kernel takes on an H200, from its compilation ahead of any GPU.

    python -m zoo.benchmarks.studies.triton_kernels

It needs triton and no GPU. Every kernel is compiled for sm_90 as its op launches it, forward and backward, with
documents and lengths and without. Registers and spilled bytes are a thread's, shared memory is a program's. The rows of
another version of triton, which is first on PYTHONPATH, stand beside those of earlier runs.
"""

from __future__ import annotations

import argparse
import functools
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from zoo import ops
from zoo.benchmarks.studies.harness import Data, Study, facts, shown_machine, table
from zoo.core.errors import UsageError
from zoo.ops.triton_kernel import TritonKernel

Leaves = dict[str, Tensor]
REGISTERS, SHARED = 255, 227 * 1024  # most of a thread, and of a program, on sm_90


def _normal(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=dtype)


def _scan(B: int, T: int, D: int, dtype: torch.dtype, *, varying: bool) -> Leaves:
    a = _normal(*((B, T, D) if varying else (D,)), dtype=dtype)
    return {"a": a / (1 + a.abs()), "b": _normal(B, T, D, dtype=dtype), "state": _normal(B, D, dtype=dtype)}


def _slstm(B: int, T: int, D: int) -> Leaves:
    width = max(D // 2, 3)
    names = "h", "c", "n", "m"
    return {
        "gates": _normal(B, T, 4, 2, width),
        "weight": 0.3 * _normal(2, 4, width, width),
        **{name: _normal(B, 2, width) + 3 * (name == "n") for name in names},
    }


def _m2rnn(B: int, T: int, D: int) -> Leaves:
    heads, K, V = 4, max(D // 4, 3), max(D // 4, 5)
    return {
        "q": _normal(B, T, 2, K),
        "k": _normal(B, T, 2, K),
        "v": _normal(B, T, heads, V),
        "weight": 0.3 * _normal(heads, V, V),
        "log_decay": -_normal(B, T, heads).abs(),
        "state": _normal(B, heads, K, V),
    }


def _cfc(B: int, T: int, D: int, heads: int, *, timespans: bool = False, tau: bool = False) -> Leaves:
    H, M = max(D // 4, 3), max(D // 4, 5)
    leaves = {
        "inputs": _normal(B, T, M),
        "recurrent": 0.3 * _normal(M, H),
        "w1": 0.3 * _normal(M + 1, M),
        "b1": _normal(M + 1),
        "w2": 0.3 * _normal(heads * H, M + 1),
        "b2": _normal(heads * H),
        "state": _normal(B, H),
    }
    leaves |= {"timespans": _normal(B, T).abs()} if timespans else {}
    return leaves | ({"tau": _normal(H), "level": _normal(H)} if tau else {})


def _of_cfc(inputs: Tensor, recurrent: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, **how: Any) -> Any:
    return ops.cfc(inputs, recurrent, [(w1, b1), (w2, b2)], **how)


def _ltc(B: int, T: int, D: int) -> Leaves:
    N, P = max(D // 4, 5), max(D // 4, 3)
    synapses = {
        f"{what}_{part}": scale * _normal(width, N)
        for what, width in (("sensory", P), ("inner", N))
        for part, scale in (("mu", 0.3), ("sigma", 2.0), ("weight", 0.5), ("reversal", 1.0))
    }
    cell = {name: 0.5 + _normal(N).abs() for name in ("leak", "rest", "capacity")}
    series = {"x": _normal(B, T, P), "state": _normal(B, N), "timespans": _normal(B, T).abs()}
    return series | {name: x.abs() if "weight" in name else x for name, x in synapses.items()} | cell


def _of_ltc(**given: Any) -> Any:
    sensory, inner = (
        ops.Synapses(*(given.pop(f"{what}_{part}") for part in ops.Synapses._fields)) for what in ("sensory", "inner")
    )
    return ops.ltc(given.pop("x"), sensory, inner, **given, unfolds=3)


def _conv(B: int, T: int, D: int, W: int) -> Leaves:
    leaves = {"x": _normal(B, T, D), "weight": _normal(D, W), "bias": _normal(D)}
    return leaves | ({"state": _normal(B, W - 1, D)} if W > 1 else {})


def _selective(B: int, T: int, D: int, *, whole: bool) -> Leaves:
    N = 16 if D >= 16 else 5
    leaves = {"u": _normal(B, T, D), "delta": 0.3 * _normal(B, T, D + 1)[..., :D], "A": -_normal(D, N).abs()}
    leaves |= {"B": _normal(B, T, N), "C": _normal(B, T, N + 1)[..., :N], "state": _normal(B, D, N)}
    leaves["delta"] = leaves["delta"] if whole else leaves["delta"].abs()
    more = {"D": _normal(D), "z": _normal(B, T, D), "delta_bias": 0.1 * _normal(D)}
    return leaves | more if whole else leaves


def _of_slstm(gates: Tensor, weight: Tensor, h: Tensor, c: Tensor, n: Tensor, m: Tensor, **how: Any) -> Any:
    return ops.slstm(gates, weight, ops.SLSTMState(h, c, n, m), **how)


def _mlstm(B: int, T: int, D: int) -> Leaves:
    """q, k and v are numbers that bfloat16 has."""
    heads, K, V = 4, max(D // 2, 35), max(D // 2, 5)
    qkv = {"q": _normal(B, T, 2, K).abs(), "k": _normal(B, T, 2, K).abs(), "v": _normal(B, T, heads, V)}
    return {
        **{name: x.bfloat16().double() for name, x in qkv.items()},
        "log_i": _normal(B, T, heads),
        "log_f": -_normal(B, T, heads).abs(),
        "C": _normal(B, heads, K, V),
        "n": _normal(B, heads, K).abs(),
        "m": _normal(B, heads),
    }


def _of_mlstm(C: Tensor, n: Tensor, m: Tensor, **given: Any) -> Any:
    return ops.mlstm(**given, state=ops.MLSTMState(C, n, m))


def _of_mlstm_in_bfloat16(q: Tensor, k: Tensor, v: Tensor, **given: Any) -> Any:
    q, k, v = (x.bfloat16() if x.dtype == torch.float32 else x for x in (q, k, v))
    h, state = _of_mlstm(q=q, k=k, v=v, **given)
    return h.to(state.C.dtype), state


def _oscillate(B: int, T: int, D: int, *, varying: bool) -> Leaves:
    P = max(D // 2, 3)
    coefficients = {name: _normal(*((B, T, P) if varying else (P,))).sigmoid() for name in ("p", "q", "r")}
    return {"b": _normal(B, T, 2, P), **coefficients, "state": _normal(B, 2, 2, P)}


CASES: dict[str, tuple[Callable[..., Any], Callable[[int, int, int], Leaves]]] = {
    "scan": (ops.scan, lambda B, T, D: _scan(B, T, D, torch.float64, varying=True)),
    "scan, one decay": (ops.scan, lambda B, T, D: _scan(B, T, D, torch.float64, varying=False)),
    "scan, complex": (ops.scan, lambda B, T, D: _scan(B, T, D, torch.complex128, varying=True)),
    "scan, complex, one decay": (ops.scan, lambda B, T, D: _scan(B, T, D, torch.complex128, varying=False)),
    "cfc": (_of_cfc, lambda B, T, D: _cfc(B, T, D, 4, timespans=True)),
    "cfc, no gate": (functools.partial(_of_cfc, mode="no_gate", activation="silu"), lambda B, T, D: _cfc(B, T, D, 3)),
    "cfc, pure": (
        functools.partial(_of_cfc, mode="pure", activation="gelu"),
        lambda B, T, D: _cfc(B, T, D, 1, timespans=True, tau=True),
    ),
    "causal_conv1d": (functools.partial(ops.causal_conv1d, activation="silu"), lambda B, T, D: _conv(B, T, D, 4)),
    "causal_conv1d, 1 tap": (ops.causal_conv1d, lambda B, T, D: _conv(B, T, D, 1)),
    "ltc": (_of_ltc, _ltc),
    "selective_scan": (
        functools.partial(ops.selective_scan, delta_softplus=True),
        lambda B, T, D: _selective(B, T, D, whole=True),
    ),
    "selective_scan, plain": (ops.selective_scan, lambda B, T, D: _selective(B, T, D, whole=False)),
    "slstm": (_of_slstm, _slstm),
    "mlstm": (_of_mlstm, _mlstm),
    "mlstm, bfloat16": (_of_mlstm_in_bfloat16, _mlstm),
    "oscillate": (ops.oscillate, functools.partial(_oscillate, varying=False)),
    "oscillate, varying": (ops.oscillate, functools.partial(_oscillate, varying=True)),
    "m2rnn": (ops.m2rnn, _m2rnn),
    "m2rnn, cut gradients": (functools.partial(ops.m2rnn, gradient_clipping=0.5), _m2rnn),
}
"""By the name of an operator, and of a variant of it: the op, and its inputs in float64 for B rows, T steps and about D
channels in all."""


def narrow(leaves: Leaves) -> Leaves:
    """The same in the precision of the kernels."""
    return {name: x.to(torch.complex64 if x.is_complex() else torch.float32) for name, x in leaves.items()}


def both(op: Callable[..., Any], leaves: Leaves, **how: Any) -> None:
    """The op forward and backward."""
    leaves = {name: x.detach().requires_grad_() for name, x in leaves.items()}
    outputs = [x for x in torch.utils._pytree.tree_leaves(op(**leaves, backend="triton", **how)) if x.requires_grad]
    torch.autograd.grad(outputs, list(leaves.values()), [torch.zeros_like(x) for x in outputs], allow_unused=True)


class Hopper:
    """In place of a driver: says that an H200 is there."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0


def compiled(call: Callable[[], None]) -> list[tuple[str, Any, float]]:
    """Every kernel that a call launches, with its name and the processor seconds it took: it is compiled, not run."""
    from triton.runtime import JITFunction, driver

    found: list[tuple[str, Any, float]] = []
    run = JITFunction.run

    def warm(kernel: Any, *given: Any, **options: Any) -> Any:
        start = sum(os.times()[:4])  # those of the assembler, a process of its own, too
        result = run(kernel, *given, **{**options, "warmup": True})
        found.append((kernel.fn.__name__.strip("_"), result, sum(os.times()[:4]) - start))
        return result

    driver.set_active(Hopper())
    with mock.patch.object(JITFunction, "run", warm), mock.patch.object(TritonKernel, "devices", ["cpu"]):
        call()
    return found


def resources(kernel: Any) -> dict[str, int]:
    """Registers and spilled bytes of a thread, and shared memory of a program, of a compiled kernel."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        shown = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    words = shown.stdout.replace(":", " ").split()
    registers, spilled = (int(words[words.index(name) + 1]) for name in ("REG", "LOCAL"))
    return {"registers": registers, "spilled": spilled, "shared": kernel.metadata.shared}


ACCESS = re.compile(r"\b(?:ld|st)\.global(?:\.[a-z]\w*)*?(?:\.v(\d))?\.[bfsu](\d+)|\bcp\.async\.c[ag]\S* .*?, (0x\w+)")
PRODUCT = re.compile(r"\b(?:mma\.sync|wgmma\.mma_async)")


def instructions(kernel: Any) -> dict[str, int]:
    """Instructions of a compiled kernel that read or write global memory, those of them of 16 bytes, and those on
    tensor cores. One in a loop counts once."""
    code = kernel.asm["ptx"]
    sizes = [
        int(copied, 16) if copied else int(many or 1) * int(bits) // 8 for many, bits, copied in ACCESS.findall(code)
    ]
    return {"accesses": len(sizes), "wide": sum(n >= 16 for n in sizes), "products": len(PRODUCT.findall(code))}


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", help="one operator, by default all")


def measure(given: argparse.Namespace, data: Data) -> Iterator[Data]:
    try:
        import triton
    except ImportError:
        raise UsageError("triton is not installed: pip install triton") from None

    compiled_by = {version: dict(found) for version, found in data.get("compiled", {}).items()}
    own = compiled_by.setdefault(triton.__version__, {})
    data = {"machine": facts(), "compiled": compiled_by}
    for name, (op, make) in CASES.items():
        if given.only is not None and name.partition(",")[0] != given.only:
            continue
        rows: list[dict[str, Any]] = []
        leaves = narrow(make(2, 128, 256))
        packed = {"lengths": torch.tensor([128, 7]), "resets": torch.zeros(2, 128, dtype=torch.bool)}
        for how in ({}, packed):
            calls = compiled(lambda op=op, leaves=leaves, how=how: both(op, leaves, **how))  # type: ignore[misc]
            for kernel, result, seconds in calls:
                row = {"kernel": kernel, "packed": bool(how), "seconds": seconds, **resources(result)}
                rows.append(row | instructions(result))
        own[name] = rows
        yield data


HEAD = ["operator", "kernel", "packed", "triton", "registers", "spilled bytes", "shared memory, KiB"]
HEAD += ["tensor-core instructions", "16-byte accesses", "compiled in, processor s"]


def markdown(data: Data) -> str:
    versions = sorted(data["compiled"])
    rows, first_calls = [], []
    for name in (name for name in CASES if any(name in data["compiled"][version] for version in versions)):
        for version in versions:
            found = data["compiled"][version].get(name, [])
            for row in found:
                rows.append(
                    [
                        *(name, row["kernel"].replace("_", " "), "yes" if row["packed"] else "no", version),
                        *(str(row["registers"]), str(row["spilled"]), f"{row['shared'] / 1024:.1f}"),
                        *(str(row["products"]), f"{row['wide']} of {row['accesses']}", f"{row['seconds']:.1f}"),
                    ]
                )
            if found:
                totals = [sum(row["seconds"] for row in found if row["packed"] == packed) for packed in (False, True)]
                first_calls.append([name, version, *(f"{total:.1f}" for total in totals)])
    told = (
        "The Triton kernels of this project, compiled for sm_90 (H100, H200) ahead of any GPU with triton "
        f"{' and '.join(versions)}: what a thread and a program take. Packed: with lengths and documents. No kernel "
        f"has been run on a GPU for this page. Compiled on {shown_machine(data['machine'])}; 0.0 s: it was compiled "
        "already.\n\n"
        "An access is an instruction that reads or writes global memory; one of 16 bytes is as wide as they are. Those "
        "of gates, of resets and of sums are narrower. A kernel without tensor-core instructions multiplies in exact "
        "float32. Spilled bytes count local memory, so that a kernel without them has none in its loops.\n\n"
        "`python -m zoo.benchmarks.studies.triton_kernels` makes this page again, for one version of triton at a time."
    )
    call = (
        "## The first call\n\nProcessor seconds that compile all kernels of one forward and backward pass of a size: a "
        "first call waits for as long at least. Triton keeps what it compiled."
    )
    of_calls = table(["operator", "triton", "not packed", "packed"], first_calls)
    return "\n".join(
        ["# Triton kernels, compiled ahead", "", told, "", *table(HEAD, rows), "", call, "", *of_calls, ""]
    )


STUDY = Study("triton_kernels", __doc__, arguments, measure, markdown)

if __name__ == "__main__":
    STUDY.main()
