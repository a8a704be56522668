"""The residual stack, against the same sums written out by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from stacks import EPS, D, backbone, close, places_of

import zoo
from zoo.backbone import Backbone
from zoo.norms import make_norm
from zoo.norms.layer import LayerNorm
from zoo.norms.none import NoNorm
from zoo.pattern import StepOptions, parse
from zoo.protocol import Context, Place, norms


@pytest.fixture
def x():
    return torch.randn(2, 9, D, dtype=torch.float64)


def test_pre_norm_by_hand(x):
    stack = backbone("mamba2 swiglu")
    y, state = stack(x)
    h = x
    for step in stack.steps:
        h = h + step.mixers[0](F.rms_norm(h, (D,), step.norm_in.weight, EPS))[0]
    close(y, h)
    assert len(state) == 2
    assert state[1] == ((),)


def test_post_norm_by_hand(x):
    stack = backbone('swiglu(placement="post", norm="layernorm")')
    (step,) = stack.steps
    norm = step.norm_out
    assert isinstance(step.norm_in, NoNorm)
    close(stack(x)[0], F.layer_norm(x + step.mixers[0](x)[0], (D,), norm.weight, norm.bias, EPS))


def test_sandwich_norm_by_hand(x):
    stack = backbone("swiglu", defaults=StepOptions(placement="sandwich"), norm_eps=1e-2)
    (step,) = stack.steps
    inner = step.mixers[0](F.rms_norm(x, (D,), step.norm_in.weight, 1e-2))[0]
    close(stack(x)[0], x + F.rms_norm(inner, (D,), step.norm_out.weight, 1e-2))


def test_a_word_overrides_the_defaults():
    stack = backbone('swiglu swiglu(placement="post")', defaults=StepOptions(placement="sandwich", norm="layernorm"))
    assert [step.placement for step in stack.steps] == ["sandwich", "post"]
    assert all(isinstance(step.norm_out, LayerNorm) for step in stack.steps)


def test_scales_by_hand(x):
    stack = backbone('swiglu(norm="none", in_scale=0.5, out_scale=3.0)')
    close(stack(x)[0], x + 3 * stack.steps[0].mixers[0](0.5 * x)[0])


def test_parallel_words_read_the_same_and_are_summed(x):
    stack = backbone("mamba2(out_scale=0.5) | short_conv(in_scale=2.0)")
    (step,) = stack.steps
    h = F.rms_norm(x, (D,), step.norm_in.weight, EPS)
    close(stack(x)[0], x + 0.5 * step.mixers[0](h)[0] + step.mixers[1](2 * h)[0])


def test_a_shortcut_reads_early_and_is_added_late(x):
    stack = backbone("shortcut(swiglu, mamba2 swiglu)")
    (step,) = stack.steps
    assert not list(step.branch.norm_in.parameters())  # it reads what the body's first mixer reads
    branch = step.branch.mixers[0](F.rms_norm(x, (D,), step.body.steps[0].norm_in.weight, EPS))[0]
    close(stack(x)[0], step.body(x)[0] + branch)


@pytest.mark.parametrize(
    "pattern",
    ['shortcut(swiglu(norm="rmsnorm"), mamba2 swiglu)', 'shortcut(swiglu, mamba2(placement="post") swiglu)'],
)
def test_a_branch_with_a_norm_of_its_own(pattern, x):
    (step,) = backbone(pattern).steps
    branch = step.branch.mixers[0](F.rms_norm(x, (D,), step.branch.norm_in.weight, EPS))[0]
    close(step(x, None, zoo.Context())[0], step.body(x)[0] + branch)


def test_a_branch_with_a_norm_on_its_output(x):
    (step,) = backbone('shortcut(swiglu(placement="sandwich"), swiglu)').steps
    branch = step.branch.mixers[0](F.rms_norm(x, (D,), step.body.steps[0].norm_in.weight, EPS))[0]
    branch = F.rms_norm(branch, (D,), step.branch.norm_out.weight, EPS)
    close(step(x, None, zoo.Context())[0], step.body(x)[0] + branch)
    (step,) = backbone('shortcut(swiglu(placement="output"), swiglu)').steps
    branch = F.rms_norm(step.branch.mixers[0](x)[0], (D,), step.branch.norm_out.weight, EPS)
    close(step(x, None, zoo.Context())[0], step.body(x)[0] + branch)


def test_a_shortcut_in_a_shortcut(x):
    stack = backbone("shortcut(swiglu, shortcut(short_conv, swiglu))")
    outer = stack.steps[0]
    inner = outer.body.steps[0]

    def branch(step, norm):
        return step.branch.mixers[0](F.rms_norm(x, (D,), norm.weight, EPS))[0]

    y = inner.body(x)[0] + branch(inner, inner.body.steps[0].norm_in)
    close(stack(x)[0], y + branch(outer, outer.branch.norm_in))


def test_placements_and_scales_by_hand(x):
    (step,) = backbone('swiglu(placement="output", residual_scale=0.5, out_scale=3.0)').steps
    y = 3.0 * step.mixers[0](x)[0]
    close(step(x, None, zoo.Context())[0], 0.5 * x + F.rms_norm(y, (D,), step.norm_out.weight, EPS))


def test_a_zero_centred_norm_is_one_plus_its_weight(x):
    (step,) = backbone('swiglu(norm="rmsnorm_zero_centred")').steps
    assert (make_norm("rmsnorm_zero_centred", D).weight == 0).all()
    step.norm_in.weight.data += torch.linspace(-1, 1, D)
    close(step.norm_in(x), F.rms_norm(x, (D,), 1 + step.norm_in.weight, EPS))


def test_repeats_have_parameters_of_their_own():
    stack = backbone("3*(swiglu)")
    assert len(stack.steps) == 3
    assert len({p.data_ptr() for p in stack.parameters()}) == 3 * len(list(stack.steps[0].parameters()))


@pytest.mark.parametrize("pattern", ["2*(mamba2 swiglu) (short_conv | lstm)", "shortcut(short_conv, mamba2 swiglu)"])
def test_state_carries(x, pattern):
    stack = backbone(pattern)
    whole, state = stack(x)
    first, carried = stack(x[:, :4], stack.init_state(2, capacity=9))
    second, carried = stack(x[:, 4:], carried)
    close(torch.cat([first, second], 1), whole)
    assert str(torch.utils._pytree.tree_structure(carried)) == str(torch.utils._pytree.tree_structure(state))
    for a, b in zip(*map(torch.utils._pytree.tree_leaves, (carried, state)), strict=True):
        close(a, b)


def test_one_context_for_all(x):
    stack = backbone("2*(mamba2 swiglu)")
    resets = torch.zeros(2, 9, dtype=torch.bool)
    resets[:, 5] = True
    close(stack(x, None, Context(resets=resets))[0][:, 5:], stack(x[:, 5:])[0])


@pytest.mark.parametrize(
    ("pattern", "layers", "n_layers"),
    [
        ("2*(mamba2 swiglu)", [0, 0, 1, 1], 2),
        ("swiglu mamba2", [0, 0], 1),
        ("(mamba2 | lstm) swiglu short_conv", [0, 0, 1, 2], 3),
        ("lstm shortcut(swiglu, swiglu lstm swiglu) lstm", [0, 0, 0, 1, 1, 2], 3),
        ("swiglu", [0], 1),
    ],
)
def test_mixers_know_their_place(monkeypatch, pattern, layers, n_layers):
    stack, places = places_of(monkeypatch, pattern)
    assert [p.layer for p in places] == layers
    assert {p.n_layers for p in places} == {n_layers}
    assert all(p.causal for p in places)
    assert len(stack.mixers()) == len(layers)


def test_mixers_are_listed_in_order_without_their_insides():
    stack = backbone("(mamba2 | lstm) shortcut(swiglu, short_conv)")
    assert [m.name for m in stack.mixers()] == ["mamba2", "lstm", "swiglu", "short_conv"]
    stack = backbone("bidirectional(lstm) swiglu", causal=False)
    assert [m.name for m in stack.mixers()] == ["bidirectional", "swiglu"]


def test_time_norm_by_hand(x):
    norm = make_norm("rmsnorm_plain", D, EPS, axis="time")
    close(norm(x), x / (x.square().mean(1, keepdim=True) + EPS).sqrt())
    stack = backbone('swiglu(norm_axis="time")', causal=False)
    close(stack(x)[0], x + stack.steps[0].mixers[0](norm(x))[0])


@pytest.mark.parametrize("kind", norms.names())
def test_norms_keep_the_dtype(kind):
    norm = make_norm(kind, D).bfloat16()
    assert norm(torch.ones(1, 2, D, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("pattern", "options", "message"),
    [
        ("bidirectional(mamba2)", {}, r"bidirectional looks ahead here, but the model is causal: set causal=False"),
        (
            "mamba2",
            {"causal": False},
            r"mamba2 reads left to right only, .* causal=False: write bidirectional\(mamba2\).",
        ),
        (
            'lstm(norm="none") | mamba2',
            {},
            r"are one step: placement, norm, norm_axis, residual_scale, canon must be the same",
        ),
        ('swiglu(norm_axis="time")', {}, r'norm_axis="time" looks ahead: it needs a model with causal=False.'),
        (
            'swiglu(norm_axis="time", norm="layernorm")',
            {"causal": False},
            r'offered for norm="rmsnorm" or "rmsnorm_plain", not .layernorm.',
        ),
        (
            'shortcut(swiglu(placement="post"), swiglu)',
            {},
            r'takes placement="pre", "sandwich" or "output", not "post"',
        ),
        ("shortcut(swiglu(residual_scale=0.5), swiglu)", {}, r"branch of a shortcut takes no residual_scale"),
    ],
)
def test_refusals(pattern, options, message):
    with pytest.raises(zoo.UsageError, match=message) as refusal:
        Backbone(parse(pattern), D, **options)
    assert "\n" not in str(refusal.value)


def test_depth_reaches_inits():
    assert Place() == (0, 1, True, None, 1, None)
    deep = zoo.create_mixer("mamba2", D, place=Place(0, 50))
    shallow = zoo.create_mixer("mamba2", D, place=Place(0, 1))
    assert deep.out_proj.weight.std() < 0.5 * shallow.out_proj.weight.std()
