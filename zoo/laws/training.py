"""Laws 4 and 7: forms, gradients, autocast and compilation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from zoo.core.errors import UsageError
from zoo.laws.book import F32, law, looks_ahead, not_compilable
from zoo.laws.compare import (
    TOLERANCE,
    assert_close,
    assert_close_gradients,
    device_of,
    dtype_of,
    gradients,
    parameter_names,
    random_like,
    rebuilt,
    require,
    run,
    spans,
)
from zoo.laws.patterns import is_evaluated
from zoo.ops.choices import fixed_choices
from zoo.protocol import Context, Mixer, State
from zoo.states import canonical


def backends(mixer: Mixer) -> list[str]:
    """The forms that a mixer offers, other than its reference."""
    option = type(mixer.config).model_fields.get("backend")
    return [form for form in get_args(option.annotation) if form != "reference"] if option else []


def has_one_form(mixer: Mixer) -> str | None:
    """An exemption: there is nothing to compare."""
    return None if backends(mixer) else "it has one form"


@law(
    4,
    "forms",
    settings=tuple({"steps": n} for n in (70, 1, 100, 63, 64)),
    tried=2,
    brief=True,
    rare=({"steps": 1000},),
    unless=(has_one_form,),
)
def forms(mixer: Mixer, steps: int, brief: bool = False) -> None:
    """Every form agrees with the reference in value and in the gradients of inputs, state and parameters.

    In brief each form by its name, and in the widest precision that it serves.
    """

    def values_and_gradients(mixer: Mixer) -> tuple[Any, list[Tensor]]:
        first, second = (
            random_like(mixer, 1, n, mixer.d_model).to(dtype_of(mixer)).requires_grad_() for n in (5, steps)
        )
        state = run(mixer, first)[1] if mixer.causal else None
        y, state = run(mixer, second, state)
        outputs = (y, canonical(state))
        return outputs, gradients(outputs, [first, second, *mixer.parameters()])

    expected, expected_gradients = values_and_gradients(rebuilt(mixer, backend="reference"))
    names = ["the state's input", "the input", *parameter_names(mixer)]
    others = [backend for backend in backends(mixer) if backend != "auto"]
    for backend in others if brief and others else backends(mixer):
        for dtype in (torch.float64, torch.float32):
            what = f"{backend} in {dtype} at {steps} steps"
            try:
                values, grads = values_and_gradients(rebuilt(mixer, backend=backend).to(dtype))
            except UsageError as refusal:  # a form that says it cannot do this
                require(backend not in ("auto", "chunked"), f"{what} is refused: {refusal}")
                continue
            assert_close(values, expected, TOLERANCE[dtype], f"{what}: values")
            assert_close_gradients(grads, expected_gradients, TOLERANCE[dtype], what, names)
            if brief:
                break


@law(7, "gradients", unless=(is_evaluated,))
def training_gradients(mixer: Mixer) -> None:
    """Gradients of y.sum() + sum(context.losses) reach every parameter and the input, and are finite."""
    x = random_like(mixer, 2, 19, mixer.d_model).requires_grad_()
    context = Context(timespans=spans(2, 19, device=device_of(mixer)))
    y, _ = mixer(x, None, context)
    (y.sum() + sum(context.losses)).backward()
    for name, tensor in {"x": x, **dict(mixer.named_parameters())}.items():
        require(tensor.grad is not None, f"no gradient reaches {name}")
        require(bool(tensor.grad.isfinite().all()), f"the gradient of {name} is not finite")  # type: ignore[union-attr]
        require(bool(tensor.grad.any()), f"the gradient of {name} is zero")  # type: ignore[union-attr]


@law(7, "gradients through the state", brief=True, unless=(looks_ahead,))
def state_gradients(mixer: Mixer, brief: bool = False) -> None:
    """A carried state passes the gradients that an uncut pass has."""
    x = random_like(mixer, 2, 24, mixer.d_model).requires_grad_()
    inputs = [x, *mixer.parameters()]
    y, state = run(mixer, x)
    whole = gradients(y[:, 11:], inputs)
    stateless = not any(leaf.numel() and leaf.is_floating_point() for leaf in tree_leaves(state))
    require(bool(whole[0][:, :11].any()) or stateless, "nothing passes from the first segment")
    routes: dict[str, dict[str, Any]] = {"cut": {"cuts": [4, 11]}, "step by step": {"steps": True}}
    if brief:
        routes = {"cut, with steps between": {"cuts": [11], "steps": range(4, 8)}}
    for what, how in routes.items():
        parts = gradients(run(mixer, x, **how)[0][:, 11:], inputs)
        assert_close_gradients(parts, whole, 1e-9, what, ["x", *parameter_names(mixer)])


@law(
    7,
    "compilation",
    dtypes=(F32,),
    settings=({"backend": "eager"}, {"backend": "aot_eager"}),
    tried=1,
    covering=True,
    rare=({"backend": "inductor", "n": 4},),
    cases="first",
    unless=(not_compilable,),
    traced=True,
)
def compilation(mixer: Mixer, backend: str, n: int = 6) -> None:
    """`torch.compile(fullgraph=True)` gives the outputs and gradients of eager mode, packed and padded rows too.

    Packed ones except where a mixer declares why not. Of `n` steps, fewer where C++ is made and compiled of what may
    be a loop over them.
    """
    torch._dynamo.reset()
    D, device, dtype = mixer.d_model, device_of(mixer), dtype_of(mixer)
    x = random_like(mixer, 2, n, D).to(dtype).requires_grad_()
    resets = torch.arange(n, device=device).eq(n // 3).expand(2, n)
    fields: dict[str, Any] = {
        "lengths": torch.tensor([n, n - 2], device=device),
        "resets": None if mixer.traits.not_compilable_packed else resets,
        "timespans": spans(2, n, device=device).to(dtype),
    }
    start = None
    if mixer.causal:
        with torch.no_grad():
            _, start = run(mixer, random_like(mixer, 2, 4, D, seed=1))

    def forward(x: Tensor, state: State, fields: dict[str, Any]) -> Any:
        context = Context(**fields)
        y, state = mixer(x, state, context)
        return y, state, context.losses

    compiled = torch.compile(forward, fullgraph=True, backend=backend)
    inputs = [x, *mixer.parameters()]
    expected, actual = forward(x, start, fields), compiled(x, start, fields)
    assert_close(actual, expected, 2e-5, "compiled: outputs")
    names = ["x", *parameter_names(mixer)]
    assert_close_gradients(gradients(actual, inputs), gradients(expected, inputs), 2e-5, "compiled", names)


@law(
    7,
    "graphs of decoding",
    dtypes=(F32,),
    settings=({"n": 70}, {"n": 200}),
    tried=1,
    covering=True,
    cases="first",
    unless=(looks_ahead, not_compilable),
    traced=True,
)
def decode_graphs(mixer: Mixer, n: int, capacity: int = 256) -> None:
    """`n` decode steps compile to one graph, and give what one pass gives."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph: torch.fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    x = random_like(mixer, 1, n, mixer.d_model).to(dtype_of(mixer))
    step = torch.compile(mixer.step, fullgraph=True, backend=backend)
    outputs = []
    with torch.no_grad():
        expected, _ = mixer(x)
        state = mixer.init_state(1, capacity=capacity)
        for t in range(n):
            y, state = step(x[:, t], state)
            outputs.append(y)
            require(len(graphs) <= 1, f"a second graph is compiled at step {t}")
    require(bool(graphs), "nothing was compiled")
    assert_close(torch.stack(outputs, 1), expected, 2e-5, "compiled steps")


@law(7, "autocast", dtypes=(F32,), cases="first")
def autocast(mixer: Mixer) -> None:
    """Forward and backward under bfloat16 autocast stay near those in float32."""
    x, kind = random_like(mixer, 2, 21, mixer.d_model).float(), device_of(mixer).type
    results = []
    for enabled in (False, True):
        inputs = [x.clone().requires_grad_(), *mixer.parameters()]
        with fixed_choices():
            with torch.autocast(kind, torch.bfloat16, enabled=enabled):
                y, state = mixer(inputs[0])
            if mixer.causal:
                with torch.autocast(kind, torch.bfloat16, enabled=enabled):
                    later, _ = mixer(inputs[0], state)
                y = torch.cat([y, later], 1)
            results.append((y, gradients(y.float(), inputs)))
    (expected, expected_gradients), (actual, actual_gradients) = results
    assert_close(actual, expected, 3e-2, "autocast: outputs")
    require(all(bool(g.isfinite().all()) for g in actual_gradients), "autocast: a gradient is not finite")
    off = (actual_gradients[0] - expected_gradients[0]).norm() / expected_gradients[0].norm()
    require(bool(off <= 0.1), f"autocast: gradient of the input is off by {off:.2g} in the Euclidean norm")
