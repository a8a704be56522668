"""mlstm against the authors' code: xlstm's first layer, xlstm large's layer, and mlstm_kernels' plain PyTorch forms."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from mlstm_kernels.torch.backend_module import mLSTMBackendConfig
from mlstm_kernels.torch.chunkwise.native.fwbw import mlstm_chunkwise__native_autograd, mlstm_chunkwise__native_custbw
from mlstm_kernels.torch.parallel.native_stablef.fw import mlstm_parallel_fw
from mlstm_kernels.torch.recurrent.native_sequence import mlstm_recurrent_sequence__native_fw
from torch import Tensor, nn
from xlstm.blocks.mlstm.backends import parallel_stabilized_simple
from xlstm.blocks.mlstm.layer import mLSTMLayer, mLSTMLayerConfig
from xlstm.xlstm_large import model as large

import zoo
from zoo.mixers.mlstm import MLSTM
from zoo.ops import MLSTMState, mlstm

D, T, HEADS = 48, 64, 4
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=["f64", "f32"])


def close(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


def shaken(module: nn.Module) -> nn.Module:
    """Its parameters moved off their inits, many of which are zero."""
    with torch.no_grad():
        for p in module.parameters():
            p += 0.2 * torch.randn_like(p)
    return module


def renamed(theirs: nn.Module, names: dict[str, str], ours: nn.Module) -> None:
    """Copy all of their parameters: a name starts with a key of `names`, and a shape may only lose ones."""
    copied = {}
    for name, p in theirs.named_parameters():
        start = max((key for key in names if name.startswith(key)), key=len)
        copied[names[start] + name[len(start) :]] = p.detach().clone()
    shapes = {name: p.shape for name, p in ours.named_parameters()}
    ours.load_state_dict({name: p.reshape(shapes[name]) for name, p in copied.items()})


V1 = {"": "layer.", "conv1d.conv.": "layer.conv.", "mlstm_cell.": "layer."}
LARGE = {"": "layer."}


def gradients_agree(ours: MLSTM, theirs: nn.Module, names: dict[str, str], x: Tensor, tolerance: float) -> None:
    """Outputs, and the gradients of a fixed functional of them by the input and by every parameter."""
    weights, results = torch.randn(x.shape).to(x), []
    for module in (ours, theirs):
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        y = y if isinstance(y, Tensor) else y[0]
        module.zero_grad()
        (y * weights).sum().backward()
        results.append((y, leaf.grad))
    for a, b in zip(*results, strict=True):
        close(a, b, tolerance)
    mine = dict(ours.named_parameters())
    floor = 0.05 * max(p.grad.abs().max() for p in theirs.parameters())
    for name, p in theirs.named_parameters():
        start = max((key for key in names if name.startswith(key)), key=len)
        grad = mine[names[start] + name[len(start) :]].grad.reshape(p.shape)
        assert (grad - p.grad).abs().max() <= tolerance * p.grad.abs().max().clamp(min=floor), name


def first_layer(dtype: torch.dtype, **options: object) -> tuple[MLSTM, nn.Module]:
    config = mLSTMLayerConfig(embedding_dim=D, num_heads=HEADS, context_length=T, _num_blocks=3)
    theirs = shaken(mLSTMLayer(config)).to(dtype)
    ours = zoo.create_mixer("mlstm", D, **options).to(dtype)
    renamed(theirs, V1, ours)
    return ours, theirs


@pytest.mark.parametrize("backend", ["reference", "chunked", "auto"])
@DTYPES
def test_first_layer(dtype, backend):
    """Theirs starts from m = -inf, its own step and ours from m = 0: eps in the denominator knows the difference."""
    ours, theirs = first_layer(dtype, backend=backend)
    tolerance = 2e-5 if dtype == torch.float32 else 2e-6
    gradients_agree(ours, theirs, V1, torch.randn(2, T, D, dtype=dtype), tolerance)


@DTYPES
def test_first_layer_step_by_step(dtype):
    ours, theirs = first_layer(dtype)
    x, state = torch.randn(2, T, D, dtype=dtype), ours.init_state(2)
    their_state: dict = {}
    with torch.no_grad():
        whole, _ = ours(x)
        for t in range(T):
            y, state = ours.step(x[:, t], state)
            expected, their_state = theirs.step(x[:, t : t + 1], **their_state)
            close(y, expected[:, 0], TOLERANCE[dtype])
            close(whole[:, t], expected[:, 0], TOLERANCE[dtype])
    C, n, m = their_state["mlstm_state"]
    root = C.shape[-1] ** 0.5  # theirs scales the keys, ours the queries
    for mine, his in zip(state[1:], (root * C, root * n.squeeze(-1), m[..., 0, 0]), strict=True):
        close(mine, his, TOLERANCE[dtype])


def large_layer(dtype: torch.dtype, mode: str, *, bias: bool = False) -> tuple[MLSTM, nn.Module]:
    backend = mLSTMBackendConfig(
        chunkwise_kernel="chunkwise--native_autograd",
        sequence_kernel="native_sequence__native",
        step_kernel="native",
        mode=mode,
        chunk_size=16,
        autocast_kernel_dtype="float32",
        inference_state_dtype=str(dtype).removeprefix("torch."),
    )
    config = large.mLSTMLayerConfig(
        embedding_dim=D, num_heads=HEADS, use_bias=bias, mlstm_backend=backend, norm_reduction_force_float32=False
    )
    theirs = shaken(large.mLSTMLayer(config)).to(dtype)
    ours = zoo.create_mixer("mlstm", D, block="7b", n_heads=HEADS, bias=bias).to(dtype)
    renamed(theirs, LARGE, ours)
    return ours, theirs


@pytest.mark.parametrize("bias", [False, True])
@DTYPES
def test_large_layer(dtype, bias):
    ours, theirs = large_layer(dtype, "train", bias=bias)
    gradients_agree(ours, theirs, LARGE, torch.randn(2, T, D, dtype=dtype), TOLERANCE[dtype])


@DTYPES
def test_large_layer_prefill_and_steps(dtype):
    ours, theirs = large_layer(dtype, "inference")
    x = torch.randn(2, T, D, dtype=dtype)
    with torch.no_grad():
        y, state = ours(x[:, :37])
        expected, their_state = theirs(x[:, :37])
        close(y, expected, TOLERANCE[dtype])
        for t in range(37, T):
            y, state = ours.step(x[:, t], state)
            expected, their_state = theirs(x[:, t : t + 1], their_state)
            close(y, expected[:, 0], TOLERANCE[dtype])
    for mine, his in zip(state[1:], their_state, strict=True):
        close(mine, his.reshape(mine.shape), TOLERANCE[dtype])


# ---- the op


def inputs(dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """(q, k, v, i, f preactivations) in our layout, and the first state."""
    B, H, K, V = 2, 3, 16, 24
    q, k, v = torch.rand(B, T, H, K), torch.rand(B, T, H, K), torch.randn(B, T, H, V)
    gates = 3 * torch.randn(B, T, H), torch.randn(B, T, H) + 2
    state = torch.randn(B, H, K, V), torch.rand(B, H, K), torch.randn(B, H)
    return [x.to(dtype) for x in (q, k, v, *gates)], [x.to(dtype) for x in state]


def heads_first(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous()


def run(function, leaves: list[Tensor], weights: list[Tensor]) -> list[Tensor]:
    """Outputs of a function and the gradients of a fixed functional of them."""
    leaves = [x.clone().requires_grad_() for x in leaves]
    out = function(*leaves)
    return [*out, *torch.autograd.grad(out, leaves, weights[: len(out)])]


def ours(backend: str, eps: float, *x: Tensor) -> tuple[Tensor, ...]:
    q, k, v, i, f, *state = x
    h, last = mlstm(q, k, v, i, F.logsigmoid(f), MLSTMState(*state) if state else None, eps=eps, backend=backend)
    return (heads_first(h), *last) if state else (heads_first(h),)


def chunkwise(*x: Tensor) -> tuple[Tensor, ...]:
    q, k, v, i, f, C, n, m = x
    h, (C, n, m) = mlstm_chunkwise__native_autograd(
        *map(heads_first, (q, k, v, i, f)), C, n, m[..., None], return_last_states=True, chunk_size=16
    )
    return h, C, n, m.squeeze(-1)


def recurrent(*x: Tensor) -> tuple[Tensor, ...]:
    q, k, v, i, f, C, n, m = x
    h, (C, n, m) = mlstm_recurrent_sequence__native_fw(
        *map(heads_first, (q, k, v, i, f)), C, n, m[..., None], return_last_states=True, dtype_state=x[0].dtype
    )
    return h, C, n, m.squeeze(-1)


@pytest.mark.parametrize("theirs", [chunkwise, recurrent])
@pytest.mark.parametrize("backend", ["reference", "chunked", "auto"])
@DTYPES
def test_op_with_state(dtype, backend, theirs):
    x, state = inputs(dtype)
    weights = [torch.randn_like(heads_first(x[2])), *map(torch.randn_like, state)]
    expected = run(theirs, x + state, weights)
    got = run(functools.partial(ours, backend, 1e-6), x + state, weights)
    for a, b in zip(got, expected, strict=True):
        close(a, b, TOLERANCE[dtype])


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_op_without_eps(backend):
    """Their parallel forms start from m = -inf: without eps that makes no difference."""
    x, _ = inputs(torch.float64)
    weights = [torch.randn_like(heads_first(x[2]))]

    def kernels(*x: Tensor) -> tuple[Tensor, ...]:
        return (mlstm_parallel_fw(*map(heads_first, x), eps=0.0)[0],)

    def simple(*x: Tensor) -> tuple[Tensor, ...]:
        q, k, v, i, f = map(heads_first, x)
        return (parallel_stabilized_simple(q, k, v, i[..., None], f[..., None], eps=0.0),)

    got = run(functools.partial(ours, backend, 0.0), x, weights)
    for theirs in (kernels, simple):
        for a, b in zip(got, run(theirs, x, weights), strict=True):
            close(a, b, 1e-9)


def test_their_own_backward_pass_leaves_the_normaliser_out():
    """mlstm_kernels' hand-written gradients are not those of its outputs, and are no peer for speed at equal values."""
    x, _ = inputs(torch.float64)
    weights = [torch.randn_like(heads_first(x[2]))]

    def custom(*x: Tensor) -> tuple[Tensor, ...]:
        return (mlstm_chunkwise__native_custbw(*map(heads_first, x), chunk_size=16),)

    h, d_q, *_ = run(custom, x, weights)
    expected, exact, *_ = run(functools.partial(ours, "reference", 1e-6), x, weights)
    close(expected, h, 1e-9)
    assert (d_q - exact).abs().max() > 0.1 * exact.abs().max()
