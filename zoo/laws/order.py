"""Laws 1 to 3: which outputs may depend on which inputs."""

from __future__ import annotations

import contextlib
import copy
import random
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from zoo.core.errors import UsageError
from zoo.laws.book import EVERY, couples_rows, law, looks_ahead, mixes_channels
from zoo.laws.compare import (
    TOLERANCE,
    LawBroken,
    assert_close,
    assert_same_run,
    device_of,
    dtype_of,
    error,
    exact,
    forked,
    given,
    noise,
    random_like,
    require,
    row,
    run,
    spans,
)
from zoo.protocol import Mixer, State
from zoo.states import canonical


@law(
    1,
    "chunk consistency",
    dtypes=EVERY,
    settings=({"n": 21}, {"n": 37}),
    tried=1,
    brief=True,
    unless=(looks_ahead,),
)
def chunk_consistency(mixer: Mixer, n: int, tolerance: float | None = None, brief: bool = False) -> None:
    """Cutting a sequence of `n` steps anywhere and carrying the state changes neither outputs nor final state.

    In brief a few segments and steps in turn, from rest, from a state that has to grow, and with gradients on.
    """
    x, fields = given(mixer, n)
    rng = random.Random(0)
    cuts = [[1], [n - 1], [4, 5, 6], [16, min(32, n - 2)], [8, 9, 20], sorted(rng.sample(range(1, n), 6))]
    with torch.no_grad():
        expected = run(exact(mixer), x, **fields)

    def same(actual: tuple[Tensor, State], what: str) -> None:
        assert_same_run(actual, expected, mixer, what, tolerance)

    with torch.no_grad():
        same(run(mixer, x, **fields), "uncut")
        if brief:
            same(run(mixer, x, cuts=[16], steps=range(5, 15), **fields), "cut, with steps between")
            same(run(mixer, x, mixer.init_state(2, capacity=5), cuts=[7], **fields), "from init_state(capacity=5)")
        for cut in () if brief else cuts:
            same(run(mixer, x, cuts=cut, **fields), f"cut at {cut}")
        if not brief:
            same(run(mixer, x, steps=True, **fields), "step by step")
        for capacity in () if brief else (None, 1, 5, n, n + 27):
            state = mixer.init_state(2, capacity=capacity)
            dtypes = [leaf.dtype for leaf in tree_leaves(state)]
            outcome = run(mixer, x, state, cuts=[7], **fields)
            same(outcome, f"from init_state(capacity={capacity})")
            require([leaf.dtype for leaf in tree_leaves(outcome[1])] == dtypes, "a state keeps its dtypes")
    same(run(mixer, x, cuts=[3, 4, 18], **fields), "cut, with gradients on")
    if not brief:
        same(run(mixer, x, steps=True, **fields), "step by step, with gradients on")


@law(2, "causality", dtypes=EVERY, brief=True, unless=(mixes_channels,), by_score=True)
@torch.no_grad()
def causality(mixer: Mixer, n: int = 33, brief: bool = False) -> None:
    """No output of a causal mixer depends on a later input; a mixer that is not causal looks ahead and has no state."""
    x, fields = given(mixer, n)
    other = 3 * random_like(mixer, *x.shape, seed=1)
    y, state = run(mixer, x, **fields)
    for t in (2, 16) if brief else (1, 2, 15, 16, n - 1):
        changed = torch.cat([x[:, :t], other[:, t:]], 1)
        y_changed, _ = run(mixer, changed, **fields)
        require(error(y_changed[:, t:], y[:, t:]) > 1e-3, f"outputs from {t} on do not depend on their inputs")
        if mixer.causal:
            what = f"outputs before step {t}, when only later inputs changed"
            assert_close(y_changed[:, :t], y[:, :t], TOLERANCE[dtype_of(mixer)], what)
        else:
            require(error(y_changed[:, :t], y[:, :t]) > 1e-4, f"outputs before {t} do not look ahead")
    if not mixer.causal:
        require(tree_leaves(state) == [], "a mixer that looks ahead returns a state")
        require(tree_leaves(mixer.init_state(2)) == [], "a mixer that looks ahead has a state")
        with contextlib.suppress(UsageError):
            mixer.step(x[:, 0].to(dtype_of(mixer)), ())
            raise LawBroken("a mixer that looks ahead takes a step")


@torch.no_grad()
def rounding(mixer: Any, n: int) -> float:
    """How far results in float64 move, relatively, when every input of `n` steps moves by half a unit in its last
    place of the mixer's own dtype: no computation in that dtype can be expected to stay below it."""
    x, fields = given(mixer, n)
    nudge = 1 + torch.finfo(dtype_of(mixer)).eps / 2 * noise(*x.shape, seed=2, device=x.device).sign()
    exactly = copy.deepcopy(mixer).double()
    runs = [run(exactly, x * factor, **fields) for factor in (1.0, nudge)]
    leaves = [tree_leaves((y, canonical(state))) for y, state in runs]
    return max(error(b, a) for a, b in zip(*leaves, strict=True) if a.is_floating_point())


@law(3, "batch independence", dtypes=EVERY, cases="first", unless=(couples_rows,))
@torch.no_grad()
def batch_independence(mixer: Mixer) -> None:
    """No output or state of a row depends on another row's inputs, state, length or documents."""
    n, device = 20, device_of(mixer)
    x, timespans = random_like(mixer, 3, n, mixer.d_model), spans(3, n, device=device)
    state = None
    if mixer.causal:
        _, state = run(mixer, random_like(mixer, 3, 6, mixer.d_model, seed=1))
    expected = run(exact(mixer), x, _widened(state, mixer), timespans=timespans)
    for i in range(3):
        alone = run(mixer, x[[i]], row(state, i) if state is not None else None, timespans=timespans[[i]])
        assert_same_run(alone, (expected[0][[i]], row(expected[1], i)), mixer, f"row {i} alone")
    resets = torch.zeros(3, n, dtype=torch.bool, device=device)
    resets[0, 3] = resets[2, 0] = True
    crowd = [3 * random_like(mixer, n, mixer.d_model, seed=2), x[1], random_like(mixer, n, mixer.d_model, seed=3)]
    lengths = torch.tensor([5, n, 0], device=device)
    y, after = run(mixer, torch.stack(crowd), forked(state), lengths=lengths, resets=resets, timespans=timespans)
    assert_same_run((y[[1]], row(after, 1)), (expected[0][[1]], row(expected[1], 1)), mixer, "row 1 among others")


def _widened(state: State | None, mixer: Mixer) -> State | None:
    """A copy of the state for `exact(mixer)`."""
    if state is None:
        return None
    widen = dtype_of(mixer) == torch.float32
    return tree_map(lambda t: t.double() if widen and t.is_floating_point() else t.clone(), state)
