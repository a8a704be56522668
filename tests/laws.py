"""The laws of the mixer contract (`zoo/protocol.py`) as checks that any mixer can be put to.

Two results agree when the relative error of every tensor, max |actual - expected| / max |expected|, is at most
`TOLERANCE` of the dtype; whole numbers agree exactly. What is expected of a float32 mixer is computed in float64 with
the same parameters; of other dtypes, in the dtype itself by the plainest route (one uncut pass, one row, one document).
Parameters are moved off their inits first, so that none is hidden behind a zero or a one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils import prune
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import zoo
from zoo import laws
from zoo.laws import TOLERANCE, assert_close, assert_same_run, dtype_of, error, exact, noise, run, spans
from zoo.ops.sparse_latent_attention import choose
from zoo.pattern import make_word, to_text
from zoo.protocol import Context, Mixer, Place, State, mixers, recurrent_dtype, tree_bytes

WIDTH = 32
WIDTHS = (16, 18, 34, 48, 66, 130)


@dataclass(frozen=True)
class Case:
    """A mixer class with one set of options, in a model that is causal or not, on a device."""

    mixer: type[Mixer]
    options: dict[str, Any] = field(default_factory=dict)
    causal: bool = True
    device: str = "cpu"

    def __str__(self) -> str:
        word = to_text(make_word(self.mixer.name, self.options)) if self.mixer.name in mixers else self.mixer.name
        word = word if self.causal else f"{word}, looking ahead"
        return word if self.device == "cpu" else f"{word} on {self.device}"

    @property
    def place(self) -> Place:
        return Place(layer=1, n_layers=3, causal=self.causal)

    def build(self, dtype: torch.dtype = torch.float64, d_model: int = WIDTH, **options: Any) -> Mixer:
        """The mixer with parameters moved off their inits; the same ones in float64 and float32, on every device."""
        config = self.mixer.Config(**{**self.options, **options})
        with torch.random.fork_rng(), torch.device("cpu"):
            torch.manual_seed(1)
            mixer = laws.off_inits(self.mixer(d_model, config, place=self.place).double())
        return mixer.float().to(self.device, dtype)

    def noise(self, *shape: int, seed: int = 0) -> Tensor:
        """Normal float64 numbers on the device."""
        return noise(*shape, seed=seed, device=self.device)

    def spans(self, batch: int, steps: int) -> Tensor:
        """Time steps on the device."""
        return spans(batch, steps, device=self.device)


# ---- inputs, runs, comparisons


def choice_by_place(scores: Tensor, seen: Tensor, top_k: int) -> Tensor:
    """In place of `choose` of sparse attention: by a key's number among those seen, and not by its score.

    Rounding may turn which of two keys scores higher, and then results differ by more than rounding; laws in lower
    precision are held with a choice that it cannot turn.
    """
    number, count = seen.cumsum(-1), seen.sum(-1, keepdim=True)
    return choose((number * 40503 + count * 30011) % 65521 + 0.0 * scores, seen, top_k)


def assert_close_gradients(
    actual: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float, what: str, names: Sequence[str]
) -> None:
    """Gradients agree; one that cancels to almost nothing is measured by a twentieth of the largest."""
    floor = 0.05 * max(g.abs().max().item() for g in expected)
    for name, a, e in zip(names, actual, expected, strict=True):
        assert_close(a, e, tolerance, f"{what}: gradient of {name}", floor)


def forked(state: State | None) -> State | None:
    return None if state is None else zoo.fork(state)


def row(tree: Any, i: int) -> Any:
    """Row i of every tensor, as a batch of one."""
    return zoo.select(tree, [i])


def gradients(outputs: Any, inputs: Sequence[Tensor], seed: int = 9) -> list[Tensor]:
    """Gradients of a random weighing of all floating-point tensors of `outputs`; zeros where nothing arrives."""
    leaves = [leaf for leaf in tree_leaves(outputs) if leaf.requires_grad]
    loss = sum(
        (leaf * noise(*leaf.shape, seed=seed + i, device=leaf.device).to(leaf)).sum() for i, leaf in enumerate(leaves)
    )
    return list(torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True))


def parameter_names(mixer: Mixer) -> list[str]:
    return [name for name, _ in mixer.named_parameters()]


# ---- 1 to 3: what may depend on what


def chunk_consistency(case: Case, dtype: torch.dtype) -> None:
    """Cutting a sequence anywhere and carrying the state changes neither outputs nor final state."""
    laws.chunk_consistency(case.build(dtype))


def causality(case: Case, dtype: torch.dtype) -> None:
    """No output of a causal mixer depends on a later input; a mixer that is not causal looks ahead and has no state."""
    laws.causality(case.build(dtype))


@torch.no_grad()
def batch_independence(case: Case, dtype: torch.dtype) -> None:
    """No output or state of a row depends on another row's inputs, state, length or documents."""
    mixer, n = case.build(dtype), 20
    x, fields = case.noise(3, n, WIDTH), {"timespans": case.spans(3, n)}
    state = None
    if mixer.causal:
        _, state = run(mixer, case.noise(3, 6, WIDTH, seed=1))
    expected = run(exact(mixer), x, widened(state, mixer), **fields)
    for i in range(3):
        alone = run(mixer, x[[i]], row(state, i) if state is not None else None, timespans=fields["timespans"][[i]])
        assert_same_run(alone, (expected[0][[i]], row(expected[1], i)), mixer, f"row {i} alone")
    resets = torch.zeros(3, n, dtype=torch.bool, device=case.device)
    resets[0, 3] = resets[2, 0] = True
    crowd = torch.stack([3 * case.noise(n, WIDTH, seed=2), x[1], case.noise(n, WIDTH, seed=3)])
    y, after = run(
        mixer, crowd, forked(state), lengths=torch.tensor([5, n, 0], device=case.device), resets=resets, **fields
    )
    assert_same_run((y[[1]], row(after, 1)), (expected[0][[1]], row(expected[1], 1)), mixer, "row 1 among others")


def widened(state: State | None, mixer: Mixer) -> State | None:
    """A copy of the state for `exact(mixer)`."""
    if state is None:
        return None
    widen = dtype_of(mixer) == torch.float32
    return tree_map(lambda t: t.double() if widen and t.is_floating_point() else t.clone(), state)


# ---- 4 and 5: forms, purity


def backends(case: Case) -> list[str]:
    """The forms that a mixer offers, other than its reference."""
    option = case.mixer.Config.model_fields.get("backend")
    return [form for form in get_args(option.annotation) if form != "reference"] if option else []


def forms(case: Case, steps: int) -> None:
    """Every form agrees with the reference in value and in the gradients of inputs, state and parameters."""

    def values_and_gradients(mixer: Mixer) -> tuple[Any, list[Tensor]]:
        first, second = (
            t.to(dtype_of(mixer)).requires_grad_() for t in (case.noise(1, 5, WIDTH), case.noise(1, steps, WIDTH))
        )
        state = run(mixer, first)[1] if mixer.causal else None
        y, state = run(mixer, second, state)
        outputs = (y, zoo.canonical(state))
        return outputs, gradients(outputs, [first, second, *mixer.parameters()])

    expected, expected_gradients = values_and_gradients(case.build(backend="reference"))
    for backend in backends(case):
        for dtype in (torch.float64, torch.float32):
            what = f"{backend} at {steps} steps"
            try:
                mixer = case.build(dtype, backend=backend)
                values, grads = values_and_gradients(mixer)
            except zoo.UsageError:  # a form that says it cannot do this
                assert backend not in ("auto", "chunked")
                continue
            assert_close(values, expected, TOLERANCE[dtype], f"{what}: values")
            names = ["the state's input", "the input", *parameter_names(mixer)]
            assert_close_gradients(grads, expected_gradients, TOLERANCE[dtype], what, names)


def purity(case: Case, dtype: torch.dtype) -> None:
    """Inputs, parameters and (with gradients on) the state stay as they are; the same call gives the same bits."""
    mixer, n = case.build(dtype), 18
    x = case.noise(2, n, WIDTH).to(dtype)
    resets = torch.zeros(2, n, dtype=torch.bool, device=case.device)
    resets[0, 4] = True
    held = {
        "x": x,
        "lengths": torch.tensor([n, 11], device=case.device),
        "resets": resets,
        "timespans": case.spans(2, n).to(dtype),
        **dict(mixer.named_parameters()),
        **dict(mixer.named_buffers()),
    }
    start = None
    if mixer.causal:
        _, start = run(mixer, case.noise(2, 6, WIDTH, seed=1))
        held |= {f"state {i}": leaf for i, leaf in enumerate(tree_leaves(start))}
    before = {name: (tensor._version, tensor.detach().clone()) for name, tensor in held.items()}

    def call() -> tuple[Tensor, State]:
        state = start if torch.is_grad_enabled() else forked(start)
        return mixer(x, state, Context(held["lengths"], resets, held["timespans"]))

    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            y, state = call()
            again, state_again = call()
        assert_close((again, state_again), (y, state), 0.0, "the same call again")
        for name, tensor in held.items():
            version, copied = before[name]
            assert tensor._version == version, f"{name} was written to"
            assert torch.equal(tensor, copied), f"{name} was changed"
        assert all(leaf.isfinite().all() for leaf in tree_leaves((y, state)) if leaf.is_floating_point())


@torch.no_grad()
def layout(case: Case, dtype: torch.dtype) -> None:
    """Every leaf of a state has the dtype of `init_state` and the strides of a fresh tensor, wherever it comes from.

    A decoder that is compiled for the state of one step then serves all others.
    """
    mixer = case.build(dtype)
    for batch, n in ((1, 1), (1, 12), (2, 1), (2, 2), (2, 12)):
        x = case.noise(batch, n, WIDTH).to(dtype)
        contexts = {"": {}, ", ragged": {"lengths": torch.full((batch,), n - 1, device=case.device)}}
        contexts[", packed"] = {"resets": torch.arange(n, device=case.device).eq(n // 2).expand(batch, n)}
        dtypes = [leaf.dtype for leaf in tree_leaves(mixer.init_state(batch))]

        def check(what: str, state: State, dtypes: Sequence[torch.dtype] = dtypes) -> None:
            for i, leaf in enumerate(tree_leaves(state)):
                assert leaf.dtype == dtypes[i], f"tensor {i} {what} is {leaf.dtype}, at first {dtypes[i]}"
                fresh = torch.empty(leaf.shape, device="meta").stride()
                assert leaf.stride() == fresh, f"tensor {i} {tuple(leaf.shape)} {what} has strides {leaf.stride()}"

        for more, fields in contexts.items():
            for start in (None, mixer.init_state(batch, capacity=16)):
                check("from init_state", start if start is not None else ())
                what = f"of {n} steps {'from rest' if start is None else 'from a state'}{more}"
                _, state = mixer(x, start, Context(**fields))
                check(f"of a forward pass {what}", state)
                _, state = mixer.step(x[:, 0], state)
                check(f"of a step after a pass {what}", state)


# ---- 6: cost


@torch.no_grad()
def cost(case: Case, dtype: torch.dtype) -> None:
    """Bytes of the state, FLOPs of a step and number of parameters are what they are said to be."""
    mixer = case.build(dtype)
    for batch, n in ((1, 1), (2, 7), (3, 40)):
        state = mixer.init_state(batch, capacity=n, dtype=dtype)
        assert mixer.state_bytes(batch, n, dtype) == tree_bytes(state), f"state_bytes at capacity {n}"
        _, state = run(mixer, case.noise(batch, n, WIDTH), state)
        assert mixer.state_bytes(batch, n, dtype) == tree_bytes(state), f"state_bytes after {n} tokens"
        for leaf in tree_leaves(state):
            assert leaf.shape[0] == batch
            assert leaf.dtype in (dtype, recurrent_dtype(dtype), torch.int64)
    with torch.device("meta"):
        config = mixer.config
        shadow = case.mixer(WIDTH, config, place=case.place)
    assert sum(p.numel() for p in shadow.parameters()) == sum(p.numel() for p in mixer.parameters())


@torch.no_grad()
def flops(case: Case, context_length: int) -> None:
    """`flops_per_token` is the matmul count of the step that brings the context to that length."""
    form = {"backend": "reference"} if "backend" in case.mixer.Config.model_fields else {}
    mixer = case.build(torch.float32, **form)
    state = mixer.init_state(1, capacity=context_length)
    if context_length > 1:
        _, state = run(mixer, case.noise(1, context_length - 1, WIDTH), state)
    with FlopCounterMode(display=False) as counter:
        mixer.step(case.noise(1, WIDTH).float(), state)
    counted = counter.get_total_flops()
    said = mixer.flops_per_token(context_length)
    right = counted <= said if mixer.traits.work_varies else counted == said
    assert right, f"flops_per_token({context_length}) = {said} counted as {counted}"


# ---- 7: training


def training_gradients(case: Case) -> None:
    """Gradients of y.sum() + sum(context.losses) reach every parameter and the input, and are finite."""
    mixer = case.build()
    x, context = case.noise(2, 19, WIDTH).requires_grad_(), Context(timespans=case.spans(2, 19))
    y, _ = mixer(x, None, context)
    (y.sum() + sum(context.losses)).backward()
    for name, tensor in {"x": x, **dict(mixer.named_parameters())}.items():
        assert tensor.grad is not None, f"no gradient reaches {name}"
        assert tensor.grad.isfinite().all(), f"the gradient of {name} is not finite"
        assert tensor.grad.any(), f"the gradient of {name} is zero"


def state_gradients(case: Case) -> None:
    """A carried state passes the gradients that an uncut pass has."""
    mixer = case.build()
    x = case.noise(2, 24, WIDTH).requires_grad_()
    inputs = [x, *mixer.parameters()]
    whole = gradients(run(mixer, x)[0][:, 11:], inputs)
    stateless = not any(leaf.numel() for leaf in tree_leaves(run(mixer, x)[1]))
    assert whole[0][:, :11].any() or stateless, "nothing passes from the first segment"
    for what, how in {"cut": {"cuts": [4, 11]}, "step by step": {"steps": True}}.items():
        parts = gradients(run(mixer, x, **how)[0][:, 11:], inputs)
        assert_close_gradients(parts, whole, 1e-9, what, ["x", *parameter_names(mixer)])


def compiles(case: Case, backend: str = "aot_eager") -> None:
    """`torch.compile(fullgraph=True)` gives the outputs and gradients of eager mode, packed and padded rows too."""
    torch._dynamo.reset()
    mixer, n = case.build(torch.float32), 6
    x = case.noise(2, n, WIDTH).float().requires_grad_()
    fields = {
        "lengths": torch.tensor([n, 4], device=case.device),
        "resets": torch.arange(n, device=case.device).eq(2).expand(2, n),
        "timespans": case.spans(2, n).float(),
    }
    start = None
    if mixer.causal:
        with torch.no_grad():
            _, start = run(mixer, case.noise(2, 4, WIDTH, seed=1).float())

    def forward(x: Tensor, state: State, fields: dict[str, Tensor]) -> Any:
        context = Context(**fields)
        y, state = mixer(x, state, context)
        return y, state, context.losses

    compiled = torch.compile(forward, fullgraph=True, backend=backend)
    inputs = [x, *mixer.parameters()]
    expected, actual = forward(x, start, fields), compiled(x, start, fields)
    assert_close(actual, expected, 2e-5, "compiled: outputs")
    names = ["x", *parameter_names(mixer)]
    assert_close_gradients(gradients(actual, inputs), gradients(expected, inputs), 2e-5, "compiled", names)


def autocast(case: Case) -> None:
    """Forward and backward under bfloat16 autocast stay near those in float32."""
    mixer, x = case.build(torch.float32), case.noise(2, 21, WIDTH).float()
    results = []
    for enabled in (False, True):
        inputs = [x.clone().requires_grad_(), *mixer.parameters()]
        with torch.autocast(torch.device(case.device).type, torch.bfloat16, enabled=enabled):
            y, state = mixer(inputs[0])
        if mixer.causal:
            with torch.autocast(torch.device(case.device).type, torch.bfloat16, enabled=enabled):
                later, _ = mixer(inputs[0], state)
            y = torch.cat([y, later], 1)
        results.append((y, gradients(y.float(), inputs)))
    (expected, expected_gradients), (actual, actual_gradients) = results
    assert_close(actual, expected, 3e-2, "autocast: outputs")
    assert all(g.isfinite().all() for g in actual_gradients)
    off = (actual_gradients[0] - expected_gradients[0]).norm() / expected_gradients[0].norm()
    assert off <= 0.1, f"autocast: gradient of the input is off by {off:.2g} in the Euclidean norm"  # bends may flip


def decode_graphs(case: Case, n: int = 200, capacity: int = 256) -> None:
    """`n` decode steps compile to one graph, and give what one pass gives."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph: torch.fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    mixer, x = case.build(torch.float32), case.noise(1, n, WIDTH).float()
    step = torch.compile(mixer.step, fullgraph=True, backend=backend)
    outputs = []
    with torch.no_grad():
        expected, _ = mixer(x)
        state = mixer.init_state(1, capacity=capacity)
        for t in range(n):
            y, state = step(x[:, t], state)
            outputs.append(y)
            assert len(graphs) <= 1, f"a second graph is compiled at step {t}"
    assert graphs, "nothing was compiled"
    assert_close(torch.stack(outputs, 1), expected, 2e-5, "compiled steps")


# ---- 8 to 10: sizes, packing, raggedness


@torch.no_grad()
def any_size(case: Case, d_model: int) -> None:
    """Every even width from 16, every length from 1, batch 1."""
    mixer = case.build(d_model=d_model)
    for n in (1, 2, 3, 5, 63, 65):
        x = case.noise(1, n, d_model, seed=n)
        expected = run(mixer, x)
        assert expected[0].shape == x.shape
        assert expected[0].isfinite().all()
        if mixer.causal and n > 1:
            assert_same_run(run(mixer, x, cuts=[n // 2]), expected, mixer, f"{n} steps, cut in the middle")


@torch.no_grad()
def packing(case: Case, dtype: torch.dtype) -> None:
    """With `resets`, a packed row equals its documents run alone: outputs, and the last one's state."""
    mixer = case.build(dtype)
    documents = [[37], [1, 1, 19, 16], [8, 28, 1]]
    n = 37
    x, timespans = case.noise(3, n, WIDTH), case.spans(3, n)
    starts = [[sum(row[:i]) for i in range(len(row))] for row in documents]
    resets = torch.zeros(3, n, dtype=torch.bool, device=case.device)
    for i, at in enumerate(starts):
        resets[i, at] = True
    expected = []
    for i, at in enumerate(starts):
        parts = [run(exact(mixer), x[[i], a:b], timespans=timespans[[i], a:b]) for a, b in pairwise([*at, n])]
        expected.append((torch.cat([y for y, _ in parts], 1), parts[-1][1]))

    def check(
        what: str, x: Tensor = x, state: State | None = None, rows: Sequence[int] = (0, 1, 2), **how: Any
    ) -> None:
        y, after = run(mixer, x, state, resets=resets, timespans=timespans, **how)
        for i in rows:
            assert_same_run((y[[i]], row(after, i)), expected[i], mixer, f"row {i}, {what}")

    check("in one pass")
    if not mixer.causal:
        return
    check("cut at documents and inside", cuts=[1, 2, 8, 12, 30])
    check("step by step", steps=True)
    past = case.noise(3, 21, WIDTH, seed=5)
    check("after an unrelated past", state=run(mixer, past)[1])
    check("step by step, after an unrelated past", state=run(mixer, past)[1], steps=True)
    capacious = mixer.init_state(3, capacity=64)
    check("after an unrelated past, with room", state=run(mixer, past, capacious)[1], cuts=[20])
    # A row that goes on from its past, beside rows that start anew.
    resets[0, 0] = False
    expected[0] = run(
        exact(mixer), torch.cat([past[:1], x[:1]], 1), timespans=torch.cat([x.new_ones(1, 21), timespans[:1]], 1)
    )
    expected[0] = (expected[0][0][:, 21:], expected[0][1])
    check("where row 0 goes on", state=run(mixer, past, timespans=x.new_ones(3, 21))[1], cuts=[10])


@torch.no_grad()
def raggedness(case: Case, dtype: torch.dtype) -> None:
    """With `lengths`, outputs and returned state of each row equal that row run alone, and so does what follows."""
    mixer, n = case.build(dtype), 33
    lengths = torch.tensor([n, 0, 20, 1], device=case.device)
    past, x, later = case.noise(4, 6, WIDTH, seed=1), case.noise(4, n, WIDTH), case.noise(4, 9, WIDTH, seed=2)
    for i, length in enumerate(lengths):
        x[i, length:] *= 10  # padding that would be seen
    ones = x.new_ones(4, 6)
    timespans = case.spans(4, n)
    pasts = [None] if not mixer.causal else [None, past]
    for prefix in pasts:
        before = None if prefix is None else run(mixer, prefix, timespans=ones)[1]
        outcomes = {"in one pass": {}}
        if mixer.causal:
            outcomes |= {"cut": {"cuts": [3, 20, 21]}, "step by step": {"steps": True}}
        alone = []
        for i, length in enumerate(lengths.tolist()):
            parts = [x[[i], :length]] if prefix is None else [prefix[[i]], x[[i], :length]]
            times = [timespans[[i], :length]] if prefix is None else [ones[[i]], timespans[[i], :length]]
            parts, times = torch.cat(parts, 1), torch.cat(times, 1)
            if parts.shape[1]:
                y, state = run(exact(mixer), parts, timespans=times)
                alone.append((y[:, y.shape[1] - length :], state))
            else:
                alone.append((x[[i], :0], exact(mixer).init_state(1)))
        for what, how in outcomes.items():
            what = f"{what}, {'from rest' if prefix is None else 'after a past'}"
            y, state = run(mixer, x, forked(before), lengths=lengths, timespans=timespans, **how)
            assert y.isfinite().all(), f"{what}: outputs in the padding are not finite"
            for i, length in enumerate(lengths.tolist()):
                outcome = (y[[i], :length], row(state, i))
                assert_same_run(outcome, alone[i], mixer, f"row of length {length}, {what}")
            if not mixer.causal:
                continue
            y, state = run(mixer, later, state, cuts=[1, 2], timespans=x.new_ones(4, 9))
            for i in range(4):
                wanted = run(exact(mixer), later[[i]], zoo.fork(alone[i][1]), timespans=x.new_ones(1, 9))
                assert_same_run((y[[i]], row(state, i)), wanted, mixer, f"row {i} going on, {what}")


def ragged_gradients(case: Case) -> None:
    """Padding gets no gradient, and spoils none."""
    mixer, n = case.build(), 17
    lengths = torch.tensor([n, 5, 0], device=case.device)
    x = case.noise(3, n, WIDTH).requires_grad_()
    y, _ = run(mixer, x, lengths=lengths)
    valid = (torch.arange(n, device=case.device) < lengths[:, None])[..., None]
    inputs = [x, *mixer.parameters()]
    grads = gradients(y.masked_fill(~valid, 0), inputs)
    assert not grads[0].masked_fill(valid, 0).any(), "padding gets a gradient"
    alone = [gradients_alone(mixer, x, i, length) for i, length in enumerate(lengths.tolist()) if length]
    summed = [sum(parts) for parts in zip(*alone, strict=True)]
    assert_close_gradients(grads[1:], summed, 1e-9, "ragged", parameter_names(mixer))


def gradients_alone(mixer: Mixer, x: Tensor, i: int, length: int) -> list[Tensor]:
    """Parameter gradients of row i's valid part, under the weights that the whole batch has."""
    y, _ = run(mixer, x[[i], :length])
    weights = noise(*x.shape, seed=9, device=x.device)[[i], :length]
    parameters = list(mixer.parameters())
    return list(torch.autograd.grad((y * weights).sum(), parameters, allow_unused=True, materialize_grads=True))


# ---- handling states


@torch.no_grad()
def state_handling(case: Case, dtype: torch.dtype) -> None:
    """fork branches, select picks rows, join undoes select, also where capacities differ."""
    mixer, n = case.build(dtype), 23
    x, later = case.noise(3, n, WIDTH), case.noise(3, 12, WIDTH, seed=1)
    _, state = run(mixer, x, mixer.init_state(3, capacity=n + 12))
    assert all(leaf.shape[0] == 3 for leaf in tree_leaves(state)), "every leaf is batch first"
    kept = zoo.fork(state)
    branch = zoo.fork(state)
    expected = run(mixer, later, state)
    assert_close(branch, kept, 0.0, "a fork whose original was consumed")
    assert_same_run(run(mixer, later, branch, steps=True), expected, mixer, "a fork going on")

    mask = torch.tensor([False, True, True], device=case.device)
    rows = zoo.join([zoo.select(kept, ~mask), zoo.select(kept, mask)])
    assert_close(rows, kept, 0.0, "select, then join")
    picked = zoo.select(kept, [2, 0, 2])
    y, after = run(mixer, later[[2, 0, 2]], picked)
    assert_same_run((y, after), (expected[0][[2, 0, 2]], zoo.select(expected[1], [2, 0, 2])), mixer, "picked rows")

    _, short = run(mixer, x[:1, :4], mixer.init_state(1, capacity=5))
    joined = zoo.join([short, zoo.select(kept, [1])])
    y, after = run(mixer, later[:2], joined, cuts=[1])
    alone = run(exact(mixer), torch.cat([x[:1, :4], later[:1]], 1))
    assert_same_run((y[:1], row(after, 0)), (alone[0][:, 4:], alone[1]), mixer, "a joined row, short")
    alone = run(exact(mixer), torch.cat([x[1:2], later[1:2]], 1))
    assert_same_run((y[1:], row(after, 1)), (alone[0][:, n:], alone[1]), mixer, "a joined row, long")


# ---- 12: openness


class Adapter(nn.Module):
    """A layer of rank 2 beside a linear layer or an embedding, as in LoRA (Hu et al. 2021), with nothing at zero."""

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base = base
        weight = next(base.parameters())
        wide, out = (weight.shape[1], weight.shape[0]) if isinstance(base, nn.Linear) else weight.shape
        self.down = nn.Parameter(0.3 * noise(2, wide, seed=21, device=weight.device).to(weight))
        self.up = nn.Parameter(0.3 * noise(out, 2, seed=22, device=weight.device).to(weight))

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.base, nn.Embedding):
            return self.base(x) + self.down.mT[x] @ self.up.mT
        return self.base(x) + x @ self.down.mT @ self.up.mT

    def delta(self) -> Tensor:
        """What the weight of the layer would have to grow by for the same."""
        both = self.up @ self.down
        return both if isinstance(self.base, nn.Linear) else both.mT


def layers_of(module: nn.Module) -> dict[str, nn.Module]:
    """Its linear layers and embeddings, by name."""
    return {name: m for name, m in module.named_modules() if isinstance(m, (nn.Linear, nn.Embedding))}


def adapted(module: nn.Module) -> list[Adapter]:
    """Puts an adapter in the place of every linear layer and embedding."""
    adapters = []
    for name, layer in layers_of(module).items():
        parent = module.get_submodule(name.rpartition(".")[0])
        adapters.append(Adapter(layer))
        setattr(parent, name.rpartition(".")[2], adapters[-1])
    return adapters


def trained(mixer: Mixer, x: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
    """Outputs, and a loss to take gradients of."""
    context = Context() if context is None else context
    y, _ = mixer(x, None, context)
    return y, (y * noise(*y.shape, seed=9, device=y.device).to(y)).sum() + sum(context.losses)


def hooks_fire(case: Case, n: int = 12) -> None:
    """Forward hooks of every part that owns parameters fire, in a pass over a sequence and in one over a step."""
    mixer = case.build()
    x = case.noise(2, n, WIDTH)
    for steps in (n, 1) if mixer.causal else (n,):
        called: list[str] = []
        owners = {name: m for name, m in mixer.named_modules() if list(m.parameters(recurse=False))}
        handles = [
            m.register_forward_hook(lambda *_, name=name, called=called: called.append(name))
            for name, m in owners.items()
        ]
        y, _ = mixer(x[:, :steps], None, Context())
        for handle in handles:
            handle.remove()
        assert set(called) == set(owners), f"passed by: {sorted(set(owners) - set(called))}"
        assert_close(y, mixer(x[:, :steps], None, Context())[0], 1e-9, "with hooks")


def adapters(case: Case, n: int = 12) -> None:
    """Adapters around linear layers do what the same change of the weights does, and learn."""
    mixer, expected = case.build(), case.build()
    x, context = case.noise(2, n, WIDTH), Context(lengths=torch.tensor([n, n - 3], device=case.device))
    found = adapted(mixer)
    merged = {name: layer for name, layer in layers_of(expected).items() if type(layer) is nn.Linear}
    y, loss = trained(mixer, x, context)
    loss.backward()
    for adapter in found:
        assert adapter.up.grad is not None, "an adapter gets no gradient"
        assert adapter.up.grad.any() or adapter.down.grad.any(), "the gradient of an adapter is zero"
    if len(merged) == len(found):  # a layer with a mask of its own has no weight that would do
        with torch.no_grad():
            for layer, adapter in zip(merged.values(), found, strict=True):
                layer.weight += adapter.delta()
        wanted, wanted_loss = trained(expected, x, Context(lengths=context.lengths))
        assert_close(y, wanted, 1e-9, "adapted")
        grads = torch.autograd.grad(wanted_loss, [layer.weight for layer in merged.values()])
        for adapter, d_weight in zip(found, grads, strict=True):
            assert_close(adapter.up.grad, d_weight @ adapter.down.mT, 1e-8, "gradient of an adapter", 1e-3)


def pruning(case: Case, n: int = 12) -> None:
    """Pruned layers have the weights that `weight_orig` and the mask give, also after a step of training."""
    mixer, expected, x = case.build(), case.build(), case.noise(2, n, WIDTH)
    layers, dense = layers_of(mixer), layers_of(expected)
    for i, layer in enumerate(layers.values()):
        mask = (case.noise(*layer.weight.shape, seed=i) > 0).double()
        prune.custom_from_mask(layer, "weight", mask)
    for _ in range(2):
        with torch.no_grad():
            for name, layer in layers.items():
                dense[name].weight.copy_(layer.weight_orig * layer.weight_mask)
        for p in mixer.parameters():
            p.grad = None
        y, loss = trained(mixer, x)
        wanted, wanted_loss = trained(expected, x)
        assert_close(y, wanted, 1e-9, "pruned")
        loss.backward()
        grads = torch.autograd.grad(wanted_loss, [layer.weight for layer in dense.values()])
        for layer, d_weight in zip(layers.values(), grads, strict=True):
            assert_close(layer.weight_orig.grad, d_weight * layer.weight_mask, 1e-8, "gradient of weight_orig", 1e-3)
            with torch.no_grad():
                layer.weight_orig.add_(0.1 * case.noise(*d_weight.shape, seed=5))


def checkpointing(case: Case, dtype: torch.dtype, use_reentrant: bool, n: int = 24) -> None:
    """Gradients are the same where the pass is run again in the backward pass."""
    x, fields = case.noise(2, n, WIDTH).to(dtype).requires_grad_(), {"timespans": case.spans(2, n).to(dtype)}

    def gradients_of(again: bool) -> list[Tensor]:
        mixer = case.build(dtype)

        def forward(x: Tensor) -> tuple[Tensor, ...]:
            context = Context(**fields)
            y, state = mixer(x, None, context)
            state = [leaf for leaf in tree_leaves(state) if leaf.is_floating_point()]
            return y, *state, sum(context.losses, y.new_zeros(()))

        outputs = checkpoint(forward, x, use_reentrant=use_reentrant) if again else forward(x)
        inputs = [x, *mixer.parameters()]
        for p in inputs:
            p.grad = None
        weighed = [(leaf * case.noise(*leaf.shape, seed=i).to(leaf)).sum() for i, leaf in enumerate(outputs)]
        sum(weighed).backward()
        return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in inputs]

    names = ["x", *parameter_names(case.build(dtype))]
    assert_close_gradients(gradients_of(True), gradients_of(False), TOLERANCE[dtype], "checkpointed", names)


# ---- 13: second derivatives, forward mode, torch.func


def hessian_product(mixer: Mixer, n: int, fields: dict[str, Tensor], start: Any = None) -> tuple[list, list, list]:
    """Inputs and parameters, directions for each, and the product of the Hessian of a loss with them.

    The losses that a mixer leaves in its context are left out: what they hold constant has no Hessian.
    """
    dtype, device = dtype_of(mixer), next(mixer.parameters()).device
    inputs = [noise(2, n, WIDTH, device=device).to(dtype).requires_grad_(), *mixer.parameters()]
    directions = [noise(*t.shape, seed=31 + i, device=device).to(dtype) for i, t in enumerate(inputs)]
    gradients = loss_gradients(mixer, inputs, fields, start, create_graph=True)
    dot = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True))
    return inputs, directions, list(torch.autograd.grad(dot, inputs, allow_unused=True, materialize_grads=True))


def loss_gradients(
    mixer: Mixer, inputs: list[Tensor], fields: dict[str, Tensor], start: Any = None, create_graph: bool = False
) -> Sequence[Tensor]:
    """Gradients of a loss that is curved in the outputs."""
    y, _ = mixer(inputs[0], None if start is None else zoo.fork(start), Context(**fields))
    loss = (y * noise(*y.shape, seed=9, device=y.device).to(y)).sin().mean()
    return torch.autograd.grad(loss, inputs, create_graph=create_graph, allow_unused=True, materialize_grads=True)


def second_derivatives(case: Case, n: int = 20) -> None:
    """The product of the Hessian with a direction is the change of the gradients along it."""
    mixer, fields = case.build(), {"timespans": case.spans(2, n)}
    inputs, directions, product = hessian_product(mixer, n, fields)
    step, ends = 1e-6, []
    for sign in (1, -2, 1):
        with torch.no_grad():
            for t, d in zip(inputs, directions, strict=True):
                t.add_(sign * step * d)
        ends.append(loss_gradients(mixer, inputs, fields))
    expected = [(a - b) / (2 * step) for a, b in zip(ends[0], ends[1], strict=True)]
    floor = max(e.abs().max().item() for e in expected)
    assert floor > 0, "nothing is curved"
    for name, actual, wanted in zip(["x", *parameter_names(mixer)], product, expected, strict=True):
        assert_close(actual, wanted, 1e-6, f"Hessian product of {name}", floor)


def second_derivatives_of_kernels(case: Case, n: int = 280) -> None:
    """In float32, packed and ragged and from a state, products with the Hessian are those of float64."""
    resets = torch.zeros(2, n, dtype=torch.bool, device=case.device)
    resets[0, 5] = resets[1, n // 2] = True

    def product(dtype: torch.dtype) -> list[Tensor]:
        mixer, fields = case.build(dtype), {"timespans": case.spans(2, n).to(dtype)}
        start = None
        if mixer.causal and not mixer.traits.couples_rows:
            fields |= {"lengths": torch.tensor([n - 7, n], device=case.device), "resets": resets}
            with torch.no_grad():
                start = run(mixer, case.noise(2, 4, WIDTH, seed=1))[1]
        return hessian_product(mixer, n, fields, start)[2]

    actual, expected = product(torch.float32), product(torch.float64)
    floor = max(e.abs().max().item() for e in expected)
    for name, a, e in zip(["x", *parameter_names(case.build())], actual, expected, strict=True):
        assert_close(a, e, TOLERANCE[torch.float32], f"Hessian product of {name}", floor)


def transforms(case: Case, n: int = 10) -> None:
    """torch.func gives what autograd, finite differences and loops give: grad, jvp, vmap and jacrev; so does forward
    mode."""
    mixer, x, span = case.build(), case.noise(2, n, WIDTH), case.spans(2, n)
    values = {name: p.detach() for name, p in mixer.named_parameters()}
    tangents = {name: case.noise(*p.shape, seed=41 + i) for i, (name, p) in enumerate(values.items())}
    along, step = case.noise(*x.shape, seed=40), 1e-6

    def f(values: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(mixer, values, (x, None, Context(timespans=span[: len(x)])))[0]

    def moved(values: dict[str, Tensor], x: Tensor, by: float) -> Tensor:
        return f({name: v + by * tangents[name] for name, v in values.items()}, x + by * along)

    slope = (moved(values, x, step) - moved(values, x, -step)) / (2 * step)
    assert_close(torch.func.jvp(f, (values, x), (tangents, along))[1], slope, 1e-6, "jvp")
    with forward_ad.dual_level():
        dual = f(values, forward_ad.make_dual(x, along))
        across = forward_ad.unpack_dual(dual).tangent
    assert across is not None, "forward mode: no tangent"
    slope = (f(values, x + step * along) - f(values, x - step * along)) / (2 * step)
    assert_close(across, slope, 1e-6, "forward mode")
    jacobian = torch.func.jacrev(lambda x: f(values, x)[:, -1, :2])(x)
    assert_close((jacobian * along).sum((-3, -2, -1)), slope[:, -1, :2], 1e-6, "jacrev")

    own = case.build()  # functional_call leaves its own tensors in a module that is shared
    inputs = list(own.parameters())
    expected = torch.autograd.grad(own(x, None, Context(timespans=span))[0].sin().sum(), inputs, allow_unused=True)
    found = torch.func.grad(lambda values: f(values, x).sin().sum())(values)
    wanted = [torch.zeros_like(p) if g is None else g for p, g in zip(inputs, expected, strict=True)]
    assert_close_gradients(list(found.values()), wanted, 1e-9, "grad", list(values))

    rows = torch.func.vmap(lambda row: f(values, row[None])[0])(x)
    if not mixer.traits.couples_rows:
        assert_close(rows, torch.cat([f(values, row[None]) for row in x]), 1e-9, "vmap over inputs")
    lengths = torch.tensor([[n, n - 4], [2, n]], device=case.device)
    resets = torch.arange(4 * n, device=case.device).view(2, 2, n) % 7 == 3

    def packed(x: Tensor, lengths: Tensor, resets: Tensor) -> Tensor:
        y, state = mixer(x, None, Context(lengths, resets))
        return mixer(x, state)[0] if mixer.causal else y

    crowd = torch.stack([x, case.noise(*x.shape, seed=42)])
    try:
        rows = torch.func.vmap(packed)(crowd, lengths, resets)
    except zoo.UsageError:  # a mixer for whom the number of documents is a shape
        assert mixer.traits.not_compilable
    else:
        one_by_one = torch.stack([packed(*given) for given in zip(crowd, lengths, resets, strict=True)])
        assert mixer.traits.couples_rows or error(rows, one_by_one) <= 1e-9, "vmap over packed and ragged rows"
    pair = {name: torch.stack([v, 1.1 * v]) for name, v in values.items()}
    both = torch.stack([f({name: v[i] for name, v in pair.items()}, x) for i in range(2)])
    assert_close(torch.func.vmap(f, in_dims=(0, None))(pair, x), both, 1e-9, "vmap over parameters")
