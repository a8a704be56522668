"""The GRU against torch.nn.GRU with the same weights."""

import pytest
import torch
from torch import nn

import zoo
from zoo.protocol import Context

FORMS = ["auto", "reference", "fused"]


def pair(backend, bias=True, d_model=16):
    theirs = nn.GRU(d_model, d_model, batch_first=True, bias=bias).double()
    ours = zoo.create_mixer("gru", d_model, backend=backend, bias=bias).double()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("backend", FORMS)
def test_equals_torch(backend, bias):
    ours, theirs = pair(backend, bias)
    x = torch.randn(3, 20, 16, dtype=torch.float64)
    (y, state), (y_theirs, h) = ours(x), theirs(x)
    torch.testing.assert_close((y, state.h), (y_theirs, h[0]))
    later = torch.randn(3, 7, 16, dtype=torch.float64)
    torch.testing.assert_close(ours(later, state)[0], theirs(later, h)[0])
    for (name, p), (_, q) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        ours_p, theirs_q = (torch.autograd.grad(m(x)[0].square().sum(), w) for m, w in ((ours, p), (theirs, q)))
        torch.testing.assert_close(ours_p, theirs_q, msg=name)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("backend", FORMS)
def test_ragged_rows_equal_packed_sequences(backend, dtype):
    ours, theirs = (m.to(dtype) for m in pair(backend))
    x, lengths = torch.randn(4, 12, 16, dtype=dtype), torch.tensor([5, 12, 1, 7])
    packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    y_theirs, h = theirs(packed)
    y, state = ours(x, None, Context(lengths=lengths))
    torch.testing.assert_close((y, state.h), (nn.utils.rnn.pad_packed_sequence(y_theirs, True)[0], h[0]))


@pytest.mark.parametrize("backend", FORMS)
def test_a_row_of_no_steps_keeps_its_state(backend):
    ours, _ = pair(backend)
    _, state = ours(torch.randn(2, 3, 16, dtype=torch.float64))
    x, no_steps = torch.full((2, 4, 16), torch.nan, dtype=torch.float64), torch.zeros(2, dtype=torch.long)
    for resets in (None, torch.ones(2, 4, dtype=torch.bool)):
        y, after = ours(x, zoo.fork(state), Context(lengths=no_steps, resets=resets))
        assert not y.any()
        torch.testing.assert_close(after, state, rtol=0, atol=0)


@pytest.mark.parametrize("backend", FORMS)
def test_documents_equal_rows(backend):
    ours, theirs = pair(backend)
    x, resets = torch.randn(1, 11, 16, dtype=torch.float64), torch.zeros(1, 11, dtype=torch.bool)
    resets[0, [2, 3, 8]] = True
    y, state = ours(x, None, Context(resets=resets))
    alone = [theirs(x[:, a:b]) for a, b in ((0, 2), (2, 3), (3, 8), (8, 11))]
    torch.testing.assert_close(y, torch.cat([part for part, _ in alone], 1))
    torch.testing.assert_close(state.h, alone[-1][1][0])


def test_starts_as_torchs_own():
    mixer = zoo.create_mixer("gru", 16)
    assert all(0.2 < p.abs().max() <= 0.25 for p in mixer.parameters())


def test_another_width_is_projected_back():
    mixer = zoo.create_mixer("gru(d_hidden=40)", 16)
    y, state = mixer(torch.randn(2, 5, 16))
    assert y.shape == (2, 5, 16)
    assert state.h.shape == (2, 40)
    assert sum(p.numel() for p in mixer.parameters()) == 3 * 40 * (16 + 40 + 2) + 40 * 16
