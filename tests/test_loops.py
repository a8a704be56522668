"""Loops, weight-tied depth: against the same sums written out pass by pass, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from stacks import EPS, D, backbone, close, counted_flops, gradients, losses_by_hand, places_of
from torch.utils._pytree import tree_leaves

import zoo
from zoo.cli import app
from zoo.listing import listing
from zoo.pattern import LoopOptions
from zoo.protocol import Context, admit, register
from zoo.states import tree_bytes

VOCAB = 11


@pytest.fixture
def x():
    return torch.randn(2, 9, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def rms(x, weight=None):
    return F.rms_norm(x, (D,), weight, EPS)


BODY = "gqa swiglu"


def loop_of(options: str = "", n: int = 3, **more):
    """A loop, and its body as a function."""
    (step,) = backbone(f"loop({n}, {BODY}{', ' * bool(options)}{options})", **more).steps
    return step, lambda h: step.body(h, None, Context())[0]


# ---- what a pass computes


def test_a_body_applied_again(x):
    step, f = loop_of()
    close(step(x, None, Context())[0], f(f(f(x))))


def test_the_input_added(x):
    step, f = loop_of('inject="add"')
    close(step(x, None, Context())[0], f(f(f(x) + x) + x))


def test_a_low_level_module_of_hrm(x):
    """z <- norm(L(z + e)) from zeros (HRM-Text)."""
    step, f = loop_of('inject="add", start="zeros", norm="rmsnorm_plain"')
    z = torch.zeros_like(x)
    for _ in range(3):
        z = rms(f(z + x))
    close(step(x, None, Context())[0], z)


def test_the_core_of_huginn(x):
    """s <- R(A [s, e]) from s = 0, then a norm: their state at scale 0 (Geiping et al. 2025, section 3.2)."""
    step, f = loop_of('inject="concat", start="zeros"')
    s = torch.zeros_like(x)
    for _ in range(3):
        s = f(torch.cat([s, x], -1) @ step.inject.proj.weight.T)
    close(step(x, None, Context())[0], s)


def test_the_gated_message_of_inkling(x):
    step, f = loop_of('inject="gated", inject_rank=5')
    h, parts = f(x), step.inject
    for _ in range(2):
        u = torch.cat([rms(x), rms(h)], -1) @ parts.proj.weight.T
        forget, message = torch.tanh(u @ parts.forget.weight.T), torch.tanh(u @ parts.message.weight.T)
        h = f((1 - forget) * x + message * h)
    close(step(x, None, Context())[0], h)


def test_a_gate_for_each_pass(x):
    step, f = loop_of('gate=True, norm="rmsnorm"')
    h = x
    for g in step.gates:
        h = h + torch.sigmoid(g) * (rms(f(h), step.norm.weight) - h)
    close(step(x, None, Context())[0], h)
    fresh = zoo.create_backbone("loop(3, swiglu, gate=True)", d_model=D).steps[0]
    assert fresh.gates.shape == (3, D)


@pytest.mark.parametrize("options", ['inject="add"', 'inject="concat", start="zeros"'])
def test_gradients_through_the_last_passes_only(options, x):
    step, f = loop_of(f"{options}, gradient=2", n=4)
    weights = list(step.parameters())
    x.requires_grad_()
    found = torch.autograd.grad(step(x, None, Context())[0].sin().sum(), [x, *weights])
    h = torch.zeros_like(x) if "zeros" in options else x
    for i in range(4):
        h = f(step.inject(h, x) if i or "zeros" in options else x)
        h = h.detach() if i < 2 else h
    for a, e in zip(found, torch.autograd.grad(h.sin().sum(), [x, *weights]), strict=True):
        close(a, e)


def test_second_derivatives_of_a_cut_gradient_are_refused(x):
    step, _ = loop_of('inject="add", gradient=1')
    y, _ = step(x.requires_grad_(), None, Context())
    with pytest.raises(zoo.UsageError, match="second derivatives do not exist where gradient= lets"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


# ---- two levels

LOW = 'inject="add", start="carried", norm="rmsnorm_plain", residual=True'


def two_levels(n_high=3, options=LOW, body="gru swiglu"):
    """The pattern of HRM-Text, and its levels as functions."""
    stack = backbone(f'loop({n_high}, loop(2, {BODY}, {options}) {body}, norm="rmsnorm_plain")')
    low, *high = stack.steps[0].body.steps
    low.initial += 0.5

    def f_high(h):
        for step in high:
            h = step(h, None, Context())[0]
        return rms(h)

    return stack, low, lambda h: rms(low.body(h, None, Context())[0]), f_high


def test_the_low_level_goes_on_in_the_next_cycle(x):
    stack, low, f_low, f_high = two_levels()
    z, h = low.initial.expand_as(x), x
    for _ in range(3):
        for _ in range(2):
            z = f_low(z + h)
        h = f_high(h + z)
    context = Context()
    for _ in range(2):  # what one call leaves in its context does not reach the next
        close(stack(x, None, context)[0], h)


@pytest.mark.parametrize("gradient", [[1, 2, 1], [2, 0, 2], [0, 0, 1]])
def test_every_cycle_has_its_own_number_of_passes_with_gradients(gradient, x):
    stack, low, f_low, f_high = two_levels(options=f"{LOW}, gradient={gradient}")
    weights = list(stack.parameters())
    x.requires_grad_()
    found = torch.autograd.grad(stack(x)[0].sin().sum(), [x, *weights])
    z, h = low.initial.expand_as(x), x
    for learning in gradient:
        for i in range(2):
            z = f_low(z + h)
            z = z.detach() if i < 2 - learning else z
        h = f_high(h + z)
    for a, e in zip(found, torch.autograd.grad(h.sin().sum(), [x, *weights]), strict=True):
        close(a, e)


def test_a_loop_in_the_middle_begins_anew(x):
    """Of three levels, the innermost goes on within one run of the middle one."""
    inner = f"loop(2, gru, {LOW})"
    stack = backbone(f"loop(2, loop(2, {inner} swiglu) swiglu)")
    middle = stack.steps[0].body.steps[0].body.steps
    last, (low, high) = stack.steps[0].body.steps[1], middle
    h = x
    for _ in range(2):
        z = torch.zeros_like(h)
        for _ in range(2):
            for _ in range(2):
                z = rms(low.body(z + h, None, Context())[0])
            h = high(h + z, None, Context())[0]
        h = last(h, None, Context())[0]
    close(stack(x)[0], h)


def test_a_low_level_in_a_shortcut(x):
    """It is within the same loop; recomputed activations change nothing."""
    found = []
    for recompute in (False, True):
        stack = backbone(f"loop(2, shortcut(swiglu, gru loop(2, gqa, {LOW}, gradient=[2, 1])))")
        y, _ = stack(x, recompute=recompute)
        y.sin().sum().backward()
        found.append([y.detach(), *(p.grad for p in stack.parameters())])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (f"loop(2, gru, {LOW})", "continues from the pass before of the loop around it, and no loop is around: write"),
        ('loop(2, gru, inject="add", gradient=[1])', "one number for each pass of the loop around it, and no loop is"),
        ('loop(3, loop(2, gru, inject="add", gradient=[1, 2]))', r"gradient=\[1, 2\] .* around it, which makes 3"),
    ],
)
def test_a_level_without_its_loop_is_refused(pattern, message):
    with pytest.raises(zoo.UsageError, match=message):
        zoo.create_backbone(pattern, d_model=D)


# ---- leaving a loop


def probabilities(step, passes):
    """(n, B, T) probability to leave after each pass, written out as in Ouro's section 3.2."""
    stays, p = 1.0, []
    for i, h in enumerate(passes):
        leaves = torch.sigmoid(h @ step.halting.weight[0] + step.halting.bias)
        p.append(stays * leaves if i < len(passes) - 1 else stays * torch.ones_like(leaves))
        stays = stays * (1 - leaves)
    return torch.stack(p)


@pytest.mark.parametrize("lengths", [None, [9, 4]])
def test_training_weighs_the_passes(lengths, x):
    step, f = loop_of("exit=0.7, entropy_loss=0.2, depth_loss=0.3", n=4)
    context = Context(lengths=None if lengths is None else torch.tensor(lengths))
    passes = [f(x)]
    for _ in range(3):
        passes.append(f(passes[-1]))
    p = probabilities(step, passes)
    close(p.sum(0), torch.ones_like(p[0]))
    valid = torch.ones(2, 9, dtype=torch.bool) if lengths is None else torch.arange(9) < context.lengths[:, None]
    y, _ = step(x, None, context)
    close(y[valid], sum(q[..., None] * h for q, h in zip(p, passes, strict=True))[valid])
    entropy, depth = -(p * p.log()).sum(0)[valid].mean(), sum((i + 1) * p[i] for i in range(4))[valid].mean()
    (loss,) = context.losses
    close(loss, -0.2 * entropy + 0.3 * depth)
    close(context.metrics["loop_0_depth"], depth)


def test_the_mean_of_the_passes_has_the_mean_of_their_logits(x):
    """As Ouro's `compute_expected_logits`: head(sum p h) = sum p head(h), where passes end in the norm."""
    step, f = loop_of('exit=0.9, norm="rmsnorm"')
    head = torch.randn(VOCAB, D, dtype=x.dtype)
    passes, h = [], x
    for _ in range(3):
        h = rms(f(h), step.norm.weight)
        passes.append(h)
    logits = sum(q[..., None] * (h @ head.T) for q, h in zip(probabilities(step, passes), passes, strict=True))
    close(step(x, None, Context())[0] @ head.T, logits)


def early(step, x):
    """Outputs, and passes of each token, as the docstring of `LoopStep` says it, with word by word freezing."""
    h, left, stays = x, torch.zeros(x.shape[:2], dtype=torch.bool), 1.0
    depth = torch.zeros(x.shape[:2], dtype=x.dtype)
    for i in range(step.count):
        y = u = h if i == 0 else step.inject(h, x)
        for word in step.body.steps:
            y = torch.where(left[..., None], u, word(y, None, Context())[0])
        h, depth = torch.where(left[..., None], h, y), depth + ~left
        stays = stays * (1 - torch.sigmoid(h @ step.halting.weight[0] + step.halting.bias))
        left = left | (1 - stays >= step.options.exit)
    return h, depth


@pytest.mark.parametrize("options", ["exit=0.6", 'inject="add", exit=0.8'])
def test_evaluation_leaves_at_the_first_pass_that_is_probable_enough(options, x):
    step, _ = loop_of(options, n=5)
    step.halting.weight.data *= 20
    expected, depth = early(step.eval(), x)
    assert len(depth.unique()) > 2
    context = Context()
    y, states = step(x, None, context)
    close(y, expected)
    assert context.metrics["loop_0_depth"].item() == pytest.approx(depth.mean().item(), rel=1e-6)
    assert not context.losses
    for state in states:  # every pass holds every token
        assert state[0][0].length.tolist() == [9, 9]


def test_a_number_of_one_runs_every_pass(x):
    step, f = loop_of("exit=1.0")
    context = Context()
    close(step.eval()(x, None, context)[0], f(f(f(x))))
    assert context.metrics["loop_0_depth"] == 3


def test_words_without_a_state_do_not_run_where_all_have_left(x):
    stack = backbone("loop(6, gqa swiglu rwkv_channel_mix, exit=0.5)").eval()
    (step,) = stack.steps
    step.halting.bias.data.fill_(5.0)
    called = {"gqa": 0, "swiglu": 0, "rwkv_channel_mix": 0}
    for mixer in stack.mixers():
        mixer.register_forward_hook(lambda m, *_: called.update({m.name: called[m.name] + 1}))
    _, state = stack(x)
    assert called == {"gqa": 6, "swiglu": 1, "rwkv_channel_mix": 6}
    stack.step(x[:, 0], state)
    assert called == {"gqa": 12, "swiglu": 2, "rwkv_channel_mix": 12}


# ---- what it costs, and where its words are


def test_weights_are_counted_once_and_work_as_often_as_it_runs():
    alone, looped = zoo.create_backbone(BODY, d_model=D), zoo.create_backbone(f"loop(4, {BODY})", d_model=D)
    assert looped.n_parameters() == alone.n_parameters()
    assert looped.flops_per_token(20) == 4 * alone.flops_per_token(20)
    assert looped.state_bytes(2, 20) == 4 * alone.state_bytes(2, 20) == tree_bytes(looped.init_state(2, capacity=20))
    assert [m.name for m in looped.mixers()] == ["gqa", "swiglu"]
    model = zoo.create_model(f"loop(4, {BODY})", d_model=D, vocab_size=VOCAB)
    assert model.state_bytes(1, 20) == tree_bytes(model.init_state(1, capacity=20))


@pytest.mark.parametrize("residual", ["plain", "mhc(streams=3)"])
@pytest.mark.parametrize(
    "options", ["", 'inject="concat", exit=1.0', 'inject="concat", start="zeros"', 'inject="gated", gate=True']
)
def test_flops_are_counted(options, residual):
    body = 'gqa(backend="reference") swiglu'
    stack = zoo.create_backbone(f"loop(3, {body}{', ' * bool(options)}{options})", d_model=D, residual=residual)
    assert counted_flops(stack) == stack.flops_per_token(5)


def test_words_know_the_depth_of_the_passes_written_out(monkeypatch):
    _, places = places_of(monkeypatch, "lstm loop(4, gqa swiglu gqa) swiglu lstm loop(2, loop(3, gru))")
    assert [p.layer for p in places] == [0, 1, 1, 2, 8, 9, 10]
    assert {p.n_layers for p in places} == {16}


def test_losses_of_the_passes_are_averaged(x):
    """A router in a loop counts as one, as in a recursive model."""
    stack = backbone("loop(3, moe(n_experts=4, top_k=2))")
    context, by_hand = Context(), losses_by_hand(stack.steps[0].body, x, 3)
    stack(x, None, context)
    assert len(by_hand) == 3
    close(sum(context.losses), sum(by_hand) / 3)


def test_streams_pass_through_a_loop(x):
    stack = backbone(f'loop(2, {BODY}, inject="concat", exit=0.5)', residual="hyper_connections(streams=3)")
    stream = stack.residual.widen(x)
    (step,) = stack.steps
    context = admit("backbone", None, 2, 9, x.device)
    first = step._pass(0, stream, stream, None, context, None, False, stream)[0]
    second = step._pass(1, first, stream, None, context, None, False)[0]
    p = torch.sigmoid(first.mean(2) @ step.halting.weight[0] + step.halting.bias)[..., None, None]
    close(stack(x)[0], (p * first + (1 - p) * second).mean(2))


def test_nodes_are_listed_with_their_options(capsys):
    with pytest.raises(SystemExit) as end:
        app(["list", "nodes"])
    assert end.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("loop(n, body) ") for line in lines)
    named = [entry["name"] for entry in listing("nodes", "loop(..., *")]
    assert named == [f"loop(..., {option}=)" for option in LoopOptions.model_fields]
    assert all(entry["about"] for entry in listing("nodes"))


# ---- as part of models

PATTERN = 'short_conv loop(3, gqa shortcut(swiglu, min_gru swiglu), inject="concat", gate=True, exit=0.6) swiglu'


def model_of(pattern: str = PATTERN, **options):
    torch.manual_seed(0)
    return zoo.create_model(pattern, **{"d_model": D, "vocab_size": VOCAB, **options})


def test_generation_is_the_pass_over_the_whole():
    model = model_of().double()
    model.backbone.steps[1].halting.weight.data *= 50
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8, 9]]
    for prompt, row in zip(prompts, model.generate(prompts, max_new_tokens=6, prefill_chunk=2), strict=True):
        context = Context()
        logits, _ = model.eval()(row[None, :-1], None, context)
        assert torch.equal(logits[0, len(prompt) - 1 :].argmax(-1), row[len(prompt) :])
        assert 1 < context.metrics["loop_1_depth"] < 3


@pytest.mark.parametrize("pattern", [PATTERN, 'loop(3, gqa swiglu, inject="add", gradient=2)'])
def test_recomputed_activations_give_the_same_gradients(pattern):
    found = []
    for recompute in (False, True):
        model = model_of(pattern)
        found.append(gradients(model, recompute=recompute))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
    parts = model.backbone.recomputed_parts()
    assert len(parts) == (4 if pattern == PATTERN else 2)
    assert parts[-1] is (model.backbone.steps[-1] if pattern == PATTERN else model.backbone.steps[0].body.steps[-1])


def test_a_word_in_a_loop_is_swapped():
    model = model_of("gqa loop(2, gqa swiglu, gate=True) gqa")
    with torch.no_grad():
        model.backbone.steps[1].gates += 1.0
    new = zoo.swap(model, {"gqa": "mla"}, layers=[1])
    assert new.config.pattern == "gqa loop(2, mla swiglu, gate=True) gqa"
    fresh = new.swapped.fresh
    assert fresh
    assert all(name.startswith("backbone.steps.1.body.steps.0.mixers.0.") for name in fresh)
    assert torch.equal(new.backbone.steps[1].gates, model.backbone.steps[1].gates)


def test_another_number_of_passes_has_the_same_weights():
    few, many = model_of('loop(2, gqa swiglu, inject="add")'), model_of('loop(8, gqa swiglu, inject="add")')
    many.load_state_dict(few.state_dict())
    assert many.flops_per_token(4) > 3 * few.flops_per_token(4)


def test_a_loop_is_saved_and_loaded(tmp_path):
    model = model_of()
    zoo.save(model, tmp_path / "model")
    again = zoo.load(tmp_path / "model")
    tokens = torch.arange(10).view(2, 5)
    assert torch.equal(model(tokens)[0], again.train()(tokens)[0])
    assert again.config == model.config


def test_a_loop_in_a_recursive_model():
    model = model_of(
        'loop(2, mha swiglu, inject="add", exit=0.5)',
        causal=False,
        placement="post",
        recursion={"cycles": 2},
        max_len=6,
    )
    context = Context()
    thought = model.think(torch.arange(6)[None], None, context)
    assert len(context.losses) == model.recursion.updates + 1
    (model.logits(thought.hidden).sum() + sum(context.losses)).backward()
    assert model.backbone.steps[0].halting.weight.grad.any()
    assert "loop_0_depth" in context.metrics


def test_no_causal_model_has_a_state():
    stack = zoo.create_backbone("loop(2, mha swiglu, exit=0.5)", d_model=D, causal=False)
    for _ in range(2):
        y, state = stack(torch.randn(2, 5, D))
        assert y.shape == (2, 5, D)
        assert not tree_leaves(state)
        stack.eval()


@pytest.mark.parametrize("name", ["loop", "shortcut"])
def test_no_mixer_has_the_name_of_a_node(name):
    with pytest.raises(
        zoo.UsageError, match=rf"The mixer '{name}'.* is refused: its name is that of a node of"
    ) as error:
        register(name)(type("Mine", (type(zoo.create_mixer("gru", D)),), {}))
    assert "\n" not in str(error.value)
    assert name not in zoo.list_mixers()
