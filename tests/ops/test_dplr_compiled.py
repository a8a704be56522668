"""The compiled DPLR: sizes that no block divides, packed and ragged batches, groups cut into tasks, long sequences."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from test_dplr import DECAYS, assert_close, make, outcome

from zoo.ops import dplr, native

pytestmark = pytest.mark.skipif(native.why_not() is not None, reason=f"no kernels here: {native.why_not()}")


def compiled(inputs, **options):
    return outcome(inputs, torch.float32, backend="compiled", **options)


@pytest.mark.crossed("T", "decay")
@pytest.mark.parametrize("decay", ["channel mixed", *DECAYS[:-1]])
@pytest.mark.parametrize("T", [100, 1, 2, 16, 17, 63, 64, 65, 300])
def test_against_the_step_form(T, decay):
    inputs, options = make(T, decay=decay), {}
    if T > 64:
        options = {"resets": torch.rand(2, T) < 0.1, "lengths": torch.tensor([T // 2, T])}
    assert_close(compiled(inputs, **options), outcome(inputs, backend="reference", **options), torch.float32)


@pytest.mark.parametrize("decay", [None, "head mixed", "channel mixed"])
@pytest.mark.parametrize(("G", "H", "K", "V"), [(1, 1, 1, 1), (1, 6, 5, 7), (2, 4, 130, 24), (3, 3, 64, 64)])
def test_sizes_and_tasks(G, H, K, V, decay):
    """However many threads share the heads of a group."""
    inputs = make(130, G=G, H=H, K=K, V=V, decay=decay)
    exact = outcome(inputs, backend="chunked")
    threads = torch.get_num_threads()
    try:
        for n in (1, 3, 16):
            torch.set_num_threads(n)
            assert_close(compiled(inputs), exact, torch.float32)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("wanted", ["q", "k", "v", "a", "b", "log_decay", "state"])
def test_gradient_of_one_input(wanted):
    """With the inputs slices of wider tensors."""
    inputs = make(40)
    leaves = {name: x.clone().requires_grad_(name == wanted) for name, x in inputs.items()}
    expected = torch.autograd.grad(dplr(**leaves, backend="reference")[0].square().sum(), leaves[wanted])
    wide = {name: torch.cat([x, x], -1)[..., : x.shape[-1]].float() for name, x in inputs.items()}
    wide[wanted].requires_grad_()
    got = torch.autograd.grad(dplr(**wide, backend="compiled")[0].square().sum(), wide[wanted])
    assert_close(got, expected, torch.float32)


def test_a_long_sequence():
    T, K = 65_536, 8
    direction = F.normalize(torch.randn(1, T, 1, K), dim=-1)
    leaves = {name: torch.randn(1, T, 1, K) for name in ("q", "k", "v")}
    leaves |= {"a": -direction, "b": direction * torch.rand(1, T, 1, K)}
    leaves["log_decay"] = -(10 ** (-1 - 4 * torch.rand(1, T, 1, K)))
    exact = dplr(**{name: x.double() for name, x in leaves.items()}, backend="chunked")
    assert_close(dplr(**leaves, backend="compiled"), exact, torch.float32)


@pytest.mark.slow
def test_one_graph_whatever_the_length():
    torch._dynamo.reset()
    graph = torch.compile(dplr, fullgraph=True, backend="aot_eager", dynamic=True)
    for T in (20, 300, 1000):
        leaves = {name: x.float().requires_grad_() for name, x in make(T).items()}
        got, expected = (f(**leaves, backend="compiled") for f in (graph, dplr))
        assert_close(got, expected, torch.float32)
        gradients = [torch.autograd.grad(x[0].square().sum(), list(leaves.values())) for x in (got, expected)]
        assert_close(*gradients, torch.float32)
