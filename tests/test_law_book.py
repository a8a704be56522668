"""The laws can fail: a sound toy keeps them all, and each of its flaws breaks the law that it is against."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

import zoo
from zoo.core.options import Options
from zoo.laws import LAWS, Case, Check, LawBroken, poisoned_memory
from zoo.protocol import Context, Mixer, Place, State, first_parameter_like, mixers, recurrent_dtype, register
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
        return scale * y, ToyState(h.mT if flaw == "layout" else h)

    def flops_per_token(self, context_length: int) -> int:
        return (2 if self.config.flaw == "half the flops" else 4) * self.d_model**2

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


F32, BF16 = torch.float32, torch.bfloat16
SETTINGS: dict[str, dict[str, Any]] = {"forms": {"steps": 63}, "graphs of decoding": {"n": 20}}
"""With which the laws are tried here, where not with their principal ones."""
FLAWS = {
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
}


def finding(law: str, dtype: torch.dtype | None = None, **options: Any) -> zoo.laws.Finding:
    chosen = LAWS[law]
    setting = SETTINGS.get(law, chosen.settings[0])
    toy = Doorless if str(options.get("flaw")).startswith("takes any") else Toy
    return Check(chosen, Case(toy, options), dtype or chosen.dtypes[0], setting).find()


@pytest.mark.parametrize("law", LAWS)
def test_a_sound_mixer_keeps_every_law(law):
    for dtype in LAWS[law].dtypes:
        found = finding(law, dtype)
        assert found.broken is None
        assert found.note is None


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
    status, lines = ended("toy(flaw='ignores resets')", "--law", "9")
    assert status == 1
    assert (
        'BROKEN: toy(flaw="ignores resets"), float32, n=20: row 1, in one pass: outputs of 20 steps: relative error'
        in lines[1]
    )
    assert ended("toy", "--law", "77")[0] == 2
    assert ended("to")[0] == 2


def test_registry_is_untouched():
    assert "toy" not in mixers
