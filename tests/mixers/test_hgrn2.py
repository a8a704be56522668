"""HGRN2 against the paper's equations, and its lower bounds, which the layers of a model share."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import zoo
from zoo.mixers.hgrn2 import BOUNDS
from zoo.protocol import Context, Place, mixers

D = 16


def perturbed(module):
    with torch.no_grad():
        for p in module.parameters():
            p += 0.3 * torch.randn_like(p)
    return module.double()


def by_hand(m, x: Tensor, bound) -> Tensor:
    """One row x (T, D), one token at a time."""
    c, H, K = m.config, m.n_heads, m.head_dim
    qfv = x @ m.in_proj.weight.T
    if c.conv_size:
        padded = F.pad(qfv, (0, 0, c.conv_size - 1, 0))
        qfv = sum(m.conv.weight[:, w] * padded[w : w + len(x)] for w in range(c.conv_size)) + m.conv.bias
    S, outputs = x.new_zeros(H, K, K), []
    for q, f, v in zip(*qfv.split(D, -1), strict=True):
        f = (bound + (1 - bound) * torch.sigmoid(f)).view(H, K, 1)
        S = f * S + (1 - f) * v.view(H, 1, K)
        o = ((q * torch.sigmoid(q)).view(H, 1, K) @ S).flatten() / math.sqrt(K)
        outputs.append(m.out_proj(o / torch.sqrt((o**2).mean() + c.norm_eps) * m.norm.weight))
    return torch.stack(outputs)


@pytest.mark.parametrize("options", mixers["hgrn2"].law_cases(), ids=str)
@torch.no_grad()
def test_the_equations(options):
    """A layer alone has the bounds that learning starts with."""
    mixer = perturbed(zoo.create_mixer("hgrn2", D, place=Place(2, 5), **options))
    x = torch.randn(2, 13, D).double()
    bound = 0.0 if options.get("lower_bounds") == "none" else 2 / 5
    torch.testing.assert_close(mixer(x)[0], torch.stack([by_hand(mixer, row, bound) for row in x]))


@torch.no_grad()
def test_the_first_layer_leaves_the_bounds_of_all():
    stack = [perturbed(zoo.create_mixer("hgrn2", D, place=Place(i, 4))) for i in range(4)]
    assert [m.logits is not None for m in stack] == [True, False, False, False]
    shares = stack[0].logits.softmax(0)
    x, context = torch.randn(1, 9, D).double(), Context()
    for i, mixer in enumerate(stack):
        bound = shares[1 : i + 1].sum(0)
        torch.testing.assert_close(mixer(x, None, context)[0][0], by_hand(mixer, x[0], bound))
        torch.testing.assert_close(context.shared[BOUNDS][i], bound, rtol=1e-9, atol=1e-12)
    assert (context.shared[BOUNDS].diff(dim=0) > 0).all()  # later layers forget less
    fixed = zoo.create_mixer('hgrn2(lower_bounds="fixed")', D, place=Place(3, 4)).double()
    torch.testing.assert_close(fixed(x, None, context)[0][0], by_hand(fixed, x[0], 3 / 4))


@torch.no_grad()
def test_learning_starts_with_the_fixed_bounds():
    learned, fixed = (
        zoo.create_model(f'3*(hgrn2(lower_bounds="{kind}") swiglu)', d_model=D, vocab_size=16)
        for kind in ("learned", "fixed")
    )
    fixed.load_state_dict({k: v for k, v in learned.state_dict().items() if "logits" not in k})
    tokens = torch.randint(16, (2, 20))
    torch.testing.assert_close(learned(tokens)[0], fixed(tokens)[0])


@pytest.mark.parametrize("pattern", ["2*(hgrn2 swiglu)", "hgrn2 swiglu gqa swiglu", "gqa hgrn2 hgrn2", "hgrn2"])
def test_every_parameter_has_a_gradient_in_every_model(pattern):
    model = zoo.create_model(pattern, d_model=D, vocab_size=16)
    model(torch.randint(16, (2, 20)))[0].square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@torch.no_grad()
def test_bounds_near_zero_and_strong_gates_are_exact():
    """f from 1e-30 to 1 - 1e-30: the logarithm of the decay and the key are computed without cancellation."""
    mixer = zoo.create_mixer("hgrn2(head_dim=16)", D, place=Place(1, 2))
    mixer.in_proj.weight.copy_(torch.cat([torch.eye(D)] * 3))
    context = Context(shared={BOUNDS: torch.cat([torch.zeros(1, D), torch.logspace(-30, -0.001, D)[None]])})
    x = torch.linspace(-70, 70, 12)[None, :, None] * torch.linspace(0.2, 1, D)
    y = mixer(x, None, context)[0]
    context.shared[BOUNDS] = context.shared[BOUNDS].double()
    expected = mixer.double()(x.double(), None, context)[0]
    assert y.isfinite().all()
    assert (y - expected).abs().max() < 2e-5 * expected.abs().max()


def test_published_size():
    """The authors' 1.3B shape: a layer is four square matrices, a norm, and a row of bounds."""
    with torch.device("meta"):
        model = zoo.create_model("24*(hgrn2 swiglu)", d_model=2048, vocab_size=50272)
    layers = [sum(p.numel() for p in m.parameters()) for m in model.mixers() if m.name == "hgrn2"]
    assert layers == [4 * 2048**2 + 2048 + 24 * 2048, *[4 * 2048**2 + 2048] * 23]
