"""Recursive models: the recursion by hand, where gradients stop, cutting the thinking anywhere."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import zoo
from zoo.models.recursive import RecursiveModel, RecursiveState
from zoo.protocol import Context

L, D, V = 6, 16, 7


def model(pattern="gqa(rope=False) swiglu", **options):
    torch.manual_seed(0)
    recursion = {"cycles": 2, "updates": 3, **options.pop("recursion", {})}
    defaults = {"d_model": D, "vocab_size": V, "causal": False, "placement": "post", "norm": "rmsnorm_plain"}
    made = zoo.create_model(pattern, **{**defaults, "recursion": recursion, **options}).double()
    for p in made.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return made


@pytest.fixture
def tokens():
    return torch.randint(V, (3, L), generator=torch.Generator().manual_seed(1))


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("latents", [0, 1, 3])
def test_one_supervision_step_by_hand(latents, tokens):
    m = model(recursion={"latents": latents})
    f = lambda h: m.backbone(h)[0]  # noqa: E731
    x = m.embedding(tokens)
    y = m.answer_init.expand(3, L, D)
    z = [latent.expand(3, L, D) for latent in m.latent_init[:latents]]
    for _ in range(2):
        for i in range(3):
            if latents:
                z[i % latents] = f(sum(z) + y + x)
            else:
                y = f(y + x)
        y = f(y + sum(z))
    logits, state = m(tokens)
    close(logits, y @ m.head.weight.T)
    close(state.answer, y)
    close(state.latents, torch.stack(z, 1) if z else torch.empty(3, 0, L, D).double())
    thought = m.think(tokens)
    halting = m.halting(y[:, 0])
    torch.testing.assert_close(torch.stack([thought.halt, thought.go_on], 1), halting)


def test_two_levels_by_hand(tokens):
    m = model(recursion={"outer": "mlp", "gradient": "step"})
    x, y, z = m.embedding(tokens), m.answer_init.expand(3, L, D), m.latent_init[:1].expand(3, L, D)
    for _ in range(2):
        for _ in range(3):
            z = m.backbone(z + y + x)[0]
        y = m.outer(y + z)[0]
    close(m(tokens)[0], y @ m.head.weight.T)


def test_gradients_pass_through_the_last_cycle_only(tokens):
    for gradient in ("cycle", "step"):
        m = model(recursion={"gradient": gradient})
        m(tokens)[0].square().sum().backward()
        actual = [p.grad.clone() for p in m.parameters() if p.grad is not None]
        m.zero_grad()
        x = m.embedding(tokens)
        with torch.no_grad():
            state = RecursiveState(m.answer_init.expand(3, L, D), m.latent_init.expand(3, 1, L, D))
            y, z = state.answer, state.latents[:, 0]
            for _ in range(3):
                z = m.backbone(z + y + x)[0]
            y = m.backbone(y + z)[0]
        for i in range(3):
            with torch.set_grad_enabled(gradient == "cycle" or i == 2):
                z = m.backbone(z + y + x)[0]
        y = m.backbone(y + z)[0]
        (y @ m.head.weight.T).square().sum().backward()
        expected = [p.grad for p in m.parameters() if p.grad is not None]
        assert len(actual) == len(expected)
        for a, b in zip(actual, expected, strict=True):
            close(a, b)


def test_autocast_keeps_the_gradients_of_the_last_cycle(tokens):
    """Casts cached while nothing was learned must not cut the weights off."""
    m = model().float()
    gradients = []
    for enabled in (False, True):
        m.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            logits, _ = m(tokens)
        logits.float().square().sum().backward()
        gradients.append([p.grad.clone() for p in m.backbone.parameters()])
    for plain, cast in zip(*gradients, strict=True):
        assert (plain - cast).norm() < 0.1 * plain.norm()


PATTERNS = (
    "gqa(rope=False) swiglu",
    'token_mlp(length=9, norm_axis="time") swiglu',
    "bidirectional(mamba2(d_state=8)) swiglu",
    "mha moe(n_experts=4, top_k=2)",
)
OPTIONS: dict[str, dict] = {
    "trm": {},
    "single": {"recursion": {"latents": 0}},
    "six": {"recursion": {"latents": 6, "updates": 7}},
    "hrm": {"recursion": {"outer": "mlp", "gradient": "step"}},
    "places": {"recursion": {"prefix": 2, "n_puzzles": 3, "puzzle_width": 20}},
    "norms within": {"placement": "pre", "norm": "rmsnorm", "recursion": {"prefix": 1, "n_puzzles": 3}},
    "learned": {"positions": "learned", "max_len": 9, "embedding_scale": 4.0},
}
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5}


@pytest.fixture(params=PATTERNS, ids=lambda p: p.split("(")[0].split()[0])
def pattern(request):
    return request.param


@pytest.fixture(params=OPTIONS, ids=lambda name: name.replace(" ", "-"))
def options(request):
    return {"recursion": {}, **OPTIONS[request.param]}


def same(a, b, dtype):
    assert a.dtype == dtype
    torch.testing.assert_close(a, b, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.crossed("dtype", "pattern, options")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@torch.no_grad()
def test_laws_of_thinking(pattern, options, tokens, dtype):
    """Cut anywhere it goes on the same; no row sees another; the state is as large as it is said to be."""
    m = model(pattern, **options).to(dtype).eval()
    whole, states = [], [m.init_state(3, L)]
    for _ in range(4):
        logits, state = m(tokens, zoo.fork(states[-1]))
        whole.append(logits)
        states.append(state)
    assert torch.equal(m(tokens)[0], whole[0])  # no state is the state before any thinking
    for cut in range(1, 4):
        state = RecursiveState(*(t.clone() for t in states[cut]))
        for later in whole[cut:]:
            logits, state = m(tokens, state)
            same(logits, later, dtype)
        for mine, theirs in zip(state, states[-1], strict=True):
            same(mine, theirs, dtype)
    for row in range(3):
        logits, state = m(tokens[row : row + 1], zoo.select(states[2], [row]))
        same(logits, whole[2][row : row + 1], dtype)
    assert m.state_bytes(3, L, dtype) == sum(t.nbytes for t in states[-1])


@torch.no_grad()
def test_ragged_puzzles(pattern, options, tokens):
    m = model(pattern, **options).eval()
    lengths = torch.tensor([4, L, 1])
    if "norm_axis" in pattern:
        with pytest.raises(zoo.UsageError, match='norm_axis="time" norms whole rows: give neither lengths nor resets'):
            m.think(tokens, context=Context(lengths=lengths))
        return
    state = alone = None
    for _ in range(2):
        thought = m.think(tokens, state, Context(lengths=lengths))
        alone = [
            m.think(tokens[i : i + 1, :n], None if alone is None else alone[i].state)
            for i, n in enumerate(lengths.tolist())
        ]
        for i, n in enumerate(lengths.tolist()):
            same(thought.hidden[i, :n], alone[i].hidden[0], torch.float64)
            torch.testing.assert_close(thought.halt[i], alone[i].halt[0])
        state = thought.state


@pytest.mark.parametrize("pattern", [*PATTERNS, 'mha moe(n_experts=4, top_k=2, balance="both")'])
def test_recomputing_changes_nothing(pattern, options, tokens):
    """Neither values, nor gradients, nor auxiliary losses, nor what mixers count."""
    results = []
    for recompute in (False, True):
        m = model(pattern, **options).train()
        m.recompute = recompute
        context = Context()
        thought = m.think(tokens, context=context)
        n_losses = len(context.losses)
        loss = thought.hidden.square().sum() + thought.halt.double().sum() + sum(context.losses)
        loss.backward()
        assert len(context.losses) == n_losses
        gradients = [p.grad for p in m.parameters() if p.grad is not None]
        results.append([loss, *context.metrics.values(), *thought.state, *gradients, *m.buffers()])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_every_parameter_learns(pattern, options, tokens):
    m = model(pattern, **options).train()
    context = Context()
    thought = m.think(tokens, context=context, puzzles=torch.tensor([0, 1, 2]) if m.puzzles is not None else None)
    outputs = m.logits(thought.hidden), thought.halt, thought.go_on
    (sum(t.double().pow(2).sum() for t in outputs) + sum(context.losses)).backward()
    for name, p in m.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
        assert p.grad.any(), name
    assert not any(t.requires_grad for t in thought.state)


def test_auxiliary_losses_are_those_of_one_application(tokens):
    """However often the network is applied, of a cycle or of one step."""
    for gradient, first in (("cycle", 0), ("step", 2)):
        m = model("moe(n_experts=4, top_k=2)", recursion={"cycles": 1, "gradient": gradient}).train()
        context = Context()
        m.think(tokens, context=context)
        x, y, z = m.embedding(tokens), m.answer_init.expand(3, L, D), m.latent_init[0].expand(3, L, D)
        losses = []
        for i in range(4):
            own = Context()
            h = m.backbone(z + y + x if i < 3 else y + z, None, own)[0]
            z, y = (h, y) if i < 3 else (z, h)
            losses += own.losses
        expected = torch.stack(losses[first:]).mean()
        torch.testing.assert_close(torch.stack(context.losses).sum(), expected)


def test_words_keep_their_own_inits():
    """Where their matrices are more than projections: state matrices, polarities, decays."""
    for word in ("mamba", "ltc", "rwkv7", "slstm"):
        torch.manual_seed(0)
        plain = zoo.create_model(f"bidirectional({word})", d_model=D, vocab_size=V, causal=False)
        torch.manual_seed(0)
        recursive = zoo.create_model(f"bidirectional({word})", d_model=D, vocab_size=V, causal=False, recursion={})
        for a, b in zip(plain.backbone.parameters(), recursive.backbone.parameters(), strict=True):
            assert torch.equal(a, b), word


def test_projections_are_initialised_through_the_contract():
    """Those of any mixer whose matrices are projections, a user's own too; truncated at two deviations."""

    class Own(zoo.Mixer):
        name, kind, causal = "own", "channel", False

        def __init__(self, d_model):
            super().__init__(d_model, None)
            self.first, self.second = torch.nn.Linear(d_model, 40), torch.nn.Linear(40, d_model)
            torch.nn.init.constant_(self.first.weight, 9.0)

        init_state = forward = flops_per_token = None

    own, seen = Own(D), []
    own.init_projections(seen.append)
    assert [w.shape for w in seen] == [(40, D), (D, 40)]
    own.table = torch.nn.Parameter(torch.zeros(3, D))  # a matrix that is no projection: all keep their inits
    own.init_projections(lambda weight: pytest.fail("initialised"))
    for word in ("mha(qk_norm=True)", "mla", "token_mlp(length=6)", "swiglu", "mlp"):
        for mixer in zoo.create_model(word, d_model=D, vocab_size=V, causal=False, recursion={}).mixers():
            for weight in (m.weight.detach() for m in mixer.modules() if isinstance(m, torch.nn.Linear)):
                assert weight.abs().max() < 2.28 * weight.shape[1] ** -0.5, word
                assert weight.std().item() * weight.shape[1] ** 0.5 == pytest.approx(1, abs=0.2), word


def test_puzzles_have_places_of_their_own(tokens):
    m = model(recursion={"prefix": 2, "n_puzzles": 3, "puzzle_width": 20})
    assert m.puzzles.weight.shape == (3, 20)
    numbers = torch.tensor([2, 0, 1])
    thought = m.think(tokens, puzzles=numbers)
    assert thought.hidden.shape == (3, L, D)
    assert thought.state.answer.shape == (3, L + 2, D)
    close(m.think(tokens).hidden[1], thought.hidden[1])
    assert (m.think(tokens).hidden[0] - thought.hidden[0]).abs().max() > 1e-6


def test_costs():
    m = model(recursion={"prefix": 2})
    assert m.state_bytes(3, L) == 2 * 3 * (L + 2) * D * 4
    assert sum(t.numel() * 4 for t in m.init_state(3, L)) == m.state_bytes(3, L)
    inner = sum(mixer.flops_per_token(L + 2) for mixer in m.backbone.mixers())
    assert m.flops_per_token(L) == 2 * 4 * inner * (L + 2) // L + 2 * D * V


@pytest.mark.parametrize("residual", ["plain", "mhc"])
@torch.no_grad()
def test_flops_are_those_counted(residual, tokens):
    m = model("token_mlp(length=8) swiglu", residual=residual, recursion={"prefix": 2, "outer": "swiglu"})
    with FlopCounterMode(display=False) as counter:
        m(tokens)
    halting = 2 * 3 * 2 * D  # for each row, not for each token
    assert m.flops_per_token(L) == (counter.get_total_flops() - halting) // (3 * L)


def test_random_starts_are_drawn_for_every_place():
    m = model()
    a, b = (m.init_state(2, L, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    assert abs(a.answer.std() - 1) < 0.2
    assert not torch.equal(a.answer, b.answer)
    assert not torch.equal(a.answer[0], a.answer[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"causal": True}, "reads whole puzzles: set model.causal=false"),
        ({"recursion": {"cycle": 2}}, "Did you mean 'cycles'?"),
        ({"recursion": {"prefix": 1, "puzzle_width": 99}}, "puzzle_width=99 is more than prefix"),
        ({"positions": "sinusoidal"}, 'takes positions="learned", or those of its attention words'),
        ({"dropout": 0.1}, "takes no dropout: leave model.dropout out"),
        ({"embedding_norm": True}, "takes no embedding_norm"),
        ({"time_feature": True}, "takes no time_feature"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(zoo.UsageError, match=message.replace("?", r"\?")) as refusal:
        model(**options)
    assert "\n" not in str(refusal.value)


def test_wrong_passes_are_refused_in_one_line(tokens):
    m = model(positions="learned", max_len=8, recursion={"prefix": 2})
    assert m.init_state(3).answer.shape == (3, 8, D)
    for refused, message in (
        (lambda: m.think(tokens, context=Context(resets=torch.zeros(3, L, dtype=torch.bool))), "give no resets"),
        (lambda: m(tokens, m.init_state(3, L - 1)), r"answer is \(3, 7, 16\) float64, expected \(3, 8, 16\)"),
        (lambda: m(tokens.repeat(1, 2)), "14 places and tokens are more than max_len=8"),
        (lambda: model().init_state(3), "give init_state a length"),
    ):
        with pytest.raises(zoo.UsageError, match=message):
            refused()


def test_it_is_made_by_its_options():
    assert isinstance(zoo.create_model("mlp", d_model=D, vocab_size=V, causal=False, recursion={}), RecursiveModel)
