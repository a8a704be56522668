"""Timing and exactness of one function in several forms, beside a peer, in one process."""

from __future__ import annotations

import functools
import importlib.util
import os
import pathlib
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode, bmm_flop

import zoo
from zoo.benchmarks.decode import error
from zoo.core.errors import UsageError

SLOW = 5.0  # seconds
SEGMENT = 128  # steps between the states kept by a float64 step form

Inputs = dict[str, Tensor]
Function = Callable[[Inputs], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Case:
    """A function of tensors in several forms.

    Attributes:
        inputs: float32 tensors, each of which is differentiated by.
        form: from a form's name ("auto" is what a user gets) to the function; raises `UsageError` where it cannot run.
        forms: names of the forms to measure, "auto" first.
        exact: what is measured against, run in float64.
        counted: the form whose matrix products are counted as the work of all.
        peer: gives the peer's function of the same inputs, output first; raises ImportError where it is not installed.
        peer_name: package and function.
        at_least: how many times the peer's speed is asked for.
    """

    inputs: Inputs
    form: Callable[[str], Function]
    forms: tuple[str, ...]
    exact: Function
    counted: str
    peer: Callable[[], Function] | None = None
    peer_name: str = ""
    at_least: float | None = None


def op_case(op: Callable[..., tuple[Tensor, Any]], inputs: Inputs, forms: Sequence[str], **rest: Any) -> Case:
    """An op `op(**inputs, state=, backend=)`; the exact values are its step form's, in float64."""

    def form(backend: str) -> Function:
        return lambda x: flat(op(**x, backend=backend))

    return Case(inputs, form, ("auto", *forms), functools.partial(by_steps, op), rest.pop("counted", "chunked"), **rest)


def whole_case(
    run: Callable[..., Tensor], inputs: Inputs, forms: Sequence[str], exact: str = "reference", **rest: Any
) -> Case:
    """A function `run(**inputs, backend=)`; the exact values are those of its form `exact`, in float64."""

    def form(backend: str) -> Function:
        return lambda x: (run(**x, backend=backend),)

    return Case(inputs, form, ("auto", *forms), form(exact), rest.pop("counted", exact), **rest)


def plain_case(run: Callable[..., Tensor], inputs: Inputs, **rest: Any) -> Case:
    """A function `run(**inputs)` without forms to choose from; the exact values are its own, in float64."""
    return Case(inputs, lambda _: lambda x: (run(**x),), ("auto",), lambda x: (run(**x),), "auto", **rest)


def mixer_case(spec: str, d_model: int, shape: tuple[int, int], forms: Sequence[str], **rest: Any) -> Case:
    """A mixer `spec` of width `d_model` over x (B, T); its parameters are inputs too.

    `inputs` may be given to change or add to the parameters' values under their names.
    """
    torch.manual_seed(0)
    mixer = zoo.create_mixer(spec, d_model)
    own = {"x": torch.randn(*shape, d_model), **{n: p.detach().clone() for n, p in mixer.named_parameters()}}
    own |= rest.pop("inputs", {})

    def form(backend: str) -> Function:
        return functools.partial(_call, zoo.create_mixer(spec, d_model, backend=backend))

    exact = functools.partial(_call, zoo.create_mixer(spec, d_model, backend="reference").double())
    return Case(own, form, ("auto", *forms), exact, rest.pop("counted", "chunked"), **rest)


def _call(module: torch.nn.Module, inputs: Inputs) -> tuple[Tensor, ...]:
    parameters = {name: x for name, x in inputs.items() if name != "x"}
    x = inputs["x"].view_as(inputs["x"])  # no leaf: the FLOP counter cannot follow one into a module
    return flat(functional_call(module, parameters, (x,)))


def flat(outputs: Any) -> tuple[Tensor, ...]:
    return tuple(torch.utils._pytree.tree_leaves(outputs))


def load_naive(module: str, file: str = "naive") -> ModuleType:
    """flash-linear-attention's plain PyTorch forms of one op, from their file alone, `naive.py` for most.

    Importing `fla.ops` would ask for Triton and a GPU. The package is looked for on the path, then in the folder that
    FLA_PATH names.

    Raises:
        ImportError: it is not installed.
    """
    package = importlib.util.find_spec("fla")
    folders = list(package.submodule_search_locations or ()) if package else []
    folders += [os.path.join(os.environ["FLA_PATH"], "fla")] if os.environ.get("FLA_PATH") else []
    for folder in folders:
        path = pathlib.Path(folder) / "ops" / module / f"{file}.py"
        if path.exists():
            spec = importlib.util.spec_from_file_location(f"fla_{file}_{module.replace('/', '_')}", path)
            assert spec is not None
            assert spec.loader is not None
            loaded = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(loaded)
            return loaded
    raise ImportError("flash-linear-attention is neither on the path nor in FLA_PATH")


def by_steps(op: Callable[..., Any], inputs: Inputs) -> tuple[Tensor, ...]:
    """The step form, with only every SEGMENT-th state kept for the backward pass."""
    n_steps = max(x.shape[1] for x in inputs.values() if x.ndim > 2)
    along_time = {name: x for name, x in inputs.items() if x.ndim > 2 and x.shape[1] == n_steps}
    fixed = {name: x for name, x in inputs.items() if name not in along_time}
    outputs, state = [], None
    for start in range(0, n_steps, SEGMENT):
        part = {name: x[:, start : start + SEGMENT] for name, x in along_time.items()}
        step = functools.partial(op, **part, **fixed, state=state, backend="reference")
        o, state = checkpoint(step, use_reentrant=False)
        outputs.append(o)
    return (torch.cat(outputs, 1), *flat(state))


def results(run: Function, inputs: Inputs, dtype: torch.dtype) -> list[Tensor]:
    """Outputs, last state, and the gradients of a fixed random functional of all."""
    leaves = {name: x.to(dtype, copy=True).requires_grad_() for name, x in inputs.items()}
    out = [x for x in run(leaves) if x.is_floating_point()]
    rng = torch.Generator().manual_seed(1)
    seeds = [torch.randn(x.shape, generator=rng).to(dtype) for x in out]
    live = [i for i, x in enumerate(out) if x.requires_grad]
    gradients = torch.autograd.grad(
        [out[i] for i in live], list(leaves.values()), [seeds[i] for i in live], allow_unused=True
    )
    return [*(x.detach() for x in out), *(g for g in gradients if g is not None)]


def training_step(function: Function, inputs: Inputs) -> Callable[[], object]:
    """Forward and backward of sum(w * output) with respect to all inputs."""
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    weight = torch.randn(function(leaves)[0].shape)

    def step() -> object:
        return torch.autograd.grad(function(leaves)[0], list(leaves.values()), weight, allow_unused=True)

    return step


def medians(steps: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each, the runs taking turns."""
    return {name: statistics.median(seconds) for name, seconds in timings(steps, repeats).items()}


def timings(
    steps: dict[str, Callable[[], object]], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of `repeats` runs of each, the runs taking turns; a first turn, not counted, warms up.

    What takes SLOW seconds and more is run once after warming up: it varies little, and its ratio is large.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    warm: dict[str, float] = {}
    for turn in range(repeats + 1):
        for name, step in steps.items():
            if turn > 1 and warm[name] >= SLOW:
                continue
            start = clock()
            step()
            taken = clock() - start
            if turn:
                seconds[name].append(taken)
            else:
                warm[name] = taken
    return seconds


def matmul_flops(step: Callable[[], object]) -> int:
    def inplace(_: Any, a: Any, b: Any, **rest: Any) -> int:
        return int(bmm_flop(a, b))

    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.baddbmm_: inplace}) as counter:
        step()
    return int(counter.get_total_flops())


def matmul_rate(size: int = 2048) -> float:
    """Floating-point operations a second of one large float32 product."""
    a = torch.randn(size, size)
    return 2 * size**3 / medians({"mm": lambda: torch.mm(a, a)}, 5)["mm"]


def measured(case: Case, rate: float, repeats: int) -> dict[str, Any]:
    """Seconds and error of every form of `case`, the peer's seconds and the ratio."""
    exact = results(case.exact, case.inputs, torch.float64)
    steps: dict[str, Callable[[], object]] = {}
    errors, first = {}, {}
    for name in case.forms:
        try:
            function = case.form(name)
            start = time.perf_counter()
            errors[name] = error(results(function, case.inputs, torch.float32), exact)
            first[name] = time.perf_counter() - start
        except UsageError:  # a form that cannot run here
            continue
        steps[name] = training_step(function, case.inputs)
    peer_error = None
    if case.peer:
        try:
            peer = case.peer()
            steps["peer"] = training_step(peer, case.inputs)
            got = peer({name: x.clone() for name, x in case.inputs.items()})[0]
            peer_error = error([got], exact[:1])
        except ImportError as missing:
            print(f"  {case.peer_name} is not measured: {missing}")
    seconds = medians(steps, repeats)
    flops = matmul_flops(training_step(case.form(case.counted), case.inputs))
    peer_seconds = seconds.pop("peer", None)
    return {
        "forms": {
            name: {
                "seconds": s,
                "first_seconds": first[name],
                "error": errors[name],
                "share": flops / s / rate,
                "ratio": peer_seconds / s if peer_seconds else None,
            }
            for name, s in seconds.items()
        },
        "peer": case.peer_name,
        "peer_seconds": peer_seconds,
        "peer_error": peer_error,
        "at_least": case.at_least,
    }
