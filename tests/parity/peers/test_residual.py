"""Hyper-connections against the package of that name, and mHC against DeepSeek-V4's in transformers, weights copied."""

from __future__ import annotations

import hyper_connections
import pytest
import torch
from torch import Tensor, nn
from transformers import DeepseekV4Config
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4HyperConnection

from zoo.residual import Residual
from zoo.residual.hyper_connections import HyperConnections, ManifoldHyperConnections

D, TOLERANCE = 24, 1e-9
over_sizes = pytest.mark.parametrize("n", [2, 3, 4])


def perturbed(module: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        for p in module.double().parameters():
            p += 0.3 * torch.randn_like(p)
    return module


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE)


def copied(theirs: hyper_connections.HyperConnections, index: int) -> HyperConnections:
    """Ours with the weights of theirs, whose norm has no epsilon."""
    ours = HyperConnections(D, HyperConnections.Config(streams=theirs.num_residual_streams), index=index, eps=0.0)
    weights = {
        "static": torch.cat([theirs.static_alpha, theirs.static_beta[:, None]], 1),
        "weight": torch.cat([theirs.dynamic_alpha_fn.T, theirs.dynamic_beta_fn[None]]),
        "scale": torch.stack([theirs.dynamic_alpha_scale, theirs.dynamic_beta_scale]),
    }
    ours.double().load_state_dict({k: v.detach().clone() for k, v in weights.items()})
    return ours


@over_sizes
def test_first_weights_are_the_packages(n):
    for index in range(2 * n):
        theirs = hyper_connections.HyperConnections(n, dim=D, layer_index=index)
        ours = HyperConnections(D, HyperConnections.Config(streams=n), index=index, eps=0.0)
        expected = copied(theirs, index).float().state_dict()
        assert ours.state_dict().keys() == expected.keys()
        assert all(torch.equal(value, expected[name]) for name, value in ours.state_dict().items())


@over_sizes
def test_hyper_connections_against_the_package(n):
    peers = [perturbed(hyper_connections.HyperConnections(n, dim=D, layer_index=i)) for i in range(3)]
    for peer in peers:
        nn.init.zeros_(peer.norm.gamma)  # ours has no weights there, which those of the projection would absorb
    ours = [copied(peer, i) for i, peer in enumerate(peers)]
    branches = [nn.Linear(D, D).double() for _ in peers]
    expand, reduce = hyper_connections.get_expand_reduce_stream_functions(n)
    x = torch.randn(2, 5, D, dtype=torch.float64, requires_grad=True)
    stream = expand(x)
    for peer, branch in zip(peers, branches, strict=True):
        h, add = peer(stream)
        stream = add(branch(h))
    theirs = reduce(stream)
    residual = Residual.of(f"hyper_connections(streams={n})")
    wide = residual.widen(x)
    for connection, branch in zip(ours, branches, strict=True):
        h, mixed, weights = connection(wide)
        wide = connection.write(mixed, branch(h), weights)
    close(n * residual.narrow(wide), theirs)  # theirs is the sum
    towards = torch.randn_like(theirs)
    (expected,) = torch.autograd.grad(theirs, x, towards)
    (found,) = torch.autograd.grad(n * residual.narrow(wide), x, towards, retain_graph=True)
    close(found, expected)


@over_sizes
def test_mhc_against_deepseek_v4(n):
    config = DeepseekV4Config(hidden_size=D, hc_mult=n, hc_sinkhorn_iters=20, hc_eps=0.0, rms_norm_eps=1e-5)
    theirs = DeepseekV4HyperConnection(config)
    torch.manual_seed(0)
    for p in theirs.parameters():
        nn.init.normal_(p, std=0.5)
    ours = ManifoldHyperConnections(D, ManifoldHyperConnections.Config(streams=n), index=0, eps=1e-5)
    ours.load_state_dict(dict(zip(("weight", "bias", "scale"), theirs.parameters(), strict=True)))
    streams, y = torch.randn(2, 5, n, D, requires_grad=True), torch.randn(2, 5, D)
    post, comb, collapsed = theirs(streams)
    expected = post[..., None] * y[..., None, :] + comb.mT @ streams
    h, mixed, weights = ours(streams)
    found = ours.write(mixed, y, weights)
    for a, b in ((h, collapsed), (found, expected)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    towards = torch.randn_like(found)
    (a,) = torch.autograd.grad(found, streams, towards, retain_graph=True)
    (b,) = torch.autograd.grad(expected, streams, towards, retain_graph=True)
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    for (name, p), q in zip(ours.named_parameters(), [theirs.base, theirs.fn, theirs.scale], strict=True):
        (a,) = torch.autograd.grad(found, p, towards, retain_graph=True)
        (b,) = torch.autograd.grad(expected, q, towards, retain_graph=True)
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=name)
