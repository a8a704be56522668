"""Every form of every op on a device, beside the definition in float64 on a CPU: outputs, last states and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves

from zoo import ops
from zoo.benchmarks.studies import triton_kernels
from zoo.laws import error, noise

B, G, H, K, V, D = 2, 2, 4, 32, 48, 40
PLAIN = ("auto", "chunked", "reference")
LIBRARIES = ("fla", "flash_qla", "mamba_ssm", "causal_conv1d")
BACKENDS = (*PLAIN, "triton", *LIBRARIES)
STATES = frozenset(("state", "h", "c", "n", "m", "C"))
"""Names of leaves that are in float32 where the others are in bfloat16."""
FLOOR = 0.05
"""What is expected counts as this at least, for relative errors."""
# float32 operands go through TF32 in the libraries' kernels: 10 bits of mantissa
TOLERANCE = {("plain", torch.float32): 2e-5, ("library", torch.float32): 5e-3}
TOLERANCE |= {(kind, torch.bfloat16): 2e-2 for kind in ("plain", "library")}


class OpCase(NamedTuple):
    """An op with its inputs.

    Attributes:
        op: its name in `zoo.ops`.
        call: from the leaves by name, and `backend`, to the outputs and the last state.
        leaves: from T to float64 leaves on the CPU.
        most: the largest T that the definition, a loop in Python, is run at.
    """

    op: str
    call: Callable[..., Any]
    leaves: Callable[[int], dict[str, Tensor]]
    most: int = 1000


def _over_heads(op: str, decay: str | None, K: int = K, V: int = V) -> Callable[[int], dict[str, Tensor]]:
    def leaves(T: int) -> dict[str, Tensor]:
        rng = torch.Generator("cpu").manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=rng, device="cpu")

        def unit(*shape: int) -> Tensor:
            return F.normalize(normal(*shape), dim=-1)

        qkv = {"q": unit(B, T, G, K), "k": unit(B, T, G, K), "v": normal(B, T, H, V)}
        shapes = {"head": (B, T, H), "channel": (B, T, H, K)}
        g = {"log_decay": F.logsigmoid(normal(*shapes[decay]) + 3)} if decay else {}
        state, a = {"state": normal(B, H, K, V)}, unit(B, T, H, K)
        more: dict[str, dict[str, Tensor]] = {
            "linear_attention": g | state,
            "delta_rule": {"beta": normal(B, T, H).sigmoid()} | g | state,
            "dplr": {"a": -a, "b": a * normal(B, T, H, 1).sigmoid()} | g | state,
            "mlstm": {"log_i": normal(B, T, H), "log_f": F.logsigmoid(normal(B, T, H) + 3)},
        }
        return qkv | more[op]

    return leaves


def _oscillating(T: int) -> dict[str, Tensor]:
    rng = torch.Generator("cpu").manual_seed(0)
    decays = {name: torch.randn(D, generator=rng, device="cpu").sigmoid() for name in ("p", "q", "r")}
    shapes = {"b": (B, T, 2, D), "state": (B, 2, 2, D)}
    return decays | {name: torch.randn(shape, generator=rng, device="cpu") for name, shape in shapes.items()}


def _in_pairs(call: Callable[..., Any]) -> Callable[..., Any]:
    """A function of complex numbers, given as pairs; there are none of bfloat16."""

    def run(backend: str, **leaves: Tensor) -> Any:
        wide = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in leaves.values())
        return call(**dict(zip(leaves, map(torch.view_as_complex, wide), strict=True)), backend=backend)

    return run


def _with_kernel(name: str) -> OpCase:
    """A case of the Triton kernels, with pairs in place of complex numbers."""
    call, make = triton_kernels.CASES[name]

    def leaves(T: int) -> dict[str, Tensor]:
        made = make(B, T, D)
        return {key: torch.view_as_real(x) if x.is_complex() else x for key, x in made.items()}

    op = name.partition(",")[0]
    complex_numbers = any(x.is_complex() for x in make(1, 1, 8).values())
    return OpCase(op, _in_pairs(call) if complex_numbers else call, leaves, 100 if op in LOOPS else 1000)


LOOPS = ("slstm", "cfc", "ltc", "m2rnn")
"""Ops whose only form in plain PyTorch is the loop over steps."""
HEADS = [(op, decay) for op in ("linear_attention", "delta_rule", "dplr") for decay in (None, "head", "channel")]


def _cases() -> dict[str, OpCase]:
    with torch.device("cpu"):
        found = {
            f"{op}, decay per {decay}" if decay else op: OpCase(op, getattr(ops, op), _over_heads(op, decay))
            for op, decay in HEADS
        }
        wide = _over_heads("delta_rule", "head", 128, 128)  # as flash-qla takes it
        found["delta_rule, decay per head, width 128"] = OpCase("delta_rule", ops.delta_rule, wide)
        found["mlstm, from rest"] = OpCase("mlstm", ops.mlstm, _over_heads("mlstm", None))
        found["oscillate"] = OpCase("oscillate", ops.oscillate, _oscillating)
        found |= {name: _with_kernel(name) for name in triton_kernels.CASES if "bfloat16" not in name}
        whole = found["selective_scan"]
        rest = whole._replace(leaves=lambda T: {n: x for n, x in whole.leaves(T).items() if n != "state"})
        return found | {"selective_scan, from rest": rest}  # as mamba-ssm takes it


CASES = _cases()
"""By the op's name, and what is special."""


def leaves_of(case: OpCase, T: int) -> dict[str, Tensor]:
    """Float64 leaves on the CPU that bfloat16 holds exactly."""
    with torch.device("cpu"):
        return {name: x.bfloat16().double() for name, x in case.leaves(T).items()}


def values(case: OpCase, leaves: dict[str, Tensor], device: str, dtype: torch.dtype, backend: str) -> list[Tensor]:
    """Outputs, last state, and the gradients of a fixed functional of the outputs, in float64 on the CPU.

    Raises:
        UsageError: a form that the op has not, or that cannot run here.
    """
    wide = torch.promote_types(dtype, torch.float32)
    given = {n: x.detach().to(device, wide if n in STATES else dtype).requires_grad_() for n, x in leaves.items()}
    outputs = [torch.view_as_real(x) if x.is_complex() else x for x in tree_leaves(case.call(**given, backend=backend))]
    weight = noise(*outputs[0].shape, device=device).to(outputs[0])
    gradients = torch.autograd.grad(outputs[0], list(given.values()), weight, allow_unused=True)
    zeros = (torch.zeros_like(x) if g is None else g for x, g in zip(given.values(), gradients, strict=True))
    return [x.detach().double().cpu() for x in (*outputs, *zeros)]


def exact_values(case: OpCase, leaves: dict[str, Tensor]) -> list[Tensor]:
    """The same by the definition, in float64 on the CPU; by chunks where the definition would take long."""
    T = max(x.shape[1] for x in leaves.values() if x.ndim > 2)
    return values(case, leaves, "cpu", torch.float64, "chunked" if T > 100 and case.op not in LOOPS else "reference")


def worst(case: OpCase, leaves: dict[str, Tensor], got: list[Tensor], exact: list[Tensor]) -> tuple[float, str]:
    """The largest relative error, NaN if there is one, and of what."""
    names = [f"output {i}" for i in range(len(exact) - len(leaves))] + [f"gradient of {name}" for name in leaves]
    errors = [error(a, e, floor=FLOOR) for a, e in zip(got, exact, strict=True)]
    # NaN is the worst of all, and no number is larger than it
    return max(zip(errors, names, strict=True), key=lambda found: (found[0] != found[0], found[0]))


def tolerance(backend: str, dtype: torch.dtype) -> float:
    """How large the error of a form may be; "auto" takes a library for bfloat16 alone."""
    return TOLERANCE["library" if backend in LIBRARIES else "plain", dtype]
