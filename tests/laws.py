"""The ten laws of the mixer contract (`zoo/protocol.py`) as checks that any mixer can be put to.

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
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

import zoo
from zoo import laws
from zoo.laws import TOLERANCE, assert_close, assert_same_run, dtype_of, exact, noise, run, spans
from zoo.ops.sparse_latent_attention import choose
from zoo.pattern import make_word, to_text
from zoo.protocol import Context, Mixer, Place, State, recurrent_dtype, tree_bytes
from zoo.registry import mixers

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
    right = counted <= said if mixer.work_varies else counted == said
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
    """`n` decode steps compile to at most two graphs, and give what one pass gives."""
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
            assert len(graphs) <= 2, f"a third graph is compiled at step {t}"
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
