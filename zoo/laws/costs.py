"""Laws 5, 6 and 8: purity, the layout of states, costs, and any size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from zoo.core.errors import UsageError
from zoo.laws.book import BF16, EVERY, F32, couples_rows, law, looks_ahead
from zoo.laws.compare import (
    assert_close,
    assert_same_run,
    device_of,
    dtype_of,
    forked,
    random_like,
    rebuilt,
    require,
    run,
    spans,
)
from zoo.protocol import Context, Mixer, State, recurrent_dtype
from zoo.states import tree_bytes


@law(5, "purity", dtypes=EVERY, cases="first")
def purity(mixer: Mixer) -> None:
    """Inputs, parameters and (with gradients on) the state stay as they are; the same call gives the same bits."""
    n, D, device, dtype = 18, mixer.d_model, device_of(mixer), dtype_of(mixer)
    resets = torch.zeros(2, n, dtype=torch.bool, device=device)
    resets[0, 4] = True
    held = {
        "x": random_like(mixer, 2, n, D).to(dtype),
        "lengths": torch.tensor([n, 11], device=device),
        "resets": resets,
        "timespans": spans(2, n, device=device).to(dtype),
        **dict(mixer.named_parameters()),
        **dict(mixer.named_buffers()),
    }
    start = None
    if mixer.causal:
        _, start = run(mixer, random_like(mixer, 2, 6, D, seed=1))
        held |= {f"state {i}": leaf for i, leaf in enumerate(tree_leaves(start))}
    before = {name: (tensor._version, tensor.detach().clone()) for name, tensor in held.items()}

    def call() -> tuple[Tensor, State]:
        state = start if torch.is_grad_enabled() else forked(start)
        return mixer(held["x"], state, Context(held["lengths"], resets, held["timespans"]))

    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            y, state = call()
            again, state_again = call()
        assert_close((again, state_again), (y, state), 0.0, "the same call again")
        for name, tensor in held.items():
            version, copied = before[name]
            require(tensor._version == version, f"{name} was written to")
            require(torch.equal(tensor, copied), f"{name} was changed")
        for leaf in tree_leaves((y, state)):
            require(not leaf.is_floating_point() or bool(leaf.isfinite().all()), "a result is not finite")


@law(5, "layout of states", dtypes=(F32, BF16), brief=True, cases="first", unless=(looks_ahead,))
@torch.no_grad()
def layout(mixer: Mixer, brief: bool = False) -> None:
    """Every leaf of a state has the dtype of `init_state` and the strides of a fresh tensor, wherever it comes from.

    A decoder that is compiled for the state of one step then serves all others.
    """
    device = device_of(mixer)
    for batch, n in ((1, 1), (2, 12)) if brief else ((1, 1), (1, 12), (2, 1), (2, 2), (2, 12)):
        x = random_like(mixer, batch, n, mixer.d_model).to(dtype_of(mixer))
        contexts: dict[str, dict[str, Any]] = {"": {}}
        contexts[", ragged"] = {"lengths": torch.full((batch,), n - 1, device=device)}
        contexts[", packed"] = {"resets": torch.arange(n, device=device).eq(n // 2).expand(batch, n)}
        dtypes = [leaf.dtype for leaf in tree_leaves(mixer.init_state(batch))]

        def check(what: str, state: State, dtypes: Sequence[torch.dtype] = dtypes) -> None:
            for i, leaf in enumerate(tree_leaves(state)):
                require(leaf.dtype == dtypes[i], f"tensor {i} {what} is {leaf.dtype}, at first {dtypes[i]}")
                fresh = torch.empty(leaf.shape, device="meta").stride()
                found = f"tensor {i} {tuple(leaf.shape)} {what} has strides {leaf.stride()}"
                require(leaf.stride() == fresh, f"{found}: copy a slice by zoo.ops.common.owned")

        for more, fields in contexts.items():
            for start in (None, mixer.init_state(batch, capacity=16)):
                check("from init_state", start if start is not None else ())
                what = f"of {n} steps {'from rest' if start is None else 'from a state'}{more}"
                _, state = mixer(x, start, Context(**fields))
                check(f"of a forward pass {what}", state)
                _, state = mixer.step(x[:, 0], state)
                check(f"of a step after a pass {what}", state)


@law(6, "cost", dtypes=EVERY)
@torch.no_grad()
def cost(mixer: Mixer) -> None:
    """Bytes of the state and number of parameters are what they are said to be."""
    dtype = dtype_of(mixer)
    for batch, n in ((1, 1), (2, 7), (3, 40)):
        state = mixer.init_state(batch, capacity=n, dtype=dtype)
        require(mixer.state_bytes(batch, n, dtype) == tree_bytes(state), f"state_bytes at capacity {n}")
        _, state = run(mixer, random_like(mixer, batch, n, mixer.d_model), state)
        require(mixer.state_bytes(batch, n, dtype) == tree_bytes(state), f"state_bytes after {n} tokens")
        for leaf in tree_leaves(state):
            require(leaf.shape[0] == batch, "a tensor of the state is not batch first")
            allowed = (dtype, recurrent_dtype(dtype), torch.int64)
            require(leaf.dtype in allowed, f"a tensor of the state is {leaf.dtype}")
    with torch.device("meta"):
        shadow = type(mixer)(mixer.d_model, mixer.config, place=mixer.place)
    counts = [sum(p.numel() for p in m.parameters()) for m in (shadow, mixer)]
    require(counts[0] == counts[1], f"{counts[0]} parameters on the meta device, {counts[1]} elsewhere")


@law(
    6,
    "flops",
    dtypes=(F32,),
    settings=tuple({"context_length": n} for n in (33, 1, 2, 100)),
    unless=(looks_ahead, couples_rows),
)
@torch.no_grad()
def flops(mixer: Mixer, context_length: int) -> None:
    """`flops_per_token` is the matmul count of the step that brings the context to that length."""
    if "backend" in type(mixer.config).model_fields:
        mixer = rebuilt(mixer, backend="reference")
    state = mixer.init_state(1, capacity=context_length)
    if context_length > 1:
        _, state = run(mixer, random_like(mixer, 1, context_length - 1, mixer.d_model), state)
    with FlopCounterMode(display=False) as counter:
        mixer.step(random_like(mixer, 1, mixer.d_model).to(dtype_of(mixer)), state)
    counted, said = counter.get_total_flops(), mixer.flops_per_token(context_length)
    right = counted <= said if mixer.traits.work_varies else counted == said
    require(right, f"flops_per_token({context_length}) = {said} counted as {counted}")


@law(
    8,
    "any size",
    settings=tuple({"d_model": n} for n in (46, 16, 130, 18, 34, 48, 66)),
    tried=3,
    brief=True,
    cases="first",
)
@torch.no_grad()
def any_size(mixer: Mixer, d_model: int, brief: bool = False) -> str | None:
    """Every even width from 16, every length from 1, batch 1."""
    try:
        mixer = rebuilt(mixer, d_model)
    except UsageError as refusal:  # head counts given by hand need not divide every width
        require(bool(mixer.config.changed()), f"d_model={d_model} is refused with the default options: {refusal}")
        return f"refused: {refusal}"
    for n in (1, 3, 65) if brief else (1, 2, 3, 5, 63, 65):
        x = random_like(mixer, 1, n, d_model, seed=n)
        expected = run(mixer, x)
        require(expected[0].shape == x.shape, f"{n} steps: outputs {tuple(expected[0].shape)}")
        require(bool(expected[0].isfinite().all()), f"{n} steps: outputs are not finite")
        if mixer.causal and n > 1:
            cut: Any = run(mixer, x, cuts=[n // 2])
            assert_same_run(cut, expected, mixer, f"{n} steps, cut in the middle")
    return None
