"""On a GPU: every form of every op, and every mixer, against float64 on the CPU, forward and backward.

pytest -m gpu -rs
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import laws
import pytest
import torch
import torch.nn.functional as F
from laws import Case
from torch import Tensor
from torch.utils._pytree import tree_leaves

from tasks.registry import UsageError
from zoo.ops import causal_conv1d, delta_rule, dplr, linear_attention, mlstm, scan, selective_scan
from zoo.registry import mixers

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: torch.cuda.is_available() is False"),
]

B, G, H, K, V, D, N, W = 2, 2, 4, 32, 48, 40, 16, 4
LIBRARIES = ("fla", "mamba_ssm", "causal_conv1d")
# float32 operands go through TF32 in the libraries' kernels: 10 bits of mantissa
TOLERANCE = {("plain", torch.float32): 2e-5, ("library", torch.float32): 5e-3, ("library", torch.bfloat16): 2e-2}
TOLERANCE["plain", torch.bfloat16] = 2e-2


def inputs(op: str, decay: str | None, T: int) -> dict[str, Tensor]:
    """Float64 leaves on the CPU that bfloat16 holds exactly."""
    rng = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng)

    def unit(*shape: int) -> Tensor:
        return F.normalize(normal(*shape), dim=-1)

    decays = {"head": (B, T, H), "channel": (B, T, H, K)}
    qkv = {"q": unit(B, T, G, K), "k": unit(B, T, G, K), "v": normal(B, T, H, V)}
    g = {"log_decay": F.logsigmoid(normal(*decays[decay]) + 3)} if decay else {}
    state = {"state": normal(B, H, K, V)}
    a = unit(B, T, H, K)
    leaves = {
        "linear_attention": qkv | g | state,
        "delta_rule": qkv | {"beta": normal(B, T, H).sigmoid()} | g | state,
        "dplr": qkv | {"a": -a, "b": a * torch.rand(B, T, H, 1, generator=rng)} | g | state,
        "mlstm": qkv | {"log_i": normal(B, T, H), "log_f": F.logsigmoid(normal(B, T, H) + 3)},
        "scan": {"a": normal(B, T, D).sigmoid(), "b": normal(B, T, D), "state": normal(B, D)},
        "selective_scan": {
            "u": normal(B, T, D),
            "delta": normal(B, T, D),
            "A": -normal(D, N).exp(),
            "B": normal(B, T, N),
            "C": normal(B, T, N),
            "D": normal(D),
            "z": normal(B, T, D),
        },
        "causal_conv1d": {
            "x": normal(B, T, D),
            "weight": normal(D, W),
            "bias": normal(D),
            "state": normal(B, W - 1, D),
        },
    }[op]
    return {name: x.bfloat16().double() for name, x in leaves.items()}


OPS: dict[str, tuple[Callable[..., tuple[Tensor, Any]], dict[str, Any]]] = {
    "linear_attention": (linear_attention, {}),
    "delta_rule": (delta_rule, {}),
    "dplr": (dplr, {}),
    "mlstm": (mlstm, {}),
    "scan": (scan, {}),
    "selective_scan": (selective_scan, {"delta_softplus": True}),
    "causal_conv1d": (causal_conv1d, {"activation": "silu"}),
}
CASES = [(op, None) for op in OPS] + [
    (op, decay) for op in ("linear_attention", "delta_rule", "dplr") for decay in ("head", "channel")
]


def outcome(op: str, leaves: dict[str, Tensor], device: str, dtype: torch.dtype, backend: str) -> list[Tensor]:
    """Output and the gradients of a fixed functional of it, in float64 on the CPU."""
    function, options = OPS[op]
    wide = torch.promote_types(dtype, torch.float32)
    held = {n: x.to(device, wide if n == "state" else dtype).requires_grad_() for n, x in leaves.items()}
    o, _ = function(**held, **options, backend=backend)
    weight = laws.noise(*o.shape).to(o)
    return [x.double().cpu() for x in (o, *torch.autograd.grad(o, list(held.values()), weight))]


@pytest.mark.parametrize("T", [1, 63, 100, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("backend", ["auto", "chunked", *LIBRARIES])
@pytest.mark.parametrize(("op", "decay"), CASES)
def test_ops(op, decay, backend, dtype, T):
    leaves = inputs(op, decay, T)
    try:
        got = outcome(op, leaves, "cuda", dtype, backend)
    except UsageError as refusal:
        if backend not in LIBRARIES:
            raise
        pytest.skip(str(refusal))
    exact = outcome(op, leaves, "cpu", torch.float64, "chunked" if T > 100 else "reference")
    # "auto" takes a library for bfloat16 alone
    kind = "library" if backend in LIBRARIES else "plain"
    for name, a, e in zip(["o", *leaves], got, exact, strict=True):
        assert laws.error(a, e, floor=0.05) <= TOLERANCE[kind, dtype], name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("name", mixers.names())
def test_mixers(name, dtype):
    case = Case(mixers[name], mixers[name].law_cases()[0])

    def results(device: str, dtype: torch.dtype) -> list[Tensor]:
        mixer = case.build(torch.float32 if dtype == torch.bfloat16 else dtype).to(device, dtype)
        x = laws.noise(2, 100, laws.WIDTH).to(device, dtype).requires_grad_()
        y, state = mixer(x)
        weight = laws.noise(*y.shape).to(y)
        (gradient,) = torch.autograd.grad(y, x, weight)
        if not mixer.causal:
            return [t.double().cpu() for t in (y, gradient)]
        stepped, after = mixer.step(x[:, 0].detach(), tuple_of(state))
        return [t.double().cpu() for t in (y, gradient, stepped, *tree_leaves(after))]

    for a, e in zip(results("cuda", dtype), results("cpu", torch.float64), strict=True):
        assert laws.error(a, e, floor=0.05) <= laws.TOLERANCE[dtype]


def tuple_of(state: Any) -> Any:
    """The state cut off from its past."""
    return torch.utils._pytree.tree_map(lambda t: t.detach().clone(), state)
