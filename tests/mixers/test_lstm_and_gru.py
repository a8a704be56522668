"""The LSTM and the GRU against torch.nn.LSTM and torch.nn.GRU with the same weights."""

import pytest
import torch
from torch import nn

import zoo
from zoo.mixers import _rnn
from zoo.ops.common import logged_forms
from zoo.protocol import Context

TORCHS = {"lstm": nn.LSTM, "gru": nn.GRU}
GATES = {"lstm": 4, "gru": 3}

pytestmark = pytest.mark.parametrize("word", TORCHS)
forms = pytest.mark.parametrize("backend", ["auto", "reference", "fused"])


def pair(word, backend, bias=True, d_model=16):
    theirs = TORCHS[word](d_model, d_model, batch_first=True, bias=bias).double()
    ours = zoo.create_mixer(word, d_model, backend=backend, bias=bias).double()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def leaves(state):
    """The tensors (B, H) of a state of torch's: h and c of an LSTM, h alone of a GRU."""
    return tuple(part[0] for part in (state if isinstance(state, tuple) else (state,)))


@pytest.mark.parametrize("bias", [True, False])
@forms
def test_equals_torch(word, backend, bias):
    ours, theirs = pair(word, backend, bias)
    x = torch.randn(3, 20, 16, dtype=torch.float64)
    (y, state), (y_theirs, s_theirs) = ours(x), theirs(x)
    torch.testing.assert_close((y, *state), (y_theirs, *leaves(s_theirs)))
    later = torch.randn(3, 7, 16, dtype=torch.float64)
    torch.testing.assert_close(ours(later, state)[0], theirs(later, s_theirs)[0])
    for (name, p), (_, q) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        ours_p, theirs_q = (torch.autograd.grad(m(x)[0].square().sum(), w) for m, w in ((ours, p), (theirs, q)))
        torch.testing.assert_close(ours_p, theirs_q, msg=name)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@forms
def test_ragged_rows_equal_packed_sequences(word, backend, dtype):
    ours, theirs = (m.to(dtype) for m in pair(word, backend))
    x, lengths = torch.randn(4, 12, 16, dtype=dtype), torch.tensor([5, 12, 1, 7])
    packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    y_theirs, s_theirs = theirs(packed)
    y, state = ours(x, None, Context(lengths=lengths))
    expected = nn.utils.rnn.pad_packed_sequence(y_theirs, True)[0]
    torch.testing.assert_close((y, *state), (expected, *leaves(s_theirs)))


@forms
def test_a_row_of_no_steps_keeps_its_state(word, backend):
    ours, _ = pair(word, backend)
    _, state = ours(torch.randn(2, 3, 16, dtype=torch.float64))
    x, no_steps = torch.full((2, 4, 16), torch.nan, dtype=torch.float64), torch.zeros(2, dtype=torch.long)
    for resets in (None, torch.ones(2, 4, dtype=torch.bool)):
        y, after = ours(x, zoo.fork(state), Context(lengths=no_steps, resets=resets))
        assert not y.any()
        torch.testing.assert_close(after, state, rtol=0, atol=0)


@forms
def test_documents_equal_rows(word, backend):
    ours, theirs = pair(word, backend)
    x, resets = torch.randn(1, 11, 16, dtype=torch.float64), torch.zeros(1, 11, dtype=torch.bool)
    resets[0, [2, 3, 8]] = True
    y, state = ours(x, None, Context(resets=resets))
    alone = [theirs(x[:, a:b]) for a, b in ((0, 2), (2, 3), (3, 8), (8, 11))]
    torch.testing.assert_close(y, torch.cat([part for part, _ in alone], 1))
    torch.testing.assert_close(tuple(state), leaves(alone[-1][1]))


def test_starts_as_torchs_own_but_for_open_forget_gates(word):
    plain = zoo.create_mixer(word, 16, **({"forget_bias": None} if word == "lstm" else {}))
    assert all(0.2 < p.abs().max() <= 0.25 for p in plain.parameters())
    if word == "lstm":
        for bias, options in ((1, {}), (2.5, {"forget_bias": 2.5})):
            mixer = zoo.create_mixer(word, 16, **options)
            assert (mixer.bias_ih_l0 + mixer.bias_hh_l0)[16:32].eq(bias).all()


def test_another_width_is_projected_back(word):
    mixer = zoo.create_mixer(f"{word}(d_hidden=40)", 16)
    y, state = mixer(torch.randn(2, 5, 16))
    assert y.shape == (2, 5, 16)
    assert all(leaf.shape == (2, 40) for leaf in state)
    assert sum(p.numel() for p in mixer.parameters()) == GATES[word] * 40 * (16 + 40 + 2) + 40 * 16


def test_documents_on_a_gpu_take_torchs_own_form(word, monkeypatch):
    """Steps in Python would be some launches each there."""
    ours, _ = pair(word, "auto")
    x, resets = torch.randn(2, 20, 16, dtype=torch.float64), torch.arange(20).expand(2, -1) % 7 == 3
    with logged_forms() as forms:
        expected = ours(x, None, Context(resets=resets))
        monkeypatch.setattr(_rnn, "launches", lambda x: True)
        found = ours(x, None, Context(resets=resets))
    assert forms == {word: {"reference", "fused"}}
    torch.testing.assert_close((found[0], *found[1]), (expected[0], *expected[1]))
