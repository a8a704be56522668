"""Passes without gradients that take a few steps at a time: values, sizes, threads, and when they run."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from test_heads import assert_close
from test_heads import make as made

from zoo.ops import delta_rule, dplr, heads_pass, linear_attention, native, sizes

pytestmark = pytest.mark.skipif(native.why_not() is not None, reason=f"no kernels here: {native.why_not()}")

CASES = [
    (delta_rule, None),
    (delta_rule, "head mixed"),
    (delta_rule, "channel mixed"),
    (dplr, "channel strong"),
    (dplr, None),
    (linear_attention, "channel mixed"),
]


def make(op, T, *, H, K, **how):
    inputs = made(op, T, H=H, K=K, **how)
    if op is dplr:
        a = F.normalize(torch.randn(2, T, H, K), dim=-1).bfloat16().double()
        inputs.leaves.update(a=-a, b=a * torch.rand(2, T, H, 1).bfloat16().double())
    return inputs


def outputs(op, inputs, dtype, **how):
    given = {name: x.detach().to(dtype) for name, x in inputs.leaves.items()}
    with torch.no_grad():
        return op(**given, **inputs.options, **how)


@pytest.fixture
def passes(monkeypatch):
    """The calls of such passes."""
    seen = []
    real = heads_pass.heads_pass

    def watched(*given):
        seen.append(given)
        return real(*given)

    monkeypatch.setattr(heads_pass, "heads_pass", watched)
    return seen


@pytest.mark.parametrize(("op", "decay"), CASES)
@pytest.mark.parametrize(
    ("T", "G", "H", "K", "V"), [(64, 2, 4, 32, 32), (83, 1, 3, 20, 33), (65, 1, 1, 2, 1), (70, 5, 5, 64, 64)]
)
def test_against_the_step_form(op, decay, T, G, H, K, V, passes):
    """Documents, ragged rows, a state before the first step, widths that no vector divides, groups that tasks cut."""
    inputs = make(op, T, G=G, H=H, K=K, V=V, decay=decay, packed=True, ragged=T == 83)
    exact = outputs(op, inputs, torch.float64, backend="reference")
    threads = torch.get_num_threads()
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            assert_close(outputs(op, inputs, torch.float32, backend="compiled"), exact, torch.float32)
    finally:
        torch.set_num_threads(threads)
    assert len(passes) == 2


@pytest.mark.parametrize(("op", "decay"), CASES)
def test_only_without_gradients_and_at_its_sizes(op, decay, passes):
    """A pass that learns, and one of few steps, has the bits of training."""
    short = make(op, 63, G=2, H=2, K=16, V=16, decay=decay)
    leaves = {name: x.detach().float().requires_grad_() for name, x in short.leaves.items()}
    learned = op(**leaves, **short.options, backend="compiled")
    assert all(map(torch.equal, outputs(op, short, torch.float32, backend="compiled"), learned))
    long = make(op, 64, G=2, H=2, K=16, V=16, decay=decay)
    op(**{name: x.detach().float().requires_grad_() for name, x in long.leaves.items()}, backend="compiled")
    assert not passes
    outputs(op, long, torch.float32, backend="compiled")
    assert passes


def test_the_choice_is_one_of_sizes_alone():
    assert sizes.in_one_pass("delta_rule", 64, 64, 64, False)
    for other in ((63, 64, 64), (2049, 64, 64), (64, 65, 64), (64, 64, 65)):
        assert not sizes.in_one_pass("delta_rule", *other, False)
    assert sizes.in_one_pass("dplr", 2048, 128, 128, True)
    assert not sizes.in_one_pass("linear_attention", 64, 32, 32, False)
    assert [sizes.chunk("delta_rule", "chunked", width) for width in (1, 64, 65)] == [32, 32, 64]


@pytest.mark.parametrize("op", [delta_rule, dplr, linear_attention])
@pytest.mark.parametrize("slow", [-1e-5, -1e-3, -0.5])
def test_roundings_of_equal_steps_do_not_add_up(op, slow, monkeypatch):
    """The worst case for sums and for products of decays, at the longest pass: every step is the same.

    There dplr, whose values cancel, is beyond its bound in all forms, and nearer to it in this one.
    """
    B, T, H, K = 1, sizes.MOST, 1, 32
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, 1, H, K, generator=rng).expand(B, T, H, K) for _ in range(3))
    given = {"q": q, "k": F.normalize(k, dim=-1), "v": v, "log_decay": torch.full((B, T, H, K), slow)}
    if op is delta_rule:
        given["beta"] = torch.full((B, T, H), 0.3)
    if op is dplr:
        given |= {"a": -given["k"], "b": 0.3 * given["k"]}
    exact = op(**{name: x.double() for name, x in given.items()}, backend="chunked")
    with torch.no_grad():
        found = op(**given, backend="compiled")
        if op is dplr:
            monkeypatch.setattr(heads_pass, "takes", lambda *given: False)
            usual = op(**given, backend="compiled")
            assert all((a - x).abs().max() < (b - x).abs().max() for a, b, x in zip(found, usual, exact, strict=True))
        else:
            assert_close(found, exact, torch.float32)


def test_slices_of_wider_rows_are_read_as_they_lie(passes):
    inputs = make(linear_attention, 64, G=2, H=2, K=16, V=16, decay="channel mixed")
    x = {name: t.detach().float() for name, t in inputs.leaves.items()}
    with torch.no_grad():
        dense = linear_attention(**x, backend="compiled")
        rows = torch.cat([x[name].flatten(2) for name in "qkv"], -1)
        for name, part in zip("qkv", rows.split(32, -1), strict=True):
            x[name] = part.unflatten(2, (2, 16))
        assert not x["q"].is_contiguous()
        assert all(map(torch.equal, linear_attention(**x, backend="compiled"), dense))
    assert len(passes) == 2


def test_without_its_kernel_the_usual_one_runs():
    inputs = make(delta_rule, 64, H=2, K=16, decay="head mixed")
    with mock.patch.object(heads_pass.KERNEL, "why_not", return_value="it is not here"):
        usual = outputs(delta_rule, inputs, torch.float32, backend="compiled")
    assert_close(usual, outputs(delta_rule, inputs, torch.float64, backend="reference"), torch.float32)
