"""Every registered mixer, and the wrapper, under every law, in every one of its `law_cases`."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from typing import Any, Literal, NamedTuple

import laws
import pytest
import torch
import torch.nn.functional as F
from laws import Case
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

import zoo
from zoo.core.options import Options
from zoo.protocol import Context, Mixer, Place, State, first_parameter_like, mixers, recurrent_dtype, tree_bytes

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["f64", "f32", "bf16"])


def cases_of(name: str) -> list[Case]:
    """The law cases of a mixer, and the first two again in a model that is not causal where that changes the mixer."""
    cls = mixers[name]
    cases = [Case(cls, options) for options in cls.law_cases()]
    looking_ahead = [Case(cls, case.options, causal=False) for case in cases[:2]]
    return cases + [case for case in looking_ahead if not case.build().causal and cases[0].build().causal]


CASES = {name: cases_of(name) for name in mixers.names()}
ALL = [case for cases in CASES.values() for case in cases]
CAUSAL = [case for case in ALL if case.build().causal]
FIRST = [cases[0] for cases in CASES.values()]


GPU = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"))


def over(cases: list[Case]) -> pytest.MarkDecorator:
    """Over `cases` on the CPU, and over the first of every mixer on a GPU."""
    on_gpu = [dataclasses.replace(case, device="cuda") for case in cases if case in FIRST]
    return pytest.mark.parametrize("case", [*cases, *(pytest.param(case, marks=GPU) for case in on_gpu)], ids=str)


@pytest.fixture(autouse=True)
def _other_default_device(request):
    """What is made without a device, where it should be made on that of the mixer, comes out on another one.

    So a law on the CPU fails at what would fail on a GPU. Of laws in several dtypes, in float32; not where a graph is
    traced, since dynamo does not trace `Tensor.unflatten` under a default device.
    """
    given = getattr(getattr(request.node, "callspec", None), "params", {})
    traced = request.function in (test_compiles, test_decode_graphs, test_other_cases_compile, test_inductor)
    elsewhere = not traced and given.get("dtype", torch.float32) == torch.float32
    with torch.device("meta") if elsewhere else contextlib.nullcontext():
        yield


@pytest.fixture(autouse=True)
def _fixed_choice(request, monkeypatch):
    """Sparse attention's choice is fixed in lower precision, except where runs of one shape are compared."""
    given = getattr(getattr(request.node, "callspec", None), "params", {})
    low = given.get("dtype") == torch.bfloat16 and request.function is not test_causality
    if low or request.function is test_autocast:
        monkeypatch.setattr(sys.modules[laws.choose.__module__], "choose", laws.choice_by_place)


def independent(case: Case) -> Case:
    """The case, in a law that takes rows of a batch apart."""
    if reason := case.build().traits.couples_rows:
        pytest.skip(f"{case} couples rows: {reason}")
    return case


def test_only_adaptive_solvers_couple_rows():
    coupled = {(case.mixer.name, case.options.get("solver")) for case in ALL if case.build().traits.couples_rows}
    assert coupled <= {("neural_ode", "dopri5")}


def test_only_zero_experts_vary_the_work():
    varying = [str(case) for case in ALL if case.build().traits.work_varies]
    assert varying == [str(case) for case in ALL if case.options.get("n_zero_experts")]


def test_every_mixer_is_here():
    assert set(zoo.list_mixers()) <= set(CASES)
    assert {"bidirectional"} == set(CASES) - set(zoo.list_mixers())


@over(ALL)
def test_cases_are_created_by_name(case):
    mixer = zoo.create_mixer(case.mixer.name, laws.WIDTH, place=Place(causal=case.causal), **case.options)
    assert type(mixer) is case.mixer
    assert mixer.config == case.build().config


@pytest.mark.parametrize("name", CASES)
def test_every_option_is_off_its_default_in_some_case(name):
    changed = {option for case in CASES[name] for option in case.mixer.Config(**case.options).changed()}
    assert changed >= set(mixers[name].Config.model_fields) - {"backend"}


@DTYPES
@over(CAUSAL)
def test_chunk_consistency(case, dtype):
    laws.chunk_consistency(case, dtype)


@DTYPES
@over([case for case in ALL if case.mixer.kind == "sequence"])
def test_causality(case, dtype):
    laws.causality(case, dtype)


@DTYPES
@over(ALL)
def test_batch_independence(case, dtype):
    laws.batch_independence(independent(case), dtype)


@pytest.mark.parametrize("steps", [1, 63, 64, 100])
@over([case for case in ALL if laws.backends(case)])
def test_forms(case, steps):
    laws.forms(case, steps)


@over([case for case in FIRST if laws.backends(case)])
def test_forms_at_length(case):
    laws.forms(case, 1000)


@DTYPES
@over(ALL)
def test_purity(case, dtype):
    laws.purity(case, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@over(CAUSAL)
def test_layout(case, dtype):
    laws.layout(case, dtype)


@DTYPES
@over(ALL)
def test_cost(case, dtype):
    laws.cost(case, dtype)


@pytest.mark.parametrize("context_length", [1, 2, 33, 100])
@over(CAUSAL)
def test_flops(case, context_length):
    laws.flops(independent(case), context_length)


@over(ALL)
def test_training_gradients(case):
    laws.training_gradients(case)


@over(CAUSAL)
def test_state_gradients(case):
    laws.state_gradients(case)


@over(ALL)
def test_autocast(case):
    laws.autocast(case)


def compilable(case: Case) -> Case:
    if reason := case.build().traits.not_compilable:
        pytest.skip(f"{case} does not compile: {reason}")
    return case


@over(FIRST)
def test_compiles(case):
    laws.compiles(compilable(case))


@over([case for case in FIRST if case in CAUSAL])
def test_decode_graphs(case):
    laws.decode_graphs(compilable(case))


@pytest.mark.slow
@over([case for case in ALL if case not in FIRST])
def test_other_cases_compile(case):
    laws.compiles(compilable(case))
    if case in CAUSAL:
        laws.decode_graphs(case)


@pytest.mark.slow
@over(FIRST)
def test_inductor(case):
    laws.compiles(compilable(case), backend="inductor")


@pytest.mark.parametrize("d_model", laws.WIDTHS)
@over(FIRST)
def test_any_size(case, d_model):
    laws.any_size(case, d_model)


@over([case for case in ALL if case not in FIRST])
def test_other_cases_at_an_odd_width(case):
    try:
        laws.any_size(case, 2 * 23)
    except zoo.UsageError:  # head counts given by hand need not divide every width
        assert case.options


@DTYPES
@over(ALL)
def test_packing(case, dtype):
    laws.packing(independent(case), dtype)


@DTYPES
@over(ALL)
def test_raggedness(case, dtype):
    laws.raggedness(independent(case), dtype)


@over(ALL)
def test_ragged_gradients(case):
    laws.ragged_gradients(independent(case))


@DTYPES
@over(CAUSAL)
def test_state_handling(case, dtype):
    laws.state_handling(independent(case), dtype)


@over(ALL)
def test_hooks_fire(case):
    laws.hooks_fire(case)


@over([case for case in ALL if laws.layers_of(case.build())])
def test_adapters(case):
    laws.adapters(case)


@over([case for case in FIRST if laws.layers_of(case.build())])
def test_pruning(case):
    laws.pruning(case)


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["not reentrant", "reentrant"])
@over(ALL)
def test_checkpointing(case, use_reentrant):
    laws.checkpointing(case, torch.float32, use_reentrant)


NOT_TRANSFORMED = {"positivity": "clip", "adjoint": True, "solver": "dopri5"}
"""Options under which torch.func is refused by name."""
REFUSED = {"ltc": "positivity", "neural_ode": "adjoint"}
"""Options without second derivatives, which say so by name."""


@over(ALL)
def test_second_derivatives(case):
    option = REFUSED.get(case.mixer.name)
    if option in case.options:
        with pytest.raises(
            zoo.UsageError, match=f"{case.mixer.name}: {option}=.*no second derivatives; take {option}="
        ):
            laws.second_derivatives(case)
    else:
        laws.second_derivatives(case)


@over([case for case in FIRST if case.mixer.name != "neural_ode"])  # which has no kernel, and a long loop
def test_second_derivatives_of_kernels(case):
    laws.second_derivatives_of_kernels(case, 100 if case.mixer.name == "ltc" else 280)


@over([case for case in FIRST if laws.backends(case)])
def test_second_derivatives_without_kernels(case, monkeypatch):
    monkeypatch.setenv("ZOO_KERNELS", "off")
    laws.second_derivatives_of_kernels(case, 70)


@over(FIRST)
def test_transforms(case):
    laws.transforms(case)


@over([case for case in ALL if case not in FIRST])
def test_transforms_are_right_or_refused(case):
    """Forms that were asked for by name, and options that are another library's, may refuse."""
    backend = case.options.get("backend", "reference")
    refused = [option for option, value in NOT_TRANSFORMED.items() if case.options.get(option) == value]
    refused = ["backend"] if backend != "reference" else refused
    if not refused:
        laws.transforms(case)
        return
    with pytest.raises(zoo.UsageError, match=f"^[a-z0-9_]+: .*{refused[0]}="):
        laws.transforms(case)


# ---- the laws can fail: a sound toy keeps them all, and each of its flaws breaks the law it is against


class ToyState(NamedTuple):
    h: Tensor


class UnpacksTwice(torch.autograd.Function):
    """y^2, its input taken from the context twice."""

    @staticmethod
    def forward(y):
        return y * y

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, d):
        return d * (ctx.saved_tensors[0] + ctx.saved_tensors[0])


class DifferentiatesOnce(UnpacksTwice):
    """y^2, its gradient a constant."""

    @staticmethod
    @once_differentiable
    def backward(ctx, d):
        return 2 * d * ctx.saved_tensors[0]


class Toy(Mixer):
    """h_t = a h_{t-1} + W x_t, y = U h, with one flaw on request."""

    name = "toy"

    class Config(Options):
        backend: Literal["reference", "fast"] = "fast"
        flaw: str | None = None

    def __init__(self, d_model: int, config: Config, *, place: Place = Place()):
        super().__init__(d_model, config, place=place)
        self.w_in = nn.Linear(d_model, d_model, bias=False)
        self.w_out = nn.Linear(d_model, d_model, bias=False)
        self.decay = nn.Parameter(torch.linspace(-2, 2, d_model))
        self.causal = config.flaw != "claims to look ahead"
        self.calls = 0
        if config.flaw == "unused parameter":
            self.unused = nn.Parameter(torch.ones(3))
        if config.flaw == "meta":
            self.w_out = nn.Linear(d_model, d_model, bias=self.decay.is_meta)

    def init_state(self, batch_size: int, *, capacity: int | None = None, device=None, dtype=None) -> State:
        shape = (self.d_model, batch_size) if self.config.flaw == "layout" else (batch_size, self.d_model)
        if self.config.flaw != "default device":
            device, dtype = first_parameter_like(self, device, dtype)
        return ToyState(torch.zeros(shape, device=device, dtype=recurrent_dtype(dtype or self.decay.dtype)))

    def forward(self, x: Tensor, state: State | None = None, context: Context | None = None) -> tuple[Tensor, State]:
        flaw, n = self.config.flaw, x.shape[1]
        context = Context() if context is None else context
        h = self.init_state(len(x), dtype=x.dtype).h if state is None or flaw == "restarts" else state.h
        h = h.mT if flaw == "layout" else h
        h = h.detach() if flaw == "detaches" else h
        if flaw == "writes":
            x[:, -1] += 1
        if flaw == "writes the state":
            h += 1
        a, scale = self.decay.sigmoid(), 1.0
        steps = []
        for t in range(n):
            keep = torch.ones_like(h)
            if context.resets is not None and flaw != "ignores resets":
                keep = keep.masked_fill(context.resets[:, t, None], 0)
            new = a * keep * h + self.w_in(x[:, t])
            if context.lengths is not None and flaw != "ignores lengths":
                new = torch.where((t < context.lengths)[:, None], new, h)
            h = new
            steps.append(h)
        h_all = torch.stack(steps, 1).to(x.dtype)
        base = getattr(self.w_out, "base", self.w_out)
        y = F.linear(h_all, base.weight) if flaw == "reads weights" else self.w_out(h_all)
        if flaw in (UnpacksTwice.__name__, DifferentiatesOnce.__name__):
            y = {f.__name__: f for f in (UnpacksTwice, DifferentiatesOnce)}[flaw].apply(y)
        if flaw == "drops tangents" and forward_ad._current_level >= 0:
            y = y.detach()
        fast = self.config.backend == "fast"
        if flaw == "value of a form" and fast:
            scale = 1 + 1e-6
        if flaw == "gradient of a form" and fast:
            y = y + 1e-6 * (y - y.detach())
        if flaw == "looks ahead":
            y = y + x.mean(1, keepdim=True)
        if flaw == "mixes rows":
            y = y + x.mean(0, keepdim=True)
        if flaw == "reads garbage":
            y = y + 0 * torch.empty_like(y)
        if flaw == "remembers":
            self.calls += 1
            scale = 1 + self.calls
        if flaw == "counts steps":
            self.calls += 1
            scale = 1 + 0 * self.calls
        if flaw == "breaks the graph" and y.sum().item() > 1e9:
            scale = 2.0
        if flaw == "overflows in autocast" and torch.is_autocast_enabled("cpu"):
            scale = float("inf")
        if flaw == "drops the odd step" and n % 2:
            y = F.pad(y[:, :-1], (0, 0, 0, 1))
        if flaw == "learns from padding":
            y = y + 0.1 * x.mean((0, 1)) - 0.1 * x.mean((0, 1)).detach()
        h = h.mT.contiguous().mT if flaw == "other strides" else h
        return scale * y, ToyState(h.mT if flaw == "layout" else h)

    def flops_per_token(self, context_length: int) -> int:
        return (2 if self.config.flaw == "half the flops" else 4) * self.d_model**2

    def state_bytes(self, batch_size: int, context_length: int, dtype: torch.dtype) -> int:
        dtype = dtype if self.config.flaw == "bytes" else recurrent_dtype(dtype)
        return tree_bytes(torch.empty(batch_size, self.d_model, dtype=dtype, device="meta"))


F64 = {"dtype": torch.float64}
CHECKS: dict[str, tuple[Any, dict[str, Any]]] = {
    "chunk consistency": (laws.chunk_consistency, F64),
    "causality": (laws.causality, F64),
    "batch independence": (laws.batch_independence, F64),
    "forms": (laws.forms, {"steps": 63}),
    "purity": (laws.purity, F64),
    "layout": (laws.layout, {"dtype": torch.float32}),
    "cost": (laws.cost, {"dtype": torch.bfloat16}),
    "flops": (laws.flops, {"context_length": 5}),
    "training gradients": (laws.training_gradients, {}),
    "state gradients": (laws.state_gradients, {}),
    "compiles": (laws.compiles, {}),
    "autocast": (laws.autocast, {}),
    "decode graphs": (laws.decode_graphs, {"n": 20}),
    "any size": (laws.any_size, {"d_model": 18}),
    "packing": (laws.packing, F64),
    "raggedness": (laws.raggedness, F64),
    "ragged gradients": (laws.ragged_gradients, {}),
    "state handling": (laws.state_handling, F64),
    "hooks": (laws.hooks_fire, {}),
    "adapters": (laws.adapters, {}),
    "pruning": (laws.pruning, {}),
    "checkpointing": (laws.checkpointing, {**F64, "use_reentrant": False}),
    "second derivatives": (laws.second_derivatives, {}),
    "transforms": (laws.transforms, {}),
}
FLAWS = {
    "default device": ["chunk consistency", "purity"],
    "restarts": ["chunk consistency", "state handling"],
    "looks ahead": ["causality"],
    "claims to look ahead": ["causality"],
    "mixes rows": ["batch independence"],
    "value of a form": ["forms"],
    "gradient of a form": ["forms"],
    "writes": ["purity"],
    "writes the state": ["purity"],
    "reads garbage": ["purity", "any size"],
    "remembers": ["purity"],
    "other strides": ["layout"],
    "bytes": ["cost"],
    "meta": ["cost"],
    "half the flops": ["flops"],
    "unused parameter": ["training gradients"],
    "detaches": ["state gradients"],
    "breaks the graph": ["compiles"],
    "overflows in autocast": ["autocast"],
    "counts steps": ["decode graphs"],
    "drops the odd step": ["any size"],
    "ignores resets": ["packing"],
    "ignores lengths": ["raggedness"],
    "learns from padding": ["ragged gradients"],
    "layout": ["state handling"],
    "reads weights": ["hooks", "adapters", "pruning"],
    "UnpacksTwice": ["checkpointing"],
    "DifferentiatesOnce": ["second derivatives"],
    "drops tangents": ["transforms"],
}


@pytest.mark.parametrize("law", CHECKS)
def test_a_sound_mixer_keeps_every_law(law):
    check, arguments = CHECKS[law]
    check(Case(Toy), **arguments)


@pytest.mark.parametrize(("flaw", "law"), [(flaw, law) for flaw, broken in FLAWS.items() for law in broken])
def test_a_flaw_breaks_its_law(flaw, law):
    check, arguments = CHECKS[law]
    # a state that forward returns in another form than init_state's is refused at the door, before the law compares it
    broken = (
        zoo.UsageError if flaw == "layout" else (AssertionError, RuntimeError, torch._dynamo.exc.TorchDynamoException)
    )
    with pytest.raises(broken):
        check(Case(Toy, {"flaw": flaw}), **arguments)


def test_every_law_can_fail():
    assert {law for broken in FLAWS.values() for law in broken} == set(CHECKS)


def test_memory_is_poisoned():
    with torch.device("cpu"):
        x = torch.ones(2, 3)
        for fresh in (torch.empty(2, 3), torch.empty_like(x), x.new_empty(2), torch.empty_strided((2,), (1,))):
            assert fresh.isnan().all()


def test_registry_is_untouched():
    assert "toy" not in mixers
