"""Shared blocks, one set of weights in several places: against the same sums written out use by use, in float64."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from stacks import EPS, D, backbone, close, counted_flops, gradients, losses_by_hand, places_of

import zoo
from zoo.backbone import Backbone
from zoo.listing import listing
from zoo.pattern import SharedOptions, parse
from zoo.protocol import Context
from zoo.shared import Block, SharedStep
from zoo.states import tree_bytes

VOCAB = 11
ZAMBA = 'gqa(adapter_rank=2) geglu(adapter_rank=3, residual_scale=0.0), inject="wide", enters="next", out_proj=True'


def model_of(pattern: str, **options):
    torch.manual_seed(0)
    model = zoo.create_model(pattern, **{"d_model": D, "vocab_size": VOCAB, **options})
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    return model


@pytest.fixture
def x():
    return torch.randn(2, 9, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def rms(x, weight):
    return F.rms_norm(x, x.shape[-1:], weight, EPS)


def run(module, x, use=0):
    return module(x, None, Context(use=use))[0]


# ---- what a use computes


def test_the_same_steps_at_several_depths(x):
    """As a network with the steps written out, whose weights are the same."""
    stack, apart = backbone('short_conv shared("a", gqa swiglu) gru shared("a")'), backbone("short_conv gqa swiglu gru")
    apart.load_state_dict(
        {
            name.replace("shared.0.body.steps.0", "steps.1")
            .replace("shared.0.body.steps.1", "steps.2")
            .replace("steps.2.", "steps.3." if name.startswith("steps.2.") else "steps.2."): tensor
            for name, tensor in stack.state_dict().items()
        }
    )
    conv, attention, swiglu, gru = apart.steps
    h = x
    for step in (conv, attention, swiglu, gru, attention, swiglu):
        h = run(step, h)
    close(stack(x)[0], h)


@pytest.mark.parametrize("inject", ["none", "add", "concat"])
def test_what_a_block_reads_of_the_embedding(inject, x):
    stack = backbone(f'short_conv shared("a", gqa swiglu, inject="{inject}") swiglu shared("a")')
    (block,) = stack.shared

    def f(h):
        u = {"none": h, "add": h + x, "concat": torch.cat([h, x], -1)}[inject]
        u = u @ block.inject.proj.weight.T if inject == "concat" else u
        for step in block.body.steps:
            u = run(step, u)
        return u

    close(stack(x)[0], f(run(stack.steps[2], f(run(stack.steps[0], x)))))


def zamba(stack, h, e, at, use):
    """A use of Zamba2's block and the layer after it, written out (arXiv 2411.15242, figure 2 and section II)."""
    attention, feed_forward = stack.shared[0].body.steps
    (a,), (g,) = attention.mixers, feed_forward.mixers
    z = rms(torch.cat([h, e], -1), attention.norm_in.weight)
    downs = a.adapters.down[use].weight.split(2)
    rows = torch.cat([up.weight @ down for up, down in zip(a.adapters.up[use], downs, strict=True)])
    alone = copy.deepcopy(a)
    alone.adapters = None
    alone.in_proj.weight.data += rows
    y = rms(run(alone, z), feed_forward.norm_in.weight)
    gate, up = ((layer.weight @ y.mT).mT for layer in (g.gate_proj, g.up_proj))
    of_gate, of_up = (y @ g.adapters.down[use].weight.T @ g.adapters.up[use][0].weight.T).chunk(2, -1)
    y = (F.gelu(gate + of_gate) * (up + of_up)) @ g.down_proj.weight.T
    after = stack.steps[at + 1]
    return h + run(after.mixers[0], rms(h + y @ stack.steps[at].out_proj.weight.T, after.norm_in.weight))


@pytest.mark.parametrize("again", ['shared("a")', f'shared("a", {ZAMBA})'])
def test_the_block_of_zamba2(again, x):
    stack = backbone(f'short_conv shared("a", {ZAMBA}) min_gru {again} gru')
    h = zamba(stack, run(stack.steps[0], x), x, 1, 0)
    close(stack(x)[0], zamba(stack, h, x, 3, 1))


def test_a_result_for_the_next_word_alone_leaves_the_residual_streams(x):
    """The block reads the streams as one, and the next word what its connection gives and the result."""
    kind = "hyper_connections(streams=3)"
    stack = backbone('short_conv shared("a", swiglu, inject="add", enters="next") short_conv', residual=kind)
    stream = run(stack.steps[0], stack.residual.widen(x))
    y = run(stack.shared[0].body.steps[0], stack.residual.narrow(stream) + x)
    after = stack.steps[2]
    h, stream, weights = after.connection(stream)
    out = run(after.mixers[0], after.norm_in(h + y))
    close(stack(x)[0], stack.residual.narrow(after.connection.write(stream, out, weights)))


def test_the_embedding_is_what_the_first_layer_reads_in_nodes_too(x):
    stack = backbone('short_conv loop(2, shared("a", swiglu, inject="add") shortcut(mlp, shared("a") mlp))')
    (loop,), (block,) = [stack.steps[1]], stack.shared
    h = run(stack.steps[0], x)
    for _ in range(2):
        h = run(block.body.steps[0], h + x)
        shortcut = loop.body.steps[1]
        branch = run(shortcut.branch.mixers[0], shortcut.branch.norm_in(h))
        h = run(shortcut.body.steps[1], run(block.body.steps[0], h + x)) + branch
    close(stack(x)[0], h)


# ---- what it costs, and what each use has of its own


def test_weights_are_counted_once_and_states_and_work_at_every_use():
    alone, shared = (
        zoo.create_backbone("gqa swiglu", d_model=D),
        zoo.create_backbone('3*(shared("a", gqa swiglu))', d_model=D),
    )
    assert shared.n_parameters() == alone.n_parameters()
    assert shared.flops_per_token(20) == 3 * alone.flops_per_token(20)
    assert shared.state_bytes(2, 20) == 3 * alone.state_bytes(2, 20) == tree_bytes(shared.init_state(2, capacity=20))
    assert [m.name for m in shared.mixers()] == ["gqa", "swiglu"]
    assert list(shared.state_dict()) == [f"shared.0.body.{name}" for name in alone.state_dict()]
    order = zoo.create_backbone('gru shared("a", gqa) lstm shared("a") shared("b", shared("a") mlp)', d_model=D)
    assert [m.name for m in order.mixers()] == ["gru", "gqa", "lstm", "mlp"]


@pytest.mark.parametrize("residual", ["plain", "mhc(streams=3)"])
@pytest.mark.parametrize("options", ['inject="concat"', 'inject="concat", enters="next"', ZAMBA.split("0), ")[1]])
def test_flops_are_counted(options, residual):
    body = 'gqa(backend="reference", adapter_rank=2) swiglu(adapter_rank=3)'
    body = body.replace("rank=3", "rank=3, residual_scale=0.0") if "wide" in options else body
    stack = zoo.create_backbone(f'2*(shared("a", {body}, {options}) gru)', d_model=D, residual=residual)
    assert counted_flops(stack) == stack.flops_per_token(5)


def test_words_have_the_place_of_the_first_use(monkeypatch):
    _, places = places_of(
        monkeypatch, 'lstm shared("a", gqa swiglu shared("b", gru)) lstm 2*(shared("a")) lstm shared("b") lstm'
    )
    assert [p.layer for p in places] == [0, 1, 1, 2, 3, 8, 10]
    assert {p.n_layers for p in places} == {11}
    assert [p.uses for p in places] == [1, 3, 3, 2, 1, 1, 1]


def test_losses_of_the_uses_are_averaged(x):
    """A router of a shared block counts as one, as in a loop."""
    stack = backbone('3*(shared("a", moe(n_experts=4, top_k=2)))')
    context, by_hand = Context(), losses_by_hand(stack.shared[0].body, x, 3)
    stack(x, None, context)
    assert len(by_hand) == 3
    close(sum(context.losses), sum(by_hand) / 3)


def test_adapters_start_at_zero_and_the_uses_differ_once_they_have_learned(x):
    fresh = Backbone(parse('2*(shared("a", gqa(adapter_rank=2) swiglu))'), D).double()
    plain = Backbone(parse('2*(shared("a", gqa swiglu))'), D).double()
    plain.load_state_dict({k: v for k, v in fresh.state_dict().items() if "adapters" not in k})
    close(fresh(x)[0], plain(x)[0])
    stack = backbone('2*(shared("a", gqa(adapter_rank=2) swiglu))')
    body = stack.shared[0].body
    assert not torch.allclose(body(x, None, Context(use=0))[0], body(x, None, Context(use=1))[0])
    with pytest.raises(zoo.UsageError, match=r"context.use=2 is no use of a shared block with 2 uses."):
        body(x, None, Context(use=2))


@pytest.mark.parametrize("gate", ["channel", "head"])
def test_adapters_leave_the_gate_of_attention_alone(gate, x):
    word = zoo.create_mixer("gqa", d_model=D, gate=gate, adapter_rank=2, n_heads=2).double()
    for part in word.adapters.up[0]:
        torch.nn.init.normal_(part.weight)
    plain = zoo.create_mixer("gqa", d_model=D, gate=gate, n_heads=2).double()
    plain.load_state_dict({k: v for k, v in word.state_dict().items() if "adapters" not in k})
    pairs = zip(word.adapters.up[0], word.adapters.down[0].weight.split(2), strict=True)
    rows = torch.cat([up.weight @ down for up, down in pairs])
    plain.in_proj.weight.data[: len(rows)] += rows
    close(word(x)[0], plain(x)[0])
    with torch.no_grad():
        close(word.step(x[:, 0], word.init_state(2))[0], plain.step(x[:, 0], plain.init_state(2))[0])


@pytest.mark.parametrize(
    ("pattern", "told"),
    [
        (
            'shared("a", mamba2, inject="wide", enters="next") gqa',
            r"mamba2 cannot be the first word .* of geglu",
        ),
        ('shared("a", loop(2, gqa), inject="wide", enters="next") gqa', "begins with a word, such as gqa"),
        ('shared("a", gqa, enters="next")', r"shared\('a'\) with enters=\"next\" needs a word after it"),
        ('shared("a", gqa, enters="next") loop(2, gqa)', "needs a word after it"),
        ('2*(shared("a", gqa, enters="next")) gqa', "needs a word after it"),
        ('loop(2, gqa shared("a", gqa, enters="next")) gqa', "needs a word after it"),
        ('shared("a", mha, enters="next") token_mlp', "token_mlp"),
    ],
)
def test_refusals(pattern, told):
    with pytest.raises(zoo.UsageError, match=told) as refusal:
        zoo.create_backbone(pattern, d_model=D)
    assert "\n" not in str(refusal.value)


def test_nodes_are_listed_with_their_options():
    named = [entry["name"] for entry in listing("nodes", "shared(*")]
    assert named == ["shared(name, body)", *(f"shared(..., {option}=)" for option in SharedOptions.model_fields)]


# ---- as part of models

PATTERN = f'2*(short_conv shared("a", {ZAMBA}) min_gru) shared("b", gqa swiglu, inject="concat") gru shared("b")'


def test_generation_is_the_pass_over_the_whole():
    model = model_of(PATTERN).double().eval()
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8, 9]]
    for prompt, row in zip(prompts, model.generate(prompts, max_new_tokens=6, prefill_chunk=2), strict=True):
        logits, _ = model(row[None, :-1])
        assert torch.equal(logits[0, len(prompt) - 1 :].argmax(-1), row[len(prompt) :])


def test_recomputed_activations_give_the_same_gradients():
    found = []
    for recompute in (False, True):
        model = model_of(PATTERN.replace("swiglu", "moe(n_experts=4, top_k=2)"))
        found.append(gradients(model, recompute=recompute))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
    parts = model.backbone.recomputed_parts()
    assert len(parts) == 2 * (1 + 2 + 1) + 2 + 1 + 2
    assert len(set(parts)) == 4 + 2 + 1 + 2


@pytest.mark.parametrize("later", ["loop(2, shared('a'))", "shortcut(mlp, shared('a') mlp)"])
def test_recomputation_counts_the_load_of_a_router_once(later):
    """Also where the recomputed step has the block in it, which belongs to the network around."""
    found = []
    for recompute in (False, True):
        model = model_of(f'shared("a", moe(n_experts=4, top_k=2, balance="bias")) {later}'.replace("'", '"'))
        model.recompute = recompute
        model(torch.arange(10).view(2, 5))[0].sin().sum().backward()
        found.append(model.backbone.shared[0].body.steps[0].mixers[0].load)
    assert found[0].sum() == 2 * 10 * (3 if "loop" in later else 2)
    assert torch.equal(*found)


def test_copies_and_casts_keep_the_weights_shared():
    model = model_of(PATTERN)
    again = copy.deepcopy(model).double()
    uses = [m for m in again.modules() if isinstance(m, SharedStep)]
    blocks = [m for m in again.modules() if isinstance(m, Block)]
    assert [use.block for use in uses] == [blocks[0], blocks[0], blocks[1], blocks[1]]
    with torch.device("meta"):
        empty = zoo.create_model(model.config)
    empty.to_empty(device="cpu").load_state_dict(model.state_dict())
    tokens = torch.arange(10).view(2, 5)
    assert torch.equal(empty(tokens)[0], model(tokens)[0])


def test_a_word_of_a_shared_block_is_swapped():
    model = model_of('gru shared("a", gqa swiglu) gru shared("a") mlp')
    new = zoo.swap(model, {"gqa": "mla"})
    assert new.config.pattern == 'gru shared("a", mla swiglu) gru shared("a") mlp'
    assert new.swapped.fresh
    assert all(name.startswith("backbone.shared.0.body.steps.0.mixers.0.") for name in new.swapped.fresh)
    assert torch.equal(new.backbone.steps[2].mixers[0].weight_hh_l0, model.backbone.steps[2].mixers[0].weight_hh_l0)


def test_it_is_saved_and_loaded(tmp_path):
    model = model_of(PATTERN)
    zoo.save(model, tmp_path / "model")
    again = zoo.load(tmp_path / "model")
    tokens = torch.arange(10).view(2, 5)
    assert torch.equal(model(tokens)[0], again.train()(tokens)[0])
    assert again.config == model.config


def test_a_shared_block_in_a_recursive_model():
    pattern = 'mha(rope=False) shared("a", swiglu, inject="add") mlp shared("a")'
    model = model_of(pattern, causal=False, placement="post", recursion={"cycles": 2}, max_len=6)
    model.logits(model.think(torch.arange(6)[None]).hidden).sum().backward()
    assert model.backbone.shared[0].body.steps[0].mixers[0].up_proj.weight.grad.any()
