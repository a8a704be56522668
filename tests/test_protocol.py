"""What states and contexts are handled with, on states made by hand. (On every mixer's states: `test_laws.py`.)"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import zoo
from zoo.protocol import Mixer, first_parameter_like, recurrent_dtype
from zoo.states import document_positions, grow, next_position, tree_bytes


class Cache(NamedTuple):
    """Rows written from the left; `canonical` is the written part."""

    rows: Tensor
    count: Tensor

    def canonical(self) -> Cache:
        return Cache(self.rows[:, : int(self.count.max())], self.count)


class Memory(NamedTuple):
    h: Tensor


def cache(batch: int, capacity: int, written: int, start: float = 1.0) -> Cache:
    rows = torch.zeros(batch, capacity, 2)
    rows[:, :written] = torch.arange(start, start + batch * written * 2).view(batch, written, 2)
    return Cache(rows, torch.full((batch,), written))


def test_fork_is_a_copy():
    state = (cache(2, 4, 3), (), Memory(torch.ones(2, 5)))
    branch = zoo.fork(state)
    assert type(branch[0]) is Cache
    assert branch[1] == ()
    branch[0].rows.zero_()
    branch[2].h.zero_()
    assert state[0].rows[0, 0, 0] == 1
    assert state[2].h.all()


def test_fork_passes_gradients():
    h = torch.ones(2, 3, requires_grad=True)
    zoo.fork(Memory(h)).h.sum().backward()
    assert h.grad.eq(1).all()


@pytest.mark.parametrize("rows", [[2, 0, 0], torch.tensor([2, 0, 0])], ids=["list", "tensor"])
def test_select_picks_rows_and_copies(rows):
    state = (Memory(torch.arange(3.0)[:, None]), cache(3, 4, 2))
    picked = zoo.select(state, rows)
    assert picked[0].h.squeeze(1).tolist() == [2, 0, 0]
    assert picked[1].count.tolist() == [2, 2, 2]
    picked[0].h.zero_()
    assert state[0].h.squeeze(1).tolist() == [0, 1, 2]


def test_select_takes_a_mask():
    picked = zoo.select(Memory(torch.arange(3.0)[:, None]), torch.tensor([True, False, True]))
    assert picked.h.squeeze(1).tolist() == [0, 2]
    assert zoo.select(Memory(torch.ones(3, 2)), torch.zeros(3, dtype=torch.bool)).h.shape == (0, 2)


def test_join_undoes_select():
    state = (Memory(torch.randn(3, 2)), cache(3, 4, 2), ())
    joined = zoo.join([zoo.select(state, [0]), zoo.select(state, [1, 2])])
    assert torch.equal(joined[0].h, state[0].h)
    assert torch.equal(joined[1].rows, state[1].rows)
    assert joined[2] == ()


def test_join_pads_the_smaller_buffer_with_zeros():
    joined = zoo.join([cache(1, 2, 2), cache(2, 5, 4), cache(1, 1, 0)])
    assert joined.rows.shape == (4, 5, 2)
    assert not joined.rows[0, 2:].any()
    assert joined.count.tolist() == [2, 4, 4, 0]
    assert torch.equal(joined.rows[1:3, :4], cache(2, 5, 4).rows[:, :4])


def test_join_needs_a_state():
    with pytest.raises(ValueError, match="at least one"):
        zoo.join([])


def test_canonical_reaches_into_nests_and_keeps_types():
    state = ((cache(2, 8, 3), ()), Memory(torch.ones(2, 1)))
    canonical = zoo.canonical(state)
    assert canonical[0][0].rows.shape == (2, 3, 2)
    assert canonical[0][1] == ()
    assert type(canonical[1]) is Memory


def test_grow_appends_zeros_and_never_shrinks():
    buffer = torch.ones(2, 3, 4)
    assert grow(buffer, 5).shape == (2, 5, 4)
    assert not grow(buffer, 5)[:, 3:].any()
    assert grow(buffer, 3) is buffer
    assert grow(buffer, 2) is buffer


def test_document_positions_count_from_each_reset():
    start = torch.tensor([0, 5])
    assert document_positions(start, 4, None).tolist() == [[0, 1, 2, 3], [5, 6, 7, 8]]
    resets = torch.tensor([[True, False, True, False], [False, False, True, True]])
    assert document_positions(start, 4, resets).tolist() == [[0, 1, 0, 1], [5, 6, 0, 0]]


def test_next_position_follows_the_last_valid_step():
    start = torch.tensor([0, 5, 7])
    positions = document_positions(start, 4, torch.tensor([[0, 0, 1, 0], [0, 1, 0, 0], [1, 0, 0, 0]]).bool())
    assert next_position(positions, start, None).tolist() == [2, 3, 4]
    assert next_position(positions, start, torch.tensor([2, 1, 0])).tolist() == [2, 6, 7]


def test_positions_carry_over_cuts():
    resets = torch.rand(3, 20, generator=torch.Generator().manual_seed(0)) < 0.2
    start = torch.tensor([0, 4, 9])
    whole = document_positions(start, 20, resets)
    first = document_positions(start, 7, resets[:, :7])
    second = document_positions(next_position(first, start, None), 13, resets[:, 7:])
    assert torch.equal(torch.cat([first, second], 1), whole)


def test_dtypes_and_bytes():
    assert recurrent_dtype(torch.bfloat16) == recurrent_dtype(torch.float32) == torch.float32
    assert recurrent_dtype(torch.float64) == torch.float64
    assert tree_bytes((Memory(torch.ones(2, 3)), (), torch.ones(4, dtype=torch.int64))) == 24 + 32
    assert first_parameter_like(torch.nn.Linear(2, 2).double(), None, None) == (torch.device("cpu"), torch.float64)
    assert first_parameter_like(torch.nn.Linear(2, 2), "meta", torch.bfloat16) == ("meta", torch.bfloat16)


def test_contexts_share_nothing():
    first, second = zoo.Context(), zoo.Context()
    first.losses.append(torch.ones(()))
    first.shared["x"] = first.metrics["y"] = torch.ones(())
    assert not second.losses
    assert not second.shared
    assert not second.metrics


@pytest.mark.parametrize("name", ["compiles", "couples_rows", "reads_timespans"])
def test_a_trait_is_no_attribute_of_its_own(name):
    trait = {"compiles": "not_compilable"}.get(name, name)
    with pytest.raises(zoo.UsageError, match=rf"^Own\.{name} is a trait: write `traits = Traits\({trait}=\.\.\.\)`"):
        type("Own", (Mixer,), {name: "why"})
