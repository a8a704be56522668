"""A decoder's step as one compiled graph, made once for an architecture, a number of rows and a capacity."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from zoo.core.errors import UsageError
from zoo.models.graph_packages import Run, build, identity
from zoo.ops import native
from zoo.ops.common import owned
from zoo.protocol import Mixer, State

LEAST_CAPACITY = 256  # rows of a cache; above, powers of two, so that prompts of many lengths share a graph

Step = Callable[[Tensor, State], tuple[Tensor, State]]
_made: WeakKeyDictionary[nn.Module, tuple[Any, dict[Any, Run]]] = WeakKeyDictionary()


def compiled_step(model: Any, tokens: Tensor, state: State) -> Step:
    """`model.step` as one graph, which reads the weights that the model has now and whatever is written into them.

    The first process that needs it compiles it, in 10 s to a minute; later ones load it from the user's own folder. It
    is made anew where hooks or parts of the model have changed, and then for this process alone.

    Args:
        model: in evaluation mode.
        tokens: (B,), of the number of rows that it is made for.
        state: of the sizes that it is made for; a cache's capacity has to suffice for all steps to come.

    Raises:
        UsageError: a model, or a machine, that cannot compile.
    """
    refuse_uncompilable(model)
    leaves, form = tree_flatten(state)
    names, weights = zip(*_weights(model).items(), strict=True)
    attached = _attached(model)
    if model not in _made or _made[model][0] != attached:
        _made[model] = attached, {}
    graphs, settings = _made[model][1], _settings(tokens.device)
    sizes = [(str(x.dtype), *x.shape) for x in (tokens, *leaves, *weights)]
    which = str((sizes, form, settings, names))
    if which not in graphs:
        inputs = [tokens, *leaves, *weights]
        with torch.inference_mode(False), torch.no_grad():
            given = [torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in inputs[: 1 + len(leaves)]]
            given += [x.detach() for x in weights]
            traced = _Traced(model, form, names)
            graphs[which] = build(traced, given, identity(model, which), tokens.device)
    run = graphs[which]

    def step(tokens: Tensor, state: State) -> tuple[Tensor, State]:
        logits, *after = run([tokens, *map(laid_out, tree_leaves(state)), *weights])
        return logits, tree_unflatten(after, form)

    return step


class _Traced(nn.Module):
    """What is traced: a step of flat inputs, the weights among them, so that the graph holds none of their values."""

    def __init__(self, model: Any, form: TreeSpec, names: tuple[str, ...]):
        super().__init__()
        self.read = [model]  # not a part of this module, whose weights would be constants of the graph
        self.form, self.names = form, names

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        (model,), end = self.read, 1 + self.form.num_leaves
        state = tree_unflatten(inputs[1:end], self.form)
        weights = dict(zip(self.names, inputs[end:], strict=True))
        logits, state = torch.func.functional_call(model, weights, (inputs[0][:, None], state))
        leaves, form = tree_flatten(state)
        if form != self.form:
            raise RuntimeError(f"A step of this model returns a state of another form: {form}, not {self.form}.")
        return [logits.squeeze(1), *(leaf.contiguous() for leaf in leaves)]


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: x.detach() for name, x in (*model.named_parameters(), *model.named_buffers())}


def _settings(device: torch.device) -> tuple[Any, ...]:
    """What a graph depends on beside the model and the sizes."""
    kind = device.type
    cast = torch.is_autocast_enabled(kind) and str(torch.get_autocast_dtype(kind))
    exact = torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()
    return str(device), cast, *exact, torch.get_num_threads(), native.no_kernels()


@contextlib.contextmanager
def compiled_decoding(model: Any, rows: int) -> Iterator[None]:
    """Within, `model.step` runs a compiled graph for batches of this number of rows; others run as they did."""
    plain, steps = model.step, {}

    def step(tokens: Tensor, state: State, context: Any = None) -> tuple[Tensor, State]:
        if len(tokens) != rows or context is not None:
            return plain(tokens, state, context)
        capacity = tuple(x.shape for x in tree_leaves(state))
        if capacity not in steps:
            steps[capacity] = compiled_step(model, tokens, state)
        return steps[capacity](tokens, state)

    model.__dict__["step"] = step
    try:
        yield
    finally:
        del model.__dict__["step"]


def laid_out(x: Tensor) -> Tensor:
    """A tensor of a state as a graph takes it: laid out as a fresh one, copied only if it is not."""
    strides, step = [], 1
    for size in reversed(x.shape):
        strides.append(step)
        step *= max(size, 1)
    return x if list(x.stride()) == strides[::-1] else owned(x)


def capacity_of(n_steps: int) -> int:
    """The capacity of caches for a number of steps: the next power of two, 256 at least."""
    return max(LEAST_CAPACITY, 1 << (n_steps - 1).bit_length())


def refuse_uncompilable(model: nn.Module) -> None:
    """Raises a `UsageError` where a word of the model or this machine cannot compile, or has no safe folder for it."""
    if (why := why_not_compiled(model)) is not None:
        raise UsageError(f"compile=True {why}.")


def why_not_compiled(model: nn.Module) -> str | None:
    """Why a model's step is not compiled on this machine, as the end of a sentence; None where it is."""
    for mixer in model.modules():
        if isinstance(mixer, Mixer) and (why := mixer.traits.not_compilable) is not None:
            return f"does not serve {mixer.name}: {why}"
    if os.name == "nt":
        return "is offered on Linux and macOS only"
    if native.compiler() is None:
        return "needs a C++ compiler: install g++ or clang, or name one in CXX"
    try:
        native.compiled_graphs()
    except (native.Unavailable, OSError) as error:
        return f"has no folder for what it compiles: {error}"
    return None


def _attached(model: nn.Module) -> Any:
    """What a graph was made of: the modules, and the hooks of each, whose numbers are never given twice."""
    return [
        (id(m), type(m), *m._forward_hooks, None, *m._forward_pre_hooks, "forward" in m.__dict__)
        for m in model.modules()
    ]
