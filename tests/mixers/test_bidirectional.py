"""The wrapper against a flip by hand, and torch's own bidirectional LSTM."""

import pytest
import torch
from torch import nn

import zoo
from zoo.pattern import from_data, parse, to_data, to_text
from zoo.protocol import Context, Mixer, Place, mixers, register

X = torch.randn(2, 10, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("combine", ["sum", "mean", "concat"])
@pytest.mark.parametrize("tie_weights", [False, True])
@pytest.mark.parametrize("inner", ["mamba2(d_state=8)", "gated_deltanet", "lstm", "short_conv"])
def test_equals_a_flip_by_hand(inner, tie_weights, combine):
    mixer = zoo.create_mixer(f'bidirectional({inner}, combine="{combine}", tie_weights={tie_weights})', 16)
    assert (mixer.inner is mixer.mirrored) is tie_weights
    forward, backward = mixer.inner(X)[0], mixer.mirrored(X.flip(1))[0].flip(1)
    expected = {
        "sum": lambda: forward + backward,
        "mean": lambda: (forward + backward) / 2,
        "concat": lambda: mixer.out_proj(torch.cat([forward, backward], -1)),
    }[combine]()
    torch.testing.assert_close(mixer(X)[0], expected)


def test_equals_torch_bidirectional_lstm():
    theirs = nn.LSTM(16, 16, batch_first=True, bidirectional=True)
    mixer = zoo.create_mixer('bidirectional(lstm, combine="concat")', 16)
    weights = theirs.state_dict()
    mixer.inner.load_state_dict({k: v for k, v in weights.items() if not k.endswith("_reverse")})
    reverse = {k.removesuffix("_reverse"): v for k, v in weights.items() if k.endswith("_reverse")}
    mixer.mirrored.load_state_dict(reverse)
    nn.init.eye_(mixer.out_proj.weight)
    torch.testing.assert_close(mixer(X)[0], theirs(X)[0][..., :16])


@pytest.mark.parametrize("inner", ["mamba2(d_state=8)", "lstm", "short_conv"])
def test_padding_and_documents_are_reversed_in_place(inner):
    mixer = zoo.create_mixer(f"bidirectional({inner})", 16)
    lengths, resets = torch.tensor([7, 10]), torch.zeros(2, 10, dtype=torch.bool)
    resets[0, 3] = resets[1, 0] = resets[1, 9] = True
    y, _ = mixer(X, None, Context(lengths=lengths, resets=resets))
    for row, a, b in ((0, 0, 3), (0, 3, 7), (1, 0, 9), (1, 9, 10)):
        torch.testing.assert_close(y[row, a:b], mixer(X[row : row + 1, a:b])[0][0])


class Clock(Mixer):
    """Adds up the time that has passed, and leaves word of it in the context."""

    class Config(zoo.protocol.Options):
        pass

    def init_state(self, batch_size, *, capacity=None, device=None, dtype=None):
        return torch.zeros(batch_size)

    def forward(self, x, state=None, context=None):
        passed = context.timespans.clone()
        context.shared["passed"] = context.shared.get("passed", 0) + passed
        context.metrics["first"] = passed[:, 0].sum()
        context.losses.append(passed.sum())
        return passed[..., None].expand_as(x), state

    def flops_per_token(self, context_length):
        return 0


def test_context_goes_both_ways():
    register("test_clock")(Clock)
    try:
        mixer = zoo.create_mixer("bidirectional(test_clock)", 16)
    finally:
        del mixers._classes["test_clock"]
    spans = torch.tensor([[5.0, 2, 3, 4], [6, 7, 8, 9]])
    resets = torch.tensor([[False, False, True, False]] * 2)
    lengths = torch.tensor([4, 3])
    context = Context(lengths=lengths, resets=resets, timespans=spans)
    y, _ = mixer(torch.zeros(2, 4, 16), None, context)
    # each direction reads the time since the step it came from; 1 where it came from none
    assert (y[..., 0] - spans)[0].tolist() == [2, 1, 4, 1]
    assert (y[..., 0] - spans)[1, :3].tolist() == [7, 1, 1]
    assert len(context.losses) == 2
    assert set(context.shared) == {"passed", "mirrored.passed"}
    mixer(torch.zeros(2, 4, 16), None, context)
    assert torch.equal(context.shared["passed"], 2 * spans)
    assert context.shared["mirrored.passed"][0].tolist() == [2, 8, 2, 4]
    assert set(context.metrics) == {"first", "mirrored.first"}


def test_patterns_with_it_are_read_and_written():
    text = '2*(bidirectional(mamba2(d_state=16), combine="mean", placement="sandwich") mlp)'
    assert to_text(parse(text)) == text
    assert from_data(to_data(parse(text))) == parse(text)
    assert zoo.create_mixer({"name": "bidirectional", "inner": {"name": "lstm", "d_hidden": 8}}, 16).inner.d_hidden == 8
    assert "bidirectional" not in zoo.list_mixers()


def test_attention_inside_reads_left_to_right():
    mixer = zoo.create_mixer("bidirectional(mha)", 16, place=Place(causal=False))
    assert mixer.inner.causal
    assert not mixer.causal


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("bidirectional(swiglu)", "swiglu does not mix along time: write swiglu alone"),
        ("bidirectional(bidirectional(lstm))", "bidirectional sees both sides already: write bidirectional alone"),
        ('bidirectional(lstm(placement="post"))', "placement belongs to the whole step: give it to bidirectional"),
        ("bidirectional", "bidirectional needs 'inner', which was not given"),
    ],
)
def test_what_it_does_not_wrap(word, message):
    with pytest.raises(zoo.UsageError) as error:
        zoo.create_mixer(word, 16)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_it_has_no_state_and_no_step():
    mixer = zoo.create_mixer("bidirectional(lstm)", 16)
    assert mixer.init_state(2) == mixer(X)[1] == ()
    with pytest.raises(zoo.UsageError, match=r"bidirectional\(lstm\) cannot run step by step"):
        mixer.step(X[:, 0], ())
