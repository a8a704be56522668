"""Canon layers, against PhysicsLM4's eager equations one step at a time, and as an option of any word."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import zoo
from zoo.laws import assert_close, assert_close_gradients, noise, off_inits
from zoo.norms import NORM_EPS
from zoo.states import tree_bytes

D = 16


def canon(u: Tensor, weight: Tensor) -> Tensor:
    """`apply_canon` of PhysicsLM4 with a residual, its kernel 4 and no activation: u_t + sum_w weight_w u_{t-W+1+w}."""
    W, rows = weight.shape[1], []
    for t in range(u.shape[1]):
        taps = [weight[:, w] * u[:, t - W + 1 + w] for w in range(W) if t - W + 1 + w >= 0]
        rows.append(u[:, t] + sum(taps))
    return torch.stack(rows, 1)


@pytest.mark.parametrize("size", [2, 4])
def test_a_and_c_stand_between_the_norm_and_the_mixer(size):
    stack = off_inits(zoo.create_backbone(f"gqa(canon={size}) swiglu(canon={size})", d_model=D).double())
    x = noise(2, 9, D).requires_grad_()
    expected = x
    for step in stack.steps:
        r = F.rms_norm(expected, (D,), step.norm_in.weight, NORM_EPS)
        expected = expected + step.mixers[0](canon(r, step.canon.weight))[0]
    y, _ = stack(x)
    assert_close(y, expected, 1e-12, "outputs")
    inputs = [x, *stack.parameters()]
    found, wanted = (torch.autograd.grad(out.sin().sum(), inputs) for out in (y, expected))
    assert_close_gradients(found, wanted, 1e-11, "canon", [str(i) for i in range(len(inputs))])
    assert stack.n_parameters() - zoo.create_backbone("gqa swiglu", d_model=D).n_parameters() == 2 * size * D


def test_d_acts_on_gate_and_up_together():
    mixer, x = (
        off_inits(zoo.create_mixer("swiglu(canon_d=4, d_hidden=20)", D).double()),
        noise(2, 9, D).requires_grad_(),
    )
    both = canon(torch.cat([mixer.gate_proj(x), mixer.up_proj(x)], -1), mixer.canon.weight)
    gate, up = both.chunk(2, -1)
    compare(mixer, x, mixer.down_proj(F.silu(gate) * up))


def test_b_acts_on_normed_queries_keys_and_values_together():
    """As in PhysicsLM4: norms, Canon-B, rotation, attention. The same attention without one is given what it reads."""
    text = "gqa(n_heads=4, n_kv_heads=2, qk_norm=True, qk_norm_over='all', rope=False{})"
    mixer, x = off_inits(zoo.create_mixer(text.format(", canon_b=4"), D).double()), noise(2, 9, D).requires_grad_()
    q, k, v = mixer.in_proj(x).split([D, D // 2, D // 2], -1)
    q, k = (F.rms_norm(z, w.shape, w, 1e-6) for z, w in ((q, mixer.q_norm), (k, mixer.k_norm)))
    q, k, v = canon(torch.cat([q, k, v], -1), mixer.canon.weight).split([D, D // 2, D // 2], -1)
    q, k, v = (z.unflatten(-1, (-1, 4)).transpose(1, 2) for z in (q, k, v))
    o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    compare(mixer, x, mixer.out_proj(o.transpose(1, 2).flatten(2)))


def compare(mixer, x: Tensor, expected: Tensor) -> None:
    y, inputs = mixer(x)[0], [x, *mixer.parameters()]
    assert_close(y, expected, 1e-12, "outputs")
    found, wanted = (torch.autograd.grad(out.sin().sum(), inputs) for out in (y, expected))
    assert_close_gradients(found, wanted, 1e-11, "canon", [str(i) for i in range(len(inputs))])


@pytest.mark.parametrize("pattern", ["(gru | gqa) mlp", "shortcut(mlp, gru)", "loop(2, gqa)", 'lstm(placement="post")'])
def test_its_state_follows_those_of_the_mixers(pattern):
    def of(pattern: str) -> zoo.backbone.Backbone:
        return zoo.create_backbone(pattern, d_model=D)

    put = {")": ", canon=3)"} if pattern.endswith('"post")') else {"gru | gqa": "gru(canon=3) | gqa(canon=3)"}
    put = {"shortcut(mlp": "shortcut(mlp(canon=3)", "loop(2, gqa": "loop(2, gqa(canon=3)"} | put
    text = pattern
    for old, new in put.items():
        text = text.replace(old, new, 1)
    stack = off_inits(of(text)).double()
    x = noise(2, 11, D)
    whole, end = stack(x)
    y, state = stack(x[:, :4])
    parts = [y]
    for t in range(4, 11):
        y, state = stack.step(x[:, t], state)
        parts.append(y[:, None])
    assert_close(torch.cat(parts, 1), whole, 1e-12, "step by step")
    assert_close(zoo.canonical(state), zoo.canonical(end), 1e-12, "final state")
    n = 2 if "loop" in text else 1
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        size = torch.promote_types(dtype, torch.float32).itemsize
        more = stack.state_bytes(3, 8, dtype) - of(pattern).state_bytes(3, 8, dtype)
        assert more == n * 3 * 2 * D * size
        assert stack.state_bytes(3, 8, dtype) == tree_bytes(stack.init_state(3, capacity=8, dtype=dtype))


def test_a_model_generates_with_it():
    torch.manual_seed(0)
    model = zoo.create_model("2*(gqa(canon=4) swiglu(canon=4))", d_model=D, vocab_size=11).eval()
    (row,) = model.generate([[1, 2, 3]], 6)
    assert row.tolist()[3:] == [int(model(row[None, :n])[0][0, -1].argmax()) for n in range(3, 9)]


def test_wrong_uses_are_refused():
    for pattern, options, said in (
        ("gqa(canon=1)", {}, "canon=1"),
        ("mha(canon_b=4)", {"causal": False}, "canon_b=4 reads left to right only"),
        ("mha swiglu(canon_d=4)", {"causal": False}, "canon_d=4 reads left to right only"),
        ("gqa(canon=4) | gru", {}, "canon must be the same"),
        ("mha(canon=4)", {"causal": False}, r"canon=4 reads left to right only.*leave it out"),
        ("bidirectional(gru(canon=4))", {"causal": False}, "canon belongs to the whole step"),
    ):
        with pytest.raises(zoo.UsageError, match=said):
            zoo.create_backbone(pattern, d_model=D, **options)
