"""Law 13: second derivatives, forward mode and torch.func are right, or refused by name."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from zoo.core.errors import UsageError
from zoo.laws.book import F32, law
from zoo.laws.compare import (
    TOLERANCE,
    assert_close,
    assert_close_gradients,
    device_of,
    dtype_of,
    error,
    noise,
    parameter_names,
    random_like,
    require,
    run,
    spans,
)
from zoo.laws.patterns import cuts_gradients
from zoo.protocol import Context, Mixer
from zoo.states import fork


def _refused(refusal: UsageError) -> str:
    """What is said of a derivative that is refused by name, in one line: `name: ... option=`."""
    who, colon, _ = str(refusal).partition(": ")
    require(bool(colon) and who.isidentifier(), f"refused, but not by name: {refusal}")
    return f"refused: {refusal}"


def hessian_product(mixer: nn.Module, x: Tensor, fields: dict[str, Any], start: Any = None) -> tuple[Any, ...]:
    """Inputs and parameters, directions for each, and the product of the Hessian of a loss with them.

    The losses that a mixer leaves in its context are left out: what they hold constant has no Hessian.
    """
    inputs = [x.detach().clone().requires_grad_(), *mixer.parameters()]
    directions = [noise(*t.shape, seed=31 + i, device=t.device).to(t.dtype) for i, t in enumerate(inputs)]
    gradients = loss_gradients(mixer, inputs, fields, start, create_graph=True)
    dot: Any = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True))
    return inputs, directions, list(torch.autograd.grad(dot, inputs, allow_unused=True, materialize_grads=True))


def loss_gradients(
    mixer: nn.Module, inputs: list[Any], fields: dict[str, Any], start: Any = None, create_graph: bool = False
) -> Sequence[Tensor]:
    """Gradients of a loss that is curved in the outputs."""
    y, _ = mixer(inputs[0], None if start is None else fork(start), Context(**fields))
    loss = (y * noise(*y.shape, seed=9, device=y.device).to(y)).sin().mean()
    return torch.autograd.grad(loss, inputs, create_graph=create_graph, allow_unused=True, materialize_grads=True)


@law(13, "second derivatives", cases="first")
def second_derivatives(mixer: Mixer) -> str | None:
    """The product of the Hessian with a direction is the change of the gradients along it, or refused by name."""
    n = 20
    fields: dict[str, Any] = {"timespans": spans(2, n, device=device_of(mixer))}
    try:
        inputs, directions, product = hessian_product(mixer, random_like(mixer, 2, n, mixer.d_model), fields)
    except UsageError as refusal:
        return _refused(refusal)
    step, ends = 1e-6, []
    for sign in (1, -2, 1):
        with torch.no_grad():
            for t, d in zip(inputs, directions, strict=True):
                t.add_(sign * step * d)
        ends.append(loss_gradients(mixer, inputs, fields))
    expected = [(a - b) / (2 * step) for a, b in zip(ends[0], ends[1], strict=True)]
    floor = max(e.abs().max().item() for e in expected)
    require(floor > 0, "nothing is curved")
    for name, actual, wanted in zip(["x", *parameter_names(mixer)], product, expected, strict=True):
        assert_close(actual, wanted, 1e-6, f"Hessian product of {name}", floor)
    return None


@law(
    13,
    "second derivatives of kernels",
    dtypes=(F32,),
    settings=({"n": 140, "n_continuous": 40},),  # beyond two chunks of any form
    rare=({"n": 280, "n_continuous": 100},),
    covering=True,
    cases="alone",
)
def second_derivatives_of_kernels(mixer: Mixer, n: int, n_continuous: int) -> str | None:
    """In float32, packed and ragged and from a state, products with the Hessian are those of float64.

    Of `n` steps, or of `n_continuous` in continuous time, where every step is a loop of its own. Where the function is
    so steep that rounding its inputs moves the products (a square root near zero), the tolerance is 32 times that.
    """
    n = n_continuous if mixer.traits.reads_timespans else n
    device = device_of(mixer)
    resets = torch.zeros(2, n, dtype=torch.bool, device=device)
    resets[0, 5] = resets[1, n // 2] = True

    def product(mixer: Mixer, nudge: float = 0.0) -> list[Tensor]:
        dtype = dtype_of(mixer)
        x = random_like(mixer, 2, n, mixer.d_model).to(dtype)
        x = x * (1 + nudge * noise(*x.shape, seed=2, device=device).sign().to(dtype))
        fields: dict[str, Any] = {"timespans": spans(2, n, device=device).to(dtype)}
        start = None
        if mixer.causal and not mixer.traits.couples_rows:
            fields |= {"lengths": torch.tensor([n - 7, n], device=device), "resets": resets}
            with torch.no_grad():
                start = run(mixer, random_like(mixer, 2, 4, mixer.d_model, seed=1))[1]
        return hessian_product(mixer, x, fields, start)[2]

    try:
        actual, expected = product(mixer), product(copy.deepcopy(mixer).double())
    except UsageError as refusal:
        return _refused(refusal)
    floor = max(e.abs().max().item() for e in expected)
    tolerance = TOLERANCE[torch.float32]
    if any(error(a, e, floor) > tolerance for a, e in zip(actual, expected, strict=True)):
        moved = product(copy.deepcopy(mixer).double(), torch.finfo(torch.float32).eps / 2)
        tolerance = max(tolerance, 32 * max(error(m, e, floor) for m, e in zip(moved, expected, strict=True)))
    for name, a, e in zip(["x", *parameter_names(mixer)], actual, expected, strict=True):
        assert_close(a, e, tolerance, f"Hessian product of {name}", floor)
    return None


@law(13, "transforms", cases="first", unless=(cuts_gradients,))
def transforms(mixer: Mixer) -> str | None:
    """torch.func and forward mode give what autograd, finite differences and loops give, or are refused by name."""
    try:
        _transforms(mixer)
    except UsageError as refusal:
        return _refused(refusal)
    return None


def _transforms(mixer: Mixer) -> None:
    n, D, device = 10, mixer.d_model, device_of(mixer)
    own = copy.deepcopy(mixer)  # functional_call leaves its own tensors in a module that is shared
    x, span = random_like(mixer, 2, n, D), spans(2, n, device=device)
    values = {name: p.detach() for name, p in mixer.named_parameters()}
    tangents = {name: random_like(mixer, *p.shape, seed=41 + i) for i, (name, p) in enumerate(values.items())}
    along, step = random_like(mixer, *x.shape, seed=40), 1e-6

    def f(values: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(mixer, values, (x, None, Context(timespans=span[: len(x)])))[0]

    def moved(values: dict[str, Tensor], x: Tensor, by: float) -> Tensor:
        return f({name: v + by * tangents[name] for name, v in values.items()}, x + by * along)

    slope = (moved(values, x, step) - moved(values, x, -step)) / (2 * step)
    assert_close(torch.func.jvp(f, (values, x), (tangents, along))[1], slope, 1e-6, "jvp")
    with forward_ad.dual_level():
        dual = f(values, forward_ad.make_dual(x, along))
        across = forward_ad.unpack_dual(dual).tangent
    require(across is not None, "forward mode: no tangent")
    slope = (f(values, x + step * along) - f(values, x - step * along)) / (2 * step)
    assert_close(across, slope, 1e-6, "forward mode")
    jacobian = torch.func.jacrev(lambda x: f(values, x)[:, -1, :2])(x)
    assert_close((jacobian * along).sum((-3, -2, -1)), slope[:, -1, :2], 1e-6, "jacrev")

    inputs = list(own.parameters())
    expected = torch.autograd.grad(own(x, None, Context(timespans=span))[0].sin().sum(), inputs, allow_unused=True)
    found = torch.func.grad(lambda values: f(values, x).sin().sum())(values)
    wanted = [torch.zeros_like(p) if g is None else g for p, g in zip(inputs, expected, strict=True)]
    assert_close_gradients(list(found.values()), wanted, 1e-9, "grad", list(values))

    rows = torch.func.vmap(lambda row: f(values, row[None])[0])(x)
    coupled = mixer.traits.couples_rows
    if not coupled:
        assert_close(rows, torch.cat([f(values, row[None]) for row in x]), 1e-9, "vmap over inputs")
    lengths = torch.tensor([[n, n - 4], [2, n]], device=device)
    resets = torch.arange(4 * n, device=device).view(2, 2, n) % 7 == 3

    def packed(x: Tensor, lengths: Tensor, resets: Tensor) -> Tensor:
        y, state = mixer(x, None, Context(lengths, resets))
        return mixer(x, state)[0] if mixer.causal else y

    crowd = torch.stack([x, random_like(mixer, *x.shape, seed=42)])
    try:
        rows = torch.func.vmap(packed)(crowd, lengths, resets)
    except UsageError as refusal:  # a mixer for whom the number of documents is a shape
        declared = mixer.traits.not_compilable or mixer.traits.not_compilable_packed
        require(bool(declared), f"vmap over packed and ragged rows: {refusal}")
    else:
        one_by_one = torch.stack([packed(*each) for each in zip(crowd, lengths, resets, strict=True)])
        distance = error(rows, one_by_one)
        require(bool(coupled) or distance <= 1e-9, f"vmap over packed and ragged rows: relative error {distance:.2g}")
    pair = {name: torch.stack([v, 1.1 * v]) for name, v in values.items()}
    both = torch.stack([f({name: v[i] for name, v in pair.items()}, x) for i in range(2)])
    assert_close(torch.func.vmap(f, in_dims=(0, None))(pair, x), both, 1e-9, "vmap over parameters")
