"""The bridge from torch to C++: one declaration makes a kernel a torch operator with gradients."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from zoo.core.errors import UsageError
from zoo.ops import native
from zoo.ops.common import without_autocast
from zoo.ops.derivatives import gradients_of, once, transformed
from zoo.ops.kernel import Kernel
from zoo.ops.triton_kernel import TritonKernel

OPERATORS: dict[str, Operator] = {}
"""Every operator that was declared, by its name."""

SCHEMA = re.compile(r"(\w+)\((\S+ \w+(?:, \S+ \w+)*)\) -> (\(.+\)|Tensor \w+)")
PARAMETER = re.compile(r"(\S+) (\w+)")
EAGER = (Tensor, nn.Parameter)


class Operator:
    """A kernel as the operator `torch.ops.zoo.NAME`, and one in Triton as `torch.ops.zoo.NAME_triton`.

    In eager mode the functions below are called directly, without torch's dispatcher, so that a single step costs
    little more than the kernel. Where torch traces, transforms or watches operators, they go through it.

    Args:
        kernel: its source in C++.
        schema: as "NAME(Tensor x, Tensor? z, float eps) -> (Tensor y, Tensor kept)". Callers leave out a last input
            `bool keep`: it says whether there will be a backward pass.
        forward: from (call, *inputs) to the outputs, which it allocates; None for what is not kept. It calls the kernel
            by `call`, see `Kernel`, and reads no values: for fake tensors `call` does nothing, so that the function
            gives their shapes.
        backward: from (call, ...) to the gradients, likewise. Its parameters are chosen by name among the inputs, the
            outputs, and their gradients, named as d_y. What they need is kept from the forward pass.
        gradients: the names of the inputs whose gradients `backward` returns, separated by spaces, in this order. None
            stands for that of an input that is None.
        plain: the same function of the inputs (without `keep`) in plain PyTorch, for second derivatives. Its outputs
            may be fewer.
        again: what `backward` computes in plain PyTorch, without `call`, where that serves second derivatives better.
            With neither, they are refused.
        strided: names of inputs that are passed on as they lie in memory; all others are made contiguous.
        scope: a variable that has in the backward pass the value that it had in the forward pass.
        triton: its source for GPUs, which has functions of the same names and parameters.
    """

    def __init__(
        self,
        kernel: Kernel | TritonKernel,
        schema: str,
        forward: Callable[..., Any],
        backward: Callable[..., Any] | None = None,
        *,
        gradients: str = "",
        plain: Callable[..., Any] | None = None,
        again: Callable[..., Any] | None = None,
        strided: str = "",
        scope: ContextVar[Any] | None = None,
        triton: TritonKernel | None = None,
    ):
        parts = SCHEMA.fullmatch(" ".join(schema.split()))
        if parts is None:
            raise TypeError(
                f"{schema!r} should be like 'NAME(Tensor x, Tensor? z, float eps) -> (Tensor y, Tensor n)'."
            )
        self.name, self.kernel, self.plain, self.again, self.scope = parts[1], kernel, plain, again, scope
        self._file = inspect.getsourcefile(forward)
        other = OPERATORS.get(self.name)
        if other is not None and other._file != self._file:  # torch would take the later one for both
            raise UsageError(f"the operator {self.name!r} is that of {other._file}: give the schema another name")
        self.inputs = {name: kind for kind, name in PARAMETER.findall(parts[2].replace(",", ""))}
        self.outputs = [name for _, name in PARAMETER.findall(re.sub("[(),]", "", parts[3]))]
        self.keeps = [*self.inputs][-1] == "keep"
        self.strided = strided.split()
        self._forward = _Body(kernel, forward, self.inputs, self.strided)
        self.dispatched = self._forward.register(self.name, len(self.outputs))
        if backward is not None:
            self._differentiate(backward, gradients.split())
        if isinstance(kernel, Kernel):
            OPERATORS[self.name] = self
        self.forms: dict[str, Operator] = {kernel.form: self}
        """This operator, and the same one by another kernel, by the names of their forms, the preferred first."""
        if triton is not None:
            how: dict[str, Any] = {"gradients": gradients, "plain": plain, "again": again, "strided": strided}
            schema = schema.replace(f"{self.name}(", f"{self.name}_triton(", 1)
            self.forms = Operator(triton, schema, forward, backward, **how, scope=scope).forms | self.forms

    def offers(self, *tensors: Tensor | None) -> dict[str, Callable[[], str | None]]:
        """Its forms, each with a function that says why its kernel cannot take these inputs, None where it can."""
        return {form: functools.partial(by.kernel.why_not, *tensors) for form, by in self.forms.items()}

    def _differentiate(self, backward: Callable[..., Any], gradients: list[str]) -> None:
        own = {name: kind for name, kind in self.inputs.items() if name != "keep"}
        known = own | dict.fromkeys([*self.outputs, *(f"d_{name}" for name in self.outputs)], "Tensor")
        takes, takes_again = _parameters(backward)[1:], _parameters(self.again)
        if unknown := [name for name in (*takes, *takes_again, *gradients) if name not in known]:
            raise TypeError(f"{self.name}: {', '.join(unknown)} is no input, no output and no gradient of an output.")
        self.gradients = gradients
        self._inputs, self._takes_again = [*own], takes_again
        reads = {*takes, *takes_again, *(own if self.plain else ())}
        self._saved_inputs = [i for i, (name, kind) in enumerate(own.items()) if "Tensor" in kind and name in reads]
        self._saved_outputs = [i for i, name in enumerate(self.outputs) if name in reads]
        self._saved = [self._inputs[i] for i in self._saved_inputs] + [self.outputs[i] for i in self._saved_outputs]
        self._options = [(i, name) for i, (name, kind) in enumerate(own.items()) if "Tensor" not in kind]
        self._optional = [(i, name) for i, (name, kind) in enumerate(own.items()) if kind == "Tensor?"]
        self._backward = _Body(self.kernel, backward, {name: known[name] for name in takes}, self.strided)
        self._backward_operator = self._backward.register(f"{self.name}_backward", len(gradients))

        class Function(torch.autograd.Function):
            @staticmethod
            def forward(ctx, *inputs):
                output = self._forward(*inputs)
                self._keep(ctx, inputs, output)
                return output

            @staticmethod
            @without_autocast
            @once(self._gradients_again)
            def backward(ctx, *gradients):
                return self._gradients(ctx, *gradients)

        self._function = Function.apply
        self.dispatched.register_autograd(Function.backward, setup_context=self._keep)

    def __call__(self, *inputs: Any) -> Any:
        learns = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs)
        if self.keeps:
            inputs = (*inputs, learns)
        if torch.compiler.is_compiling() or _watched(inputs):
            return self.dispatched(*inputs)
        return self._function(*inputs) if learns else self._forward(*inputs)

    def _keep(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        outputs = (output,) if isinstance(output, Tensor) else output
        ctx.save_for_backward(*(inputs[i] for i in self._saved_inputs), *(outputs[i] for i in self._saved_outputs))
        ctx.values = {name: inputs[i] for i, name in self._options}
        ctx.absent = {name for i, name in self._optional if inputs[i] is None}
        ctx.like = [(x.shape, x.dtype) for x in outputs]  # all are there: there is a backward pass
        ctx.scope = None if self.scope is None else self.scope.get()
        ctx.set_materialize_grads(False)

    def _values(self, ctx: Any, gradients: tuple[Tensor | None, ...]) -> dict[str, Any]:
        """All that is known in the backward pass, by name. A gradient that is not there is zero."""
        device = next(d.device for d in gradients if d is not None)
        values = dict(zip(self._saved, ctx.saved_tensors, strict=True)) | ctx.values
        for name, d, (shape, dtype) in zip(self.outputs, gradients, ctx.like, strict=True):
            if f"d_{name}" in self._backward.takes or f"d_{name}" in self._takes_again:
                values[f"d_{name}"] = torch.zeros(shape, dtype=dtype, device=device) if d is None else d
        return values

    def _gradients(self, ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        there = [f"d_{name}" for name, d in zip(self.outputs, gradients, strict=True) if d is not None]
        if not there:
            return (None,) * len(self.inputs)
        if not set(there) <= set(self._backward.takes):  # that of a kept output: this backward pass was differentiated
            return self._gradients_again(ctx, *gradients)
        values = self._values(ctx, gradients)
        token = None if self.scope is None else self.scope.set(ctx.scope)
        try:
            inputs = [values[name] for name in self._backward.takes]
            if torch.compiler.is_compiling() or _watched(inputs):
                found = self._backward_operator(*inputs)
            else:
                found = self._backward(*inputs)
        finally:
            if token is not None:
                self.scope.reset(token)  # type: ignore[union-attr]
        return self._by_input(ctx, found)

    def _gradients_again(self, ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradients as a graph, to be differentiated in turn."""
        if all(d is None for d in gradients):
            return (None,) * len(self.inputs)
        if self.again is not None:
            values = self._values(ctx, gradients)
            return self._by_input(ctx, self.again(*(values[name] for name in self._takes_again)))
        if self.plain is None:
            raise UsageError(f"{self.name} has no second derivatives: its declaration names no `plain` form.")
        values = dict(zip(self._saved, ctx.saved_tensors, strict=True)) | ctx.values
        found = gradients_of(self.plain, [values[name] for name in self._inputs], gradients)
        gradients = tuple(d if isinstance(d, Tensor) else None for d in found)  # for a list of numbers there is a list
        return *gradients, *[None] * self.keeps

    def _by_input(self, ctx: Any, found: Any) -> tuple[Tensor | None, ...]:
        each = dict(zip(self.gradients, (found,) if isinstance(found, Tensor) else found, strict=True))
        return tuple(None if name in ctx.absent else each.get(name) for name in self.inputs)


class _Body:
    """`function(call, *inputs)` on contiguous tensors, directly or as an operator."""

    def __init__(
        self, kernel: Kernel | TritonKernel, function: Callable[..., Any], inputs: dict[str, str], strided: list[str]
    ):
        self.kernel, self.function, self.takes = kernel, function, inputs
        self._dense = [i for i, (n, kind) in enumerate(inputs.items()) if "Tensor" in kind and n not in strided]

    def __call__(self, *inputs: Any) -> Any:
        return self._run(self.kernel, inputs)

    def _run(self, call: Callable[..., None], inputs: tuple[Any, ...]) -> Any:
        given = list(inputs)
        for i in self._dense:
            x = given[i]
            if x is None:
                continue
            if x.is_conj() or x.is_neg():  # a mark on the tensor, of which its memory knows nothing
                x = given[i] = x.resolve_conj().resolve_neg()
            if not x.is_contiguous():
                given[i] = x.contiguous()
        return self.function(call, *given)

    def register(self, name: str, n_outputs: int) -> Any:
        """The operator `zoo::name`; what is None among its outputs is an empty tensor."""
        inputs = ", ".join(f"{kind} {name}" for name, kind in self.takes.items())
        outputs = "Tensor" if n_outputs == 1 else f"({', '.join(['Tensor'] * n_outputs)})"
        define = torch.library.custom_op(
            f"zoo::{name}", mutates_args=(), device_types=self.kernel.devices, schema=f"({inputs}) -> {outputs}"
        )
        operator = define(lambda *given: _whole(self._run(self.kernel, given), given))
        operator.register_fake(lambda *given: _whole(self._run(_nothing, given), given))
        return operator


def _nothing(function: str, reads: Any, writes: Any, *numbers: Any) -> None:
    """What fake tensors meet in place of a kernel."""


def _whole(outputs: Any, inputs: tuple[Any, ...]) -> Any:
    if isinstance(outputs, Tensor):
        return outputs
    like = next(x for x in inputs if isinstance(x, Tensor))
    return tuple(like.new_empty(0) if x is None else x for x in outputs)


def steps_alone(kernel: Kernel, *tensors: Tensor | None) -> bool:
    """Whether a single step may pass the addresses of these tensors to a kernel as they lie, with no operator between.

    It may in eager mode, where no gradient is recorded, of contiguous float32 numbers in a CPU's memory, and where
    nothing has to see an operator.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or torch._C._is_tracing():
        return False
    learns = torch.is_grad_enabled()
    for x in tensors:
        if x is None:
            continue
        if type(x) not in EAGER or x.dtype is not torch.float32 or not x.is_cpu or not x.is_contiguous():
            return False
        if learns and x.requires_grad:
            return False
    return native.why_not(kernel.source) is None


def _watched(inputs: Any) -> bool:
    """Whether anything has to see an operator where these inputs meet: a mode, a tracer, a transform, a subclass."""
    if torch._C._len_torch_dispatch_stack() or torch.jit.is_tracing() or transformed():
        return True
    return any(isinstance(x, Tensor) and (type(x) not in EAGER or not (x.is_cpu or x.is_cuda)) for x in inputs)


def _parameters(function: Callable[..., Any] | None) -> list[str]:
    return [] if function is None else [*inspect.signature(function).parameters]
