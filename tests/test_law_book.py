"""The laws can fail: a sound toy keeps them all, and each of its flaws breaks the law that it is against."""

from __future__ import annotations

import re
from typing import Any, Literal, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

import zoo
from zoo.core.options import Options
from zoo.laws import LAWS, Case, Check, Finding, LawBroken, Verdict, plan, poisoned_memory
from zoo.laws.verdicts import lines
from zoo.protocol import (
    Context,
    Mixer,
    Norm,
    Place,
    State,
    Traits,
    first_parameter_like,
    mixers,
    recurrent_dtype,
    register,
)
from zoo.residual import Connection
from zoo.states import tree_bytes


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
        if flaw == "differentiates once in float32":
            y = DifferentiatesOnce.apply(y) if y.dtype == torch.float32 else y * y
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
        if flaw == "reads padded times" and context.timespans is not None:
            y = y + 0 * context.timespans.to(y).sum()
        if flaw == "learns from padding":
            y = y + 0.1 * x.mean((0, 1)) - 0.1 * x.mean((0, 1)).detach()
        h = h.mT.contiguous().mT if flaw == "other strides" else h
        if flaw == "returns the outputs alone":
            return y  # type: ignore[return-value]
        return scale * y, ToyState(h.mT if flaw == "layout" else h)

    def flops_per_token(self, context_length: int) -> int:
        return (2 if self.config.flaw == "half the flops" else 4) * self.d_model**2

    @classmethod
    def law_cases(cls) -> list[dict[str, Any]]:
        return [{}, {"flaw": "none"}]

    def state_bytes(self, batch_size: int, context_length: int, dtype: torch.dtype) -> int:
        dtype = dtype if self.config.flaw == "bytes" else recurrent_dtype(dtype)
        return tree_bytes(torch.empty(batch_size, self.d_model, dtype=dtype, device="meta"))


class Doorless(Toy):
    """The toy, which lets in what does not fit."""

    def __call__(self, x: Tensor, state: Any = None, context: Any = None) -> tuple[Tensor, State]:
        if self.config.flaw == "takes any state" and not isinstance(state, ToyState):
            state = None
        if self.config.flaw == "takes any context" and isinstance(context, Context):
            context = Context(context.lengths, context.resets)
        return super().__call__(x, state, context)


class Apart(Toy):
    """The toy, which says that it hands states on by itself where a sequence is cut, and does not."""

    traits = Traits(cuts_in_ops=True)


class Untried(Toy):
    """The toy, with an option that no law case changes."""

    class Config(Toy.Config):
        size: int = 1


ODD = {"untried": Untried, "keeps to its piece": Apart}
F32, BF16 = torch.float32, torch.bfloat16
SETTINGS: dict[str, dict[str, Any]] = {"forms": {"steps": 63}, "graphs of decoding": {"n": 20}}
"""With which the laws are tried here, where not with their principal ones."""
FLAWS = {
    "returns the outputs alone": ["contract"],
    "untried": ["law cases"],
    "default device": ["chunk consistency", "purity"],
    "restarts": ["chunk consistency", "states of rows"],
    "looks ahead": ["causality"],
    "claims to look ahead": ["causality"],
    "mixes rows": ["batch independence"],
    "value of a form": ["forms"],
    "gradient of a form": ["forms"],
    "writes": ["purity"],
    "writes the state": ["purity"],
    "reads garbage": ["purity", "any size"],
    "remembers": ["purity"],
    "other strides": ["layout of states"],
    "bytes": ["cost"],
    "meta": ["cost"],
    "half the flops": ["flops"],
    "unused parameter": ["gradients"],
    "detaches": ["gradients through the state"],
    "breaks the graph": ["compilation"],
    "overflows in autocast": ["autocast"],
    "counts steps": ["graphs of decoding"],
    "drops the odd step": ["any size"],
    "ignores resets": ["packing"],
    "ignores lengths": ["raggedness"],
    "learns from padding": ["ragged gradients"],
    "layout": ["states of rows"],
    "takes any state": ["refusal of states"],
    "takes any context": ["refusal of inputs"],
    "reads padded times": ["whole numbers"],
    "reads weights": ["hooks", "adapters", "pruning"],
    "UnpacksTwice": ["checkpointing"],
    "DifferentiatesOnce": ["second derivatives"],
    "differentiates once in float32": ["second derivatives of kernels"],
    "drops tangents": ["transforms"],
    "keeps to its piece": ["pieces"],
}


BRIEF = [law for law in LAWS if LAWS[law].brief]


def finding(law: str, dtype: torch.dtype | None = None, brief: bool = False, **options: Any) -> zoo.laws.Finding:
    chosen = LAWS[law]
    setting = SETTINGS.get(law, chosen.settings[0]) | ({"brief": True} if brief else {})
    flaw = str(options.get("flaw"))
    toy = Doorless if flaw.startswith("takes any") else ODD.get(flaw, Toy)
    return Check(chosen, Case(toy, options), dtype or chosen.dtypes[0], setting).find()


@pytest.mark.parametrize("law", LAWS)
def test_a_sound_mixer_keeps_every_law(law):
    for dtype in LAWS[law].dtypes:
        found = finding(law, dtype)
        assert found.broken is None
        assert found.note is None


@pytest.mark.parametrize("law", BRIEF)
def test_a_sound_mixer_keeps_the_brief_form_of_a_law(law):
    assert finding(law, brief=True).broken is None


@pytest.mark.parametrize("law", BRIEF)
def test_a_flaw_breaks_the_brief_form_of_its_law(law):
    for flaw in [flaw for flaw, broken in FLAWS.items() if law in broken]:
        assert finding(law, brief=True, flaw=flaw).broken, flaw


def test_other_cases_and_precisions_are_checked_in_brief_unless_all_is_checked():
    law = LAWS["packing"]
    checks = plan(law, [Case(Toy, {}), Case(Toy, {"backend": "reference"})])
    assert [(dict(check.case.options), check.dtype, check.setting.get("brief", False)) for check in checks] == [
        ({}, law.dtypes[0], False),
        *[({}, dtype, True) for dtype in law.dtypes[1:]],
        ({"backend": "reference"}, law.dtypes[0], True),
    ]


def test_all_is_every_case_in_every_precision_and_with_every_setting_in_the_principal_one():
    cases = [Case(Toy, {}), Case(Toy, {"backend": "reference"})]

    def every(law: str) -> list[tuple[Any, ...]]:
        checks = plan(LAWS[law], cases, thorough=True)
        assert not any("brief" in check.setting for check in checks)
        return [(cases.index(check.case), check.dtype, *check.setting.values()) for check in checks]

    precisions = [(F32, 20), (F32, 37), (torch.float64, 37), (BF16, 37)]
    assert every("packing") == [(i, *precision) for i in range(2) for precision in precisions]
    lengths = [(0, 70), (0, 1), (0, 100), (0, 63), (0, 64), (0, 1000), (1, 70), (1, 1), (1, 100), (1, 63), (1, 64)]
    assert every("forms") == [(i, torch.float64, n) for i, n in lengths]
    assert every("compilation") == [(0, F32, "inductor", 4), (1, F32, "aot_eager")]


@pytest.mark.parametrize(("flaw", "law"), [(flaw, law) for flaw, broken in FLAWS.items() for law in broken])
def test_a_flaw_breaks_its_law(flaw, law):
    found = finding(law, BF16 if flaw == "bytes" else None, flaw=flaw)
    assert found.broken
    line = str(found)
    assert line.startswith(f"toy: law {LAWS[law].number}, {law}, does not hold in ")
    assert "\n" not in line


def test_every_law_can_fail():
    assert {law for broken in FLAWS.values() for law in broken} == set(LAWS)


def test_a_broken_law_is_named_with_its_case_length_and_error():
    toy = Toy(32, Toy.Config(flaw="ignores resets"))
    with pytest.raises(
        LawBroken, match=r"^toy: law 9, packing, does not hold in float32, n=20: .* relative error \d.* above"
    ):
        zoo.laws.check(toy, laws=[9])
    assert [found.law.name for found in zoo.laws.check(toy, laws=[2, "purity"], dtypes=[F32])] == [
        "causality",
        "purity",
    ]
    with pytest.raises(zoo.UsageError, match=r"Unknown law 'purit'.*purity"):
        zoo.laws.check(toy, laws=["purit"])


def test_the_checked_mixer_stays_as_it_is():
    mixer = zoo.create_mixer("min_gru", 32).eval()
    before = {name: p.clone() for name, p in mixer.state_dict().items()}
    zoo.laws.check(mixer, laws=["purity", "gradients", "adapters", "pruning"])
    assert all(torch.equal(p, before[name]) for name, p in mixer.state_dict().items())
    assert all(p.grad is None for p in mixer.parameters())
    assert not mixer.training


class Returns(Toy):
    """The toy with other results; the flaw says which."""

    def init_state(self, batch_size: int, *, capacity: int | None = None, device=None, dtype=None) -> State:
        state = super().init_state(batch_size, capacity=capacity, device=device, dtype=dtype)
        return {"bare": state.h, "a list": (state.h, [state.h]), "no tuple": None}.get(self.config.flaw, state)

    def forward(self, x: Tensor, state: State | None = None, context: Context | None = None) -> tuple[Tensor, State]:
        y, state = Toy.forward(self, x)
        flaw = self.config.flaw
        if flaw == "no such attribute":
            return self.missing
        y = {"narrow": y[..., :1], "double": y.double(), "detached": y.detach()}.get(flaw, y)
        return (y, state, 1) if flaw == "three values" else (y, () if flaw == "another state" else state)

    def step(self, x_t: Tensor, state: State, context: Context | None = None) -> tuple[Tensor, State]:
        return self(x_t[:, None]) if self.config.flaw == "step of a sequence" else super().step(x_t, state, context)

    def flops_per_token(self, context_length: int) -> int:
        return 2.0 if self.config.flaw == "half a number" else 2  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("flaw", "said"),
    [
        (
            "bare",
            r"init_state returns a tensor \(2, 32\) float32 as a state: a state is a NamedTuple of ",
        ),
        ("a list", "init_state returns a tuple with a list as a state: a state is a NamedTuple"),
        ("no tuple", "init_state returns a NoneType as a state"),
        ("three values", r"forward returns 3 values, expected \(y, next state\)"),
        ("narrow", r"forward returns a tensor \(2, 3, 1\) float32 as y, expected a tensor \(2, 3, 32\) float32"),
        ("double", r"forward returns a tensor \(2, 3, 32\) float64 as y"),
        ("detached", "the outputs of forward have no gradient"),
        ("another state", r"forward returns another state than init_state: toy: state is \(\), expected ToyState"),
        ("step of a sequence", r"step returns a tensor \(2, 1, 32\) float32 as y, expected a tensor \(2, 32\)"),
        ("half a number", "flops_per_token returns 2.0, expected a whole number"),
        ("no such attribute", r"AttributeError: .*'missing' \(test_law_book.py, line \d+\)"),
    ],
)
def test_a_broken_contract_is_one_line_and_no_other_law_is_checked(flaw, said):
    mixer = Returns(32, Toy.Config(flaw=flaw))
    (found,) = zoo.laws.examine(mixer, laws=[1, 2, 9], dtypes=[F32])
    assert str(found).startswith("toy: law 0, contract, does not hold in float32: ")
    assert re.search(said, found.broken)
    with pytest.raises(LawBroken, match=f"^contract: .*{said}"):
        zoo.laws.quick(mixer)


class Scaled(Norm):
    """x / rms(x) w, with one flaw on request."""

    axes = ("channels", "time")

    class Config(Options):
        flaw: str | None = None
        untried: int = 1

    def __init__(self, d_model: int, config: Config, *, eps: float, axis: str = "channels"):
        super().__init__(d_model, config, eps=eps, axis=axis)
        self.weight = nn.Parameter(torch.ones(d_model))

    @classmethod
    def law_cases(cls) -> list[dict[str, Any]]:
        return [{}, {"flaw": "none", "untried": 2}]

    def forward(self, x: Tensor) -> Tensor:
        flaw = self.config.flaw
        mean = x.square().mean(1 if self.axis == "time" and flaw != "mixes channels" else -1, keepdim=True)
        y = x * self.weight * (mean if flaw == "divides by zero" else mean + self.eps).rsqrt()
        if flaw == "narrow":
            y = y[..., :1]
        if flaw == "float32":
            y = y.float()
        if flaw == "reads other steps":
            y = y - y.mean(1, keepdim=True)
        if flaw == "reads other rows" and self.axis == "channels":
            y = y - y.mean(0, keepdim=True)
        if flaw == "reads other streams" and y.ndim == 4:
            y = y - y.mean(2, keepdim=True)
        if flaw == "breaks the graph" and y.sum().item() > 1e9:
            y = 2 * y
        if flaw == "drops the odd channel" and y.shape[-1] == 46:
            y = y[..., 1:]
        return y + y.detach() if flaw == "wrong gradient" else y


Scaled.name = "scaled"


@pytest.mark.parametrize(
    ("flaw", "law", "said"),
    [
        ("narrow", "contract", r"forward returns \(2, 3, 1\) float32, expected \(2, 3, 32\) float32"),
        ("float32", "contract", r"returns \(2, 3, 32\) float32, expected \(2, 3, 32\) bfloat16"),
        ("divides by zero", "contract", "the norm of zeros, such as padding, is not finite"),
        ("reads other streams", "contract", "one stream of several"),
        ("mixes channels", "contract", 'channels beside others, along axis="time"'),
        ("reads other steps", "chunk consistency", "cut at"),
        ("reads other rows", "batch independence", "row 0 alone"),
        ("breaks the graph", "compilation", "backend=eager"),
        ("drops the odd channel", "any size", ""),
        ("wrong gradient", "second derivatives", ""),
    ],
)
def test_a_flaw_of_a_norm_breaks_its_law(flaw, law, said):
    norm = Scaled(32, Scaled.Config(flaw=flaw), eps=1e-5)
    with pytest.raises(LawBroken, match=rf'^scaled\(flaw="{flaw}"\): law \d+, {law}, does not hold in .*{said}'):
        zoo.laws.check(norm, laws=["contract", law])


class Steps(Connection):
    """x + y, with one flaw on request."""

    class Config(Options):
        flaw: str | None = None

    @classmethod
    def law_cases(cls) -> list[dict[str, Any]]:
        return [{}, {"flaw": "none"}]

    def forward(self, stream: Tensor) -> Any:
        flaw = self.config.flaw
        h = stream[..., :1] if flaw == "narrow" else stream
        return (h, stream) if flaw == "two values" else (h, stream, None)

    def write(self, stream: Tensor, y: Tensor, weights: None) -> Tensor:
        flaw = self.config.flaw
        if flaw == "writes in place":
            return stream.add_(y)
        return (stream + y).mean(1) if flaw == "loses steps" else stream + y

    def flops_per_token(self) -> int:
        return 7 if self.config.flaw == "counts too many" else 0


Steps.name = "steps"


@pytest.mark.parametrize(
    ("flaw", "law", "said"),
    [
        ("narrow", "contract", r"forward, as h, returns \(2, 3, 1\)"),
        ("two values", "contract", r"forward does not return \(h, the stream"),
        ("loses steps", "contract", r"write returns \(2, 32\) float32, expected \(2, 3, 32\)"),
        ("writes in place", "purity", "x was written to"),
        ("counts too many", "flops", r"flops_per_token\(33\) = 4110 counted as 4096"),
    ],
)
def test_a_flaw_of_a_residual_kind_breaks_its_law(flaw, law, said):
    operator = Steps(32, Steps.Config(flaw=flaw), index=0, eps=1e-5)
    with pytest.raises(LawBroken, match=rf'^steps\(flaw="{flaw}"\): law \d+, {law}, does not hold in .*{said}'):
        zoo.laws.check(operator, laws=["contract", law])


def test_memory_is_poisoned():
    with poisoned_memory():
        x = torch.ones(2, 3)
        for fresh in (torch.empty(2, 3), torch.empty_like(x), x.new_empty(2), torch.empty_strided((2,), (1,))):
            assert fresh.isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.fixture
def registered(monkeypatch):
    """The toy in the registry, for one test."""
    mixers.names()
    monkeypatch.setattr(mixers, "_classes", dict(mixers._classes))
    monkeypatch.delattr(Toy, "name")
    register("toy")(Toy)


def test_the_command_ends_with_0_or_1(registered, capsys):
    from zoo.cli import main

    def ended(*words: str) -> tuple[object, list[str]]:
        with pytest.raises(SystemExit) as caught:
            main(["laws", *words])
        return caught.value.code, capsys.readouterr().out.splitlines()

    status, lines = ended("toy", "--law", "9", "--law", "purity")
    assert status == 0
    assert [line[:12].split() for line in lines[1:3]] == [["5", "purity"], ["9", "packing"]]
    told = "1 of 2 laws were checked of the first of 2 law cases only; --all checks every case in every precision."
    assert lines[3] == f"toy: every law holds. {told}"
    assert ended("toy", "--law", "purity", "--all")[1][-1] == "toy: every law holds."
    assert ended("toy", "--law", "9")[1][-1] == "toy: every law holds."
    assert ended("toy(flaw='none')", "--law", "purity")[1][-1] == "toy(flaw='none'): every law holds."
    status, lines = ended("toy(flaw='ignores resets')", "--law", "9")
    assert status == 1
    assert (
        'BROKEN: toy(flaw="ignores resets"), float32, n=20: row 1, in one pass: outputs of 20 steps: relative error'
        in lines[1]
    )
    assert ended("toy", "--law", "77")[0] == 2
    assert ended("to")[0] == 2
    status, lines = ended("toy(flaw='returns the outputs alone')")
    assert status == 1
    assert len(lines) == 3
    assert lines[2].endswith(": the contract is broken, and no other law was checked.")
    status, lines = ended("rmsnorm", "mhc(streams=2)", "--law", "purity")
    assert (status, lines[0], lines[3]) == (0, "rmsnorm", "mhc(streams=2)")
    assert ended("rmsnorm", "--law", "packing")[0] == 2


def test_laws_that_are_broken_for_one_reason_say_it_once():
    first, second = Finding(LAWS["purity"], "toy", "float32", "why"), Finding(LAWS["cost"], "toy", "float32", "why")
    found = [Verdict("toy", LAWS["purity"], [first]), Verdict("toy", LAWS["cost"], [second])]
    said = [line for line, _ in lines(iter(found))]
    assert said[1].endswith("BROKEN: toy, float32: why")
    assert said[2].endswith("BROKEN, for the same reason as law 5")


def test_registry_is_untouched():
    assert "toy" not in mixers
