"""Two of the laws of `zoo/protocol.py`, as checks of one built mixer, and what all of them are checked with.

Two results agree when the relative error of every tensor, max |actual - expected| / max |expected|, is at most
`TOLERANCE` of the dtype; whole numbers agree exactly. What is expected of a float32 mixer is computed in float64 with
the same parameters; of other dtypes, in the dtype itself, in one pass over the whole sequence. The whole set of laws
is in `tests/laws.py`; a benchmark checks a mixer by `quick` before it times it.
"""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from zoo.core.errors import UsageError
from zoo.protocol import Context, State, canonical

M = TypeVar("M", bound=nn.Module)

TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5, torch.bfloat16: 2e-2}


class LawBroken(AssertionError):
    """A law that does not hold, in one line."""


def require(holds: bool, what: str) -> None:
    """Raises LawBroken, saying `what`, unless it `holds`."""
    if not holds:
        raise LawBroken(what)


Device = torch.device | str


def noise(*shape: int, seed: int = 0, device: Device | None = None) -> Tensor:
    """Normal float64 numbers that every dtype holds exactly, the same on every device (by default the default one)."""
    drawn = torch.randn(shape, generator=_seeded(seed), device="cpu")
    return drawn.bfloat16().double().to(_device(device))


def spans(batch: int, steps: int, seed: int = 0, device: Device | None = None) -> Tensor:
    """Time steps between 0.5 and 1.5, for mixers that read `timespans`, the same on every device."""
    drawn = 0.5 + torch.rand(batch, steps, generator=_seeded(seed), device="cpu")
    return drawn.bfloat16().double().to(_device(device))


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)


def _device(device: Device | None) -> Device:
    return torch.get_default_device() if device is None else device


@torch.no_grad()
def off_inits(mixer: M) -> M:
    """The mixer, its parameters moved off their inits by random numbers, so that none hides behind a zero or a one."""
    for p in mixer.parameters():
        p.add_(0.1 * (p.abs().mean() + 0.3) * torch.randn_like(p))
    return mixer


def dtype_of(mixer: Any) -> torch.dtype:
    """The dtype that a mixer computes in."""
    return next(mixer.parameters()).dtype


def device_of(mixer: Any) -> torch.device:
    """The device that a mixer computes on."""
    return next(mixer.parameters()).device


def exact(mixer: Any) -> Any:
    """The mixer to expect results of: `mixer` itself, in float64 if it is in float32."""
    return copy.deepcopy(mixer).double() if dtype_of(mixer) == torch.float32 else mixer


def run(
    mixer: Any,
    x: Tensor,
    state: State | None = None,
    *,
    cuts: Sequence[int] = (),
    steps: bool = False,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    timespans: Tensor | None = None,
) -> tuple[Tensor, State]:
    """x (B, T, D) through `mixer`, cut at `cuts`, or one `step` at a time."""
    x = x.to(next(mixer.parameters()))
    outputs = []
    edges = range(x.shape[1] + 1) if steps else [0, *cuts, x.shape[1]]
    for a, b in pairwise(edges):
        context = Context(
            lengths=None if lengths is None else (lengths - a).clamp(0, b - a),
            resets=None if resets is None else resets[:, a:b],
            timespans=None if timespans is None else timespans[:, a:b].to(x),
        )
        if steps:
            y, state = mixer.step(x[:, a], mixer.init_state(len(x)) if state is None else state, context)
            y = y.unsqueeze(1)
        else:
            y, state = mixer(x[:, a:b], state, context)
        outputs.append(y)
    return torch.cat(outputs, 1), state


def error(actual: Tensor, expected: Tensor, floor: float = 0.0) -> float:
    """Relative error in the maximum norm, NaN if there is one; what is expected counts as `floor` at least."""
    if not expected.numel():
        return 0.0
    scale = max(expected.abs().max().item(), floor) or 1.0
    return (actual.double() - expected.double()).abs().max().item() / scale


def assert_close(actual: Any, expected: Any, tolerance: float, what: str, floor: float = 0.0) -> None:
    """Two trees of tensors agree in structure, shape and value."""
    actual, expected = tree_leaves(actual), tree_leaves(expected)
    require(len(actual) == len(expected), f"{what}: {len(actual)} tensors, expected {len(expected)}")
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        where = f"{what}, tensor {i}" if len(actual) > 1 else what
        require(a.shape == e.shape, f"{where}: shape {tuple(a.shape)}, expected {tuple(e.shape)}")
        if e.is_floating_point():
            distance = error(a, e, floor)
            require(distance <= tolerance, f"{where}: relative error {distance:.2g} above {tolerance:.0e}")
        else:
            require(torch.equal(a, e), f"{where}: {a.tolist()}, expected {e.tolist()}")


def assert_same_run(
    actual: tuple[Tensor, State],
    expected: tuple[Tensor, State],
    mixer: Any,
    what: str,
    tolerance: float | None = None,
) -> None:
    """Outputs and canonical states of two runs agree, by default within the tolerance of the mixer's dtype."""
    tolerance = TOLERANCE[dtype_of(mixer)] if tolerance is None else tolerance
    assert_close(actual[0], expected[0], tolerance, f"{what}: outputs")
    assert_close(canonical(actual[1]), canonical(expected[1]), tolerance, f"{what}: final state")


def _input(mixer: Any, n: int) -> tuple[Tensor, dict[str, Any]]:
    """x (2, n, D), and the fields of a context that go with it."""
    device = device_of(mixer)
    return noise(2, n, mixer.d_model, device=device), {"timespans": spans(2, n, device=device)}


def chunk_consistency(mixer: Any, n: int = 37, tolerance: float | None = None) -> None:
    """Cutting a sequence of `n` steps anywhere and carrying the state changes neither outputs nor final state."""
    x, fields = _input(mixer, n)
    rng = random.Random(0)
    cuts = [[1], [n - 1], [4, 5, 6], [16, 32], [8, 9, 20], sorted(rng.sample(range(1, n), 6))]
    with torch.no_grad():
        expected = run(exact(mixer), x, **fields)

    def same(actual: tuple[Tensor, State], what: str) -> None:
        assert_same_run(actual, expected, mixer, what, tolerance)

    with torch.no_grad():
        same(run(mixer, x, **fields), "uncut")
        for cut in cuts:
            same(run(mixer, x, cuts=cut, **fields), f"cut at {cut}")
        same(run(mixer, x, steps=True, **fields), "step by step")
        for capacity in (None, 1, 5, n, n + 27):
            state = mixer.init_state(2, capacity=capacity)
            dtypes = [leaf.dtype for leaf in tree_leaves(state)]
            outcome = run(mixer, x, state, cuts=[7], **fields)
            same(outcome, f"from init_state(capacity={capacity})")
            require([leaf.dtype for leaf in tree_leaves(outcome[1])] == dtypes, "a state keeps its dtypes")
    same(run(mixer, x, cuts=[3, 4, 18], **fields), "cut, with gradients on")
    same(run(mixer, x, steps=True, **fields), "step by step, with gradients on")


@torch.no_grad()
def causality(mixer: Any, n: int = 33) -> None:
    """No output of a causal mixer depends on a later input; a mixer that is not causal looks ahead and has no state."""
    x, fields = _input(mixer, n)
    other = 3 * noise(*x.shape, seed=1, device=x.device)
    y, state = run(mixer, x, **fields)
    for t in (1, 2, 15, 16, n - 1):
        changed = torch.cat([x[:, :t], other[:, t:]], 1)
        y_changed, _ = run(mixer, changed, **fields)
        require(error(y_changed[:, t:], y[:, t:]) > 1e-3, f"outputs from {t} on do not depend on their inputs")
        if mixer.causal:
            assert_close(y_changed[:, :t], y[:, :t], TOLERANCE[dtype_of(mixer)], f"outputs before {t}")
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
    place of the mixer's own dtype: what no computation in that dtype can be asked to stay below."""
    x, fields = _input(mixer, n)
    nudge = 1 + torch.finfo(dtype_of(mixer)).eps / 2 * noise(*x.shape, seed=2, device=x.device).sign()
    exactly = copy.deepcopy(mixer).double()
    runs = [run(exactly, x * factor, **fields) for factor in (1.0, nudge)]
    leaves = [tree_leaves((y, canonical(state))) for y, state in runs]
    return max(error(b, a) for a, b in zip(*leaves, strict=True) if a.is_floating_point())


def quick(mixer: Any, n: int = 70) -> list[str]:
    """The names of the laws that a copy of a built mixer passes, its parameters moved off their inits.

    Takes a second or so: what is held before anything is measured.

    Args:
        mixer: of any width, on any device, in float32 or float64.
        n: steps; beyond the chunks of most forms. Where rounding grows over the steps, as it may in a large
            nonlinear recurrence, the tolerance is 32 times `rounding`.

    Raises:
        LawBroken: what does not hold.
    """
    names = []
    with torch.random.fork_rng():
        torch.manual_seed(1)
        mixer = off_inits(copy.deepcopy(mixer))
    try:
        if mixer.causal:
            names.append("chunk consistency")
            chunk_consistency(mixer, n, max(TOLERANCE[dtype_of(mixer)], 32 * rounding(mixer, n)))
        names.append("causality")
        causality(mixer, n)
    except LawBroken as broken:
        raise LawBroken(f"{names[-1]}: {broken}") from None
    return names
