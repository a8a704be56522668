"""The adapters' mapping of arguments, forward and backward: real Triton kernels interpreted, plain forms for CUDA's."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import inspect
import itertools
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.core.errors import UsageError
from zoo.ops import MLSTMState, causal_conv1d, common, delta_rule, dplr, linear_attention, mlstm, selective_scan
from zoo.ops.adapters import causal_conv1d as conv_adapter
from zoo.ops.adapters import flash_linear_attention as fla
from zoo.ops.adapters import flash_qla, mamba_ssm, mlstm_kernels

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


def draw_mlstm() -> tuple[dict[str, Tensor], MLSTMState]:
    leaves, _ = draw("head")
    rng = torch.Generator().manual_seed(3)
    leaves["log_f"], C = leaves.pop("log_decay"), leaves.pop("state")
    leaves["log_i"] = torch.randn(B, T, H, generator=rng)
    return leaves, MLSTMState(C, torch.rand(B, H, K, generator=rng), torch.randn(B, H, generator=rng))


@pytest.fixture
def older_triton(monkeypatch):
    """As if Triton could compile the kernels of mlstm_kernels."""
    monkeypatch.setattr(mlstm_kernels, "outdated", lambda: None)


@pytest.mark.usefixtures("older_triton")
def test_mlstm_kernels(monkeypatch):
    """Layout, scale, gates, states and padding, with the library's form in plain PyTorch."""
    from mlstm_kernels.torch import get_mlstm_kernel
    from mlstm_kernels.torch.chunkwise.triton_xl_chunk import mlstm_chunkwise__xl_chunk

    leaves, state = draw_mlstm()
    adapter, kernel = mlstm_kernels.mlstm, get_mlstm_kernel("chunkwise--native_autograd")

    def plain(**given):
        inspect.signature(mlstm_chunkwise__xl_chunk).bind(**given)
        return kernel(**given)

    monkeypatch.setattr(mlstm_kernels, "mlstm", lambda *given: adapter(*given, kernel=plain))
    given = {"lengths": torch.tensor([T, T // 2]), "scale": 0.3}
    expected = mlstm(**leaves, state=state, **given, backend="reference")
    found = mlstm(**leaves, state=state, **given, backend="mlstm_kernels")
    for a, e in zip((found[0], *found[1]), (expected[0], *expected[1]), strict=True):
        assert a.shape == e.shape
        assert (a - e).abs().max() <= 2e-5 * e.abs().max()


@pytest.mark.usefixtures("older_triton")
def test_mlstm_kernels_are_refused_where_they_are_wrong():
    leaves, state = draw_mlstm()
    with common.logged_forms() as forms:
        mlstm(**leaves, state=state)
    assert forms == {"mlstm": {"triton"}}
    with pytest.raises(UsageError, match="it knows no documents"):
        mlstm(**leaves, state=state, resets=torch.zeros(B, T, dtype=torch.bool), backend="mlstm_kernels")
    leaves["q"].requires_grad_()
    with pytest.raises(UsageError, match="its gradients take the normaliser for a constant"):
        mlstm(**leaves, state=state, backend="mlstm_kernels")


def test_mlstm_kernels_need_block_pointers():
    leaves, state = draw_mlstm()
    with pytest.raises(UsageError, match="use block pointers, which triton"):
        mlstm(**leaves, state=state, backend="mlstm_kernels")


def test_the_gradients_of_mlstm_kernels_take_the_normaliser_for_a_constant():
    """Once they do not, the adapter may serve passes with gradients."""
    from mlstm_kernels.torch import get_mlstm_kernel

    rng = torch.Generator().manual_seed(0)
    shapes = {"q": (1, 2, 64, 16), "k": (1, 2, 64, 16), "v": (1, 2, 64, 16), "i": (1, 2, 64), "f": (1, 2, 64)}
    inputs = {name: torch.randn(shape, generator=rng).requires_grad_() for name, shape in shapes.items()}
    weight = torch.randn(1, 2, 64, 16, generator=rng)
    exact, theirs = (
        torch.autograd.grad((get_mlstm_kernel(f"chunkwise--{name}")(**inputs, **how) * weight).sum(), inputs.values())
        for name, how in (("native_autograd", {}), ("native_custbw", {"autocast_kernel_dtype": torch.float32}))
    )
    errors = [(a - e).abs().max() / e.abs().max() for a, e in zip(theirs, exact, strict=True)]
    assert errors[2] < 1e-5  # that of v is right
    assert min(errors[0], errors[1]) > 0.1


def documented_chunk_gated_delta_rule(q, k, v, g, beta, scale, initial_state, output_final_state, cu_seqlens=None):
    """What flash-qla documents of its function, by the definition of ours, one sequence after another."""
    assert output_final_state
    assert initial_state.dtype == torch.float32
    assert q.is_contiguous()
    ends = [0, q.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    assert cu_seqlens is None or len(q) == 1
    assert len(initial_state) == (len(q) if cu_seqlens is None else len(ends) - 1)
    outputs, states = [], []
    for i, (start, end) in enumerate(itertools.pairwise(ends)):
        at = slice(start, end)
        state = initial_state if cu_seqlens is None else initial_state[i : i + 1]
        given = [x[:, at] for x in (q, k, v, beta, g)]
        o, state = delta_rule(*given, state, scale=scale, backend="reference")
        outputs.append(o)
        states.append(state)
    return torch.cat(outputs, 1), torch.cat(states)


@pytest.mark.parametrize("resets", [False, True])
@pytest.mark.parametrize("decay", [None, "head"])
def test_flash_qla(decay, resets):
    leaves, starts = draw(decay, delta=True, resets=resets)

    def theirs(q, k, v, beta, log_decay=None, state=None):
        heads = common.prepare_heads("delta_rule", q, k, v, log_decay, state, None, starts, beta)
        o, last = flash_qla.delta_rule(heads, 0.3, torch.float32, kernel=documented_chunk_gated_delta_rule)
        return o.flatten(2, 3), last.flatten(1, 2)

    agree(lambda **x: delta_rule(**x, resets=starts, scale=0.3, backend="chunked"), theirs, leaves, 2e-5)


def test_flash_qla_is_as_its_source_has_it():
    """Its parameters, dtypes and widths, read from the installed source: it cannot be imported without a GPU."""
    (folder,) = importlib.util.find_spec("flash_qla").submodule_search_locations
    chunk = Path(folder) / "ops" / "gated_delta_rule" / "chunk"
    source = (chunk / "__init__.py").read_text()
    functions = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}
    theirs = functions["chunk_gated_delta_rule"].args
    parameters = inspect.signature(documented_chunk_gated_delta_rule).parameters
    assert set(parameters) <= {a.arg for a in theirs.args}
    text = ast.get_source_segment(source, functions["chunk_gated_delta_rule"])
    assert "q.dtype == torch.bfloat16 or q.dtype == torch.float16" in text
    assert "`[N, HV, K, V]`" in text
    assert "log space" in text
    for name in ("fused_fwd", "fused_bwd"):
        assert f"assert K == V == {flash_qla.WIDTH}" in (chunk / "hopper" / f"{name}.py").read_text()
    assert "bhg = bh // (H // Hg)" in (chunk / "hopper" / "fused_fwd.py").read_text()  # consecutive heads share keys
