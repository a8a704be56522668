"""What ran is told."""

import torch

import zoo
from zoo.ops import native
from zoo.ops.common import logged_forms

FAST = "chunked" if native.why_not() else "compiled"


def test_every_form_that_ran_is_logged() -> None:
    model = zoo.create_model("mamba2 deltanet mha lstm short_conv", d_model=32, vocab_size=8)
    with torch.no_grad(), logged_forms() as forms:
        state = model(torch.zeros(1, 40, dtype=torch.int64))[1]
    assert forms == {
        "attention": {"sdpa"},
        "causal_conv1d": {FAST},
        "delta_rule": {FAST},
        "linear_attention": {FAST},
        "lstm": {"fused"},
    }
    with torch.no_grad(), logged_forms() as forms:
        model(torch.zeros(1, 1, dtype=torch.int64), state)
    assert forms["delta_rule"] == {"reference" if native.why_not() else "compiled"}


def test_a_form_asked_for_by_name_is_the_one_logged() -> None:
    mixer = zoo.create_mixer('gqa(backend="reference")', d_model=32)
    with logged_forms() as forms:
        mixer(torch.zeros(1, 5, 32))
    assert forms == {"attention": {"reference"}}
