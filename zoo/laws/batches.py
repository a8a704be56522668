"""Laws 9 and 10, packed documents and ragged rows, and states that are forked, selected and joined."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from zoo.laws.book import EVERY, F64, couples_rows, law, looks_ahead
from zoo.laws.compare import (
    assert_close,
    assert_close_gradients,
    assert_same_run,
    device_of,
    exact,
    forked,
    gradients,
    parameter_names,
    random_like,
    require,
    row,
    run,
    spans,
)
from zoo.protocol import Mixer, State
from zoo.states import fork, join, select


@law(9, "packing", dtypes=EVERY, settings=({"n": 20}, {"n": 37}), tried=1, brief=True, unless=(couples_rows,))
@torch.no_grad()
def packing(mixer: Mixer, n: int, brief: bool = False) -> None:
    """With `resets`, a packed row of `n` steps equals its documents run alone: outputs, and the last one's state.

    In brief in one pass, and in segments and steps after a past.
    """
    documents = [[n], [1, 1, n - 18, 16], [8, n - 9, 1]]
    D, device = mixer.d_model, device_of(mixer)
    exactly = exact(mixer)
    x, timespans = random_like(mixer, 3, n, D), spans(3, n, device=device)
    starts = [[sum(sizes[:i]) for i in range(len(sizes))] for sizes in documents]
    resets = torch.zeros(3, n, dtype=torch.bool, device=device)
    for i, at in enumerate(starts):
        resets[i, at] = True
    expected = []
    for i, at in enumerate(starts):
        parts = [run(exactly, x[[i], a:b], timespans=timespans[[i], a:b]) for a, b in pairwise([*at, n])]
        expected.append((torch.cat([y for y, _ in parts], 1), parts[-1][1]))

    def check(what: str, state: State | None = None, **how: Any) -> None:
        y, after = run(mixer, x, state, resets=resets, timespans=timespans, **how)
        for i in range(3):
            assert_same_run((y[[i]], row(after, i)), expected[i], mixer, f"row {i}, {what}")

    check("in one pass")
    if not mixer.causal:
        return
    m = 21
    past, capacious = random_like(mixer, 3, m, D, seed=5), mixer.init_state(3, capacity=64)
    if brief:
        mixed: dict[str, Any] = {"cuts": [n - 7], "steps": range(1, 10)}
        check("cut, with steps between, after an unrelated past", state=run(mixer, past)[1], **mixed)
    else:
        check("cut at documents and inside", cuts=[1, 2, 8, 12, n - 7])
        check("step by step", steps=True)
        check("after an unrelated past", state=run(mixer, past)[1])
        check("step by step, after an unrelated past", state=run(mixer, past)[1], steps=True)
        check("after an unrelated past, with room", state=run(mixer, past, capacious)[1], cuts=[n - 1])
    # A row that continues its past, beside rows that start anew.
    resets[0, 0] = False
    times = torch.cat([x.new_ones(1, m), timespans[:1]], 1)
    y, state = run(exactly, torch.cat([past[:1], x[:1]], 1), timespans=times)
    expected[0] = (y[:, m:], state)
    check("where row 0 continues its past", state=run(mixer, past, timespans=x.new_ones(3, m))[1], cuts=[10])


@law(10, "raggedness", dtypes=EVERY, settings=({"n": 18}, {"n": 33}), tried=1, brief=True, unless=(couples_rows,))
@torch.no_grad()
def raggedness(mixer: Mixer, n: int, brief: bool = False) -> None:
    """With `lengths` up to `n`, outputs and state of each row equal that row run alone, and so does what follows.

    In brief in one pass from rest, and in segments and steps after a past.
    """
    D, device, exactly = mixer.d_model, device_of(mixer), exact(mixer)
    sizes = [n, 0, n - 13, 1]
    lengths = torch.tensor(sizes, device=device)
    x, past = random_like(mixer, 4, n, D), random_like(mixer, 4, 6, D, seed=1)
    later = random_like(mixer, 4, 9, D, seed=2)
    for i, length in enumerate(sizes):
        x[i, length:] *= 10  # padding that would be seen
    ones, timespans = x.new_ones(4, 6), spans(4, n, device=device)

    def alone(i: int, prefix: Tensor | None) -> tuple[Tensor, State]:
        parts, times = x[[i], : sizes[i]], timespans[[i], : sizes[i]]
        if prefix is not None:
            parts, times = torch.cat([prefix[[i]], parts], 1), torch.cat([ones[[i]], times], 1)
        if not parts.shape[1]:
            return parts, exactly.init_state(1)
        y, state = run(exactly, parts, timespans=times)
        return y[:, y.shape[1] - sizes[i] :], state

    for prefix in [None, past] if mixer.causal else [None]:
        before = None if prefix is None else run(mixer, prefix, timespans=ones)[1]
        expected = [alone(i, prefix) for i in range(4)]
        outcomes: dict[str, dict[str, Any]] = {"in one pass": {}}
        wanted, goes_on = [], mixer.causal and not (brief and prefix is None)
        if mixer.causal:
            if not brief:
                outcomes |= {"cut": {"cuts": [3, n - 13, n - 12]}, "step by step": {"steps": True}}
            elif prefix is not None:
                outcomes = {"cut, with steps between": {"cuts": [n - 1], "steps": range(n - 15, n - 10)}}
        if goes_on:
            for i in range(4):
                wanted.append(run(exactly, later[[i]], fork(expected[i][1]), timespans=x.new_ones(1, 9)))
        for what, how in outcomes.items():
            what = f"{what}, {'from rest' if prefix is None else 'after a past'}"
            y, state = run(mixer, x, forked(before), lengths=lengths, timespans=timespans, **how)
            require(bool(y.isfinite().all()), f"{what}: outputs in the padding are not finite")
            for i, length in enumerate(sizes):
                outcome = (y[[i], :length], row(state, i))
                assert_same_run(outcome, expected[i], mixer, f"row of length {length}, {what}")
            if goes_on:
                y, state = run(mixer, later, state, cuts=[1, 2], timespans=x.new_ones(4, 9))
                for i in range(4):
                    assert_same_run((y[[i]], row(state, i)), wanted[i], mixer, f"row {i} continued, {what}")


@law(10, "ragged gradients", dtypes=(F64,), cases="first", unless=(couples_rows,))
def ragged_gradients(mixer: Mixer) -> None:
    """Padding gets no gradient, and changes none."""
    n, device = 17, device_of(mixer)
    sizes = [n, 5, 0]
    lengths = torch.tensor(sizes, device=device)
    x = random_like(mixer, 3, n, mixer.d_model).requires_grad_()
    y, _ = run(mixer, x, lengths=lengths)
    valid = (torch.arange(n, device=device) < lengths[:, None])[..., None]
    grads = gradients(y.masked_fill(~valid, 0), [x, *mixer.parameters()])
    require(not grads[0].masked_fill(valid, 0).any(), "padding gets a gradient")
    alone = [_gradients_alone(mixer, x, i, length) for i, length in enumerate(sizes) if length]
    summed = [sum(parts[1:], parts[0]) for parts in zip(*alone, strict=True)]
    assert_close_gradients(grads[1:], summed, 1e-9, "ragged", parameter_names(mixer))


def _gradients_alone(mixer: Mixer, x: Tensor, i: int, length: int) -> Sequence[Tensor]:
    """Parameter gradients of row i's valid part, under the weights that the whole batch has."""
    y, _ = run(mixer, x[[i], :length])
    weights = random_like(mixer, *x.shape, seed=9)[[i], :length]
    return torch.autograd.grad((y * weights).sum(), list(mixer.parameters()), allow_unused=True, materialize_grads=True)


@law(3, "states of rows", dtypes=EVERY, brief=True, cases="first", unless=(looks_ahead, couples_rows))
@torch.no_grad()
def states_of_rows(mixer: Mixer, brief: bool = False) -> None:
    """fork branches, select picks rows, join undoes select, also where capacities differ."""
    n, D, device, exactly = 23, mixer.d_model, device_of(mixer), exact(mixer)
    x, later = random_like(mixer, 3, n, D), random_like(mixer, 3, 12, D, seed=1)
    _, state = run(mixer, x, mixer.init_state(3, capacity=n + 12))
    require(all(leaf.shape[0] == 3 for leaf in tree_leaves(state)), "a tensor of the state is not batch first")
    kept, branch = fork(state), fork(state)
    expected = run(mixer, later, state)
    assert_close(branch, kept, 0.0, "a fork whose original was consumed")
    assert_same_run(run(mixer, later, branch, steps=range(2) if brief else True), expected, mixer, "a fork, continued")

    mask = torch.tensor([False, True, True], device=device)
    rows = join([select(kept, ~mask), select(kept, mask)])
    assert_close(rows, kept, 0.0, "select, then join")
    y, after = run(mixer, later[[2, 0, 2]], select(kept, [2, 0, 2]))
    assert_same_run((y, after), (expected[0][[2, 0, 2]], select(expected[1], [2, 0, 2])), mixer, "selected rows")

    _, short = run(mixer, x[:1, :4], mixer.init_state(1, capacity=5))
    y, after = run(mixer, later[:2], join([short, select(kept, [1])]), cuts=[1])
    alone = run(exactly, torch.cat([x[:1, :4], later[:1]], 1))
    assert_same_run((y[:1], row(after, 0)), (alone[0][:, 4:], alone[1]), mixer, "a joined row, short")
    alone = run(exactly, torch.cat([x[1:2], later[1:2]], 1))
    assert_same_run((y[1:], row(after, 1)), (alone[0][:, n:], alone[1]), mixer, "a joined row, long")
