"""The compiled delta rule: sizes that no block divides, groups cut into tasks, long sequences, memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from test_heads import assert_close, make, outcome

from zoo.ops import delta_rule, native

pytestmark = pytest.mark.skipif(native.why_not() is not None, reason=f"no kernels here: {native.why_not()}")

DECAYS = [None, "head mild", "head strong", "head mixed", "channel mild", "channel strong", "channel mixed"]


@pytest.mark.crossed("T", "decay")
@pytest.mark.parametrize("decay", ["channel mixed", *DECAYS[:-1]])
@pytest.mark.parametrize("T", [100, 1, 2, 16, 17, 63, 64, 65, 300])
def test_against_the_step_form(T, decay):
    inputs = make(delta_rule, T, decay=decay, packed=T > 64, ragged=T == 100)
    exact = outcome(delta_rule, inputs, backend="reference")
    assert_close(outcome(delta_rule, inputs, torch.float32, backend="compiled"), exact, torch.float32)


@pytest.mark.parametrize("decay", [None, "head mixed", "channel mixed"])
@pytest.mark.parametrize(("G", "H", "K", "V"), [(1, 1, 1, 1), (1, 6, 5, 7), (2, 4, 130, 24), (3, 3, 64, 64)])
def test_sizes_and_tasks(G, H, K, V, decay):
    """However many threads share the heads of a group."""
    inputs = make(delta_rule, 130, G=G, H=H, K=K, V=V, decay=decay, packed=True)
    exact = outcome(delta_rule, inputs, backend="chunked")
    threads = torch.get_num_threads()
    try:
        for n in (1, 3, 16):
            torch.set_num_threads(n)
            assert_close(outcome(delta_rule, inputs, torch.float32, backend="compiled"), exact, torch.float32)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("wanted", ["q", "k", "v", "beta", "log_decay", "state"])
@pytest.mark.parametrize("decay", ["head mild", "channel mild"])
def test_gradient_of_one_input_from_one_output(wanted, decay):
    """With the inputs slices of wider tensors."""
    inputs = make(delta_rule, 40, decay=decay).leaves
    for which in (0, 1):
        leaves = {name: x.clone().requires_grad_(name == wanted) for name, x in inputs.items()}
        exact = delta_rule(**leaves, backend="reference")[which].square().sum()
        wide = {name: torch.cat([x, x], -1)[..., : x.shape[-1]].float() for name, x in inputs.items()}
        wide[wanted].requires_grad_()
        got = delta_rule(**wide, backend="compiled")[which].square().sum()
        if which == 1 and wanted == "q":
            assert torch.autograd.grad(got, wide[wanted])[0].eq(0).all()
            continue
        expected = torch.autograd.grad(exact, leaves[wanted])
        assert_close(torch.autograd.grad(got, wide[wanted]), expected, torch.float32)


@pytest.mark.parametrize("decay", [None, "head", "channel"])
def test_a_long_sequence(decay):
    T, K = 65_536, 8
    leaves = {
        "q": torch.randn(1, T, 1, K),
        "k": F.normalize(torch.randn(1, T, 1, K), dim=-1),
        "v": torch.randn(1, T, 1, K),
        "beta": torch.rand(1, T, 1),
    }
    if decay:
        leaves["log_decay"] = -(10 ** (-5 * torch.rand((1, T, 1) if decay == "head" else (1, T, 1, K))))
    o, state = delta_rule(**leaves, backend="compiled")
    exact = delta_rule(**{name: x.double() for name, x in leaves.items()}, backend="chunked", chunk_size=64)
    assert_close([o, state], exact, torch.float32)


@pytest.mark.slow
def test_one_graph_whatever_the_length():
    torch._dynamo.reset()
    compiled = torch.compile(delta_rule, fullgraph=True, backend="aot_eager", dynamic=True)
    for T in (20, 300, 1000):
        inputs = make(delta_rule, T, decay="head mild")
        expected = outcome(delta_rule, inputs, torch.float32, backend="compiled")
        assert_close(outcome(compiled, inputs, torch.float32, backend="compiled"), expected, torch.float32)


def test_beta_of_two_reflects_without_growing():
    T = 256
    k = F.normalize(torch.randn(1, 1, 1, 8), dim=-1).expand(1, T, 1, 8)
    inputs = make(delta_rule, T, B=1, G=1, H=1, K=8, V=8)
    inputs.leaves |= {"q": k.double(), "k": k.double(), "beta": torch.full((1, T, 1), 2.0).double()}
    exact = outcome(delta_rule, inputs, backend="reference")
    assert_close(outcome(delta_rule, inputs, torch.float32, backend="compiled"), exact, torch.float32)
