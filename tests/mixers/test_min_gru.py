"""minGRU against the paper: the recurrence written out, positive candidates, sizes."""

import pytest
import torch

import zoo


def plain(mixer, x):
    """The equations, one step at a time, for x (T, D)."""
    h, outputs = x.new_zeros(mixer.d_hidden), []
    for x_t in x:
        z, c = torch.sigmoid(mixer.linear_z(x_t)), mixer.linear_h(x_t)
        if mixer.config.positive:
            c = torch.where(c >= 0, c + 0.5, torch.sigmoid(c))
        h = (1 - z) * h + z * c
        outputs.append(h if mixer.out_proj is None else mixer.out_proj(h))
    return torch.stack(outputs)


@pytest.mark.parametrize("options", zoo.protocol.mixers["min_gru"].law_cases(), ids=str)
def test_equals_the_paper_written_out(options):
    mixer = zoo.create_mixer("min_gru", 16, **options).double()
    x = torch.randn(2, 40, 16, dtype=torch.float64)
    y, state = mixer(x)
    torch.testing.assert_close(y, torch.stack([plain(mixer, row) for row in x]))
    if mixer.out_proj is None:
        torch.testing.assert_close(state.h, y[:, -1])


def test_states_stay_positive_and_bounded_by_the_candidates():
    mixer = zoo.create_mixer("min_gru", 16)
    x = 100 * torch.randn(2, 300, 16)
    y, _ = mixer(x)
    highest = mixer.linear_h(x).clamp(min=0.0).amax(1, keepdim=True) + 0.5
    assert (y >= 0).all()
    assert (y <= highest * (1 + 1e-6)).all()


def test_what_a_wide_open_gate_leaves_of_the_past():
    """1 - z is taken as sigmoid(-v): the difference itself would round to 0."""
    mixer = zoo.create_mixer("min_gru(positive=False)", 16)
    with torch.no_grad():
        mixer.linear_z.weight.zero_()
        mixer.linear_z.bias.fill_(40.0)
        mixer.linear_h.bias.zero_()
    x = torch.randn(1, 2, 16)
    x[:, 1] = 0
    y, _ = mixer(x)
    torch.testing.assert_close(y[:, 1], torch.sigmoid(torch.tensor(-40.0)) * y[:, 0], rtol=1e-6, atol=0)


def test_sizes():
    assert sum(p.numel() for p in zoo.create_mixer("min_gru", 16).parameters()) == 2 * (16 * 16 + 16)
    wide = zoo.create_mixer("min_gru(expand=2.5)", 16)
    assert wide.d_hidden == 40
    assert wide(torch.randn(2, 5, 16))[0].shape == (2, 5, 16)
    with pytest.raises(zoo.UsageError, match=r"= 20\.8 is not allowed"):
        zoo.create_mixer("min_gru(expand=1.3)", 16)
