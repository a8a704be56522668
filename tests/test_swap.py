"""`zoo.swap` of a model: every weight of what is not replaced stays, to the bit."""

from __future__ import annotations

import copy

import pytest
import torch

import zoo


def _bits(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_layers_are_numbered_from_0_in_reading_order():
    swap = zoo.swap
    assert swap("4*(gqa swiglu)", {"gqa": "mla"}, layers=[3]) == "3*(gqa swiglu) mla swiglu"
    assert swap("4*(gqa swiglu)", {"gqa": "mla"}, layers=[-2]) == "2*(gqa swiglu) mla swiglu gqa swiglu"
    assert swap("4*(gqa swiglu)", {"gqa": "mla"}, layers=range(4)) == "4*(mla swiglu)"
    assert swap("2*(gqa swiglu)", {"swiglu": "geglu"}, layers=1) == "gqa swiglu gqa geglu"  # of that layer
    assert swap("(mamba2 | gqa) swiglu (mamba2 | gqa)", {"gqa": "mla"}, layers=[1]) == (
        "(mamba2 | gqa) swiglu (mamba2 | mla)"
    )
    nested = "2*(gqa shortcut(swiglu, 2*(mla swiglu)))"
    assert swap(nested, {"mla": "gla"}, layers=[-1]) == (
        "gqa shortcut(swiglu, 2*(mla swiglu)) gqa shortcut(swiglu, mla swiglu gla swiglu)"
    )
    assert swap("1*(gqa) bidirectional(gla)", {"gla": "mamba2"}, layers=[1]) == "1*(gqa) bidirectional(mamba2)"


@pytest.mark.parametrize(
    ("words", "layers", "told"),
    [
        ({"gqa": "mla"}, [2], r"There is no layer 2: the pattern has the layers 0 to 1 \(or -2 to -1, from the end\)"),
        ({"gqa": "mla"}, [1], "layer 1 has no 'gqa'"),
        ({"gqa": "mla", "mamba2": "gla"}, [0], "none of these layers has 'mamba2'"),
        ({"gqa": "mla"}, [True], "should be a list of numbers of layers"),
        ({"gqa": "mla"}, "0", "should be a list of numbers of layers"),
        ({"gqa": "mla"}, [0.0], "should be a list of numbers of layers"),
        ({"gqa": "mla"}, [], "names no layer"),
        ({"gqa": "mlaa"}, [0], "Did you mean 'mla'"),
    ],
)
def test_what_no_layer_has_is_refused_in_one_line(words, layers, told):
    with pytest.raises(zoo.UsageError, match=told) as error:
        zoo.swap("gqa swiglu mamba2", words, layers=layers)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("spec", "words", "layers", "new"),
    [
        ("llama3-tiny", {"gqa": "mla"}, [1], ["backbone.steps.2.mixers.0."]),
        ("llama3-tiny", {"gqa": "mla"}, None, ["backbone.steps.0.mixers.0.", "backbone.steps.2.mixers.0."]),
        ("falcon_h1-tiny", {"mamba2": "gla"}, [0], ["backbone.steps.0.mixers.1."]),
        ("longcat_flash-tiny", {"moe": "swiglu"}, [0], ["backbone.steps.1.branch.mixers.0."]),
        ("hrm-tiny", {"mha": "gla"}, [1], ["outer.steps.0.mixers.0."]),
    ],
)
def test_a_model_keeps_the_weights_of_every_other_word(spec, words, layers, new):
    model = zoo.create_model(spec)
    if spec == "hrm-tiny":
        words = {"mha": "token_mlp(length=81)"}
    before = _bits(model)
    swapped = zoo.swap(model, words, layers=layers)
    after = swapped.state_dict()
    assert type(swapped) is type(model)
    fresh = {name for name in after if any(name.startswith(place) for place in new)}
    assert fresh
    assert set(swapped.swapped.fresh) == fresh
    assert set(swapped.swapped.kept) == after.keys() - fresh
    for name in swapped.swapped.kept:
        assert torch.equal(after[name], before[name]), name
    assert swapped.config == zoo.swap(model.config, words, layers=layers)
    assert f"{len(fresh)} new ({new[0]}*" in str(swapped.swapped)
    unchanged = _bits(model)
    assert all(torch.equal(before[name], unchanged[name]) for name in before)
    shared = {t.data_ptr() for t in model.state_dict().values()} & {t.data_ptr() for t in after.values()}
    assert not shared  # training one does not move the other


def test_what_a_person_set_of_a_model_stays():
    model = zoo.create_model("llama3-tiny").bfloat16().eval()
    model.embedding.weight.requires_grad_(False)
    swapped = zoo.swap(model, {"gqa": "mla"}, layers=[0])
    assert {p.dtype for p in swapped.parameters()} == {torch.bfloat16}
    assert not swapped.training
    assert not swapped.embedding.weight.requires_grad
    assert swapped.backbone.steps[0].mixers[0].out_proj.weight.requires_grad
    assert copy.deepcopy(swapped).swapped == swapped.swapped
    same = zoo.swap(zoo.swap(model, {"swiglu": "geglu(d_hidden=192)"}), {"geglu": "swiglu(d_hidden=192)"})
    tokens = torch.arange(8)[None]
    assert not torch.equal(same(tokens)[0], model(tokens)[0])  # the way back brings no weight back


def test_layers_that_depend_on_their_place_are_counted_as_new():
    """RWKV-7's first layer leaves values for the later ones: without it, the second is the first, of other weights."""
    model = zoo.create_model("rwkv7 rwkv_channel_mix rwkv7 rwkv_channel_mix", d_model=32, vocab_size=16)
    swapped = zoo.swap(model, {"rwkv7": "gla"}, layers=[0])
    kept = set(swapped.swapped.kept)
    assert any(name.startswith("backbone.steps.2.mixers.0.") for name in kept)
    for name in kept:
        assert torch.equal(swapped.state_dict()[name], model.state_dict()[name])


def test_models_that_are_more_than_their_config_are_refused():
    from torch.nn.utils import parametrizations

    model = zoo.create_model("gqa swiglu", d_model=32, vocab_size=16)
    parametrizations.weight_norm(model.head)
    with pytest.raises(zoo.UsageError, match="is not what its config says, as with an adapter"):
        zoo.swap(model, {"gqa": "mla"})
    with pytest.raises(zoo.UsageError, match="not a Linear"):
        zoo.swap(torch.nn.Linear(2, 2), {"gqa": "mla"})
