"""Models of real vectors and bare backbones: what they compute, how they carry on, what they cost, what they refuse."""

from __future__ import annotations

import pytest
import torch
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

import zoo
from zoo.backbone import Backbone
from zoo.laws import assert_close, refusal_of_vectors
from zoo.models import SeriesModel
from zoo.protocol import Context
from zoo.states import tree_bytes

D_IN, D_OUT, D = 3, 2, 16
PATTERNS = [
    "cfc swiglu",
    "lstm swiglu gqa mlp",
    "gated_deltanet shortcut(swiglu, ltc swiglu)",
    "neural_ode (mamba2 | gqa)",
]
over_patterns = pytest.mark.parametrize("pattern", PATTERNS)
over_kinds = pytest.mark.parametrize("kind", ["model", "backbone"])


def module_of(kind: str, pattern: str, **options):
    torch.manual_seed(0)
    if kind == "model":
        module = zoo.create_model(pattern, d_model=D, inputs=D_IN, outputs=D_OUT, **options)
    else:
        module = zoo.create_backbone(pattern, d_model=D, **options)
    module = module.double()
    with torch.no_grad():
        for p in module.parameters():
            p += 0.1 * torch.randn_like(p)
    return module


def series(kind: str, n: int = 2, length: int = 9, seed: int = 0):
    """(n, length, width) vectors and (n, length) timespans."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, length, D_IN if kind == "model" else D, generator=generator, dtype=torch.float64)
    return x, 0.1 + 3 * torch.rand(n, length, generator=generator, dtype=torch.float64)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)


def test_forward_by_hand():
    model, (x, _) = module_of("model", "swiglu"), series("model")
    step = model.backbone.steps[0]
    h = x @ model.embedding.weight.T + model.embedding.bias
    h = h + step.mixers[0](step.norm_in(h))[0]
    expected = model.norm(h) @ model.head.weight.T + model.head_bias
    y, state = model(x)
    close(y, expected)
    assert y.shape == (2, 9, D_OUT)
    assert isinstance(model, SeriesModel)
    assert state.position.tolist() == [9, 9]


def test_a_backbone_is_the_layers_of_the_model():
    model = module_of("model", "cfc swiglu")
    layers = zoo.create_backbone("cfc swiglu", d_model=D).double()
    layers.load_state_dict(model.backbone.state_dict())
    x, spans = series("backbone")
    close(layers(x, None, Context(timespans=spans))[0], model.backbone(x, None, Context(timespans=spans))[0])
    assert isinstance(layers, Backbone)
    assert layers.n_parameters() == sum(p.numel() for p in model.backbone.parameters())


@over_kinds
@over_patterns
def test_state_carries_and_timespans_are_read(kind, pattern):
    module, (x, spans) = module_of(kind, pattern), series(kind)
    whole, end = module(x, None, Context(timespans=spans))
    state, pieces = None, []
    for a, b in ((0, 4), (4, 5), (5, 9)):
        y, state = module(x[:, a:b], state, Context(timespans=spans[:, a:b]))
        pieces.append(y)
    close(torch.cat(pieces, 1), whole)
    state, steps = module.init_state(2, capacity=9), []
    for t in range(9):
        y, state = module.step(x[:, t], state, Context(timespans=spans[:, t : t + 1]))
        steps.append(y)
    close(torch.stack(steps, 1), whole)
    close(zoo.canonical(state), zoo.canonical(end))
    if any(word in pattern for word in ("cfc", "ltc", "neural_ode")):
        assert not torch.allclose(module(x)[0], whole)


@over_kinds
@over_patterns
def test_rows_are_alone_packed_or_padded(kind, pattern):
    module, (x, spans) = module_of(kind, pattern), series(kind)
    lengths = torch.tensor([9, 5])
    padded = x.clone()
    padded[1, 5:] = torch.nan if kind == "model" else 7.0  # a model does not read its padding
    y, state = module(padded, None, Context(lengths=lengths, timespans=spans))
    alone, last = module(x[1:, :5], None, Context(timespans=spans[1:, :5]))
    close(y[1:, :5], alone)
    close(zoo.canonical(zoo.select(state, [1])), zoo.canonical(last))
    resets = torch.zeros(2, 9, dtype=torch.bool)
    resets[0, 4] = True
    y, _ = module(x, None, Context(resets=resets, timespans=spans))
    close(y[:1, 4:], module(x[:1, 4:], None, Context(timespans=spans[:1, 4:]))[0])


@over_kinds
@over_patterns
def test_costs_are_those_counted(kind, pattern):
    module = module_of(kind, pattern)
    assert module.state_bytes(3, 7, torch.float64) == tree_bytes(module.init_state(3, capacity=7))
    with torch.device("meta"):
        shadow = zoo.create_backbone(pattern, d_model=D)
    assert shadow.n_parameters() == module_of("backbone", pattern).n_parameters()


@over_kinds
def test_flops_are_counted(kind):
    module, (x, _) = module_of(kind, 'cfc(backend="reference") swiglu'), series(kind, 1, 1)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(x)
    assert module.flops_per_token(1) == counter.get_total_flops()


@over_kinds
def test_gradients_reach_every_weight(kind):
    module, (x, spans) = module_of(kind, PATTERNS[0]), series(kind)
    module(x, None, Context(timespans=spans))[0].square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())


@over_kinds
@over_patterns
def test_what_does_not_fit_is_refused(kind, pattern):
    module = module_of(kind, pattern).float()
    refusal_of_vectors(module, D_IN if kind == "model" else D)
    x, own = series(kind)[0].float(), module.init_state(2)
    wrong = [module.init_state(3), tree_map(lambda t: t[..., None], own)]
    for state in wrong:
        with pytest.raises(zoo.UsageError, match="expected") as refusal:
            module(x, state)
        assert "\n" not in str(refusal.value)


def test_values_are_looked_at_but_in_the_padding():
    model, (x, _) = module_of("model", "gru"), series("model")
    x[1, 7, 0] = torch.inf
    with pytest.raises(zoo.UsageError, match=r"inputs should be finite numbers; these go from .* to inf"):
        model(x)
    assert model(x, None, Context(lengths=torch.tensor([9, 6])))[0].isfinite().all()


def test_any_floating_point_type_serves():
    model, (x, _) = module_of("model", "gru").float(), series("model")
    assert_close(model(x)[0], model(x.float())[0], 1e-6, "float64 inputs of a float32 model")
    assert model(x.half())[0].dtype == torch.float32


def test_models_that_look_ahead_take_no_state():
    model, (x, _) = module_of("model", "bidirectional(cfc) swiglu", causal=False), series("model")
    y, state = model(x)
    assert state == ()
    assert y.shape == (2, 9, D_OUT)
    with pytest.raises(zoo.UsageError, match="write bidirectional"):
        zoo.create_backbone("cfc", causal=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inputs": 3}, "inputs=3 needs outputs too"),
        ({"outputs": 3}, "outputs=3 needs inputs too"),
        ({"inputs": 3, "outputs": 1, "vocab_size": 9}, "vocab_size=9 is that of a model of tokens"),
        ({"inputs": 0, "outputs": 1}, "inputs=0 is not allowed"),
        ({"inputs": 3, "outputs": 1, "tie_embeddings": True}, "takes no tie_embeddings"),
        ({"inputs": 3, "outputs": 1, "decoder": True}, "takes no decoder"),
        ({"inputs": 3, "outputs": 1, "causal": False, "recursion": {}}, "takes no recursion"),
    ],
)
def test_options_that_do_not_go_together(options, message):
    with pytest.raises(zoo.UsageError, match=message) as refusal:
        zoo.create_model("gru", **options)
    assert "\n" not in str(refusal.value)


def test_ways_to_create():
    config = zoo.ModelConfig(pattern="2*(cfc swiglu)", d_model=32, inputs=1, outputs=4)
    assert zoo.create_model(config).config == config
    assert zoo.ModelConfig(**config.model_dump(mode="json")) == config
    assert zoo.create_model("2*(gru swiglu)", n_parameters=20_000, inputs=1, outputs=4).n_parameters() <= 20_000
    small = zoo.create_backbone("2*(gru swiglu)", n_parameters=20_000)
    assert 0.8 * 20_000 < small.n_parameters() <= 20_000
    assert zoo.create_backbone(config).d_model == 32
    assert zoo.create_backbone("mamba2-tiny").d_model == zoo.create_model("mamba2-tiny").config.d_model
    assert zoo.swap(config, {"cfc": "ltc"}).pattern == "2*(ltc swiglu)"
    for wrong, message in (
        ({"vocab_size": 3}, "Unknown option of a backbone 'vocab_size'"),
        ({"d_mode": 32}, "Did you mean 'd_model'"),
        ({"d_model": 31}, "d_model=31 is not allowed"),
    ):
        with pytest.raises(zoo.UsageError, match=message):
            zoo.create_backbone("cfc", **wrong)
    with pytest.raises(zoo.UsageError, match=r"Unknown|cfd"):
        zoo.create_backbone("cfd swiglu")


def test_it_generates_no_tokens():
    with pytest.raises(zoo.UsageError, match="writes tokens, and this model reads real vectors"):
        module_of("model", "gru").generate([[1, 2]], max_new_tokens=3)


def test_it_compiles_to_one_graph():
    module, (x, spans) = module_of("backbone", "min_gru swiglu"), series("backbone")
    compiled = torch.compile(lambda x, s: module(x, None, Context(timespans=s))[0], fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        close(compiled(x, spans), module(x, None, Context(timespans=spans))[0])


def test_the_stream_is_no_less_exact_under_autocast_than_that_of_tokens():
    """A linear layer would begin it in half precision, in which timespans and small updates are lost."""
    model, seen = module_of("model", "gqa swiglu", time_feature=True).float(), []
    model.backbone.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.randn(2, 5, D_IN))
    assert seen == [torch.float32]
