"""At the door of every mixer and model: what does not fit is refused in one line; whole numbers may be of any type."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import laws
import pytest
import torch
from laws import WIDTH, Case
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

import zoo
from zoo.protocol import Context, Mixer, mixers

B, T = 3, 9
WHOLE = [torch.int32, torch.int16, torch.int8, torch.uint8]
CASES = [Case(mixers[name], mixers[name].law_cases()[0]) for name in mixers.names()]
LOOKING_AHEAD = [Case(c.mixer, c.options, causal=False) for c in CASES if c.mixer.kind == "sequence"]
LOOKING_AHEAD = [case for case in LOOKING_AHEAD if not case.build().causal]
EVERY = pytest.mark.parametrize("case", [*CASES, *LOOKING_AHEAD], ids=str)

MODELS = {
    "hybrid": {"pattern": "gated_deltanet swiglu gqa moe lstm swa(window=5) mlp"},
    "shortcut": {"pattern": "shortcut(moe, swiglu mla swiglu)"},
    "parallel": {"pattern": "(mamba2 | gqa) swiglu"},
    "hyper-connections": {"pattern": "cfc swiglu", "residual": "hyper_connections"},
    "bidirectional": {"pattern": "bidirectional(mamba2) swiglu", "causal": False},
    "attention that looks ahead": {"pattern": "gqa swiglu", "causal": False},
    "recursive": {"pattern": "gqa swiglu", "causal": False, "recursion": {}},
}
EVERY_MODEL = pytest.mark.parametrize("options", MODELS.values(), ids=list(MODELS))


def refused(call: Callable[[], Any], *parts: str) -> None:
    """The call ends in a `UsageError` of one line that holds `parts`."""
    with pytest.raises(zoo.UsageError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 400
    for part in parts:
        assert part in message


def contexts(batch: int, steps: int) -> list[tuple[Context, str]]:
    """Contexts that do not fit (batch, steps), with a word that the message names."""
    whole, real, last = torch.full((batch,), steps), torch.ones(batch, steps), torch.tensor([steps - 1])
    return [
        (Context(lengths=whole[:-1]), "lengths"),
        (Context(lengths=whole[:, None]), "lengths"),
        (Context(lengths=whole.double()), "lengths"),
        (Context(lengths=whole.bool()), "lengths"),
        (Context(lengths=whole.tolist()), "lengths"),  # type: ignore[arg-type]
        (Context(lengths=whole - steps - 1), "length"),
        (Context(lengths=whole + 1), "length"),
        (Context(resets=real), "resets"),
        (Context(resets=real.bool()[:, 1:]), "resets"),
        (Context(resets=real.bool()[1:]), "resets"),
        (Context(resets=real.long()), "resets"),
        (Context(timespans=real[:, 1:]), "timespans"),
        (Context(timespans=real[0]), "timespans"),
        (Context(timespans=real.bool()), "timespans"),
        (Context(timespans=-real), "timespans"),
        (Context(timespans=real.index_fill(1, last, torch.nan)), "NaN"),
        (Context(timespans=real.index_fill(1, last, torch.inf)), "timespans"),
        ({"lengths": whole}, "context"),  # type: ignore[list-item]
    ]


def states(mixer: Mixer) -> list[Any]:
    """States that are not of this mixer, or not of B rows."""
    leaf = torch.zeros(B, WIDTH)
    foreign = [
        zoo.create_mixer(word, WIDTH).init_state(B) for word in ("lstm", "gqa", "mamba2", "cfc", "swa(window=3)")
    ]
    wrong: list[Any] = ["state", leaf, (leaf,), (leaf, leaf), [leaf], *foreign]
    if not mixer.causal or not tree_leaves(mixer.init_state(B)):
        return wrong
    fields = range(len(mixer.init_state(B)))
    own = mixer.init_state(B)
    wider = mixer.init_state(B)
    return [
        *(state for state in wrong if type(state) is not type(own)),
        (),
        mixer.init_state(B - 1),
        mixer.init_state(1),
        mixer.init_state(B + 40),
        tuple(own),
        tree_map(lambda t: t.flatten(), wider),
        tree_map(lambda t: t[..., None], wider),
        tree_map(lambda t: t.bool(), wider),
        *(own._replace(**{own._fields[i]: "state"}) for i in fields if hasattr(own, "_fields")),
    ]


@EVERY
def test_a_mixer_refuses_states(case):
    mixer, x = case.build(torch.float32), torch.randn(B, T, WIDTH)
    for state in states(mixer):
        refused(lambda state=state: mixer(x, state), mixer.name)
        if mixer.causal:
            refused(lambda state=state: mixer.step(x[:, 0], state), mixer.name)


@pytest.mark.parametrize("case", [case for case in CASES if case.build().causal], ids=str)
def test_a_mixer_refuses_states_of_another_width(case):
    mixer, other = case.build(torch.float32), case.build(torch.float32, 2 * WIDTH)
    if tree_leaves(mixer.init_state(B)):
        refused(lambda: mixer(torch.randn(B, T, WIDTH), other.init_state(B)), mixer.name, "expected")


@EVERY
def test_a_mixer_refuses_inputs(case):
    mixer, x = case.build(torch.float32), torch.randn(B, T, WIDTH)
    for wrong in (x[:0], x[:, :0], x[0], x[..., 1:], x.long(), x[None], "x"):
        refused(lambda wrong=wrong: mixer(wrong), mixer.name, f"(B, T, {WIDTH})")
    for context, what in contexts(B, T):
        refused(lambda context=context: mixer(x, None, context), mixer.name, what)
    if mixer.causal:
        refused(lambda: mixer.step(x, mixer.init_state(B)), mixer.name)
        for context, what in contexts(B, 1):
            refused(lambda context=context: mixer.step(x[:, 0], mixer.init_state(B), context), mixer.name, what)


@EVERY
def test_a_refusal_leaves_the_state(case):
    mixer, x = case.build(torch.float32), torch.randn(B, T, WIDTH)
    if mixer.causal:
        with torch.no_grad():
            _, state = mixer(x)
            before = zoo.fork(state)
            refused(lambda: mixer(x[:1], state) if tree_leaves(state) else mixer(x[:0]))
            refused(lambda: mixer(x, state, Context(lengths=torch.tensor([1, 2, T + 1]))))
        laws.assert_close(state, before, 0.0, "the state")


@EVERY
def test_any_whole_numbers_are_lengths(case):
    mixer, x = case.build(torch.float32), torch.randn(B, T, WIDTH)
    lengths, timespans = torch.tensor([2, 0, T]), torch.ones(B, T)

    def outcome(lengths: Tensor, timespans: Tensor) -> list[Tensor]:
        inputs = [x.clone().requires_grad_(), *mixer.parameters()]
        y, state = mixer(inputs[0], None, Context(lengths=lengths, timespans=timespans))
        leaves = [leaf for leaf in tree_leaves((y, state)) if leaf.is_floating_point()]
        return [*tree_leaves((y, state)), *laws.gradients(leaves, inputs)]

    expected = outcome(lengths, timespans)
    for dtype in WHOLE[::3]:
        laws.assert_close(outcome(lengths.to(dtype), timespans.to(dtype)), expected, 0.0, f"lengths in {dtype}")


@EVERY
def test_padding_may_hold_any_timespans(case):
    mixer, x, lengths = case.build(torch.float32), torch.randn(B, T, WIDTH), torch.tensor([2, 5, T])
    padding = torch.arange(T) >= lengths[:, None]
    spans = torch.rand(B, T)
    expected = mixer(x, None, Context(lengths=lengths, timespans=spans))
    for value in (torch.nan, -1.0, torch.inf):
        got = mixer(x, None, Context(lengths=lengths, timespans=spans.masked_fill(padding, value)))
        laws.assert_close(got, expected, 0.0, f"{value} in the padding")


def model_of(options: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    return zoo.create_model({"d_model": 32, "vocab_size": 20, **options}).eval()


@EVERY_MODEL
def test_a_model_refuses_tokens(options):
    model, tokens = model_of(options), torch.randint(0, 20, (B, T))
    for wrong in (
        tokens[:0],
        tokens[:, :0],
        tokens[0],
        tokens[None],
        tokens.double(),
        tokens.bool(),
        [[1, 2]],
        "tokens",
    ):
        refused(lambda wrong=wrong: model(wrong), "tokens", "(B, T)")
    for wrong in (tokens - 20, tokens + 20, tokens.index_fill(1, torch.tensor([1]), -100)):
        refused(lambda wrong=wrong: model(wrong), "tokens", "vocab_size=20")
    for context, what in contexts(B, T):
        refused(lambda context=context: model(tokens, None, context), "model", what)


@EVERY_MODEL
def test_any_whole_numbers_are_tokens(options):
    model, tokens, lengths = model_of(options), torch.randint(0, 20, (B, T)), torch.tensor([2, 5, T])
    expected = model(tokens, None, Context(lengths=lengths))
    for dtype in WHOLE:
        got = model(tokens.to(dtype), None, Context(lengths=lengths.to(dtype)))
        laws.assert_close(got, expected, 0.0, f"tokens in {dtype}")


@EVERY_MODEL
def test_a_model_refuses_states(options):
    model, tokens = model_of(options), torch.randint(0, 20, (B, T))
    other = zoo.create_model("gru", d_model=32, vocab_size=20).init_state(B)
    wrong = ["state", torch.zeros(B, 32), (torch.zeros(B, 32),), other, zoo.create_mixer("lstm", 32).init_state(B)]
    if options.get("recursion") is not None:
        _, own = model(tokens)
        few = zoo.select(own, [0])
        wrong += [(), few, own._replace(latents=few.latents), tree_map(lambda t: t[..., 1:], own)]
        wrong += [own._replace(answer=own.answer[:, 1:]), tuple(own)]
    elif model.causal:
        _, own = model(tokens)
        wrong += [(), tuple(own), model.init_state(B - 1), own._replace(layers=own.layers[:-1])]
        wrong += [own._replace(layers=model.init_state(1).layers), own._replace(position=own.position.int())]
        before = zoo.fork(own)
        for i, layer in enumerate(own.layers):
            if tree_leaves(layer):
                layers = [*own.layers]
                layers[i] = tree_map(lambda t: t[..., None], layer)
                wrong.append(own._replace(layers=tuple(layers)))
    for state in wrong:
        with torch.no_grad():
            refused(lambda state=state: model(tokens, state))
    if model.causal:
        laws.assert_close(own, before, 0.0, "the state after refusals")
        refused(lambda: model.step(tokens, own), "(B,)")


def test_puzzles_are_looked_at():
    model = zoo.create_model(
        "gqa swiglu", d_model=32, vocab_size=20, causal=False, recursion={"prefix": 2, "n_puzzles": 4}
    )
    tokens = torch.randint(0, 20, (B, T))
    expected = model.think(tokens, puzzles=torch.tensor([0, 3, 1]))
    laws.assert_close(model.think(tokens, puzzles=torch.tensor([0, 3, 1]).int()), expected, 0.0, "int32")
    for puzzles in ([0, 4, 1], [0, -1, 1], [0, 1], [0.0, 1.0, 2.0], [[0, 1, 2]]):
        refused(lambda puzzles=puzzles: model.think(tokens, puzzles=torch.tensor(puzzles)), "puzzles")


def test_greedy_decoding_refuses_logits_that_are_no_numbers():
    model = model_of({"pattern": "gqa swiglu"})
    with torch.no_grad():
        model.embedding.weight[3] = torch.nan
    refused(lambda: model.generate([[1, 3]], max_new_tokens=2), "finite")


def test_a_graph_clamps_what_it_cannot_refuse():
    model = zoo.create_model("cfc swiglu gqa", d_model=16, vocab_size=20).eval()
    tokens = torch.randint(0, 20, (2, 6))
    compiled = torch.compile(lambda t, n: model(t, None, Context(lengths=n))[0], fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        expected = model(tokens, None, Context(lengths=torch.tensor([0, 6])))[0]
        got = compiled(tokens.int(), torch.tensor([-5, 600], dtype=torch.int32))
    laws.assert_close(got, expected, 2e-5, "clamped lengths")


def test_exchanged_mixers_are_looked_at_anew():
    model = zoo.create_model("lstm gru", d_model=16, vocab_size=20)
    tokens = torch.randint(0, 20, (2, 5))
    _, state = model(tokens)
    model(tokens, state)
    model.backbone.steps[0].mixers[0] = zoo.create_mixer("gru", 16)
    _, fresh = model(tokens)
    model(tokens, fresh)
