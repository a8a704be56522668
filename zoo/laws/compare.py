"""What laws are checked with: inputs, runs of a mixer, and comparisons of their results.

Two results agree when the relative error of every tensor, max |actual - expected| / max |expected|, is at most
`TOLERANCE` of the dtype; whole numbers agree exactly. What is expected of a float32 mixer is computed in float64 with
the same parameters; of other dtypes, in the dtype itself by the plainest route (one uncut pass, one row, one document).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from zoo.protocol import Context, State, Traits
from zoo.states import canonical, fork, select

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
    steps: bool | range = False,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    timespans: Tensor | None = None,
) -> tuple[Tensor, State]:
    """x (B, T, D) through `mixer`, cut at `cuts`, and one `step` at a time: everywhere, or in a range of positions."""
    x = x.to(next(mixer.parameters()))
    outputs = []
    single = range(x.shape[1] if steps else 0) if isinstance(steps, bool) else steps
    for a, b in pairwise(sorted({0, x.shape[1], *cuts, *single, *(t + 1 for t in single)})):
        context = Context(
            lengths=None if lengths is None else (lengths - a).clamp(0, b - a),
            resets=None if resets is None else resets[:, a:b],
            timespans=None if timespans is None else timespans[:, a:b].to(x),
        )
        if a in single:
            y, state = mixer.step(x[:, a].contiguous(), mixer.init_state(len(x)) if state is None else state, context)
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
    assert_close(actual[0], expected[0], tolerance, f"{what}: outputs of {expected[0].shape[1]} steps")
    assert_close(canonical(actual[1]), canonical(expected[1]), tolerance, f"{what}: final state")


def assert_close_gradients(
    actual: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float, what: str, names: Sequence[str]
) -> None:
    """Gradients agree; one that cancels to almost nothing is measured by a twentieth of the largest."""
    floor = 0.05 * max(g.abs().max().item() for g in expected)
    for name, a, e in zip(names, actual, expected, strict=True):
        assert_close(a, e, tolerance, f"{what}: gradient of {name}", floor)


def given(mixer: Any, n: int) -> tuple[Tensor, dict[str, Any]]:
    """x (2, n, D), and the fields of a context that go with it."""
    device = device_of(mixer)
    return noise(2, n, mixer.d_model, device=device), {"timespans": spans(2, n, device=device)}


def random_like(mixer: Any, *shape: int, seed: int = 0) -> Tensor:
    """`noise` of a shape on the mixer's device."""
    return noise(*shape, seed=seed, device=device_of(mixer))


def forked(state: State | None) -> State | None:
    """A copy of a state, to continue from; None, rest, stays None."""
    return None if state is None else fork(state)


def row(tree: Any, i: int) -> Any:
    """Row i of every tensor, as a batch of one."""
    return select(tree, [i])


def gradients(outputs: Any, inputs: Sequence[Tensor], seed: int = 9) -> list[Tensor]:
    """Gradients of a random weighing of all floating-point tensors of `outputs`; zeros where nothing arrives."""
    leaves = [leaf for leaf in tree_leaves(outputs) if leaf.requires_grad]
    require(bool(leaves), "no output has a gradient")
    loss = sum(
        (leaf * noise(*leaf.shape, seed=seed + i, device=leaf.device).to(leaf)).sum() for i, leaf in enumerate(leaves)
    )
    return list(torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True))  # type: ignore[arg-type]


def parameter_names(mixer: nn.Module) -> list[str]:
    """The names of its parameters, in order."""
    return [name for name, _ in mixer.named_parameters()]


def spelled(mixer: M) -> M:
    """The mixer; one that looks up tokens is given, where it has none, those that the signs of its inputs spell.

    So every law judges it as it is: its tokens are cut, packed and changed together with its inputs.
    """
    if getattr(mixer, "traits", Traits()).reads_tokens:
        mixer.register_forward_pre_hook(_spell, with_kwargs=True)
    return mixer


def _spell(mixer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    x, state, context = (*args, None, None)[:3]
    if isinstance(x, Tensor) and x.ndim == 3 and (context is None or isinstance(context, Context)):
        context = Context() if context is None else context
        if context.tokens is None:
            bits = (x[..., :3] > 0).long()
            context = replace(context, tokens=bits[..., 0] + 2 * bits[..., 1:].sum(-1))
    return (x, state, context), kwargs


def rebuilt(mixer: Any, d_model: int | None = None, **options: Any) -> Any:
    """A mixer like this one at another width or with other options; one of the same width has its weights."""
    config = type(mixer.config)(**{**mixer.config.changed(), **options})
    with torch.random.fork_rng(), torch.device("cpu"):
        torch.manual_seed(1)
        other = type(mixer)(mixer.d_model if d_model is None else d_model, config, place=mixer.place)
    if d_model in (None, mixer.d_model):
        other.load_state_dict(mixer.state_dict())
    else:
        other = off_inits(other.double()).float()
    return spelled(other.to(device_of(mixer), dtype_of(mixer)))
