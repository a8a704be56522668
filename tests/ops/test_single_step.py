"""Single steps without gradients: one call of a kernel, the state written in place, and when they do not run so."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import zoo
from zoo import ops
from zoo.laws import off_inits
from zoo.norms import l2_norm, make_norm, rms_norm
from zoo.ops import native
from zoo.ops.common import logged_forms
from zoo.ops.kernel import Kernel
from zoo.protocol import Context, Mixer, Place, mixers, norms

pytestmark = pytest.mark.skipif(bool(native.why_not("step")), reason="no compiled kernels here")
WORDS = {
    "gated_deltanet": "delta_rule",
    "gated_deltanet(n_heads=2, n_v_heads=4, head_dim=5, expand_v=1.0, conv_size=3)": "delta_rule",
    "deltanet": "delta_rule",
    "mamba2(n_groups=2, head_dim=8, d_state=5)": "linear_attention",
    "rwkv7": "dplr",
    "kda": "delta_rule",
    "gla": "linear_attention",
    'gqa(n_heads=4, gate="head", qk_norm=True, sinks=True)': "attention",
    "swa(window=4)": "attention",
}


def inputs(op: str, B: int = 2, H: int = 4, G: int = 2, K: int = 5, V: int = 19) -> dict[str, Tensor]:
    """The arguments of a single step of an op."""
    torch.manual_seed(0)
    given = {
        "q": torch.randn(B, 1, G, K),
        "k": torch.randn(B, 1, G, K),
        "v": torch.randn(B, 1, H, V),
        "log_decay": -torch.rand(B, 1, H, K),
        "state": torch.randn(B, H, K, V),
    }
    if op == "delta_rule":
        given["beta"] = torch.rand(B, 1, H)
    if op == "dplr":
        given |= {"a": torch.randn(B, 1, H, K), "b": torch.randn(B, 1, H, K)}
    return given


@pytest.mark.parametrize("op", ["linear_attention", "delta_rule", "dplr"])
@pytest.mark.parametrize("decay", ["none", "head", "channel"])
@pytest.mark.parametrize("V", [3, 19, 64, 80])
def test_a_step_over_heads_is_that_of_the_definition(op, decay, V):
    given = inputs(op, V=V)
    if decay != "channel":
        given["log_decay"] = None if decay == "none" else given["log_decay"][..., 0]
    wide = {name: None if x is None else x.double() for name, x in given.items()}
    expected = getattr(ops, op)(**wide, backend="reference")
    before = given["state"].clone()
    with logged_forms() as forms:
        o, last = getattr(ops, op)(**given)
    assert forms == {op: {"compiled"}}
    torch.testing.assert_close(o.double(), expected[0], rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(last.double(), expected[1], rtol=2e-5, atol=2e-5)
    assert torch.equal(given["state"], before)  # without `in_place` it is not changed
    o, last = getattr(ops, op)(**given, in_place=True)
    assert last is given["state"]
    torch.testing.assert_close(last.double(), expected[1], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(("W", "activation", "biased"), [(1, None, True), (2, "silu", False), (4, "silu", True)])
def test_a_step_of_a_convolution_is_that_of_the_definition(W, activation, biased):
    torch.manual_seed(0)
    x, weight, state = torch.randn(3, 1, 7), torch.randn(7, W), torch.randn(3, W - 1, 7)
    bias = torch.randn(7) if biased else None
    expected = ops.causal_conv1d(x, weight, bias, state, activation=activation, backend="reference")
    found = ops.causal_conv1d(x, weight, bias, state, activation=activation, in_place=True)
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1])
    assert found[1] is state


def test_a_state_that_autograd_kept_is_not_changed_in_silence():
    given = inputs("delta_rule")
    given["q"].requires_grad_()
    longer = {name: x.expand(-1, 9, *x.shape[2:]) if name != "state" else x for name, x in given.items()}
    o, _ = ops.delta_rule(**longer, backend="compiled")
    with torch.no_grad():
        ops.delta_rule(**given, in_place=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        o.sum().backward()


@pytest.mark.parametrize("name", ["q", "v", "state"])
def test_a_step_with_gradients_takes_the_other_way(name):
    given = inputs("delta_rule")
    given[name].requires_grad_()
    o, last = ops.delta_rule(**given, in_place=True)
    (o.sum() + last.sum()).backward()
    assert given[name].grad is not None
    assert last is not given["state"]


def test_shapes_that_do_not_go_together_are_refused_in_words():
    given = inputs("delta_rule")
    with pytest.raises(zoo.UsageError, match="state has shape"):
        ops.delta_rule(**{**given, "state": torch.zeros(2, 4, 5, 4)})
    with pytest.raises(zoo.UsageError, match="beta has shape"):
        ops.delta_rule(**{**given, "beta": torch.zeros(2, 1, 3)})
    cache = ops.init_cache(1, 2, 4, 4, capacity=3)
    q, k = torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 2, 4)
    with pytest.raises(zoo.UsageError, match="state has 3 rows"):
        ops.attention(q, k, k, cache, window=2)


def test_a_negative_length_reaches_no_memory_but_the_cache():
    cache = ops.init_cache(1, 2, 4, 4, capacity=3)
    cache.length.fill_(-7)
    q, k = torch.randn(1, 1, 4, 4), torch.randn(1, 1, 2, 4)
    o, after = ops.attention(q, k, k, cache)
    assert after.length.tolist() == [1]
    torch.testing.assert_close(o, k.repeat_interleave(2, 2))


@pytest.mark.parametrize("word", WORDS)
@torch.no_grad()
def test_layers_step_in_one_call_and_in_place(word):
    torch.manual_seed(0)
    mixer = zoo.create_mixer(word, d_model=64).eval()
    for parameter in mixer.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    x = torch.randn(3, 9, 64)
    expected, last = mixer(x)
    _, state = mixer(x[:, :4], mixer.init_state(3, capacity=9))
    for t in range(4, 9):
        with logged_forms() as forms:
            y, state = mixer.step(x[:, t], state)
        torch.testing.assert_close(y, expected[:, t], rtol=1e-4, atol=1e-5)
        assert forms[WORDS[word]] == {"compiled"}
    for a, b in zip(_leaves(state), _leaves(last), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def _leaves(state: object) -> list[Tensor]:
    return tree_leaves(zoo.canonical(state))


@pytest.mark.parametrize("word", ["gated_deltanet", "mamba2", "rwkv7"])
@torch.no_grad()
def test_a_hook_on_a_part_fires_in_a_step(word):
    mixer = zoo.create_mixer(word, d_model=32).eval()
    parts = [m for m in mixer.modules() if m is not mixer and not list(m.children())]
    seen: list[torch.nn.Module] = []
    state, x = mixer.init_state(1), torch.randn(1, 32)
    plain, _ = mixer.step(x, zoo.fork(state))
    for part in parts:
        part.register_forward_hook(lambda module, inputs, output: seen.append(module))
    hooked, _ = mixer.step(x, state)
    assert set(seen) == set(parts)
    torch.testing.assert_close(hooked, plain, rtol=1e-4, atol=1e-5)


def second_layer(name: str) -> Mixer:
    """A mixer of any name, off its inits, as the second layer of a model."""
    torch.manual_seed(0)
    return off_inits(mixers[name](32, mixers[name].Config(), place=Place(layer=1, n_layers=2, length=8))).eval()


def of_tokens(T: int) -> Context:
    return Context(tokens=torch.zeros(1, T, dtype=torch.int64))


@pytest.fixture
def no_step_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(kernel: Kernel, function: str) -> None:
        raise AssertionError(f"{function} was called")

    monkeypatch.setattr(Kernel, "bare", refuse)


@pytest.mark.parametrize("name", zoo.list_mixers())
@torch.no_grad()
def test_whole_passes_take_no_step_form(name, no_step_forms):
    """Step forms round in their own way, and few rows take them where many do not."""
    mixer = second_layer(name)
    _, state = mixer(torch.randn(1, 2, 32), None, of_tokens(2))
    if mixer.causal:
        mixer(torch.randn(1, 2, 32), state, of_tokens(2))


@torch.no_grad()
def test_norms_of_whole_passes_take_no_step_form(no_step_forms):
    for name in norms.names():
        make_norm(name, 32)(torch.randn(1, 2, 32))
    for norm in (l2_norm, lambda x: rms_norm(x, None, 1e-5)):
        norm(torch.randn(1, 2, 1, 16))


@pytest.mark.parametrize("name", zoo.list_mixers())
def test_a_step_from_a_state_with_gradients(name):
    """Without gradients itself: values and calls as with gradients, and a backward pass still has what it needs."""
    mixer, x = second_layer(name), torch.randn(1, 6, 32)
    if not mixer.causal:
        pytest.skip("it takes no steps")
    o, state = mixer(x[:, :5], None, of_tokens(5))
    called: list[torch.nn.Module] = []
    for part in mixer.modules():
        if isinstance(part, torch.nn.Linear):
            part.register_forward_hook(lambda module, inputs, output: called.append(module))
    expected, _ = mixer.step(x[:, 5].contiguous(), zoo.fork(state), of_tokens(1))
    once, called[:] = called[:], []
    with torch.no_grad():
        y, _ = mixer.step(x[:, 5].contiguous(), state, of_tokens(1))
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    assert called == once
    o.sum().backward()


@torch.no_grad()
def test_a_decoder_does_not_grow_its_cache_before_it_is_full():
    model = zoo.create_model("2*(gqa swiglu)", d_model=32, vocab_size=9).eval()
    state = model.init_state(1, capacity=4)
    memory = [layer[0].k.data_ptr() for layer in (state.layers[0], state.layers[2])]
    for _ in range(4):
        _, state = model.step(torch.tensor([1]), state)
    assert memory == [layer[0].k.data_ptr() for layer in (state.layers[0], state.layers[2])]
    _, state = model.step(torch.tensor([1]), state)
    assert state.layers[0][0].k.shape[1] == 8


def test_steps_are_left_to_the_ops_where_kernels_are_switched_off(monkeypatch):
    monkeypatch.setenv("ZOO_KERNELS", "off")
    with logged_forms() as forms:
        ops.delta_rule(**inputs("delta_rule"))
    assert forms == {"delta_rule": {"reference"}}
