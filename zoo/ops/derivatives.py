"""What the ops' own backward passes do not give: second derivatives, forward mode, and the transforms of torch.func.

A backward pass that is written by hand, or in C++, is right once. Where its own gradient is wanted too
(`create_graph=True`), the gradients are taken of the same function in plain operators instead, which autograd can
differentiate any number of times; and where a transform is under way, ops run in plain operators from the start.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves, tree_map

from zoo.core.errors import UsageError

Function = TypeVar("Function", bound=Callable[..., Any])


def constant_in_graphs(function: Function) -> Function:
    """Function decorator: `torch.compile` takes the result of the function as a constant.

    It leaves the mark of `torch.compiler.assume_constant_result`, which imports dynamo at once: a second of start-up.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant_in_graphs
def transformed() -> bool:
    """Whether forward-mode differentiation or a transform of torch.func (grad, vmap, jvp, ...) is under way."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def _levels(kind: str) -> int:
    """How many transforms of a kind are under way, one within the other."""
    stack = torch._C._functorch.get_interpreter_stack() if torch._C._are_functorch_transforms_active() else None
    return sum(level.key() == getattr(torch._C._functorch.TransformType, kind) for level in stack or ())


def batched() -> bool:
    """Whether a vmap is under way, in which values of tensors cannot be read."""
    return _levels("Vmap") > 0


TRANSFORMS = "forward-mode differentiation and torch.func"
TRANSFORMED = f"{TRANSFORMS}, which take the form 'reference'"


def traced() -> bool:
    """Whether Python may not look at the values of tensors: in `torch.compile`, and under a transform."""
    return torch.compiler.is_compiling() or transformed()


BATCHED = (
    "Gradients in batches (is_grads_batched=True, vectorize=True) do not serve the ops of the zoo: take "
    "torch.func.jacrev, or vectorize=False."
)


def differentiated(*gradients: Any) -> bool:
    """Whether a backward pass that is under way, with these gradients, has to be differentiated in turn."""
    if torch.compiler.is_compiling():
        return False
    if any(isinstance(g, Tensor) and torch._C._functorch.is_legacy_batchedtensor(g) for g in gradients):
        raise UsageError(BATCHED)
    return torch.is_grad_enabled() or transformed()


def once(again: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Mark a backward pass as right once: `again`, with the same arguments, serves where it is differentiated in turn.

    `torch.autograd.function.once_differentiable` does not do: it raises only where the whole graph is walked, and
    `torch.autograd.grad(..., inputs)` then leaves out what the second derivative owes to this function.
    """

    def decorate(backward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(backward)
        def run(ctx: Any, *gradients: Any) -> Any:
            return again(ctx, *gradients) if differentiated(*gradients) else backward(ctx, *gradients)

        run.again = again  # type: ignore[attr-defined]
        return run

    return decorate


def gradients_of(plain: Callable[..., Any], inputs: Sequence[Any], gradients: Any) -> tuple[Any, ...]:
    """The gradients of `plain(*inputs)` for all inputs, as a graph; None for what is no tensor or needs none.

    Args:
        plain: gives the outputs, in plain operators; further ones than there are `gradients` are left out.
        inputs: tensors, lists of tensors, anything else.
        gradients: of the outputs, None where there is none.
    """
    device = next(x.device.type for x in tree_leaves(list(inputs)) if isinstance(x, Tensor))
    with torch.enable_grad(), torch.autocast(device, enabled=False):
        # views: of an input that depends on another one, only the direct share of the gradient belongs to that one
        own = tree_map(lambda x: x.view_as(x) if _learns(x) else x, list(inputs))
        pairs = [
            (output, gradient.to(output.dtype))
            for output, gradient in zip(tree_leaves(plain(*own)), tree_leaves(gradients), strict=False)
            if gradient is not None and output.requires_grad
        ]
        wanted = [x for x in tree_leaves(own) if _learns(x)]
        found: Iterator[Tensor | None] = itertools.repeat(None)
        if pairs:
            outputs, weights = zip(*pairs, strict=True)
            found = iter(torch.autograd.grad(outputs, wanted, weights, create_graph=True, allow_unused=True))
    return tuple(tree_map(lambda x: next(found) if _learns(x) else None, own))


def _learns(x: Any) -> bool:
    return isinstance(x, Tensor) and x.requires_grad


def guarded(plain: Callable[..., Any], outputs: tuple[Tensor, ...], inputs: Sequence[Tensor | None]) -> tuple[Any, ...]:
    """Outputs of other people's kernels, whose gradients in turn are those of `plain(*inputs)`."""
    if torch.compiler.is_compiling() or not any(x.requires_grad for x in outputs):
        return outputs
    return _Guarded.apply(plain, len(outputs), *outputs, *inputs)


class _Guarded(torch.autograd.Function):
    @staticmethod
    def forward(plain: Callable[..., Any], n: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tensors[:n]

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.plain, ctx.n, *tensors = inputs
        ctx.save_for_backward(*tensors[ctx.n :])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *gradients: Tensor | None):
        if not differentiated(*gradients):
            return None, None, *gradients, *[None] * (len(ctx.needs_input_grad) - 2 - ctx.n)
        return None, None, *[None] * ctx.n, *gradients_of(ctx.plain, ctx.saved_tensors, gradients)


def once_only(x: Tensor, why: str) -> Tensor:
    """x, whose gradient is right once: a second derivative through it is refused, saying `why`."""
    if torch.compiler.is_compiling():
        return x
    if transformed():
        if _levels("Grad") > 1:
            raise UsageError(why)
        return x
    return _OnceOnly.apply(x, why) if x.requires_grad else x


class _OnceOnly(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, why: str) -> Tensor:
        return x

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.why = inputs[1]

    @staticmethod
    def backward(ctx, gradient: Tensor):
        if differentiated(gradient):
            raise UsageError(ctx.why)
        return gradient, None
