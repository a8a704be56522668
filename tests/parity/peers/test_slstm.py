"""slstm against xlstm's own layer, its plain PyTorch backend."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from xlstm.blocks.slstm.layer import sLSTMLayer, sLSTMLayerConfig

import zoo
from zoo.mixers.slstm import SLSTM
from zoo.protocol import Place

D, T, HEADS = 48, 40, 4
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=["f64", "f32"])

# Their layer hands its gates to the cell in the order f, i, z, o, and the cell takes them for i, f, z, o: the map
# `fgate` feeds the input gate and `igate` the forget gate.
NAMES = {
    "conv1d.conv.weight": "conv.weight",
    "conv1d.conv.bias": "conv.bias",
    "fgate.weight": "igate.weight",
    "igate.weight": "fgate.weight",
    "zgate.weight": "zgate.weight",
    "ogate.weight": "ogate.weight",
    "slstm_cell._recurrent_kernel_": "recurrent",
    "slstm_cell._bias_": "bias",
    "group_norm.weight": "norm.weight",
}


def layers(dtype: torch.dtype, conv_size: int = 4, *, shake: bool = True, block: int = 1) -> tuple[SLSTM, sLSTMLayer]:
    config = sLSTMLayerConfig(
        embedding_dim=D, num_heads=HEADS, conv1d_kernel_size=conv_size, backend="vanilla", dtype="float32",
        enable_automatic_mixed_precision=False, _block_idx=block, _num_blocks=3,
    )  # fmt: skip
    theirs = sLSTMLayer(config)
    theirs.reset_parameters()
    ours = zoo.create_mixer("slstm", D, conv_size=conv_size, place=Place(layer=block, n_layers=3))
    if shake:
        with torch.no_grad():
            for p in theirs.parameters():
                p += 0.3 * torch.randn_like(p)
        shapes = {name: p.shape for name, p in ours.named_parameters()}
        copied = {NAMES[name]: p.detach().clone() for name, p in theirs.named_parameters()}
        ours.load_state_dict({name: p.reshape(shapes[name]) for name, p in copied.items()})
    return ours.to(dtype), theirs.to(dtype)


def close(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


@pytest.mark.parametrize("conv_size", [4, 0])
@DTYPES
def test_layer(dtype, conv_size):
    ours, theirs = layers(dtype, conv_size)
    x, weights, results = torch.randn(2, T, D, dtype=dtype), torch.randn(2, T, D, dtype=dtype), []
    for run in (lambda x: ours(x)[0], theirs):
        leaf = x.clone().requires_grad_()
        y = run(leaf)
        (y * weights).sum().backward()
        results.append((y, leaf.grad))
    for a, b in zip(*results, strict=True):
        close(a, b, TOLERANCE[dtype])
    mine = dict(ours.named_parameters())
    for name, p in theirs.named_parameters():
        close(mine[NAMES[name]].grad.reshape(p.shape), p.grad, TOLERANCE[dtype])


@DTYPES
def test_from_a_state(dtype):
    """Their `step` gives back the state it was given, so their forward pass takes the single steps."""
    ours, theirs = layers(dtype, 0)
    x = torch.randn(2, T, D, dtype=dtype)
    with torch.no_grad():
        y, state = ours(x[:, :20])
        expected, their_state = theirs(x[:, :20], return_last_state=True)
        close(y, expected, TOLERANCE[dtype])
        for t in range(20, T):
            y, state = ours.step(x[:, t], state)
            expected, their_state = theirs(
                x[:, t : t + 1], slstm_state=their_state["slstm_state"], return_last_state=True
            )
            close(y, expected[:, 0], TOLERANCE[dtype])
    for mine, his in zip(state[1:], their_state["slstm_state"], strict=True):
        close(mine.flatten(1), his, TOLERANCE[dtype])


@pytest.mark.parametrize("block", [0, 2])
def test_published_inits(block):
    ours, theirs = layers(torch.float32, shake=False, block=block)
    assert torch.equal(ours.bias.flatten(), theirs.slstm_cell._bias_)
    assert torch.equal(ours.recurrent.flatten(), theirs.slstm_cell._recurrent_kernel_.flatten())
    assert abs(ours.igate.weight.std() / theirs.igate.weight.std() - 1) < 0.15
