"""The bridge to C++: what every operator says of itself, how it is reached, and what is refused."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import Tensor

from zoo.benchmarks.studies.single_steps import calls, inputs_of, overhead
from zoo.core.errors import UsageError
from zoo.core.imports import import_source
from zoo.ops import native
from zoo.ops.bridge import OPERATORS, Operator, _Body, _nothing, _whole
from zoo.ops.kernel import Kernel

needs_compiler = pytest.mark.skipif(native.why_not() is not None, reason=f"no kernels here: {native.why_not()}")
CALLS = calls(5)


def test_every_operator_is_called():
    assert CALLS.keys() == OPERATORS.keys()


@needs_compiler
def test_the_study_of_single_steps_measures_every_operator():
    for name in calls():
        assert overhead(name, 2).keys() == {"kernel", "call", "dispatched"}


def test_every_operator_has_second_derivatives():
    for operator in OPERATORS.values():
        assert operator.plain or operator.again, operator.name


def learning(inputs):
    return [x.detach().clone().requires_grad_(x.is_floating_point()) if isinstance(x, Tensor) else x for x in inputs]


def outcome(operator, function, inputs):
    """The outputs that are not for the backward pass alone, and the gradients of all inputs."""
    outputs = function(*inputs)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    named = zip(operator.outputs, outputs, strict=True)
    outputs = [x for name, x in named if f"d_{name}" in operator._backward.takes]
    total = sum((x * (i + 1)).sum() for i, x in enumerate(outputs))
    wanted = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
    return [*outputs, *torch.autograd.grad(total, wanted, allow_unused=True)]


@needs_compiler
@pytest.mark.parametrize("name", CALLS)
def test_eager_mode_and_the_dispatcher_agree_to_the_bit(name):
    operator, inputs = inputs_of(CALLS[name])
    kept = [True] * operator.keeps
    with mock.patch.object(operator, "dispatched", side_effect=AssertionError("by the dispatcher")):
        eager = outcome(operator, operator, learning(inputs))
        with torch.no_grad():
            operator(*inputs)
    dispatched = outcome(operator, lambda *x: operator.dispatched(*x, *kept), learning(inputs))
    for a, b in zip(eager, dispatched, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


@needs_compiler
@pytest.mark.parametrize("name", CALLS)
def test_what_is_said_of_its_outputs_is_so(name):
    """Shapes, dtypes and strides, forward and backward: code that torch.compile generates relies on them."""
    operator, inputs = inputs_of(CALLS[name])
    bodies, real = [], _Body.__call__

    def record(body, *given):
        output = real(body, *given)
        bodies.append((body, given, _whole(output, given)))
        return output

    with mock.patch.object(_Body, "__call__", record):
        outcome(operator, operator, learning(inputs))
    assert len(bodies) == 2
    for body, given, output in bodies:
        fake = [x.to("meta") if isinstance(x, Tensor) else x for x in given]
        said = _whole(body._run(_nothing, tuple(fake)), tuple(fake))
        pairs = zip(*((x,) if isinstance(x, Tensor) else x for x in (said, output)), strict=True)
        for a, b in pairs:
            assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


def test_without_a_plain_form_second_derivatives_are_refused():
    kernel = Kernel("nowhere")
    double = Operator(
        kernel,
        "test_double(Tensor x) -> Tensor y",
        lambda call, x: 2 * x,
        lambda call, d_y: 2 * d_y,
        gradients="x",
    )
    del OPERATORS["test_double"]
    x = torch.ones(3, requires_grad=True)
    y = double(x).sum()
    assert torch.autograd.grad(y, x, retain_graph=True)[0].tolist() == [2, 2, 2]
    with pytest.raises(UsageError, match="test_double has no second derivatives"):
        torch.autograd.grad(y, x, create_graph=True)


@pytest.mark.parametrize("schema", ["double", "double(x) -> y", "double(Tensor x)"])
def test_a_schema_that_is_none_is_refused(schema):
    with pytest.raises(TypeError, match="should be like"):
        Operator(Kernel("nowhere"), schema, lambda call, x: x)


def test_a_backward_pass_that_takes_what_there_is_not_is_refused():
    with pytest.raises(TypeError, match="d_z is no input, no output and no gradient"):
        Operator(Kernel("nowhere"), "f(Tensor x) -> Tensor y", lambda call, x: x, lambda call, d_z: d_z, gradients="x")


def test_a_name_is_taken_once(tmp_path):
    """Torch would take the later one for both, in what it traces."""
    (tmp_path / "own.py").write_text(
        "from zoo.ops.bridge import Operator\nfrom zoo.ops.kernel import Kernel\n"
        "Operator(Kernel('own.cpp'), 'scan(Tensor x) -> Tensor y', lambda call, x: x)\n"
    )
    theirs = OPERATORS["scan"]
    with pytest.raises(UsageError, match=r"here '.*own.py' failed: the operator 'scan' is that of .*_scan.py: give"):
        import_source(str(tmp_path / "own.py"), "here")
    assert OPERATORS["scan"] is theirs
