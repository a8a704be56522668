"""Residual operators: hyper-connections against the same sums written out, and as part of models."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import zoo
from zoo.backbone import Backbone
from zoo.pattern import parse
from zoo.protocol import Context, admit
from zoo.residual import Residual
from zoo.residual.hyper_connections import HyperConnections, ManifoldHyperConnections, sinkhorn
from zoo.states import tree_bytes
from zoo.training.optimizer import parameter_groups

D, EPS, VOCAB = 16, 1e-5, 11
KINDS = ["hyper_connections", "mhc"]
over_kinds = pytest.mark.parametrize("kind", KINDS)
over_forms = pytest.mark.parametrize(("kind", "dynamic"), list(itertools.product(KINDS, [True, False])))
PATTERNS = [
    "2*(mamba2 swiglu)",
    "gated_deltanet (swa(window=5) | short_conv) swiglu",
    "gqa shortcut(swiglu, lstm swiglu)",
]


def perturbed(module, dtype=torch.float64):
    torch.manual_seed(1)
    with torch.no_grad():
        for p in module.to(dtype).parameters():
            p += 0.1 * torch.randn_like(p)
    return module


def model_of(pattern: str, **options):
    torch.manual_seed(0)
    return zoo.create_model(pattern, **{"d_model": D, "vocab_size": VOCAB, **options})


def tokens(batch: int = 2, steps: int = 9) -> torch.Tensor:
    return torch.randint(VOCAB, (batch, steps), generator=torch.Generator().manual_seed(0))


def close(actual, expected, tolerance=1e-9):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# ---- the sums


def weights_by_hand(connection, streams):
    """(read n, mixing n x n from a stream to a stream, write n) of one token, from its streams (n, D)."""
    n = len(streams)
    if isinstance(connection, HyperConnections):
        found = connection.static.clone()
        if connection.weight is not None:
            for i, stream in enumerate(streams):
                normed = stream / (stream.square().mean() + EPS).sqrt()
                for j in range(n + 2):
                    scale = connection.scale[1 if j == n + 1 else 0]
                    found[i, j] += scale * torch.tanh(connection.weight[j] @ normed)
        return found[:, 0], found[:, 1:-1], found[:, -1]
    logits = connection.bias.clone()
    if connection.weight is not None:
        normed = streams.flatten() / (streams.square().mean() + EPS).sqrt()
        of = [0] * n + [1] * n + [2] * n * n
        logits += connection.scale[of] * (connection.weight @ normed)
    mixing = logits[2 * n :].view(n, n).exp()
    for _ in range(20):
        mixing = mixing / mixing.sum(1, keepdim=True)
        mixing = mixing / mixing.sum(0, keepdim=True)
    return torch.sigmoid(logits[:n]), mixing, 2 * torch.sigmoid(logits[n : 2 * n])


@over_forms
@pytest.mark.parametrize("n", [2, 3])
def test_connections_by_hand(kind, dynamic, n):
    connection = perturbed(next(Residual.of({"name": kind, "streams": n, "dynamic": dynamic}).connections(D, EPS)))
    streams, y = torch.randn(2, 3, n, D, dtype=torch.float64), torch.randn(2, 3, D, dtype=torch.float64)
    h, mixed, weights = connection(streams)
    after = connection.write(mixed, y, weights)
    for b, t in itertools.product(range(2), range(3)):
        read, mixing, write = weights_by_hand(connection, streams[b, t])
        close(h[b, t], sum(read[i] * streams[b, t, i] for i in range(n)))
        for j in range(n):
            close(after[b, t, j], sum(mixing[i, j] * streams[b, t, i] for i in range(n)) + write[j] * y[b, t])


@over_kinds
def test_a_stack_by_hand(kind):
    x = torch.randn(2, 5, D, dtype=torch.float64)
    stack = perturbed(Backbone(parse("short_conv swiglu"), D, residual=f"{kind}(streams=3)"))
    streams = torch.stack([x, x, x], -2)
    for step in stack.steps:
        h, streams, weights = step.connection(streams)
        y = step.mixers[0](F.rms_norm(h, (D,), step.norm_in.weight, EPS))[0]
        streams = streams + torch.einsum("btn,btd->btnd", weights, y)
    close(stack(x)[0], sum(streams[:, :, i] for i in range(3)) / 3)


@over_kinds
def test_placements_and_scales_by_hand(kind):
    x = torch.randn(2, 5, D, dtype=torch.float64)
    streams = torch.randn(2, 5, 4, D, dtype=torch.float64)
    pattern = 'swiglu(placement="post", residual_scale=0.5) swiglu(placement="sandwich", out_scale=2.0)'
    post, sandwich = perturbed(Backbone(parse(pattern), D, residual=kind)).steps
    h, mixed, weights = post.connection(streams)
    after = 0.5 * mixed + weights[..., None] * post.mixers[0](h)[0][..., None, :]
    after = F.rms_norm(after, (D,), post.norm_out.weight, EPS)  # each stream by itself
    close(post(streams, None, Context())[0], after)
    h, mixed, weights = sandwich.connection(streams)
    y = 2 * sandwich.mixers[0](F.rms_norm(h, (D,), sandwich.norm_in.weight, EPS))[0]
    after = mixed + weights[..., None] * F.rms_norm(y, (D,), sandwich.norm_out.weight, EPS)[..., None, :]
    close(sandwich(streams, None, Context())[0], after)
    assert x.shape == Residual.of(kind).narrow(Residual.of(kind).widen(x)).shape


@over_kinds
def test_a_shortcut_by_hand(kind):
    streams = torch.randn(2, 5, 4, D, dtype=torch.float64)
    (step,) = perturbed(Backbone(parse("shortcut(swiglu, short_conv swiglu)"), D, residual=kind)).steps
    h, mixed, weights = step.branch.connection(streams)
    y = step.branch.mixers[0](F.rms_norm(h, (D,), step.body.steps[0].norm_in.weight, EPS))[0]
    for inner in step.body.steps:
        mixed = inner(mixed, None, Context())[0]
    context = admit("backbone", None, 2, 5, streams.device)  # as the model at whose door it was checked
    close(step(streams, None, context)[0], mixed + weights[..., None] * y[..., None, :])


def test_sinkhorn_is_doubly_stochastic():
    logits = 2 * torch.randn(5, 4, 4, dtype=torch.float64)
    matrix = sinkhorn(logits)
    assert (matrix > 0).all()
    close(matrix.sum(-2), torch.ones(5, 4, dtype=torch.float64))
    close(matrix.sum(-1), torch.ones(5, 4, dtype=torch.float64), 1e-2)
    extreme = (1e4 * logits.float()).requires_grad_()
    sinkhorn(extreme).square().sum().backward()
    assert extreme.grad.isfinite().all()


# ---- at the start


@over_forms
@pytest.mark.parametrize(
    ("placement", "pattern"),
    [*itertools.product(["pre", "sandwich", "output"], PATTERNS), ("post", PATTERNS[0]), ("post", PATTERNS[1])],
)
def test_the_start_is_that_of_one_stream(kind, dynamic, placement, pattern):
    plain = model_of(pattern, placement=placement).double()
    wide = model_of(pattern, placement=placement, residual=kind, residual_dynamic=dynamic).double()
    left = wide.load_state_dict(plain.state_dict(), strict=False)
    assert left.unexpected_keys == []
    assert all(".connection." in name for name in left.missing_keys)
    with torch.no_grad():
        close(wide(tokens())[0], plain(tokens())[0], 1e-5)  # mHC's first weights are rounded to float32


def test_each_step_starts_with_another_stream():
    for kind, cls in (("hyper_connections", HyperConnections), ("mhc", ManifoldHyperConnections)):
        stack = Backbone(parse("short_conv shortcut(swiglu, 2*(swiglu)) short_conv"), D, residual=f"{kind}(streams=4)")
        read = [m.weights(torch.zeros(1, 1, 4, D))[0][..., 0] for m in stack.modules() if isinstance(m, cls)]
        assert sorted(r.argmax().item() for r in read) == [0, 0, 1, 2, 3]
        assert stack.steps[2].connection.weights(torch.zeros(1, 1, 4, D))[0][..., 0].argmax() == 0
        close(torch.stack([r.sum() for r in read]), torch.ones(5), 1e-6)


# ---- as part of a model


@over_forms
@pytest.mark.parametrize("pattern", PATTERNS)
def test_state_carries_and_gradients_reach_all(kind, dynamic, pattern):
    model = perturbed(model_of(pattern, residual=kind, residual_streams=3, residual_dynamic=dynamic))
    x = tokens(2, 11)
    whole, _ = model(x)
    first, state = model(x[:, :4], model.init_state(2, capacity=11))
    second, _ = model(x[:, 4:], state)
    close(torch.cat([first, second], 1), whole)
    assert model.state_bytes(2, 11) == model_of(pattern).state_bytes(2, 11)
    assert model.state_bytes(2, 11) == tree_bytes(model.float().init_state(2, capacity=11))
    model.double()(x)[0].square().sum().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
        assert p.grad.ne(0).any(), name


@over_kinds
def test_a_model_that_looks_ahead(kind):
    pattern = 'bidirectional(lstm) gqa swiglu(norm_axis="time", placement="post")'
    model = perturbed(model_of(pattern, causal=False, residual=kind))
    x = tokens()
    changed = x.clone()
    changed[:, -1] = (x[:, -1] + 1) % VOCAB
    assert not torch.allclose(model(changed)[0][:, 0], model(x)[0][:, 0])
    streams = torch.randn(2, 5, 4, D, dtype=torch.float64)
    post = model.backbone.steps[2]
    for i in range(4):  # a norm along time takes the streams one by one, too
        close(post.norm_out(streams)[:, :, i], post.norm_out(streams[:, :, i]))


@over_forms
def test_flops_are_counted(kind, dynamic):
    model = model_of("short_conv shortcut(swiglu, mlp)", residual=kind, residual_streams=3, residual_dynamic=dynamic)
    with torch.no_grad():
        _, state = model(tokens(1, 9), model.init_state(1, capacity=10))
        with FlopCounterMode(display=False) as counter:
            model.step(tokens(1, 1)[0], state)
    assert model.flops_per_token(10) == counter.get_total_flops()


@over_forms
def test_parameters_on_the_meta_device(kind, dynamic):
    options = {"residual": kind, "residual_streams": 3, "residual_dynamic": dynamic}
    with torch.device("meta"):
        shadow = model_of("mha swiglu", **options)
    assert {p.device.type for p in shadow.parameters()} == {"meta"}
    n = 3
    static = n * (n + 2)
    each = static
    if dynamic:
        each += (n + 2) * D + 2 if kind == "hyper_connections" else static * n * D + 3
    assert shadow.n_parameters() == model_of("mha swiglu").n_parameters() + 2 * each


@over_kinds
def test_static_weights_are_not_decayed(kind):
    model = model_of("mha swiglu", residual=kind)
    free = {id(p) for p in parameter_groups(model)["no_decay"]}
    for step in model.backbone.steps:
        own = dict(step.connection.named_parameters())
        assert {name for name, p in own.items() if id(p) not in free} == {"weight"}


@pytest.mark.parametrize("kind", [pytest.param(k, marks=[pytest.mark.slow] if i else []) for i, k in enumerate(KINDS)])
def test_compilation(kind):
    model = perturbed(model_of("mha swiglu", residual=kind), torch.float32)
    x = tokens()
    compiled = torch.compile(lambda x: model(x)[0], fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x)[0], rtol=1e-4, atol=1e-5)


@over_kinds
def test_autocast(kind):
    model = perturbed(model_of("mha swiglu", residual=kind), torch.float32)
    x = tokens()
    expected, _ = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert (model(x)[0].float() - expected).norm() < 0.05 * expected.norm()
        h, stream, _ = model.backbone.steps[0].connection(Residual.of(kind).widen(torch.randn(2, 3, D)))
    assert h.dtype == stream.dtype == torch.float32  # the stream keeps its precision
    assert model.bfloat16()(x)[0].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"residual": "hyper_conection"},
            "Unknown residual kind 'hyper_conection'. Did you mean 'hyper_connections'?",
        ),
        ({"residual": "mhc", "residual_streams": 1}, "mhc: streams=1 is not allowed"),
        ({"residual_streams": 2}, 'residual_streams needs residual="hyper_connections" or "mhc"'),
        ({"residual_dynamic": False}, 'residual_dynamic needs residual="hyper_connections" or "mhc"'),
    ],
)
def test_refusals(options, message):
    with pytest.raises(zoo.UsageError, match=message) as refusal:
        model_of("mha", **options)
    assert "\n" not in str(refusal.value)
