"""Scores of slots: every form against the definition, values and gradients, packed and ragged, cut, and refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from zoo.core.errors import UsageError
from zoo.laws import noise
from zoo.ops import linear_attention, native, slot_scores

needs_compiler = pytest.mark.skipif(native.why_not() is not None, reason=f"no kernels here: {native.why_not()}")
FORMS = ["chunked", pytest.param("compiled", marks=needs_compiler)]


def arguments(T: int, H: int = 3, K: int = 7, M: int = 5, decay: float = 1.0) -> list[Tensor]:
    """q, k, slots, log_decay and state."""
    q, k = noise(2, T, H, K), noise(2, T, H, K, seed=1)
    slots, log_decay = noise(2, T, H, M, seed=2), -decay * noise(2, T, H, M, seed=3).abs()
    return [x.float() for x in (q, k, slots, log_decay, noise(2, H, M, K, seed=4))]


def by_hand(q, k, slots, log_decay, state, scale: float) -> tuple[Tensor, Tensor]:
    outputs = []
    for t in range(q.shape[1]):
        state = log_decay[:, t, :, :, None].exp() * state + torch.einsum("bhm,bhk->bhmk", slots[:, t], k[:, t])
        outputs.append(scale * torch.einsum("bhmk,bhk->bhm", state, q[:, t]))
    return torch.stack(outputs, 1), state


def outcome(inputs: list[Tensor], dtype: torch.dtype, **options) -> list[Tensor]:
    leaves = [x.to(dtype).requires_grad_() for x in inputs]
    o, last = slot_scores(*leaves, **options)
    total = (o * torch.linspace(-1, 1, o.shape[-1])).sum() + (last * torch.linspace(-1, 1, last.shape[-1])).sum()
    return [o, last, *torch.autograd.grad(total, leaves)]


def close(values: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for value, wanted in zip(values, expected, strict=True):
        assert (value - wanted).abs().max() <= tolerance * wanted.abs().max()


def test_the_definition():
    inputs = [x.double() for x in arguments(20)]
    expected = by_hand(*inputs, scale=7**-0.5)
    torch.testing.assert_close(slot_scores(*inputs, backend="reference"), expected)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("T", [1, 16, 63, 100, 300])
def test_forms_agree(form, T):
    inputs = arguments(T)
    expected = outcome(inputs, torch.float64, backend="reference")
    close(outcome(inputs, torch.float32, backend=form), expected, 2e-5)
    if form == "chunked":
        close(outcome(inputs, torch.float64, backend=form, chunk_size=8), expected, 1e-9)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("H", "K", "M"), [(1, 1, 1), (2, 3, 33), (2, 40, 17)])
def test_heads_of_any_size(form, H, K, M):
    inputs = arguments(40, H, K, M)
    expected = outcome(inputs, torch.float64, backend="reference", scale=0.5)
    close(outcome(inputs, torch.float32, backend=form, scale=0.5), expected, 2e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("decay", [0.0, 1e-3, 100.0])
def test_extreme_decays_stay_exact(form, decay):
    inputs = arguments(150, decay=decay)
    expected = outcome(inputs, torch.float64, backend="reference")
    close(outcome(inputs, torch.float32, backend=form), expected, 2e-5)


@pytest.mark.parametrize("form", ["reference", *FORMS])
def test_packed_and_ragged_rows_are_their_documents_alone(form):
    inputs, dtype = arguments(60), torch.float32 if form == "compiled" else torch.float64
    inputs = [x.to(dtype) for x in inputs]
    resets, lengths = torch.zeros(2, 60, dtype=torch.bool), torch.tensor([50, 0])
    resets[0, [17, 49]] = True
    o, last = slot_scores(*inputs, resets=resets, lengths=lengths, backend=form)
    state = inputs[4][:1]
    for start, stop in ((0, 17), (17, 49), (49, 50)):
        part, state = slot_scores(*(x[:1, start:stop] for x in inputs[:4]), state if start == 0 else None, backend=form)
        close([o[:1, start:stop]], [part], 2e-5)
    close([last[:1]], [state], 2e-5)
    assert torch.equal(last[1], inputs[4][1])
    assert not o[0, 50:].any()
    assert not o[1].any()


def test_its_gradient_is_linear_attention():
    """d_q is what linear attention reads with queries d_o, keys s and values k."""
    q, k, slots, log_decay, state = (x.double() for x in arguments(30))
    q.requires_grad_()
    o, _ = slot_scores(q, k, slots, log_decay, state, scale=0.3)
    d_o = noise(*o.shape, seed=9).double()
    (d_q,) = torch.autograd.grad(o, q, d_o)
    torch.testing.assert_close(d_q, linear_attention(d_o, slots, k, log_decay, state, scale=0.3)[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"slots": (2, 4, 2, 5)}, "slot_scores: q (2, 4, 3, 7) and slots (2, 4, 2, 5) do not go together"),
        ({"k": (2, 4, 3, 6)}, "slot_scores: k has shape (2, 4, 3, 6), expected (2, 4, 3, 7)"),
        ({"log_decay": (2, 4, 3)}, "slot_scores: log_decay has shape (2, 4, 3), expected (2, 4, 3, 5)"),
        ({"state": (2, 3, 7, 5)}, "slot_scores: state has shape (2, 3, 7, 5), expected (2, 3, 5, 7)"),
    ],
)
def test_wrong_inputs_say_what_is_wrong(changes, message):
    names = ("q", "k", "slots", "log_decay", "state")
    given = dict(zip(names, arguments(4), strict=True)) | {name: torch.zeros(shape) for name, shape in changes.items()}
    with pytest.raises(UsageError) as error:
        slot_scores(**given)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
