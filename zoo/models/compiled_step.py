"""A decoder's step as one compiled graph, made once for a model, a number of rows and a capacity."""

from __future__ import annotations

import os
import types
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from zoo.core.errors import UsageError
from zoo.ops import native
from zoo.ops.common import owned
from zoo.protocol import Mixer, State

LEAST_CAPACITY = 256  # rows of a cache; above, powers of two, so that prompts of many lengths share a graph

Step = Callable[[Tensor, State], tuple[Tensor, State]]
_made: WeakKeyDictionary[nn.Module, tuple[Any, Callable[..., Any]]] = WeakKeyDictionary()


def compiled_step(model: Any) -> Step:
    """`model.step` as one graph. The first call compiles it, in 10 s to a minute; later processes find most of it.

    It is made anew where hooks or parts of the model have changed. States go in and out laid out alike, so that every
    step runs the same graph.

    Raises:
        UsageError: a model, or a machine, that cannot compile.
    """
    refuse_uncompilable(model)
    attached = _attached(model)
    if model not in _made or _made[model][0] != attached:
        # a code object of its own: torch counts how often each is compiled, for all models together
        own = types.FunctionType(_step.__code__.replace(co_name=f"step_{len(_made)}"), globals())
        _made[model] = attached, torch.compile(own, fullgraph=True, dynamic=False)
    run = _made[model][1]

    def step(tokens: Tensor, state: State) -> tuple[Tensor, State]:
        logits, state = run(model, tokens, state)
        return logits, laid_out(state)  # inductor may give a copy as a part of a larger tensor

    return step


def _step(model: Any, tokens: Tensor, state: State) -> tuple[Tensor, State]:
    return model.step(tokens, state)


def laid_out(state: State) -> State:
    """A state as a compiled step takes and gives it: each tensor laid out as a fresh one, copied only if it is not."""
    return tree_map(_dense, state)


def _dense(x: Tensor) -> Tensor:
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
    for mixer in model.modules():
        if isinstance(mixer, Mixer) and (why := mixer.traits.not_compilable) is not None:
            raise UsageError(f"compile=True does not serve {mixer.name}: {why}.")
    if os.name == "nt":
        raise UsageError("compile=True is offered on Linux and macOS only.")
    on_cpu = all(p.device.type == "cpu" for p in model.parameters())
    if on_cpu and native.compiler() is None:
        raise UsageError("compile=True needs a C++ compiler: install g++ or clang, or name one in CXX.")
    try:
        native.compiled_graphs()
    except (native.Unavailable, OSError) as error:
        raise UsageError(f"compile=True has no folder for what it compiles: {error}.") from None


def _attached(model: nn.Module) -> Any:
    """What a graph was made of: the modules, and how many hooks each has."""
    return [
        (id(m), type(m), len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in m.__dict__)
        for m in model.modules()
    ]
