"""The perceptron along time: by hand, short and long rows."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import zoo
from zoo.mixers.token_mlp import TokenMLP
from zoo.protocol import Place
from zoo.training.options import Experiment

N, D = 9, 16


@pytest.fixture
def mixer():
    torch.manual_seed(0)
    return zoo.create_mixer("token_mlp(length=9, d_hidden=14)", D, place=Place(causal=False)).double()


def test_every_channel_by_itself(mixer):
    x = torch.randn(2, N, D, dtype=torch.float64)
    y, state = mixer(x)
    assert state == ()
    for d in range(D):
        h = F.silu(x[..., d] @ mixer.gate_proj.weight.T) * (x[..., d] @ mixer.up_proj.weight.T)
        torch.testing.assert_close(y[..., d], h @ mixer.down_proj.weight.T)


def test_a_short_row_is_padded_with_zeros(mixer):
    x = torch.randn(2, 5, D, dtype=torch.float64)
    torch.testing.assert_close(mixer(x)[0], mixer(F.pad(x, (0, 0, 0, N - 5)))[0][:, :5])


def test_refusals(mixer):
    with pytest.raises(zoo.UsageError, match="10 steps are more than length=9"):
        mixer(torch.zeros(1, 10, D, dtype=torch.float64))
    with pytest.raises(zoo.UsageError, match="token_mlp looks ahead here, but the model is causal: set causal=False"):
        zoo.create_model("token_mlp", d_model=D, vocab_size=4)
    with pytest.raises(zoo.UsageError, match="cannot go step by step"):
        mixer.step(torch.zeros(1, D, dtype=torch.float64), ())


def test_its_length_is_the_models_where_it_is_left_out():
    """An experiment fills in what its task, its objective and the places of a recursive model come to."""
    assert zoo.create_mixer("token_mlp", D, place=Place(causal=False, length=12)).length == 12
    assert zoo.create_mixer("token_mlp(length=9)", D, place=Place(causal=False, length=12)).length == 9
    model = zoo.create_model("2*(token_mlp swiglu)", d_model=D, vocab_size=4, causal=False, max_len=12)
    assert [m.length for m in model.mixers() if m.name == "token_mlp"] == [12, 12]

    def built(objective, **model):
        given = {"pattern": "shortcut(mlp, token_mlp swiglu)", "d_model": D, "causal": False, **model}
        return Experiment(task={"name": "sudoku", "size": 4}, model=given, objective=objective).build().model

    assert built({"name": "next_token"}).max_len == 16
    recursive = built({"name": "deep_supervision"}, recursion={"prefix": 3, "outer": "token_mlp"})
    assert recursive.max_len == 19
    both = [m.length for m in zoo.create_model(recursive).modules() if isinstance(m, TokenMLP)]
    assert both == [19, 19]
    assert built({"name": "next_token"}, pattern="token_mlp(length=16)").max_len is None
    with pytest.raises(zoo.UsageError, match=r"token_mlp\(length=9\) is too short: sudoku under next_token reads 16"):
        built({"name": "next_token"}, pattern="token_mlp(length=9)")
    with pytest.raises(zoo.UsageError, match='max_len belongs to positions="learned"'):
        built({"name": "next_token"}, pattern="token_mlp(length=16)", max_len=16)
