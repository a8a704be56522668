"""The adapters' mapping of arguments, forward and backward: real Triton kernels interpreted, plain forms for CUDA's."""

from __future__ import annotations

import contextlib
import types

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.ops import causal_conv1d, common, delta_rule, dplr, linear_attention, selective_scan
from zoo.ops.adapters import causal_conv1d as conv_adapter
from zoo.ops.adapters import flash_linear_attention as fla
from zoo.ops.adapters import mamba_ssm

B, T, G, H, K, V = 2, 70, 1, 2, 16, 16


def draw(decay: str | None, *, delta: bool = False, resets: bool = False) -> tuple[dict[str, Tensor], Tensor | None]:
    """Leaves in the order of an op's arguments, and document starts."""
    rng = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng)

    shapes = {"head": (B, T, H), "channel": (B, T, H, K)}
    leaves = {"q": normal(B, T, G, K), "k": F.normalize(normal(B, T, G, K), dim=-1), "v": normal(B, T, H, V)}
    if delta:
        leaves["beta"] = normal(B, T, H).sigmoid()
    if decay:
        leaves["log_decay"] = F.logsigmoid(normal(*shapes[decay]) + 2)
    leaves["state"] = normal(B, H, K, V)
    starts = torch.zeros(B, T, dtype=torch.bool)
    starts[0, 0] = starts[0, 33] = starts[1, 64] = True
    return leaves, starts if resets else None


def agree(ours, theirs, leaves: dict[str, Tensor], tolerance: float) -> None:
    """Two functions of the leaves agree in their outputs and in all gradients."""
    results = []
    for function in (ours, theirs):
        inputs = {name: x.clone().requires_grad_() for name, x in leaves.items()}
        out = function(**inputs)
        rng = torch.Generator().manual_seed(1)
        loss = sum((x * torch.randn(x.shape, generator=rng)).sum() for x in out if x.requires_grad)
        results.append([*out, *torch.autograd.grad(loss, list(inputs.values()))])
    for name, a, e in zip(["o", "state", *leaves], *results, strict=True):
        assert a.shape == e.shape, name
        assert (a - e).abs().max() <= tolerance * e.abs().max(), name


@pytest.mark.parametrize("resets", [False, True])
@pytest.mark.parametrize("decay", [None, "head", "channel"])
def test_linear_attention(decay, resets):
    leaves, starts = draw(decay, resets=resets)

    def theirs(q, k, v, log_decay=None, state=None):
        heads = common.prepare_heads("linear_attention", q, k, v, log_decay, state, None, starts)
        o, last = fla.linear_attention(heads, 0.3, torch.float32)
        return o.flatten(2, 3), last.flatten(1, 2)

    agree(lambda **x: linear_attention(**x, resets=starts, scale=0.3, backend="chunked"), theirs, leaves, 2e-5)


@pytest.mark.parametrize("resets", [False, True])
@pytest.mark.parametrize("decay", [None, "head", "channel"])
def test_delta_rule(decay, resets):
    leaves, starts = draw(decay, delta=True, resets=resets)

    def theirs(q, k, v, beta, log_decay=None, state=None):
        heads = common.prepare_heads("delta_rule", q, k, v, log_decay, state, None, starts, beta)
        o, last = fla.delta_rule(heads, 0.3, torch.float32)
        return o.flatten(2, 3), last.flatten(1, 2)

    agree(lambda **x: delta_rule(**x, resets=starts, scale=0.3, backend="chunked"), theirs, leaves, 2e-5)


def test_dplr():
    leaves, _ = draw("channel")
    rng = torch.Generator().manual_seed(2)
    a = -F.normalize(torch.randn(B, T, H, K, generator=rng), dim=-1)
    leaves = leaves | {"a": a, "b": -a * torch.rand(B, T, H, 1, generator=rng)}

    def theirs(q, k, v, log_decay, state, a, b):
        heads = common.prepare_heads("dplr", q, k, v, log_decay, state, None, None)
        o, last = fla.dplr(heads, *(x.unflatten(2, (G, H // G)) for x in (a, b)), 0.3, torch.float32)
        return o.flatten(2, 3), last.flatten(1, 2)

    agree(lambda **x: dplr(**x, scale=0.3, backend="chunked"), theirs, leaves, 2e-5)


@pytest.mark.usefixtures("sources")
@pytest.mark.parametrize("resets", [False, True])
@pytest.mark.parametrize("decay", [None, "head"])
def test_ssd(decay, resets, monkeypatch):
    leaves, starts = draw(decay, resets=resets)
    monkeypatch.setattr(mamba_ssm, "CHUNK", 32)
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    processors = types.SimpleNamespace(multi_processor_count=1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: processors)

    def theirs(q, k, v, log_decay=None, state=None):
        heads = common.prepare_heads("linear_attention", q, k, v, log_decay, state, None, starts)
        o, last = mamba_ssm.linear_attention(heads, 0.3, torch.float32)
        return o.flatten(2, 3), last.flatten(1, 2)

    agree(lambda **x: linear_attention(**x, resets=starts, scale=0.3, backend="chunked"), theirs, leaves, 2e-5)


@pytest.mark.usefixtures("sources")
def test_selective_scan():
    from mamba_ssm.ops.selective_scan_interface import selective_scan_ref

    rng = torch.Generator().manual_seed(0)
    D, N = 6, 5
    shapes = {"u": (B, T, D), "delta": (B, T, D), "A": (D, N), "B": (B, T, N), "C": (B, T, N), "D": (D,)}
    leaves = {name: torch.randn(shape, generator=rng) for name, shape in shapes.items()}
    leaves |= {"z": torch.randn(B, T, D, generator=rng), "delta_bias": torch.randn(D, generator=rng)}
    leaves["A"] = -leaves["A"].exp()

    def theirs(**x):
        y, state = mamba_ssm.selective_scan(*x.values(), True, kernel=selective_scan_ref)
        return y, state.detach()

    def ours(**x):
        y, state = selective_scan(**x, delta_softplus=True, backend="chunked")
        return y, state.detach()

    agree(ours, theirs, leaves, 2e-5)
    x = {name: leaf.clone().requires_grad_() for name, leaf in leaves.items()}
    state = mamba_ssm.selective_scan(*x.values(), True, kernel=selective_scan_ref)[1]
    with pytest.raises(Exception, match="no gradient of its last state"):
        state.sum().backward()


@pytest.mark.usefixtures("sources")
@pytest.mark.parametrize("activation", [None, "silu"])
def test_causal_conv1d(activation):
    from causal_conv1d.causal_conv1d_interface import causal_conv1d_ref

    rng = torch.Generator().manual_seed(0)
    D, W = 8, 4
    shapes = {"x": (B, T, D), "weight": (D, W), "bias": (D,), "state": (B, W - 1, D)}
    leaves = {name: torch.randn(shape, generator=rng) for name, shape in shapes.items()}

    def theirs(x, weight, bias, state):
        return conv_adapter.causal_conv1d(x, weight, bias, state, activation, kernel=causal_conv1d_ref)

    agree(lambda **x: causal_conv1d(**x, activation=activation, backend="chunked"), theirs, leaves, 2e-5)
