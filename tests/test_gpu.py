"""On another device: every form of every op, and every mixer, against float64 on the CPU, forward and backward.

The same functions run on the CPU too, with everything that is made without a device on yet another one. The laws on a
GPU are in `test_laws.py`.

pytest -m "gpu and not slow" -rs
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from zoo.core.errors import UsageError
from zoo.laws import TOLERANCE as LAW_TOLERANCE
from zoo.laws import cases_of, error, noise
from zoo.laws.cases import WIDTH
from zoo.ops import causal_conv1d, delta_rule, dplr, linear_attention, mlstm, oscillate, scan, selective_scan
from zoo.ops.choices import fixed_choices
from zoo.protocol import mixers

GPU = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"))
DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])

B, G, H, K, V, D, N, W = 2, 2, 4, 32, 48, 40, 16, 4
PLAIN = ("auto", "chunked")
LIBRARIES = ("fla", "mamba_ssm", "causal_conv1d")
# float32 operands go through TF32 in the libraries' kernels: 10 bits of mantissa
TOLERANCE = {("plain", torch.float32): 2e-5, ("library", torch.float32): 5e-3, ("library", torch.bfloat16): 2e-2}
TOLERANCE["plain", torch.bfloat16] = 2e-2


def inputs(op: str, decay: str | None, T: int) -> dict[str, Tensor]:
    """Float64 leaves on the CPU that bfloat16 holds exactly."""
    rng = torch.Generator("cpu").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, device="cpu")

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
        "dplr": qkv | {"a": -a, "b": a * normal(B, T, H, 1).sigmoid()} | g | state,
        "mlstm": qkv | {"log_i": normal(B, T, H), "log_f": F.logsigmoid(normal(B, T, H) + 3)},
        "scan": {"a": normal(B, T, D).sigmoid(), "b": normal(B, T, D), "state": normal(B, D)},
        "complex_scan": {"a": 0.4 * normal(B, T, D, 2), "b": normal(B, T, D, 2), "state": normal(B, D, 2)},
        "oscillate": {
            "b": normal(B, T, 2, D),
            **{name: normal(D).sigmoid() for name in ("p", "q", "r")},
            "state": normal(B, 2, 2, D),
        },
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


def complex_scan(a: Tensor, b: Tensor, state: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """`scan` of complex numbers, given and returned as pairs; there are none of bfloat16."""
    numbers = (torch.view_as_complex(x.to(torch.promote_types(x.dtype, torch.float32))) for x in (a, b, state))
    h, last = scan(*numbers, backend=backend)
    return torch.view_as_real(h), last


OPS: dict[str, tuple[Callable[..., tuple[Tensor, Any]], dict[str, Any]]] = {
    "linear_attention": (linear_attention, {}),
    "delta_rule": (delta_rule, {}),
    "dplr": (dplr, {}),
    "mlstm": (mlstm, {}),
    "scan": (scan, {}),
    "complex_scan": (complex_scan, {}),
    "oscillate": (oscillate, {}),
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
    weight = noise(*o.shape, device=device).to(o)
    return [x.double().cpu() for x in (o, *torch.autograd.grad(o, list(held.values()), weight))]


@pytest.fixture(autouse=True)
def _other_default_device():
    """What is made without a device comes out on one that holds no numbers."""
    with torch.device("meta"):
        yield


@pytest.mark.parametrize(
    ("device", "T", "backend"),
    [
        *(("cpu", T, backend) for T in (1, 63) for backend in PLAIN),
        *(pytest.param("cuda", T, b, marks=GPU) for T in (1, 63, 100, 1000) for b in (*PLAIN, "triton", *LIBRARIES)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize(("op", "decay"), CASES)
def test_ops(op, decay, dtype, device, T, backend):
    leaves = inputs(op, decay, T)
    try:
        got = outcome(op, leaves, device, dtype, backend)
    except UsageError as refusal:
        if backend in PLAIN:
            raise
        pytest.skip(str(refusal))
    exact = outcome(op, leaves, "cpu", torch.float64, "chunked" if T > 100 else "reference")
    # "auto" takes a library for bfloat16 alone
    kind = "library" if backend in LIBRARIES else "plain"
    for name, a, e in zip(["o", *leaves], got, exact, strict=True):
        assert error(a, e, floor=0.05) <= TOLERANCE[kind, dtype], name


@DEVICES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("name", mixers.names())
def test_mixers(name, dtype, device):
    start = cases_of(mixers[name])[0].build(dtype)

    def results(device: str, dtype: torch.dtype, moved: float = 0.0) -> list[Tensor]:
        mixer = copy.deepcopy(start).to(device, dtype)
        with torch.no_grad():
            for i, p in enumerate(mixer.parameters() if moved else ()):
                p *= 1 + moved * noise(*p.shape, seed=i, device=device).sign().to(p)
        x = noise(2, 70, WIDTH, device=device).to(dtype).requires_grad_()
        y, state = mixer(x)
        weight = noise(*y.shape, device=device).to(y)
        (gradient,) = torch.autograd.grad(y, x, weight)
        if not mixer.causal:
            return [t.double().cpu() for t in (y, gradient)]
        stepped, after = mixer.step(x[:, 0].detach(), tree_map(torch.detach, state))
        return [t.double().cpu() for t in (y, gradient, stepped, *tree_leaves(after))]

    with fixed_choices():
        pairs = list(zip(results(device, dtype), results("cpu", torch.float64), strict=True))
        errors = [error(a, e, floor=0.05) for a, e in pairs]
        tolerance = LAW_TOLERANCE[dtype]
        if max(errors) > tolerance:  # so steep that weights in the nearest numbers of the dtype move it, as in the laws
            near = results("cpu", torch.float64, torch.finfo(dtype).eps / 2)
            tolerance = max(tolerance, 32 * max(error(n, e, floor=0.05) for n, (_, e) in zip(near, pairs, strict=True)))
    assert max(errors) <= tolerance
